"""What a run takes on this hardware, from a few of its own steps: time, memory, money."""

import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from callbacks import preview_steps, preview_weights
from checkpoint import write_checkpoint
from config import Config, TrainingConfig
from data import open_data
from diffusion_utils import from_uint8
from hardware import (
    activation_bytes,
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
from pl_utils import DDPM, VALIDATE
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


def one_picture(config: Config) -> tuple[UNet, torch.Tensor, torch.Tensor]:
    """The network and what it takes, without numbers."""
    data = config.dataset
    with torch.device("meta"):
        net = UNet(image_size=data.image_size, channels=data.channels, **config.model.model_dump())
        net.recompute = config.training.activation_checkpointing
        x = torch.empty(1, data.channels, data.image_size, data.image_size)
        return net, x, torch.zeros(1, dtype=torch.long)


def flops_per_picture(config: Config) -> tuple[int, int]:
    """FLOPs of one picture: forward, and in training without what checkpointing repeats."""
    net, x, t = one_picture(config)
    net.recompute = False
    return count_flops(net, x, t)


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
        if not quote:
            return "give --dollars-per-hour"
        rate = f"${quote.dollars:g}, which is ${quote.dollars / hours:,.3g} an hour here"
        return f"give --dollars-per-hour; a TPU run of it is quoted at {rate}"
    dollars = hours * dollars_per_hour
    text = f"${dollars:,.2f} at ${dollars_per_hour:,.2f} an hour"
    if quote and dollars:
        ratio = quote.dollars / dollars
        compared = f"{ratio:,.1f}x less" if ratio >= 1 else f"{1 / ratio:,.1f}x more"
        text += f", {compared} than the ${quote.dollars:g} that a TPU run of it is quoted at"
    return text


# ---- the run, in small


class Rehearsal:
    """Steps of a run with its own sizes, without Lightning's loop, and with nothing written."""

    def __init__(self, config: Config):
        self.results = Path(config.training.results_folder).absolute()
        silent = {"logger": ["csv"], "evaluate_every": 0}  # which writes and fetches nothing
        silent = config.model_copy(update={"training": config.training.model_copy(update=silent)})
        trainer = build_trainer(silent, self.results / "dry-run", Console(quiet=True))
        self.device, self.ranks = trainer.strategy.root_device, trainer.world_size
        self.share = config.training.batch_size // self.ranks
        self.at_once = min(config.training.micro_batch_size or self.share, self.share)
        self.data, self.stand_in = open_data(config, self.ranks)
        self.batches = iter(self.data.train_dataloader())
        self.ddpm = DDPM(config).to(self.device)
        self.ddpm.trainer = trainer
        self.start = timed(self.ddpm.on_fit_start, self.device)  # seconds
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
                seconds = timed(lambda: self.steps(1, part), self.device)
                break
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
            micro = min(self.ddpm.micro, part)
            if micro == 1:
                raise ValueError(
                    "not even one picture at a time fits into the memory of "
                    f"{device_name(self.device)}; try training.activation_checkpointing=true, or "
                    "a smaller model"
                )
            self.ddpm.micro = max(d for d in range(1, micro // 2 + 1) if self.share % d == 0)
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.ddpm.micro < self.at_once:
            self.notes = [
                f"{self.at_once} pictures at a time do not fit into memory; "
                f"training.micro_batch_size={self.ddpm.micro} does, and is the same step (measured)"
            ]
        return seconds

    def preview(self, share: float) -> float:
        """Seconds of one set of preview pictures, from about this share of the network calls."""
        steps = preview_steps(self.ddpm.diffusion)
        images = self.ddpm.config.training.preview_images
        calls = min(len(steps), math.ceil(share * len(steps)))
        some = min(images, max(1, round(share * images * len(steps) / calls)))
        self.ddpm.eval()
        net = self.ddpm.sampling_net()
        run = lambda: self.ddpm.sample(steps[:calls], list(range(some)), net=net).cpu()
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

    @torch.no_grad()
    def validation(self, part: int) -> float:
        """Seconds a held-out picture."""
        x_0 = from_uint8(next(self.batches).to(self.device)[:part])
        t, eps, _ = self.ddpm.draw(VALIDATE, 0, part)
        parts = [v.split(self.ddpm.micro) for v in (x_0, t, eps)]
        loss = self.ddpm.diffusion.loss
        run = lambda: [loss(self.ddpm, *v) for v in zip(*parts, strict=True)]
        return timed(run, self.device) / part

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


def rehearse(config: Config, console: Console, *, dollars_per_hour: float | None = None) -> None:
    """Measure a few steps, one set of previews and one checkpoint of a run; print what it takes.

    Raises:
        ValueError: hardware that is not there, a batch that it cannot share, damaged pictures, or
            a network too large for it. OSError: a folder for checkpoints that cannot be written.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with console.status("building the network") as status:
        found = measure(config, status.update)
    rows = describe(config, found, dollars_per_hour)
    if not console.is_terminal:
        for name, text in rows:
            console.print(f"{name}: {text}")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(Text(row[0], "bold"), row[1])
    console.print(table, soft_wrap=False)


class Measured(NamedTuple):
    """What `measure` found, of one device."""

    hardware: str
    peak: float  # FLOP/s of matrix products in the precision of the network
    data: str
    held_out: int
    parameters: int
    flops: tuple[int, int]  # of one picture: forward, in training
    once: Seconds
    first_step: float  # seconds
    repeats: int
    memory: str
    checkpoint_size: int  # bytes
    notes: list[str]


def measure(config: Config, say: Callable[[str], None]) -> Measured:
    """Run the parts of a run, as few as will do; `say` is told which."""
    run = Rehearsal(config)
    training, device, share = config.training, run.device, run.share
    forward, flops = flops_per_picture(config)

    part = repeats = 1
    if device.type == "cuda":
        part = share
    else:
        say("a step of one picture")
        first = seconds = run.fit_into_memory(1)
        if first < LONG:
            seconds = timed(lambda: run.steps(1, 1), device)
            part = min(share, max(2, int(LONG / seconds)))
    if part > 1 or share == 1:
        say("training steps")
        first = run.fit_into_memory(part)
        seconds = timed(lambda: run.steps(1, part), device)
        repeats = max(1, min(200, round(LONG / 2 / seconds)))
        if repeats > 1:
            seconds = timed(lambda: run.steps(repeats, part), device) / repeats
    if training.evaluate_every:
        run.notes.append("what training.evaluate_every asks for is not in it")
    if part < share:
        run.notes.append(f"steps: scaled from {part} of the {share} pictures")

    parameters = sum(p.numel() for p in run.ddpm.unet.parameters())
    memory, there = peak_memory(device), memory_there(device)
    at_once = min(run.ddpm.micro, share)
    if part < at_once:  # each further picture keeps its activations
        each = activation_bytes(*one_picture(config)) / (2 if run.ddpm.bf16 else 1)
        least = memory + (8 * parameters if run.step == 1 else 0)  # Adam's came after the peak
        memory = least + (at_once - part) * each
        if memory > there:
            fitting = (d for d in range(1, at_once) if share % d == 0)
            fits = max((d for d in fitting if least + (d - part) * each < there), default=1)
            run.notes.append(
                f"{at_once} pictures at a time will not fit; training.micro_batch_size={fits} "
                "should, and is the same step"
            )

    data, quote = config.dataset.name, QUOTES.get(config.dataset.name)
    counts = {key: len(pictures) for key, pictures in run.data.pictures.items()}
    if run.stand_in:
        counts = quote.counts if quote else counts
        data = f"random pictures in place of {data}'s: {run.stand_in}"
    else:
        data += f", {counts['train']:,} pictures, {counts['validation']:,} held out"

    preview = validation = 0.0
    if training.preview_every:
        say("previews")
        calls = training.preview_images * len(preview_steps(run.ddpm.diffusion))
        affordable = LONG / 2 * flops * part / seconds / forward
        preview = run.preview(min(1.0, affordable / calls))
    if training.validate_every and counts["validation"]:
        say("validation")
        validation = run.validation(part) * counts["validation"] / run.ranks
    say("a checkpoint")
    checkpoint, size = run.checkpoint()
    say("matrix products")
    dtype = torch.bfloat16 if run.ddpm.bf16 else torch.float32
    peak = matmul_peak(device, dtype)
    hardware = f"{device_name(device)}; {si(peak, 'FLOP/s')} in {str(dtype)[6:]} products"
    if run.ranks > 1:
        hardware += f"; one of {run.ranks} was measured, without the exchange of gradients"
    return Measured(
        hardware=hardware,
        peak=peak * run.ranks,
        data=data,
        held_out=counts["validation"],
        parameters=parameters,
        flops=(forward, flops),
        once=Seconds(seconds * share / part, preview, validation, checkpoint),
        first_step=run.start + first * share / part,
        repeats=repeats,
        memory=f"{'about ' * (part < at_once)}{memory / 2**30:.2f} of {there / 2**30:.1f} GiB",
        checkpoint_size=size,
        notes=run.notes,
    )


def describe(
    config: Config, found: Measured, dollars_per_hour: float | None
) -> list[tuple[str, str]]:
    """What the whole run takes, as rows of a name and a text."""
    training, once = config.training, found.once
    whole = project(training, once)
    share = lambda seconds: f"{seconds / sum(whole):.2%} of the time"
    forward, flops = found.flops
    step_flops = flops * training.batch_size
    run_flops = step_flops * training.max_steps
    quote = QUOTES.get(config.dataset.name)
    if quote and not math.isclose(run_flops / 1e18, quote.eflop, rel_tol=0.001):
        quote = None  # of another run

    rows = [
        ("hardware", found.hardware),
        ("data", found.data),
        (
            "network",
            f"{found.parameters:,} parameters; a picture of {config.dataset.image_size}x"
            f"{config.dataset.image_size} is {si(forward, 'FLOP')} forward, "
            f"{si(flops, 'FLOP')} in training",
        ),
        (
            "step",
            f"{duration(once.step)} for {training.batch_size} pictures, {si(step_flops, 'FLOP')}; "
            f"mean of {found.repeats}, the first took {duration(found.first_step)}",
        ),
        (
            "speed",
            f"{training.batch_size / once.step:,.4g} images/s, "
            f"{step_flops / once.step / found.peak:.1%} of the matrix products' speed (MFU)",
        ),
        ("memory", found.memory),
    ]
    beside = [
        (f"{training.preview_images} pictures", training.preview_every),
        (f"{found.held_out:,} pictures", training.validate_every),
        (f"{found.checkpoint_size / 1e6:,.4g} MB", training.save_every),
    ]
    names = Seconds._fields[1:]
    for name, (what, every), seconds, total in zip(names, beside, once[1:], whole[1:], strict=True):
        when = f"every {every:,} steps" if every else "at the end"
        text = f"{duration(seconds)} for {what}, {when}: {share(total)}"
        rows.append((name, text if seconds else "none"))
    rows += [
        (
            "run",
            f"{duration(sum(whole))} for {training.max_steps:,} steps, {si(run_flops, 'FLOP')}; "
            f"all but the steps is {share(sum(whole[1:]))}",
        ),
        ("cost", price(sum(whole) / 3600, dollars_per_hour, quote)),
    ]
    return rows + [("note", note) for note in found.notes]
