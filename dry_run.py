"""What a run takes on this hardware, from a few of its own steps: time, memory, money."""

import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from callbacks import preview_steps, preview_weights
from checkpoint import write_checkpoint
from config import Config, TrainingConfig
from dataset import Pictures
from diffusion_utils import from_uint8
from hardware import (
    count_flops,
    device_name,
    duration,
    lacks_memory,
    matmul_peak,
    memory_there,
    peak_memory,
    si,
    timed,
)
from model import UNet
from pl_utils import DDPM, VALIDATE, Data
from trainer import build_trainer

LONG = 10.0  # seconds; on a CPU, what would take longer is measured on a part and scaled


class Quote(NamedTuple):
    """What a run of the paper's is said to cost on rented TPUs."""

    eflop: float
    dollars: float
    counts: dict[str, int]  # pictures to train on, and held out


QUOTES = {
    "cifar10": Quote(3.822, 70, {"train": 50_000, "validation": 10_000}),
    "celebahq": Quote(47.70, 435, {"train": 30_000, "validation": 0}),
}


class Seconds(NamedTuple):
    """Of one step, one set of preview pictures, one validation, one checkpoint; or of all."""

    step: float
    preview: float
    validation: float
    checkpoint: float


# ---- arithmetic


def flops_per_picture(config: Config) -> tuple[int, int]:
    """FLOPs of one picture: forward, and in training without what checkpointing repeats."""
    data = config.dataset
    with torch.device("meta"):
        net = UNet(image_size=data.image_size, channels=data.channels, **config.model.model_dump())
        x = torch.empty(1, data.channels, data.image_size, data.image_size)
        return count_flops(net, x, torch.zeros(1, dtype=torch.long))


def project(training: TrainingConfig, once: Seconds) -> Seconds:
    """Seconds of the whole run, by kind."""
    steps = training.max_steps
    times = lambda every: steps // every if every else 0
    every, save_every = training.preview_every, training.save_every
    sets = sum(len(preview_weights(training, k * every)) for k in range(1, times(every) + 1))
    at_the_end = not save_every or steps % save_every != 0
    return Seconds(
        step=steps * once.step,
        preview=sets * once.preview,
        validation=times(training.validate_every) * once.validation,
        checkpoint=(times(save_every) + at_the_end) * once.checkpoint,
    )


def price(hours: float, dollars_per_hour: float | None, quote: Quote | None) -> str:
    """What `hours` cost, beside what the run is quoted at."""
    if dollars_per_hour is None:
        known = "give --dollars-per-hour"
        if quote:
            known += (
                f"; a TPU run of it is quoted at ${quote.dollars:g}, which is "
                f"${quote.dollars / hours:,.3g} an hour here"
            )
        return known
    dollars = hours * dollars_per_hour
    text = f"${dollars:,.2f} at ${dollars_per_hour:,.2f} an hour"
    if quote and dollars:
        ratio = quote.dollars / dollars
        compared = f"{ratio:,.1f}x less" if ratio >= 1 else f"{1 / ratio:,.1f}x more"
        text += f", {compared} than the ${quote.dollars:g} that a TPU run of it is quoted at"
    return text


# ---- the run, in small


class NotDecoded(Exception):
    """The pictures have not been decoded into the cache yet."""


def _refuse(*_, **__):
    raise NotDecoded("they are not decoded yet")


class Rehearsal:
    """Steps of a run with its own sizes, without Lightning, and with nothing written."""

    def __init__(self, config: Config):
        self.results = Path(config.training.results_folder).absolute()
        trainer = build_trainer(config, self.results / "dry-run", Console(quiet=True))
        self.device, self.ranks = trainer.strategy.root_device, trainer.world_size
        self.share = config.training.batch_size // self.ranks
        self.at_once = min(config.training.micro_batch_size or self.share, self.share)
        self.data, self.stand_in = open_data(config, self.ranks)
        self.batches = iter(self.data.train_dataloader())
        self.ddpm = DDPM(config).to(self.device)
        self.optimizer = self.ddpm.configure_optimizers()
        self.step = 0
        self.notes: list[str] = []

    def steps(self, count: int, part: int) -> None:
        """Whole training steps from `part` pictures each."""
        for _ in range(count):
            batch = next(self.batches).to(self.device, non_blocking=True)[:part]
            self.ddpm.update(batch, self.optimizer, step=self.step)
            self.step += 1

    def fit_into_memory(self, part: int) -> float:
        """The first step's seconds; in ever smaller micro-batches while memory does not suffice."""
        while True:
            try:
                return timed(lambda: self.steps(1, part), self.device)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
            training = self.ddpm.config.training
            micro = min(training.micro_batch_size or part, part)
            if micro == 1:
                raise ValueError(
                    "not even one picture at a time fits into the memory of "
                    f"{device_name(self.device)}; make the model or the pictures smaller"
                )
            smaller = max(d for d in range(1, micro // 2 + 1) if self.share % d == 0)
            self.notes = [
                f"{self.at_once} pictures at a time do not fit; "
                f"training.micro_batch_size={smaller} does, and is the same step (measured so)"
            ]
            changed = training.model_copy(update={"micro_batch_size": smaller})
            self.ddpm.config = self.ddpm.config.model_copy(update={"training": changed})
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def preview(self, share: float) -> float:
        """Seconds of one set of preview pictures, from about this share of the network calls."""
        steps = preview_steps(self.ddpm.diffusion)
        images = self.ddpm.config.training.preview_images
        calls = min(len(steps), math.ceil(share * len(steps)))
        some = min(images, max(1, round(share * images * len(steps) / calls)))
        self.ddpm.eval()
        run = lambda: self.ddpm.sample(steps[:calls], list(range(some))).cpu()
        whole = calls == len(steps) and some == images
        if whole:
            run()  # to warm up
        else:
            self.notes.append(
                f"previews: scaled from {calls} x {some} network calls to {len(steps)} x {images}"
            )
        seconds = timed(run, self.device)
        self.ddpm.train()
        return seconds * len(steps) / calls * images / some

    def validation(self, part: int) -> float:
        """Seconds a held-out picture."""
        batch = next(self.batches).to(self.device)[:part]
        t, eps, _ = self.ddpm.draw(VALIDATE, 0, len(batch))
        micro = self.ddpm.config.training.micro_batch_size or len(batch)

        @torch.no_grad()
        def run():
            for parts in zip(from_uint8(batch).split(micro), t.split(micro), eps.split(micro)):  # noqa: B905
                self.ddpm.diffusion.loss(self.ddpm, *parts)

        return timed(run, self.device) / len(batch)

    def checkpoint(self) -> tuple[float, int]:
        """Seconds and bytes of one, written as a run does on the same disk, and deleted."""
        contents = {
            "global_step": self.step,
            "state_dict": self.ddpm.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "hyper_parameters": self.ddpm.config.model_dump(mode="json"),
        }
        home = next(p for p in (self.results, *self.results.parents) if p.is_dir())
        with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=home) as folder:
            path = Path(folder, "step.ckpt")
            seconds = timed(lambda: write_checkpoint(contents, path), self.device)
            return seconds, path.stat().st_size


def open_data(config: Config, ranks: int) -> tuple[Data, str]:
    """The run's data; or random pictures of its shape, and why: nothing is fetched or decoded."""
    data, keys, reason = Data(config), config.dataset, ""
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=ranks)
    try:
        if keys.name != "digits" and not Path(keys.root).exists():
            raise FileNotFoundError(f"{keys.root} (dataset.root) does not exist")
        data.pictures = data._load(progress=_refuse)
    except (FileNotFoundError, NotDecoded) as error:
        reason = str(error).partition(";")[0]
        shape = (config.training.batch_size, keys.channels, keys.image_size, keys.image_size)
        random = torch.randint(0, 256, shape, dtype=torch.uint8).numpy()
        data.pictures = {"train": Pictures(random), "validation": Pictures(random[:0])}
    return data, reason


def rehearse(config: Config, console: Console, *, dollars_per_hour: float | None = None) -> None:
    """Measure a few steps, one set of previews and one checkpoint of a run; print what it takes.

    Raises:
        ValueError: hardware that is not there, a batch that it cannot share, damaged pictures, or
            a network too large for it. OSError: a folder for checkpoints that cannot be written.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with console.status("building the network") as status:
        rows = measure(config, dollars_per_hour, status.update)
    if not console.is_terminal:
        for name, text in rows:
            console.print(f"{name}: {text}")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(f"[bold]{row[0]}", row[1])
    console.print(table, soft_wrap=False)


def measure(
    config: Config, dollars_per_hour: float | None, say: Callable[[str], None]
) -> list[tuple[str, str]]:
    """What a run takes, as rows of a name and a text."""
    forward, flops = flops_per_picture(config)
    run = Rehearsal(config)
    training, device, share = config.training, run.device, run.share

    part = count = 1
    if device.type == "cuda":
        part = share
    else:
        say("a step of one picture")
        first = measured = run.fit_into_memory(1)
        if first < LONG:
            measured = timed(lambda: run.steps(1, 1), device)
            part = min(share, max(2, int(LONG / measured)))
        small = peak_memory(device)
    if part > 1 or share == 1:
        say("training steps")
        run.ddpm.on_fit_start()
        first = run.fit_into_memory(part)
        again = timed(lambda: run.steps(1, part), device)
        count = max(1, min(200, round(LONG / 2 / again)))
        measured = timed(lambda: run.steps(count, part), device) / count if count > 1 else again
    step = measured * share / part
    memory = peak_memory(device)
    training = run.ddpm.config.training
    at_once = min(training.micro_batch_size or share, share)
    if 1 < part < at_once:  # what each further picture took
        memory += (memory - small) / (part - 1) * (at_once - part)
    if part < share:
        run.notes.append(f"steps: scaled from {part} of the {share} pictures")
    if memory > memory_there(device):
        fits = [d for d in range(1, part + 1) if share % d == 0]
        run.notes.append(
            f"memory: {at_once} pictures at a time will not fit; "
            f"training.micro_batch_size={max(fits)} does, and is the same step"
        )

    say("previews")
    calls = training.preview_images * len(preview_steps(run.ddpm.diffusion)) * forward
    rate = flops * part / measured  # FLOP/s
    preview = run.preview(min(1.0, LONG / 2 * rate / calls)) if training.preview_every else 0.0
    quote = QUOTES.get(config.dataset.name)
    counts = {key: len(pictures) for key, pictures in run.data.pictures.items()}
    if run.stand_in:
        counts = quote.counts if quote else {"train": 0, "validation": 0}
    validation = 0.0
    if training.validate_every and counts["validation"]:
        validation = run.validation(part) * counts["validation"] / run.ranks
    say("a checkpoint")
    checkpoint, size = run.checkpoint()
    say("matrix products")
    dtype = torch.bfloat16 if run.ddpm.bf16 else torch.float32
    peak = matmul_peak(device, dtype)

    whole = project(training, Seconds(step, preview, validation, checkpoint))
    part_of = lambda seconds: f"{seconds / sum(whole):.2%}"
    total_flops = flops * training.batch_size * training.max_steps
    if quote and not math.isclose(total_flops / 1e18, quote.eflop, rel_tol=0.001):
        quote = None
    data = f"{config.dataset.name}, {counts['train']:,} pictures, {counts['validation']:,} held out"
    if run.stand_in:
        data = f"random pictures in place of {config.dataset.name}'s: {run.stand_in}"
    hardware = f"{device_name(device)}; {si(peak, 'FLOP/s')} in {str(dtype)[6:]} products"
    if run.ranks > 1:
        hardware += f"; one of {run.ranks} was measured, without the exchange of gradients"
    shape = f"{config.dataset.channels}x{config.dataset.image_size}x{config.dataset.image_size}"
    after = f", after a first one of {duration(first)}"
    about = "" if part == at_once else "at least " if part == 1 else "about "
    rows = [
        ("hardware", hardware),
        ("data", data),
        (
            "network",
            f"{sum(p.numel() for p in run.ddpm.unet.parameters()):,} parameters; {shape} pictures: "
            f"{si(forward, 'FLOP')} forward, {si(flops, 'FLOP')} in training, each",
        ),
        (
            "step",
            f"{duration(step)} for {training.batch_size} pictures and "
            f"{si(flops * training.batch_size, 'FLOP')}: mean of {count}{after}",
        ),
        (
            "speed",
            f"{training.batch_size / step:,.4g} images/s, {flops * share / step / peak:.1%} of "
            "the matrix products' speed (MFU)",
        ),
        ("memory", f"{about}{memory / 2**30:.2f} of {memory_there(device) / 2**30:.1f} GiB"),
        (
            "previews",
            f"{duration(preview)} for {training.preview_images} pictures, every "
            f"{training.preview_every:,} steps: {part_of(whole.preview)}"
            if preview
            else "none",
        ),
        (
            "validation",
            f"{duration(validation)} for {counts['validation']:,} pictures, every "
            f"{training.validate_every:,} steps: {part_of(whole.validation)}"
            if validation
            else "none",
        ),
        (
            "checkpoints",
            f"{duration(checkpoint)} for {size / 1e6:,.4g} MB, "
            + (f"every {training.save_every:,} steps" if training.save_every else "at the end")
            + f": {part_of(whole.checkpoint)}; {training.keep_checkpoints} are kept",
        ),
        (
            "run",
            f"{duration(sum(whole))} for {training.max_steps:,} steps and "
            f"{si(total_flops, 'FLOP')}; {part_of(sum(whole[1:]))} of it beside the steps",
        ),
        ("cost", price(sum(whole) / 3600, dollars_per_hour, quote)),
    ]
    return rows + [("note", note) for note in run.notes]
