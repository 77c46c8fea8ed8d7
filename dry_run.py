"""What a run takes on this hardware, from a few of its own steps: time, memory, money."""

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from callbacks import preview_steps, preview_weights
from checkpoint import write_checkpoint
from config import Config, TrainingConfig
from dataset import Pictures
from diffusion_utils import from_uint8
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


def count_flops(net: nn.Module, x: Tensor, t: Tensor) -> tuple[int, int]:
    """FLOPs of net(x, t), and of that with its backward pass; a multiply-add is 2.

    On the meta device nothing is computed. Attention is counted as the matrix products that it
    is, since the counter does not know the CPU's fused kernel.
    """
    totals = []
    for backward in (False, True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            y = net(x, t)
            if backward:
                getattr(y, "sample", y).sum().backward()
        totals.append(counter.get_total_flops())
    return totals[0], totals[1]


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
                f"${quote.dollars / hours:,.2f} an hour here"
            )
        return known
    dollars = hours * dollars_per_hour
    text = f"${dollars:,.2f} at ${dollars_per_hour:,.2f} an hour"
    if quote and dollars:
        ratio = quote.dollars / dollars
        compared = f"{ratio:.1f}x less" if ratio >= 1 else f"{1 / ratio:.1f}x more"
        text += f", {compared} than the ${quote.dollars:g} that a TPU run of it is quoted at"
    return text


def duration(seconds: float) -> str:
    """'15.1 ms', '3.2 s', '4 min 10 s', '3 h 24 min', '36 d 4 h'."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    i = next(i for i, (_, size) in enumerate(units) if seconds >= size)
    (unit, size), (small_unit, small) = units[i], units[i + 1]
    big, rest = divmod(round(seconds / small), size // small)
    return f"{big:,} {unit} {rest} {small_unit}"


def si(value: float, unit: str) -> str:
    """'12.44 GFLOP'."""
    power = min(6, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:,.4g} {' kMGTPE'[power].strip()}{unit}"


# ---- the hardware


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until `run` is done, on the device too."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of five blocks of large square matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    once = min(timed(lambda: a @ b, device) for _ in range(2))
    count = max(1, round(0.1 / once))
    block = lambda: [torch.mm(a, b, out=c) for _ in range(count)]
    c = torch.empty_like(a)
    return 2 * n**3 * count / min(timed(block, device) for _ in range(5))


def peak_memory(device: torch.device) -> float:
    """Bytes: on CUDA what tensors held at most, elsewhere the largest this process has been."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_there(device: torch.device) -> float:
    """Bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.nan
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def lacks_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


# ---- the run, in small


class NotDecoded(Exception):
    """The pictures have not been decoded into the cache yet."""


def _refuse(*_, **__):
    raise NotDecoded("they are not decoded yet")


class Rehearsal:
    """Steps of a run with its own sizes, without Lightning, and with nothing written."""

    def __init__(self, config: Config, folder: Path):
        trainer = build_trainer(config, folder / "run", Console(quiet=True))
        self.device, self.ranks = trainer.strategy.root_device, trainer.world_size
        self.share = config.training.batch_size // self.ranks
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
                f"{training.micro_batch_size or self.share} pictures at a time do not fit; "
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
        calls = min(len(steps), max(2, round(share * len(steps))))
        some = min(images, max(1, round(share * images * len(steps) / calls)))
        self.ddpm.eval()
        run = lambda: self.ddpm.sample(steps[:calls], list(range(some))).cpu()
        whole = calls == len(steps) and some == images
        if whole:
            run()  # to warm up
        else:
            self.notes.append(
                f"previews: scaled from {calls} steps of {some} pictures to {len(steps)} of {images}"
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

    def checkpoint(self, folder: Path) -> tuple[float, int]:
        """Seconds and bytes of one, written as a run does and forced to disk."""
        path = folder / "step.ckpt"
        contents = {
            "global_step": self.step,
            "state_dict": self.ddpm.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "hyper_parameters": self.ddpm.config.model_dump(mode="json"),
        }
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
    home = Path(config.training.results_folder).absolute()
    home = next(folder for folder in (home, *home.parents) if folder.is_dir())
    with (
        tempfile.TemporaryDirectory(prefix=".dry-run-", dir=home) as folder,
        console.status("building the network") as status,
    ):
        rows = measure(config, Path(folder), dollars_per_hour, status.update)
    if not console.is_terminal:
        for name, text in rows:
            console.print(f"{name}: {text}")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(f"[bold]{row[0]}", row[1])
    console.print(table, soft_wrap=False)


def measure(
    config: Config, folder: Path, dollars_per_hour: float | None, say: Callable[[str], None]
) -> list[tuple[str, str]]:
    """What a run takes, as rows of a name and a text."""
    forward, flops = flops_per_picture(config)
    run = Rehearsal(config, folder)
    training, device, share = config.training, run.device, run.share

    part = share
    if device.type != "cuda":
        say("one picture")
        run.steps(1, 1)
        one = timed(lambda: run.steps(1, 1), device)
        small = peak_memory(device)
        part = min(share, max(2, int(LONG / one)))
    say("training steps")
    run.ddpm.on_fit_start()
    first = again = run.fit_into_memory(part)
    if first < LONG or training.compile:
        again = timed(lambda: run.steps(1, part), device)
    count = max(1, min(200, round(LONG / 2 / again)))
    measured = timed(lambda: run.steps(count, part), device) / count
    step = measured * share / part
    memory = peak_memory(device)
    training = run.ddpm.config.training
    at_once = min(training.micro_batch_size or share, share)
    if part < at_once:  # what each further picture took
        memory = memory + (memory - small) / (part - 1) * (at_once - part)
    if part < share:
        run.notes.append(f"steps: scaled from {part} pictures to {share}")
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
    checkpoint, size = run.checkpoint(folder)
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
    about = "about " if part < at_once else ""
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
