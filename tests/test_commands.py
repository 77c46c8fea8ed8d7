"""The commands as a person types them; in this process where that makes no difference."""

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Evil, invoke, noise_image, write_cifar
from PIL import Image
from processes import PROJECT, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import load_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the configs and one finished run of the smoke config."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(PROJECT / "configs")
    torch.save({"state_dict": Evil(), "hyper_parameters": {}}, folder / "evil.ckpt")
    output = run("python train.py configs/smoke.yml logging.save_every=2", folder)
    lines = output.strip().splitlines()
    assert lines[0] == lines[-1] == "run folder: lightning_logs/smoke"
    assert "step 6 of 6" in output
    return folder


def images(folder: Path) -> dict[str, bytes]:
    return {p.name: np.array(Image.open(p)).tobytes() for p in folder.glob("0*.png")}


# ---- train.py


def test_continue_takes_the_newest_and_says_which(place, monkeypatch):
    output = invoke(
        "train.py configs/smoke.yml training.max_steps=8 --continue-training", place, monkeypatch, 0
    )
    assert "continuing from lightning_logs/smoke/checkpoints/step-00000006.ckpt (step 6)" in output
    assert "changed: training.max_steps: 6 -> 8" in output
    again = "train.py configs/smoke.yml training.max_steps=8 --continue-training"
    assert "has all 8 steps" in invoke(again, place, monkeypatch, code=0)


def test_a_path_alone_is_never_ignored(place):
    path = "lightning_logs/smoke/checkpoints/step-00000004.ckpt"
    # in a process of its own, as what it is compared with: MKL chooses its threads otherwise there
    output = run(
        f"python train.py configs/smoke.yml --checkpoint-path {path} --run-name fork", place
    )
    assert f"continuing from {path} (step 4)" in output
    assert (place / "lightning_logs/fork/checkpoints/step-00000006.ckpt").exists()
    # and it ends where the run that never stopped ended
    one, other = (
        torch.load(place / f"lightning_logs/{name}/checkpoints/step-00000006.ckpt")["state_dict"]
        for name in ("smoke", "fork")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_second_run_gets_its_own_folder(place, monkeypatch):
    output = invoke("train.py configs/smoke.yml training.max_steps=1", place, monkeypatch, 0)
    assert "run folder: lightning_logs/smoke-2" in output
    output = invoke("train.py configs/smoke.yml --run-name smoke", place, monkeypatch, 2)
    assert "holds a run" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("configs/cifar.yml", "did you mean configs/cifar10.yml?"),
        ("configs/smoke.yml training.batchsize=3", "did you mean batch_size?"),
        ("configs/smoke.yml dataset.name=folder dataset.root=nowhere", "nowhere (dataset.root)"),
        ("configs/smoke.yml --checkpoint-path nowhere.ckpt", "no checkpoint at nowhere.ckpt"),
        ("configs/smoke.yml --checkpoint-path configs/smoke.yml", "not a checkpoint"),
        ("configs/smoke.yml --checkpoint-path evil.ckpt", "asks to run"),
        ("configs/smoke.yml --checkpoint-path /", "/ holds no checkpoint that can be read"),
        ("configs/smoke.yml --checkpoint-path .", ". holds no checkpoint that can be read"),
        ("configs/smoke.yml --continue-training --run-name x", "no run lightning_logs/x"),
        ("configs/smoke.yml --run-name ../x", "cannot be called"),
        ("configs/smoke.yml --continue-training training.seed=1", "training.seed: 0 -> 1"),
        ("configs/smoke.yml hardware.devices=3", "8 cannot be shared by 3 devices; try 6 or 9"),
        ("configs/smoke.yml hardware.accelerator=gpu", "error: "),
        ("configs/smoke.yml logging.results_folder=/proc/no", "error: "),
        ("configs/smoke.yml --no-such-option", "--no-such-option"),
    ],
)
def test_mistakes_end_in_one_message(place, arguments, says, monkeypatch):
    if "=gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    output = invoke(f"train.py {arguments}", place, monkeypatch, code=2)
    assert says in output
    assert len(output.splitlines()) < 12
    assert not (place / "stolen").exists()


def test_on_a_terminal_there_is_a_bar_and_the_cursor_comes_back(place):
    command = "python train.py configs/smoke.yml training.max_steps=100000 --run-name tty"
    with start(command, place, terminal=True, env={"TERM": "xterm"}) as process:
        process.wait_for("images/s")
        process.send(signal.SIGINT)
        seen = process.finish(130)
    assert "━" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    assert "to continue:" in seen[seen.rindex("\x1b[?25h") :]


def test_nothing_of_a_persons_own_is_written_over(place, monkeypatch):
    folder = place / "own"
    folder.mkdir()
    for name in ("000001.jpg", "grid.png", "chain.gif", "000000.png"):
        (folder / name).write_bytes(b"mine")
        line = "sample.py lightning_logs/smoke --num-images 2 --format jpg --gif --output-dir own"
        assert f"own/{name}" in invoke(line, place, monkeypatch, code=2)
        assert (folder / name).read_bytes() == b"mine"
        (folder / name).unlink()
    invoke(line, place, monkeypatch, code=0)


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(getattr(signal, "SIGHUP", 15), 129, marks=pytest.mark.slow),
    ],
)
def test_signals_save_and_name_what_goes_on(place, signum, code):
    name = f"stopped-{code}"
    command = f"python train.py configs/smoke.yml training.max_steps=100000 --run-name {name}"
    with start(command, place) as process:
        process.wait_for("step 4 of")
        process.send(signum)
        output = process.finish(code)
    assert "Traceback" not in output
    saved = re.search(r"stopped after step ([\d,]+), saved (\S+)", output)
    step = int(saved[1].replace(",", ""))
    assert torch.load(place / saved[2], weights_only=True)["global_step"] == step
    assert "a second signal ends at once" in output
    go_on = re.search(r"to continue: (python .*)", output)[1]
    output = run(f"{go_on} training.max_steps={step + 2}", place)
    assert f"(step {step:,})" in output


def test_the_papers_cifar10_run_starts(tmp_path, monkeypatch):
    write_cifar(tmp_path / "data")
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    output = invoke(
        "train.py configs/cifar10.yml training.max_steps=2 training.batch_size=4",
        tmp_path,
        monkeypatch,
        0,
    )
    assert "35,746,307 parameters" in output
    loss = float(re.search(r"loss ([\d.]+)", output)[1])
    assert loss == pytest.approx(1.0, abs=0.05)  # the first update has learning rate 0
    checkpoint = tmp_path / "lightning_logs/cifar10/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2


def test_a_folder_of_images(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(12):
        noise_image(i, (20, 16)).save(folder / f"{i}.jpg")
    (folder / "broken.png").write_bytes(b"no")
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    overrides = "dataset.channels=3 dataset.image_size=16 model.attention_resolutions=[8]"
    command = f"train.py configs/smoke.yml dataset.name=folder dataset.root=mine {overrides}"
    output = invoke(command, tmp_path, monkeypatch, 0)
    assert "1 of 13 files" in output
    assert "broken.png" in output
    invoke("sample.py lightning_logs/smoke --num-images 2", tmp_path, monkeypatch, 0)
    assert Image.open(tmp_path / "samples/000001.png").size == (16, 16)


def losses(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.mark.parametrize("stops", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_devices_are_one_run(tmp_path, monkeypatch, stops):
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    common = (
        "configs/smoke.yml model.dropout=0.0 hardware.precision=32-true hardware.accelerator=cpu "
        "logging.log_every=1 dataset.labels=true diffusion.prediction=v training.optimizer=muon "
        "training.loss_weight=min-snr training.t_density=normal training.t_stratified=true "
        "training.learning_rate_decay=inverse-sqrt "
        "evaluation.validate_every=30 training.max_steps=30"
    )
    two = "hardware.devices=2 hardware.micro_batch_size=2"
    invoke(f"train.py {common} --run-name one", tmp_path, monkeypatch, 0)
    if stops:  # on two, then on one, then on two again
        run(f"python train.py {common} {two} training.max_steps=10 --run-name two", tmp_path)
        alone = f"train.py {common} training.max_steps=20 --run-name two --continue-training"
        invoke(alone, tmp_path, monkeypatch, 0)
        run(f"python train.py {common} {two} --run-name two --continue-training", tmp_path)
    else:
        output = run(f"python train.py {common} {two} --run-name two", tmp_path)
        assert output.count("run folder: lightning_logs/two") == 2
    names = "one", "two"
    one, other = (
        torch.load(tmp_path / f"lightning_logs/{name}/checkpoints/last.ckpt", weights_only=True)
        for name in names
    )
    assert other["global_step"] == 30
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][key], value, rtol=1e-4, atol=1e-4)
    one, other = (losses(tmp_path / f"lightning_logs/{name}") for name in names)
    assert list(other) == list(range(1, 31))
    assert list(other.values()) == pytest.approx(list(one.values()), rel=1e-4)


def test_without_a_config_those_there_are_named(place, monkeypatch):
    output = invoke("train.py", place, monkeypatch, code=2)
    for path in Path("configs").glob("*.yml"):
        line = next(line for line in output.splitlines() if path.name in line)
        assert len(line) > 50 and line.endswith("."), line


def test_print_config_is_a_config(place, monkeypatch):
    command = "train.py configs/digits.yml training.seed=7 logging.logger=csv --print-config"
    output = invoke(command, place, monkeypatch, code=0)
    (place / "printed.yml").write_text(output)
    wanted = load_config("configs/digits.yml", ["training.seed=7", "logging.logger=[csv]"])
    assert load_config("printed.yml") == wanted
    keys = [line for line in output.splitlines() if line.startswith("  ")]
    assert all(line.partition("  # ")[2] not in ("", "None") for line in keys)


# ---- sample.py


def test_sample_fills_what_is_missing(place, monkeypatch):
    output = invoke("sample.py lightning_logs/smoke --num-images 8", place, monkeypatch, 0)
    assert "8 images written" in output
    first = images(place / "samples")
    assert sorted(first) == [f"{i:06d}.png" for i in range(8)]
    assert (place / "samples/grid.png").exists()
    (place / "samples/000003.png").unlink()
    whole = (place / "samples/000005.png").read_bytes()
    (place / "samples/000005.png").write_bytes(whole[: len(whole) // 2])
    times = {p.name: p.stat().st_mtime_ns for p in (place / "samples").glob("0*.png")}
    output = invoke(
        "sample.py lightning_logs/smoke --num-images 8 --batch-size 3", place, monkeypatch, 0
    )
    assert "2 images written" in output
    assert "6 were there already" in output
    assert images(place / "samples") == first
    after = {p.name: p.stat().st_mtime_ns for p in (place / "samples").glob("0*.png")}
    changed = {name for name in after if after[name] != times.get(name)}
    assert changed == {"000003.png", "000005.png"}
    again = "sample.py lightning_logs/smoke --timesteps 5"
    assert "8 images written to samples-2" in invoke(again, place, monkeypatch, code=0)
    assert "0 images written to samples-2, 8 were" in invoke(again, place, monkeypatch, code=0)
    for seed in (0, 100):  # a folder is one recipe's, whatever the seeds
        line = f"{again} --seed {seed} --output-dir samples"
        output = invoke(line, place, monkeypatch, code=2)
        assert "another recipe (timesteps 20 -> 5)" in output
    assert images(place / "samples") == first


def test_precision_is_a_part_of_the_recipe(place, tmp_path, monkeypatch):
    """An image made in float32 and one made in bfloat16 are two recipes; auto says which it is."""
    line = f"sample.py lightning_logs/smoke --num-images 1 --output-dir '{tmp_path}/x'"
    for forced, precision, other in (("1", "bfloat16", "float32"), ("0", "float32", "bfloat16")):
        monkeypatch.setenv("DDPM_BF16", forced)
        output = invoke(line.replace("/x", f"/{precision}"), place, monkeypatch, 0)
        assert f"on cpu in {precision}" in output
        made = Image.open(tmp_path / precision / "000000.png").info["recipe"]
        assert f'"precision": "{precision}"' in made
        again = f"{line} --precision {other}".replace("/x", f"/{precision}")
        assert f"(precision {precision} -> {other})" in invoke(again, place, monkeypatch, 2)
    for wrong, says in (
        ("configs/smoke.yml", "and images go into a folder"),
        ("evil.ckpt/x", "Not a"),
    ):
        said = invoke(line.replace(f"'{tmp_path}/x'", wrong), place, monkeypatch, 2)
        assert says in said and len(said.splitlines()) == 1
    same = f"{line} sampling.timesteps=4".replace("/x", "/4")
    alias = f"{line} --timesteps 4".replace("/x", "/4")
    assert "1 images written" in invoke(same, place, monkeypatch, 0)
    assert "0 images written" in invoke(alias, place, monkeypatch, 0)


@pytest.mark.parametrize(
    "options",
    [
        "--sampler ddim --eta 0.5 --timesteps 10 --spacing quadratic",
        "--sampler dpm++ --timesteps 5 --spacing logsnr",
        "--fast --timesteps 3",
        "--sampler ddpm --variance small --weights raw --device cpu --image-size 16 --no-grid",
    ],
)
def test_sample_options(place, options, tmp_path, monkeypatch):
    checkpoint = "lightning_logs/smoke/checkpoints/last.ckpt"
    arguments = f"{checkpoint} --num-images 3 --seed 2 --output-dir '{tmp_path}' {options}"
    invoke(f"sample.py {arguments}", place, monkeypatch, code=0)
    assert sorted(images(tmp_path)) == ["000002.png", "000003.png", "000004.png"]
    assert (tmp_path / "grid.png").exists() == ("--no-grid" not in options)
    size = 16 if "--image-size 16" in options else 8
    assert Image.open(tmp_path / "000002.png").size == (size, size)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nowhere.ckpt", "no checkpoint at nowhere.ckpt"),
        ("configs", "no checkpoint that can be read"),
        ("configs/smoke.yml", "not a checkpoint"),
        ("lightning_logs/smoke --timesteps 21", "timesteps 21 is outside 1 ... 20"),
        ("lightning_logs/smoke --image-size 9", "--image-size 9 is not a multiple of 2"),
        ("lightning_logs/smoke --eta 0.5", "--eta belongs to --sampler ddim"),
        ("lightning_logs/smoke sampling.eta=0.5", "--eta belongs to --sampler ddim"),
        ("lightning_logs/smoke sampling.etta=0.5", "no such key; did you mean eta?"),
        (
            "lightning_logs/smoke training.seed=1",
            "here only sampling.key=value and guidance.key=value",
        ),
        ("lightning_logs/smoke --device tpu9", "--device tpu9"),
        ("lightning_logs/smoke --sampler euler", "--sampler"),
        ("lightning_logs/smoke --num-images 0", "--num-images"),
        ("evil.ckpt", "asks to run"),
    ],
)
def test_sample_mistakes_end_in_one_message(place, arguments, says, monkeypatch):
    output = invoke(f"sample.py {arguments} --output-dir none", place, monkeypatch, code=2)
    assert says in " ".join(output.split())
    assert not (place / "stolen").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_is_a_page_with_an_example(script, tmp_path):
    start_time = time.perf_counter()
    output = run(f"python {script} --help", tmp_path)
    assert f"python {script} " in output
    assert time.perf_counter() - start_time < 20
    options = re.findall(r"^ +--\S+", output, re.M)
    assert len(options) >= 4


def test_copies(place, monkeypatch):
    command = "sample.py --run-name smoke --seeds 0-2,9 --output-dir copies --upscale 3"
    invoke(f"{command} --format npz --gif", place, monkeypatch, code=0)
    folder = place / "copies"
    plain = np.stack([np.array(Image.open(folder / f"{s:06d}.png")) for s in (0, 1, 2, 9)])
    large = np.array(Image.open(folder / "enlarged" / "000009.png"))
    assert np.array_equal(large, plain[3].repeat(3, 0).repeat(3, 1))  # whole pixels
    with np.load(folder / "images.npz") as packed:
        assert np.array_equal(packed["arr_0"][..., 0], plain)
        assert packed["seeds"].tolist() == [0, 1, 2, 9]
    with Image.open(folder / "chain.gif") as film:
        assert 15 < film.n_frames <= 20  # one a step, and equal ones together
        film.seek(film.n_frames - 1)
        last = np.array(film.convert("L")).astype(int)
    assert np.abs(last - np.array(Image.open(folder / "grid.png").convert("L"))).max() <= 4
    again = invoke(f"{command} --format jpg", place, monkeypatch, code=0)
    assert "0 images written to copies, 4 were there already" in again
    jpg = np.array(Image.open(folder / "000009.jpg"))
    assert np.abs(jpg.astype(int) - plain[3]).mean() < 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "give a checkpoint or a --run-name (there are: "),
        ("x.ckpt --run-name smoke", "one of them"),
        ("--run-name smok", "no run 'smok' in lightning_logs; did you mean smoke?"),
        ("--run-name smoke --seeds 5-3", "'5-3' is neither 7 nor 0-63"),
        ("--run-name smoke --seeds 1,,2", "'' is neither 7 nor 0-63"),
        ("--run-name smoke --seeds 0-99999999999", "at most 10,000,000 of them"),
    ],
)
def test_which_model_and_which_images(place, arguments, says, monkeypatch):
    assert says in invoke(f"sample.py {arguments}", place, monkeypatch, code=2)


def test_a_mistake_in_a_process_of_its_own(place):
    output = run("python train.py configs/smoke.yml training.batchsize=3", place, code=2)
    assert output == (
        "error: configs/smoke.yml:\n  training.batchsize: no such key; did you mean batch_size?\n"
    )
    output = run("python sample.py nowhere.ckpt", place, code=2)
    assert output == "error: no checkpoint at nowhere.ckpt\n"
