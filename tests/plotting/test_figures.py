import itertools
import math
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_likelihood import pixels, small_ddpm
from typer.testing import CliRunner

import figures
from checkpoint import write_checkpoint
from diffusion_utils import from_uint8, make_steps, reverse, to_uint8
from likelihood import Bound
from pl_utils import SeedNoise

plates = pytest.importorskip("plates")  # matplotlib is an extra
drawing = pytest.importorskip("drawing")


@pytest.fixture(scope="module")
def ddpm():
    return small_ddpm(T=20)


@pytest.fixture(scope="module")
def place(tmp_path_factory, ddpm):
    """A folder with a run whose checkpoint holds a small network, not trained."""
    folder = tmp_path_factory.mktemp("place")
    checkpoint = {
        "hyper_parameters": ddpm.config.model_dump(mode="json"),
        "state_dict": ddpm.state_dict(),
        "global_step": 1234,
    }
    write_checkpoint(checkpoint, folder / "runs/small/checkpoints/step-00001234.ckpt")
    return folder


def table(ddpm, sampler="ddpm", n=None):
    return make_steps(
        ddpm.diffusion, sampler=sampler, variance="large", eta=0.0, timesteps=n, spacing="trailing"
    )


def invoke(command, place, monkeypatch, code=0):
    monkeypatch.chdir(place)
    result = CliRunner().invoke(figures.app, shlex.split(command))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


# ---- what they show


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_the_chain_begins_in_noise_and_ends_in_the_sample(ddpm, sampler):
    steps, seeds = table(ddpm, sampler), [3, 8]
    states = list(plates.samples(ddpm, steps, seeds))
    assert [t for t, *_ in states] == [*range(19, -1, -1), -1]
    noise = SeedNoise(seeds, (1, 8, 8), ddpm.device)()
    assert torch.equal(states[0][1], to_uint8(noise))
    sample = ddpm.sample(steps, seeds)
    assert torch.equal(states[-1][1], sample)
    assert torch.equal(states[-2][2], sample)  # the last estimate is the sample
    # both rows of the last column, and the film's last frame
    job = SimpleNamespace(ddpm=ddpm, steps=steps, track=lambda items, total: items)
    for count in (5, 100):
        kept = plates.some_states(job, seeds, count)
        assert len(kept) == min(count, 21)
        assert kept[0][0] == 19
        assert torch.equal(kept[-1][1], sample)
        assert torch.equal(kept[-1][2], sample)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("t", [0, 7, 19])
def test_interpolation_ends_in_the_chains_of_its_ends(ddpm, sampler, t):
    pair = pixels(2, 1, 8, 8)
    steps = plates.steps_from(table(ddpm, sampler), t)
    assert [step.t for step in steps] == list(range(t, -1, -1))  # t inclusive, down to 0
    mixed = plates.interpolate(ddpm, steps, pair, mixes=[0.0, 0.3, 1.0], seed=5)
    for end, x_0 in ((0, mixed[0]), (1, mixed[2])):
        noise = SeedNoise([5], (1, 8, 8), ddpm.device)
        eps = [noise(), noise()]
        x_t = ddpm.diffusion.q_sample(from_uint8(pair[end][None]), t, eps[end])
        with torch.inference_mode():
            *_, (_, alone, _) = reverse(ddpm.diffusion, ddpm, x_t, steps, noise)
        assert (x_0.int() - to_uint8(alone)[0].int()).abs().max() <= 1  # batches of 3 and of 1
    same = plates.interpolate(ddpm, steps, pair[[0, 0]], mixes=[0.0, 1.0], seed=5)
    assert t < 3 or not torch.equal(same[0], same[1])  # each end has its own noise


def test_a_table_cut_off_begins_as_if_it_had_no_past(ddpm):
    whole = table(ddpm, "dpm++")
    first, second, *_ = plates.steps_from(whole, 9)
    assert (first.t, first.c_1) == (9, 0)
    a_t, a_s = ddpm.diffusion.alpha_bar(9), ddpm.diffusion.alpha_bar(8)
    c_t = math.sqrt((1 - a_s) / (1 - a_t))  # DDIM with eta 0
    assert first.c_t == pytest.approx(c_t)
    assert first.c_0 == pytest.approx(math.sqrt(a_s) - c_t * math.sqrt(a_t))
    assert second == whole[11]
    few = table(ddpm, n=4)  # 19, 14, 9, 4
    assert plates.steps_from(few, 12)[0].t == 9
    assert plates.steps_from(few, 2)[0].t == 4


def test_nearest_is_the_sorted_distance_and_a_picture_is_nearest_to_itself():
    others = pixels(50, 1, 8, 8).flatten(1).float()
    queries = torch.cat([others[[7, 33]], pixels(3, 1, 8, 8, seed=1).flatten(1).float()])
    distance, rows = plates.nearest(queries, others.split(8), 5)
    expected = (queries[:, None] - others).square().sum(-1).sqrt()
    torch.testing.assert_close(distance, expected.sort(dim=1).values[:, :5])
    assert rows[:, 0].tolist() == [7, 33, *expected[2:].argmin(1).tolist()]
    assert distance[:2, 0].eq(0).all()
    distance, rows = plates.nearest(queries, others[:3].split(2), 5)
    assert distance.shape == rows.shape == (5, 3)


def test_the_middle_of_the_network_knows_a_picture_again(ddpm):
    features = plates.middle_features(ddpm)
    pictures = pixels(6, 1, 8, 8)
    whole = features(pictures)
    assert whole.shape == (6, 16)  # the width of the middle
    torch.testing.assert_close(features(pictures[4:]), whole[4:], rtol=1e-4, atol=1e-4)
    assert plates.nearest(features(pictures[4:]), [whole], 1)[1].flatten().tolist() == [4, 5]
    assert not ddpm.ema.mid.block_2._forward_hooks


def test_rate_and_distortion_are_sums_of_the_bound():
    generator = torch.Generator().manual_seed(0)
    bits, mse = torch.rand(2, 3, 10, generator=generator, dtype=torch.float64)
    bound = Bound(torch.arange(10), bits, mse, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    curve = plates.rate_distortion(bound)
    for t in range(10):  # reverse time 10 - t
        assert curve.rate[t] == pytest.approx(0.2 + bits[:, t + 1 :].sum().item() / 3)
        assert curve.rmse[t] == pytest.approx(127.5 * mse[:, t].mean().sqrt().item())
    total = (bound.prior + bits.sum(1)).mean().item()
    assert curve.rate[0] + curve.distortion == pytest.approx(total)


# ---- how it is drawn


def test_a_board_has_every_pixel_as_a_square(tmp_path):
    cells = [list(row) for row in pixels(2, 3, 1, 8, 8)]
    cells[1][2] = None
    board = drawing.Board(cells, title="t", note="n", columns="abc", rows="de", column_gaps=[1])
    drawing.write_figure(board.figure, tmp_path / "board.png", recipe="{}")
    image = Image.open(tmp_path / "board.png")
    assert image.text["recipe"] == "{}"
    paper, inside = np.array(image.convert("RGB")), board.compose(cells)
    # the board stands in the paper dot for dot
    height, width, _ = inside.shape
    found = [
        np.array_equal(paper[y : y + height, x : x + width], inside)
        for y, x in itertools.product(range(paper.shape[0] - height + 1), range(30, 90))
        if x + width <= paper.shape[1]
    ]
    assert sum(found) == 1
    for (i, y), (j, x) in itertools.product(enumerate(board.y), enumerate(board.x)):
        cell = inside[y : y + board.side, x : x + board.side, 0]
        if cells[i][j] is None:
            assert (cell == 255).all()
        else:
            assert np.array_equal(cell[6::12, 6::12], cells[i][j][0].numpy())
    assert board.x[1] - board.x[0] > board.x[2] - board.x[1] > board.side
    assert list(tmp_path.iterdir()) == [tmp_path / "board.png"]


def test_colour_alpha_and_large_pictures():
    colour = pixels(4, 16, 16)
    assert np.array_equal(drawing.enlarged(colour, 1), colour[:3].permute(1, 2, 0).numpy())
    grey = drawing.enlarged(colour[:2], 2)
    assert grey.shape == (32, 32, 3)
    assert np.array_equal(grey[::2, 1::2, 2], colour[0].numpy())
    assert drawing.Board([[pixels(3, 256, 256)]], title="", note="").side == 256


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("progressive runs/small --num-images 2", "figures/progressive.png"),
        ("interpolation runs/small --t 3 --t 12 --timesteps 5", "figures/interpolation.png"),
        ("interpolation runs/small --picture a.png --picture b.png --output i.png", "i.png"),
        ("neighbours runs/small --num-images 2 --sampler ddim", "figures/neighbours.png"),
        ("rate-distortion runs/small --num-images 2 --variance small --output r.png", "r.png"),
        ("schedule runs/small/checkpoints/step-00001234.ckpt --output s.svg", "s.svg"),
        ("chain runs/small --num-images 3 --sampler dpm++ --timesteps 4", "figures/chain.gif"),
    ],
)
def test_each_kind_writes_a_readable_file(place, arguments, name, monkeypatch):
    for file, size in (("a.png", 20), ("b.png", 8)):
        Image.fromarray(pixels(size, size, 3).numpy()).save(place / file)
    assert f"figure: {name}" in invoke(arguments, place, monkeypatch)
    if name.endswith(".svg"):
        assert "Schedule" in (place / name).read_text()
        return
    image = Image.open(place / name)
    assert min(image.size) > 200
    assert len(np.unique(np.array(image.convert("L")))) > 30
    if name.endswith(".gif"):
        assert image.n_frames == 5
        image.seek(4)
        assert image.info["duration"] >= 1000
    else:
        assert '"step": 1234' in image.text["recipe"]
    assert not list(place.rglob("*.tmp*"))


def test_a_film(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [(f"{i}", [[pixels(1, 8, 8, seed=i)]]) for i in range(3)]
    drawing.write_animation(frames, tmp_path / "film.mp4", note="n")
    meta, *read = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    assert len(read) == 2 + drawing.FRAMES_PER_SECOND * drawing.STAYS + 1
    assert all(side % 2 == 0 for side in meta["size"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("progressive nowhere.ckpt", "error: no checkpoint at nowhere.ckpt"),
        ("progressiv runs/small", "progressiv"),
        ("progressive runs/small --t 3", "--t says nothing about progressive; it takes --num"),
        ("schedule runs/small --num-images 3", "--num-images says nothing about schedule"),
        ("chain runs/small --output a.png", "--output a.png: chain ends in .gif or .mp4"),
        ("schedule runs/small --timesteps 21", "timesteps 21 is outside 1 ... 20"),
        ("interpolation runs/small --t 20", "--t 20 is outside 0 ... 19"),
        ("interpolation runs/small --picture x.png", "--picture is given twice"),
        ("interpolation runs/small --picture x.png --picture x.png", "x.png"),
        ("interpolation runs/small --picture bad.png --picture bad.png", "bad.png"),
        ("interpolation runs/small --num-images 1000", "--num-images 1000: there are 180"),
        ("progressive runs/small --device tpu9", "--device tpu9"),
    ],
)
def test_mistakes_end_in_one_message(place, arguments, says, monkeypatch):
    (place / "bad.png").write_text("no picture")
    output = invoke(arguments, place, monkeypatch, code=2)
    assert says in output
    assert "Traceback" not in output


def test_without_matplotlib_a_line_says_how_to_get_it(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    output = invoke("schedule runs/small", place, monkeypatch, code=2)
    assert output == "error: figures are drawn by matplotlib: pip install matplotlib"


def test_ctrl_c_leaves_nothing(place, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(plates.PLATES, "schedule", stop)
    output = invoke("schedule runs/small --output none/s.png", place, monkeypatch, code=130)
    assert "nothing was written" in output
