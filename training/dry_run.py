"""Measure a few steps of a run on this hardware: what the whole run takes, in time and money."""

import math
import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from config import Config
from dataset import Batch, Images
from generation import quick_steps
from model import Network, build_network
from pl_utils import DDPM, SAMPLED, compared_weights, quick_images
from training.averages import disk_cost
from training.datamodule import open_images, train_batches
from training.fitting import FitIntoMemory
from training.hardware import LiveBytes, count_flops, duration, memory, si, timed
from training.trainer import build_trainer
from weights import write_checkpoint

LONG = 10.0  # seconds; what would take longer is measured on a part and scaled
# EFLOP of the paper's runs, and the dollars that their TPUs are quoted at
QUOTES = {"cifar10": (3.822, 70), "celebahq": (47.70, 435)}


class Seconds(NamedTuple):
    """Seconds of a step, a set of previews, a validation and a checkpoint; of one, or of all."""

    step: float
    preview: float
    validation: float
    checkpoint: float


def one_image(config: Config) -> tuple[Network, torch.Tensor, torch.Tensor]:
    """Return the network and an input, on the meta device."""
    network, data = build_network(config, "meta"), config.dataset
    x = torch.empty(1, *data.shape, device="meta")
    return network, x, torch.zeros(1, dtype=torch.long, device="meta")


def flops_per_image(config: Config) -> tuple[int, int]:
    """Return the FLOPs of one image: forward, and in training without what is recomputed."""
    return count_flops(*one_image(config))


def memory_per_image(config: Config) -> int:
    """Return the bytes that another image takes in a training step, in float32."""
    network, x, t = one_image(config)
    network.recompute = config.hardware.activation_checkpointing
    with LiveBytes() as live:
        torch.autograd.grad(network(x.requires_grad_(), t).sum(), x)
    return live.peak


def project(config: Config, once: Seconds) -> Seconds:
    """Return the seconds of the whole run."""
    steps, logging = config.training.max_steps, config.logging
    at = lambda every: range(every, steps + 1, every) if every else range(0)
    previews = sum(len(compared_weights(config, step)) for step in at(logging.preview_every))
    return Seconds(
        steps * once.step,
        previews * once.preview,
        len(at(config.evaluation.validate_every)) * once.validation,
        len({*at(logging.save_every), steps}) * once.checkpoint,
    )


def price(hours: float, dollars_per_hour: float | None, quote: float | None) -> str:
    """Return what the hours cost, beside the dollars that the paper's run is quoted at."""
    text = "give --dollars-per-hour"
    if dollars_per_hour is not None:
        text = f"${hours * dollars_per_hour:,.2f} at ${dollars_per_hour:,.2f} an hour"
    if quote:
        here = f"${quote / hours:,.3g} an hour here"
        text += f"; on TPUs this run is quoted at ${quote:g}, which is {here}"
    return text


class NotDecoded(Exception):
    """The images are not in the cache yet."""


def images_or_noise(config: Config) -> tuple[dict[str, Images], str]:
    """Return the run's images by split; or random ones of their shape, and why. Decodes nothing."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotDecoded("they are not decoded yet") from None

    data = config.dataset
    try:
        if data.name not in ("digits", "emoji") and not Path(data.root).exists():
            raise FileNotFoundError(f"{data.root} (dataset.root) does not exist")
        return open_images(config, refuse), ""
    except (FileNotFoundError, NotDecoded) as error:
        shape = config.training.batch_size, *data.shape
        noise = torch.randint(0, 256, shape, dtype=torch.uint8).numpy()
        labels = np.zeros(len(noise), int) if data.classes else None
        images = {
            split: Images(some, labels=labels, classes=data.classes)
            for split, some in (("train", noise), ("validation", noise[:0]))
        }
        return images, str(error).partition(";")[0]


class Rehearsal:
    """Parts of a run at its own sizes, without Lightning's loop; no files stay."""

    def __init__(self, config: Config):
        self.config = config
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(config, Path(folder), Console(quiet=True))
        self.device, self.ranks = trainer.strategy.root_device, trainer.world_size
        self.share = config.training.batch_size // self.ranks
        self.images, self.why_noise = images_or_noise(config)
        self.batches = iter(train_batches(self.images["train"], config, world_size=self.ranks))
        self.module = DDPM(config).to(self.device)
        self.optimizer = self.module.configure_optimizers()

    def steps(self, count: int, part: int) -> float:
        """Return the mean seconds of `count` training steps from `part` images each."""

        def run() -> None:
            for batch in islice(self.batches, count):
                images = batch.images[:part].to(self.device, non_blocking=True)
                labels = None if batch.labels is None else batch.labels[:part].to(self.device)
                self.module.update(Batch(images, labels), self.optimizer, step=0)

        return timed(run, self.device) / count

    def train(self) -> tuple[int, float, float, float]:
        """Return how many images were measured, bytes, seconds of a step, and of the start."""
        fit = lambda: FitIntoMemory(self.config).prepare(self.module, self.ranks)
        start = timed(fit, self.device)
        part = self.share if self.device.type == "cuda" else 1
        start += self.steps(1, part)
        part = min(self.share, max(1, int(part * LONG / self.steps(1, part))))
        seconds = self.steps(1, part)
        seconds = self.steps(max(1, min(200, round(LONG / 2 / seconds))), part)
        peak, left = memory(self.device)[0], (self.module.micro or self.share) - part
        if left > 0:
            halved = 2 if self.module.precision == "bfloat16" else 1
            peak += left * memory_per_image(self.config) / halved
        return part, peak, seconds * self.share / part, start

    def preview(self) -> float:
        """Return the seconds of one set of previews, scaled from one image where that is slow."""
        count, module = self.config.logging.preview_images, self.module.eval()
        draw = lambda n: list(quick_images(module, module.ema, list(range(n))))
        all_of_them = timed(lambda: draw(1), self.device) * count
        return all_of_them if all_of_them > LONG else timed(lambda: draw(count), self.device)

    def checkpoint(self) -> tuple[float, int]:
        """Return the seconds and bytes of one, written where the run's would be, and deleted."""
        states = {"state_dict": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        weights = dict(self.module.unet.named_parameters())
        for length in self.config.training.ema_lengths:
            states[f"EMA of {length}"] = {k: w.detach().clone() for k, w in weights.items()}
        results = Path(self.config.logging.results_folder).absolute()
        home = next(p for p in (results, *results.parents) if p.is_dir())
        with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=home) as folder:
            path = Path(folder, "step.ckpt")
            seconds = timed(lambda: write_checkpoint(states, path), self.device)
            return seconds, path.stat().st_size


def validation_calls(module: DDPM, validated: int, trained: int) -> int:
    """Return the network calls of a validation: losses of both splits, samples to look for copies.

    Args:
        validated, trained: images of either split.
    """
    return (2 * validated or min(1000, trained)) + SAMPLED * len(quick_steps(module.diffusion))


def measure(config: Config, dollars_per_hour: float | None = None) -> dict[str, str]:
    """Return what a run takes, as texts by name, from as few of its parts as will do."""
    run, training, logging = Rehearsal(config), config.training, config.logging
    name, device = config.dataset.name, run.device
    forward, flops = flops_per_image(config)
    run_flops = flops * training.batch_size * training.max_steps
    part, peak, step, start = run.train()
    count, validated = len(run.images["train"]), len(run.images["validation"])
    preview = run.preview() if logging.preview_every else 0.0
    calls = validation_calls(run.module, validated, count)
    validation = step * calls / training.batch_size * forward / flops
    checkpoint, size = run.checkpoint()
    once = Seconds(step, preview, validation, checkpoint)
    whole = project(config, once)
    micro, there = run.module.micro or run.share, memory(device)[1]
    alone = f"; one of {run.ranks}, without the exchange of gradients" if run.ranks > 1 else ""
    scaled = f", scaled from {part} of a device's {run.share}" if part < run.share else ""
    too_much = "; that is too much: lower hardware.micro_batch_size" if peak > there else ""
    without = ", without evaluation.evaluate_every" if config.evaluation.evaluate_every else ""
    hardware = f"{device.type}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    data = f"{name}, {count:,} images, {validated:,} for validation"
    if run.why_noise:
        data = f"random images in place of {name}: {run.why_noise}"
    parameters = sum(p.numel() for p in run.module.unet.parameters())
    rows = {
        "hardware": f"{hardware}{alone}",
        "data": data,
        "network": f"{parameters:,} parameters; an image takes {si(forward, 'FLOP')} forward, "
        f"{si(flops, 'FLOP')} in training",
        "step": f"{duration(step)} for {training.batch_size} images{scaled}; the first after "
        f"{duration(start)}",
        "speed": f"{training.batch_size / step:,.4g} images/s",
        "memory": f"{'about ' * (part < micro)}{peak / 2**30:.2f} of {there / 2**30:.1f} GiB, "
        f"{micro} images at a time{too_much}",
        "preview": f"{logging.preview_images} images",
        "validation": f"{validated:,} images",
        "checkpoint": f"{size / 1e6:,.4g} MB",
        "run": f"{duration(sum(whole))} for {training.max_steps:,} steps, "
        f"{si(run_flops, 'FLOP')}{without}",
    }
    for key, seconds, total in zip(Seconds._fields[1:], once[1:], whole[1:], strict=True):
        share = f"{total / sum(whole):.2%} of the time"
        rows[key] = f"{duration(seconds)} for {rows[key]}; {share}" if total else "none"
    if cost := disk_cost(config, parameters):
        rows["snapshots"] = cost
    eflop, dollars = QUOTES.get(name, (0, 0))
    same = math.isclose(run_flops / 1e18, eflop, rel_tol=0.001)
    rows["cost"] = price(sum(whole) / 3600, dollars_per_hour, dollars if same else None)
    return rows
