"""What several test files share."""

import gzip
import importlib
import itertools
import math
import os
import pickle
import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from processes import PROJECT, run, start
from torch import Tensor, nn
from typer.testing import CliRunner

from config import load_config
from diffusion_utils import GaussianDiffusion
from generation import make_steps

__all__ = ["PROJECT", "run", "start"]

TINY = {
    "image_size": 8,
    "channels": 3,
    "out_channels": 3,
    "classes": 0,
    "null_label": False,
    "base_channels": 32,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 2,
    "attention_resolutions": [4],
    "dropout": 0.0,
    "num_heads": 1,
    "scale_shift_norm": False,
    "time_scale": 1.0,
    "variant": "ddpm",
}
PAPER = {"channels": 3, "base_channels": 128, "num_res_blocks": 2, "attention_resolutions": [16]}
PAPER |= {"out_channels": 3, "classes": 0, "null_label": False}
PAPER |= {"num_heads": 1, "scale_shift_norm": False, "time_scale": 1.0, "variant": "ddpm"}
CIFAR = {**PAPER, "image_size": 32, "channel_multipliers": [1, 2, 2, 2], "dropout": 0.1}
HQ = {**PAPER, "image_size": 256, "channel_multipliers": [1, 1, 2, 2, 4, 4], "dropout": 0.0}


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch stolen",)


def invoke(command: str, place: Path, monkeypatch, code: int = 0) -> str:
    """Run a command as `processes.run` does, in this process: what trains little or nothing."""
    script, *arguments = shlex.split(command)
    monkeypatch.chdir(place)
    from dataset import load_images

    name = script.removesuffix(".py")
    app = importlib.import_module("sources.command" if name == "dataset" else name).app
    result = CliRunner().invoke(app, arguments, obj=lambda: load_images)  # as dataset.py
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def failing(function, code, when=lambda *_: True):
    """Return `function`, but with an error of the system where `when` says so."""

    def wrapped(*arguments, **options):
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return function(*arguments, **options)

    return wrapped


def wake(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give random weights of ordinary size everywhere, so that no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return net


def process(schedule="linear", T=1000, start=1e-4, end=0.02, prediction="eps", learned=False):
    return GaussianDiffusion(
        timesteps=T, beta_schedule=schedule, beta_start=start, beta_end=end, prediction=prediction,
        learned_variance=learned,
    )  # fmt: skip


def steps_of(diffusion, sampler="ddpm", *, variance="large", eta=0.0, n=None, spacing="trailing"):
    return make_steps(
        diffusion, sampler=sampler, variance=variance, eta=eta, timesteps=n, spacing=spacing
    )


# ---- images


def noise_image(seed, size=(8, 8), mode="RGB"):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (size[1], size[0], len(Image.new(mode, (1, 1)).getbands())))
    return Image.fromarray(pixels.squeeze().astype(np.uint8), mode)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder, *, count=5, packed=True, dot="-"):
    """Write images and labels, 0 ... 9 and again; return the pixels of each part."""
    folder.mkdir(parents=True)
    written = {}
    for part, seed in (("train", 0), ("t10k", 1)):
        written[part] = random_pixels(count, 28, 28, seed=seed)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images", written[part]), ("labels", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            content = header + array.tobytes()
            path = folder / f"{part}-{kind}{dot}idx{array.ndim}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return written


def write_cifar(root, count=5, form="py"):
    """Write six batches; return their pixels. The label of an image is its first byte modulo 10."""
    folder = root / f"cifar-10-batches-{form}"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, count, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = pixels[i, :, :1] % 10
        if form == "py":
            batch = {b"batch_label": b"x", b"labels": labels[:, 0].tolist(), b"data": pixels[i]}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            np.concatenate([labels, pixels[i]], 1).tofile(folder / f"{name}.bin")
    return pixels.reshape(6, count, 3, 32, 32)


def load(tmp_path, name="folder", **changes):
    """`load_images` of a folder `root` with a cache beside it."""
    from dataset import load_images

    keys = {
        "name": name,
        "root": str(tmp_path / "root"),
        "image_size": 8,
        "channels": 3,
        "fit": "crop",
        "split": "train",
        "validation_fraction": 0.0,
        "cache": str(tmp_path / "cache"),
        "labels": False,
        "classes": [],
    }
    return load_images(**{**keys, **changes})


def pixels_of(parts, key="train"):
    """Return all images of a part, uint8 [N, C, H, W]."""
    return parts[key][list(range(len(parts[key])))].images.numpy()


# ---- features


class Net(nn.Module):
    """uint8 [B, 3, H, W] -> features [B, 12], logits [B, 5]; the same each time."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 12, 3, stride=2)
            self.fc = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(images.float() / 127.5 - 1).relu().mean(dim=(2, 3))
        return features, 9 * self.fc(features)


# ---- runs


def values(facts):
    """Return the scores of a metrics.json by name."""
    return {name: score["value"] for name, score in facts["scores"].items()}


salt = itertools.count()


def tiny(*overrides):
    exact = ["hardware.accelerator=cpu", "hardware.precision=32-true"]
    return load_config("configs/smoke.yml", [*exact, *overrides])


def train(folder, *overrides, resume=None, callbacks=(), ddpm=None):
    """Train one run in this process; return the module and the optimizer's state after it."""
    from rich.console import Console

    from dataset import with_facts
    from pl_utils import DDPM
    from training import ImageData, build_trainer

    config = with_facts(tiny(*overrides))
    torch.manual_seed(next(salt))  # what the process did before is no matter
    ddpm = ddpm or DDPM(config)
    trainer = build_trainer(config, Path(folder), Console(quiet=True))
    trainer.callbacks[:0] = callbacks
    trainer.fit(ddpm, ImageData(config), ckpt_path=resume, weights_only=True)
    return ddpm, trainer.optimizers[0].state_dict()


def watched(folder, *overrides, say=None, **how):
    """Train with all that train.py adds; what is said goes to `say`."""
    from rich.console import Console

    from dataset import with_facts
    from evaluation.callback import HealthCheck

    config = with_facts(tiny(f"dataset.cache={folder.parent / 'cache'}", *overrides))
    console = Console(file=say, width=1000) if say else Console(quiet=True)
    callbacks = [HealthCheck(config, console)]
    return train(folder, f"dataset.cache={folder.parent / 'cache'}", *overrides,
                 callbacks=callbacks, **how)  # fmt: skip


def curves(folder):
    """Return {tag: [(step, value)]} of the validation losses of a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pl_utils import VALIDATION_TAGS

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"] if tag in VALIDATION_TAGS}  # fmt: skip


def best_of(folder):
    """Return the step of a run's best.ckpt, the lowest scores so far, and its weights."""
    from weights import read_checkpoint

    best = read_checkpoint(folder / "checkpoints/best.ckpt")
    state = best["callbacks"]["Checkpoints"]
    return best["global_step"], state["lowest"], best["state_dict"]


def assert_same(one, two):
    """Compare bit for bit, through nested dicts and lists."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two
