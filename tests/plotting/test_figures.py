import itertools
import math

import numpy as np
import pytest
import torch
from helpers import invoke, steps_of, tiny, wake
from PIL import Image

from dataset import with_facts
from diffusion_utils import from_uint8, to_uint8
from evaluation.copies import features_of, nearest
from evaluation.likelihood import Bound, bits_per_dim
from evaluation.metrics import spread
from generation import Sampling, SeedNoise, generate, make_denoiser, reverse
from pl_utils import DDPM
from training.datamodule import open_images
from weights import load_model, write_checkpoint

boards = pytest.importorskip("plotting.boards")  # matplotlib is an extra
studies = pytest.importorskip("plotting.studies")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder with runs whose checkpoints hold small networks, not trained."""
    folder = tmp_path_factory.mktemp("place")
    for name, overrides in (
        ("small", []),
        ("wide", ["dataset.image_size=[8, 16]", "dataset.labels=true", "guidance.scale=3"]),
        ("told", ["dataset.labels=true", "training.label_dropout=0"]),  # of every label
    ):
        ddpm = DDPM(with_facts(tiny("diffusion.timesteps=20", *overrides)))
        wake(ddpm.ema)
        checkpoint = {
            "hyper_parameters": ddpm.config.model_dump(mode="json"),
            "state_dict": ddpm.state_dict(),
            "global_step": 1234,
        }
        write_checkpoint(checkpoint, folder / f"runs/{name}/checkpoints/step-00001234.ckpt")
    return folder


@pytest.fixture(scope="module")
def model(place):
    return load_model(place / "runs/small")


def study_of(model, **sampling):
    plan = Sampling(model, sampling, source="runs/small", precision="float32")
    return studies.Study(plan, plan.recipe(), lambda items, total: items)


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


# ---- what they show


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "heun"])
def test_the_chain_begins_in_noise_and_ends_in_the_sample(model, sampler):
    study, seeds = study_of(model, sampler=sampler), [3, 8]
    states = studies.some_states(study, seeds, 100)
    if sampler == "heun":
        assert [t for t, *_ in states] == [19, *(t for t in range(18, -1, -1) for _ in "12"), -1]
    else:
        assert [t for t, *_ in states] == [*range(19, -1, -1), -1]
    noise = SeedNoise(seeds, model.shape, model.device)()
    assert torch.equal(states[0][1], to_uint8(noise))
    [(_, sample)] = generate(study.denoiser, study.steps, seeds, shape=model.shape)
    assert torch.equal(states[-1][1], sample)
    assert torch.equal(states[-2][2], sample)  # the last estimate is the sample
    # both rows of the last column, and the animation's last frame
    for count in (5, 100):
        kept = studies.some_states(study, seeds, count)
        assert len(kept) == min(count, len(states))
        assert kept[0][0] == 19
        assert torch.equal(kept[-1][1], sample)
        assert torch.equal(kept[-1][2], sample)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("t", [0, 7, 19])
def test_interpolation_ends_in_the_chains_of_its_ends(model, sampler, t):
    pair, study = pixels(2, 1, 8, 8), study_of(model, sampler=sampler)
    steps = studies.steps_from(study.steps, t)
    assert [step.t for step in steps] == list(range(t, -1, -1))  # t inclusive, down to 0
    mixed = studies.interpolate(study, steps, pair, mixes=[0.0, 0.3, 1.0], seed=5)
    for end, x_0 in ((0, mixed[0]), (1, mixed[2])):
        noise = SeedNoise([5], model.shape, model.device)
        eps = [noise(), noise()]
        x_t = model.diffusion.q_sample(from_uint8(pair[end][None]), t, eps[end])
        with torch.inference_mode():
            *_, (_, alone, _) = reverse(study.denoiser, x_t, steps, noise)
        assert (x_0.int() - to_uint8(alone)[0].int()).abs().max() <= 1  # batches of 3 and of 1
    same = studies.interpolate(study, steps, pair[[0, 0]], mixes=[0.0, 1.0], seed=5)
    assert t < 3 or not torch.equal(same[0], same[1])  # each end has its own noise


def test_a_table_cut_off_begins_as_if_it_had_no_past(model):
    whole = steps_of(model.diffusion, "dpm++")
    first, second, *_ = studies.steps_from(whole, 9)
    assert (first.t, len(first.x), len(first.x0)) == (9, 1, 1)
    a_t, a_s = model.diffusion.alpha_bar(9), model.diffusion.alpha_bar(8)
    c_t = math.sqrt((1 - a_s) / (1 - a_t))  # DDIM with eta 0
    assert first.x[0] == pytest.approx(c_t)
    assert first.x0[0] == pytest.approx(math.sqrt(a_s) - c_t * math.sqrt(a_t))
    assert second == whole[11]
    few = steps_of(model.diffusion, n=4)  # 19, 14, 9, 4
    assert studies.steps_from(few, 12)[0].t == 9
    assert studies.steps_from(few, 2)[0].t == 4
    heun = steps_of(model.diffusion, "heun")
    assert studies.steps_from(heun, 9) == heun[-19:]  # not at the row that corrects 10 -> 9
    assert (heun[-19].t, heun[-19].s) == (9, 8)


def test_the_network_knows_an_image_again(model):
    _, features = features_of(model, None)
    images = pixels(6, 1, 8, 8)
    whole = features(images)
    assert whole.shape == (6, 16)  # the width of the middle
    torch.testing.assert_close(features(images[4:]), whole[4:], rtol=1e-4, atol=1e-4)
    assert nearest([features(images[4:])], [whole], 1)[1].flatten().tolist() == [4, 5]
    assert not model.network.mid.block_2._forward_hooks


def test_rate_and_distortion_are_sums_of_the_bound():
    generator = torch.Generator().manual_seed(0)
    bits, mse = torch.rand(2, 3, 10, generator=generator, dtype=torch.float64)
    bound = Bound(torch.arange(10), bits, mse, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    rate, rmse, distortion = studies.rate_distortion(bound)
    for t in range(10):  # reverse time 10 - t
        assert rate[t] == pytest.approx(0.2 + bits[:, t + 1 :].sum().item() / 3)
        assert rmse[t] == pytest.approx(127.5 * mse[:, t].mean().sqrt().item())
    total = (bound.prior + bits.sum(1)).mean().item()
    assert rate[0] + distortion == pytest.approx(total)


@pytest.mark.parametrize("name", ["wide", "told"])
def test_the_bound_of_a_model_that_knows_classes_is_given_them(place, name, monkeypatch):
    found, whole = [], studies.rate_distortion
    monkeypatch.setattr(studies, "rate_distortion", lambda b: (found.append(b), whole(b))[1])
    line = f"figures.py rate-distortion runs/{name} --num-images 3 --output {name}.png"
    invoke(line, place, monkeypatch, 0)
    model = load_model(place / "runs" / name)
    images = open_images(model.config)["validation"]
    wanted = []
    for i, row in enumerate(spread(3, len(images))):
        pixels, label = images[[row]]
        denoiser = make_denoiser(model.network, model.diffusion, label=label[0])
        how = dict(variance="large", batch_size=256)
        wanted.append(bits_per_dim(denoiser, model.diffusion, pixels, [i], **how))
    bits = torch.cat([bound.bits for bound in wanted]).mean(0)
    torch.testing.assert_close(found[0].bits.mean(0), bits, rtol=1e-4, atol=1e-6)


# ---- how it is drawn


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(8, 8, 12), (8, 16, 8), (24, 10, 6), (64, 96, 1)]
)
def test_a_board_has_every_pixel_as_a_square(tmp_path, height, width, scale):
    cells = [list(row) for row in pixels(2, 3, 1, height, width)]
    cells[1][2] = None
    board = boards.Board(cells, title="t", note="n", columns="abc", rows="de", column_gaps=[1])
    boards.write_figure(board.figure, tmp_path / "board.png", {"a": 1})
    image = Image.open(tmp_path / "board.png")
    assert image.text["recipe"] == '{"a": 1}'
    page, inside = np.array(image.convert("RGB")), board.compose(cells)
    assert page.shape == inside.shape
    assert (page[: board.y[0]] < 128).any()  # words are over the images' page, not under it
    high, wide = board.cell
    assert (high, wide) == (scale * height, scale * width)
    images = slice(board.y[0], board.y[-1] + high), slice(board.x[0], board.x[-1] + wide)
    assert np.array_equal(page[images], inside[images])  # dot for dot
    for (i, y), (j, x) in itertools.product(enumerate(board.y), enumerate(board.x)):
        cell = inside[y : y + high, x : x + wide, 0]
        if cells[i][j] is None:
            assert (cell == 255).all()
        else:
            assert np.array_equal(cell, boards.enlarged(cells[i][j], scale)[..., 0])
    assert board.x[1] - board.x[0] > board.x[2] - board.x[1] > wide
    assert board.y[1] - board.y[0] > high
    assert list(tmp_path.iterdir()) == [tmp_path / "board.png"]


def test_color_alpha_and_large_images():
    color = pixels(4, 16, 16)
    assert np.array_equal(boards.enlarged(color, 1), color[:3].permute(1, 2, 0).numpy())
    gray = boards.enlarged(color[:2], 2)
    assert gray.shape == (32, 32, 3)
    assert np.array_equal(gray[::2, 1::2, 2], color[0].numpy())
    assert boards.Board([[pixels(3, 256, 256)]], title="", note="").cell == (256, 256)


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("progressive runs/small --num-images 2", "figures/progressive.png"),
        ("interpolation runs/small --t 3 --t 12 --timesteps 5", "figures/interpolation.png"),
        ("interpolation runs/small --image a.png --picture b.png --output i.png", "i.png"),
        ("neighbours runs/small --num-images 2 --sampler ddim", "figures/neighbours.png"),
        ("rate-distortion runs/small --num-images 2 --variance small --output r.png", "r.png"),
        ("schedule runs/small/checkpoints/step-00001234.ckpt --output s.svg", "s.svg"),
        ("chain runs/small --num-images 3 --sampler dpm++ --timesteps 4", "figures/chain.gif"),
        ("progressive runs/wide --class-label 3 --num-images 2 --output w.png", "w.png"),
        ("chain runs/wide --num-images 2 --class-label 2+5 --timesteps 4 --output w.gif", "w.gif"),
        ("neighbours runs/wide --num-images 2 --class-label 4 --output n.png", "n.png"),
        (
            "interpolation runs/wide --t 9 --class-label 1 --guidance-scale 1 --output j.png",
            "j.png",
        ),
        ("schedule runs/told --output t.png", "t.png"),
    ],
)
def test_each_kind_writes_a_readable_file(place, arguments, name, monkeypatch):
    for file, size in (("a.png", 20), ("b.png", 8)):
        Image.fromarray(pixels(size, size, 3).numpy()).save(place / file)
    assert f"figure: {name}" in invoke(f"figures.py {arguments}", place, monkeypatch, 0)
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("progressive nowhere.ckpt", "error: no checkpoint at nowhere.ckpt"),
        ("progressiv runs/small", "progressiv"),
        ("progressive runs/small --t 3", "--t says nothing about progressive; it takes --num"),
        ("schedule runs/small --num-images 3", "--num-images says nothing about schedule"),
        ("chain runs/small --output a.png", "--output a.png: chain ends in .gif"),
        ("schedule runs/small --timesteps 21", "timesteps 21 is outside 1 ... 20"),
        ("interpolation runs/small --t 20", "--t 20 is outside 0 ... 19"),
        ("interpolation runs/small --image x.png", "--image is given twice"),
        ("interpolation runs/small --image x.png --image x.png", "x.png"),
        ("interpolation runs/small --image bad.png --image bad.png", "bad.png"),
        ("interpolation runs/small --num-images 1000", "--num-images 1000: there are 180"),
        ("progressive runs/small --device tpu9", "--device tpu9"),
        ("progressive runs/small --class-label 3", "--class-label: this model knows no classes"),
        ("progressive runs/wide --class-label all", "a figure is of one --class-label"),
        ("schedule runs/wide --class-label 3", "--class-label says nothing about schedule"),
        ("progressive runs/told", "say --class-label"),
    ],
)
def test_mistakes_end_in_one_message(place, arguments, says, monkeypatch):
    (place / "bad.png").write_text("no image")
    output = invoke(f"figures.py {arguments}", place, monkeypatch, 2)
    assert says in output
    assert "Traceback" not in output


def test_without_matplotlib_a_line_says_how_to_get_it(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    output = invoke("figures.py schedule runs/small", place, monkeypatch, 2)
    assert output.strip() == "error: figures are drawn by matplotlib: pip install matplotlib"


def test_ctrl_c_leaves_nothing(place, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(studies.STUDIES, "schedule", stop)
    output = invoke("figures.py schedule runs/small --output none/s.png", place, monkeypatch, 130)
    assert "nothing was written" in output
