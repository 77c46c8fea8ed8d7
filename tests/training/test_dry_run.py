"""The dry run: what it counts, what it computes from that, and what it leaves behind."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROJECT, invoke, noise_image, run

from config import load_config
from diffusion_utils import GaussianDiffusion
from training import dry_run
from training.dry_run import (
    QUOTES,
    Seconds,
    flops_per_image,
    images_or_noise,
    memory_per_image,
    price,
    project,
)
from training.hardware import duration, memory, si


def closed_form(config) -> int:
    """FLOPs forward, written down from the architecture: layer by layer, a multiply-add is 2."""
    model, size = config.model, config.dataset.image_size
    total, width = 0, 4 * model.base_channels
    conv = lambda side, c_in, c_out, kernel: 2 * side**2 * c_in * c_out * kernel**2
    attention = lambda side, c: conv(side, c, 4 * c, 1) + 2 * 2 * side**4 * c

    def block(side, c_in, c_out):
        shortcut = conv(side, c_in, c_out, 1) if c_in != c_out else 0
        time = 2 * width * c_out
        return conv(side, c_in, c_out, 3) + conv(side, c_out, c_out, 3) + shortcut + time

    total += 2 * (model.base_channels * width + width**2)
    widths = [model.base_channels * m for m in model.channel_multipliers]
    total += conv(size, config.dataset.channels, widths[0], 3)
    c, skips = widths[0], [widths[0]]
    for level, c_out in enumerate(widths):
        side = size // 2**level
        for _ in range(model.num_res_blocks):
            total += block(side, c, c_out)
            total += attention(side, c_out) if side in model.attention_resolutions else 0
            c = c_out
            skips.append(c)
        if level < len(widths) - 1:
            total += conv(side // 2, c, c, 3)
            skips.append(c)
    total += 2 * block(side, c, c) + attention(side, c)
    for level, c_out in reversed(list(enumerate(widths))):
        side = size // 2**level
        for _ in range(model.num_res_blocks + 1):
            total += block(side, c + skips.pop(), c_out)
            total += attention(side, c_out) if side in model.attention_resolutions else 0
            c = c_out
        total += conv(2 * side, c, c, 3) if level else 0
    return total + conv(size, c, config.dataset.channels, 3)


def test_flops_are_those_of_the_architecture():
    config = load_config("configs/cifar10.yml")
    forward, training = flops_per_image(config)
    assert forward == closed_form(config)
    # backward is twice as much, but the images and the time embedding need no gradients
    assert forward / 1e9 == pytest.approx(12.444, rel=1e-4)
    assert training / 1e9 == pytest.approx(37.324, rel=1e-4)
    steps = config.training.max_steps * config.training.batch_size
    assert training * steps / 1e18 == pytest.approx(QUOTES["cifar10"][0], rel=1e-3)
    assert closed_form(load_config("configs/celeba.yml")) / 1e9 == pytest.approx(497.03, rel=1e-4)


def test_a_run_is_its_parts():
    config = load_config("configs/cifar10.yml")
    whole = project(config, Seconds(step=0.015, preview=2.0, validation=10.0, checkpoint=1.0))
    # 160 sets of previews, and the raw weights' until 0.9999^step is 0.01, at step 46,050
    assert whole == pytest.approx((12_000, (160 + 9) * 2.0, 80 * 10.0, 160))
    never = ["logging.preview_every=0", "evaluation.validate_every=0", "training.max_steps=3"]
    config = load_config("configs/cifar10.yml", [*never, "logging.save_every=0"])
    assert project(config, Seconds(1, 1, 1, 1)) == (3, 0, 0, 1)
    uneven = load_config("configs/cifar10.yml", [*never, "logging.save_every=2"])
    assert project(uneven, Seconds(1, 1, 1, 1)).checkpoint == 2  # in between, and at the end


def test_what_it_costs():
    assert price(10, 3.5, 70) == (
        "$35.00 at $3.50 an hour; on TPUs this run is quoted at $70, which is $7 an hour here"
    )
    assert price(10, 0.5, None) == "$5.00 at $0.50 an hour"
    assert "which is $7 an hour here" in price(10, None, 70)


def test_numbers_are_readable():
    times = [0.0151, 0.9996, 3.2, 59.96, 250, 3599.7, 12_240, 3_124_800]
    assert [duration(t) for t in times] == [
        "15.1 ms", "1 s", "3.2 s", "1 min 0 s", "4 min 10 s", "1 h 0 min", "3 h 24 min", "36 d 4 h",
    ]  # fmt: skip
    assert [si(v, "B") for v in (12.444e9, 3.822e18, 7.9e14, 5)] == [
        "12.44 GB", "3.822 EB", "790 TB", "5 B",
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_this_process_own():
    ballast = np.ones(2**30, np.uint8)
    code = "import torch; from training.hardware import memory; print(memory(torch.device('cpu')))"
    of_child = int(run([sys.executable, "-c", code], PROJECT).split("(")[1].split(",")[0])
    peak, there = memory(torch.device("cpu"))
    assert there > peak > ballast.nbytes > of_child > 2**26


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the configs, and little patience."""
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    monkeypatch.setattr(dry_run, "LONG", 0.1)
    return tmp_path


SMOKE = "train.py configs/smoke.yml hardware.accelerator=cpu"


def test_it_prints_all_and_leaves_nothing(place, monkeypatch):
    every = "logging.preview_every=2 evaluation.validate_every=3 logging.save_every=2"
    every += " training.ema_lengths=[0.1]"
    output = invoke(f"{SMOKE} {every} --dollars-per-hour 2", place, monkeypatch, code=0)
    rows = dict(line.split(": ", 1) for line in output.splitlines())
    assert list(rows) == [
        "hardware", "data", "network", "step", "speed", "memory", "preview", "validation",
        "checkpoint", "run", "snapshots", "cost",
    ]  # fmt: skip
    assert rows["network"].startswith("44,969 parameters")
    assert rows["snapshots"] == "6 x 0.08994 MB = 0.5396 MB, one every 1 steps"
    assert "1,617 images, 180 for validation" in rows["data"]
    assert "at $2.00 an hour" in rows["cost"]
    assert "quoted" not in output
    assert [p.name for p in place.iterdir()] == ["configs"]


def test_images_that_are_not_there_are_replaced_by_random_ones(place):
    config = load_config("configs/smoke.yml", ["dataset.name=folder", f"dataset.root={place}/no"])
    images, why = images_or_noise(config)
    assert why.endswith("no (dataset.root) does not exist")
    assert images["train"][[0, 1]].images.shape == (2, 1, 8, 8)
    assert dry_run.measure(config)["data"] == f"random images in place of folder: {why}"


def test_images_that_are_not_decoded_stay_so(place):
    (place / "mine").mkdir()
    for i in range(4):
        noise_image(i).save(place / "mine" / f"{i}.png")
    keys = ["dataset.name=folder", f"dataset.root={place}/mine", f"dataset.cache={place}/cache"]
    _, why = images_or_noise(load_config("configs/smoke.yml", keys))
    assert why == "they are not decoded yet"
    assert not list(place.glob("cache/*"))


def test_a_network_that_does_not_fit_at_all(place, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GaussianDiffusion, "loss", full)
    output = invoke(f"{SMOKE} --dry-run", place, monkeypatch, code=1)
    assert "error: this does not fit into memory" in output
    assert [p.name for p in place.iterdir()] == ["configs"]


def test_durations_never_say_60():
    for seconds in (59.6, 3599.4, 3599.6, 86399.9, 86400 * 3 - 1):
        assert " 60 " not in f" {duration(seconds)} "
    assert [duration(s) for s in (59.6, 3599.6, 7199.9)] == ["1 min 0 s", "1 h 0 min", "2 h 0 min"]


def test_recomputed_activations_are_not_counted_as_kept():
    sizes = []
    for recompute in ("false", "true"):
        overrides = [f"hardware.activation_checkpointing={recompute}"]
        sizes.append(memory_per_image(load_config("configs/cifar10.yml", overrides)))
    assert sizes[0] == pytest.approx(52.9e6, rel=0.01)
    assert 0.2 < sizes[1] / sizes[0] < 0.5
