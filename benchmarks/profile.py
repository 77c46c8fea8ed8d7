"""Measure where a step's time goes, what Lightning adds, how cost grows, if the data keeps up."""

import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytorch_lightning as pl
import torch
import typer
from rich.console import Console
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from benchmarks.common import (
    ROOT,
    Contestant,
    Options,
    digits,
    environment,
    markdown,
    pick_device,
    publish,
    race_table,
    report,
    wake,
)
from benchmarks.loader import array_loader, loader_table
from cli import quiet_libraries
from config import load_config
from dataset import Batch
from generation import SeedNoise, generate, make_denoiser, make_steps
from model import Attention, at_precision
from pl_utils import DDPM
from training import ImageData, build_trainer
from training.datamodule import open_images, train_batches
from training.dry_run import flops_per_image
from training.hardware import si, timed

KINDS = {  # the first that matches an operation or, if none does, what called it
    "convolutions": r"conv",
    "norms and swish": r"norms and swish|group_norm|silu|_Kernel",
    "attention": r"attention|softmax|scaled_dot_product",
    "dropout": r"dropout",
    "clipping": r"clip",
    "optimizer": r"Optimizer",
    "EMA": r"lerp",
    "draws of t, eps and flips": r"draws",
    "data": r"data",
    "concatenation": r"aten::cat$|CatBackward",
    "time embedding": r"addmm|AddmmBackward|aten::linear",
}
OTHER = "additions, copies, casts, resizing"


# ---- where a step's time goes


def in_range(function, name: str):
    """Return `function`, seen by the profiler under `name`."""

    def run(*arguments, **named):
        with record_function(name):
            return function(*arguments, **named)

    return run


def kind_of(event, forward_kinds: dict[int, str]) -> str:
    """Return an event's kind, else its caller's; backward, by the forward operation it is of."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return forward_kinds.get(event.sequence_nr, OTHER)
        for kind, pattern in KINDS.items():
            if re.search(pattern, event.name):
                return kind
        event = event.cpu_parent
    return OTHER


def is_backward(event) -> bool:
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return True
        event = event.cpu_parent
    return False


def step_table(options: Options, steps: int) -> str:
    ddpm = DDPM(options.config()).to(options.device)
    wake(ddpm.unet), wake(ddpm.ema)
    for module in ddpm.unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = in_range(module.forward, "norms and swish")
        if isinstance(module, nn.Dropout):
            module.forward = in_range(module.forward, "dropout")
        if isinstance(module, Attention):
            module.forward = in_range(module.forward, "attention")
    ddpm.draw = in_range(ddpm.draw, "draws")
    optimizer = ddpm.configure_optimizers()
    loader = iter(array_loader(options, 50_000 if options.image_size == 32 else 500))
    clip = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = in_range(clip, "clip")

    def run(first: int, count: int) -> None:
        for step in range(first, first + count):
            with record_function("data"):
                batch = Batch(next(loader).images.to(options.device, non_blocking=True))
            ddpm.update(batch, optimizer, step=step)

    on_cuda = options.device.type == "cuda"
    run(0, 3)
    plain = timed(lambda: run(3, steps), options.device) / steps
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with torch.profiler.profile(activities=activities) as profiler:
        timed(lambda: run(3 + steps, steps), options.device)
    torch.nn.utils.clip_grad_norm_ = clip

    events = [e for e in profiler.events() if e.device_type == DeviceType.CPU]
    events.sort(key=lambda e: e.time_range.start)
    forward_kinds = {  # the last operation with a number is the one that has the gradient
        e.sequence_nr: kind_of(e, {}) for e in events if e.sequence_nr >= 0 and not is_backward(e)
    }
    times: dict[bool, Counter] = {False: Counter(), True: Counter()}
    for event in events:
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if own:
            times[is_backward(event)][kind_of(event, forward_kinds)] += own / 1e3 / steps  # ms
    total = sum(sum(counter.values()) for counter in times.values())
    rows = []
    for kind in [*KINDS, OTHER]:
        forward, backward = times[False][kind], times[True][kind]
        if forward + backward:
            share = f"{(forward + backward) / total:.1%}"
            rows.append([kind, f"{forward:.2f}", f"{backward:.2f}", share])
    rows.sort(key=lambda row: -float(row[3][:-1]))
    whose = "kernels on the device" if on_cuda else "operations"
    return (
        markdown(["", "ms forward", "ms backward", "share"], rows)
        + f"\n\nBatch {options.batch_size}, {options.image_size}x{options.image_size}, eager, mean "
        f"of {steps} steps of {plain * 1e3:.4g} ms without the profiler; {whose} under it: "
        f"{total:.4g} ms."
    )


# ---- Lightning


def lightning_table(rounds: int, steps: int) -> str:
    overrides = ["hardware.accelerator=cpu", f"training.max_steps={steps}", "logging.log_every=50"]
    config = load_config(ROOT / "configs/smoke.yml", overrides)
    seconds: dict[str, list[float]] = {"bare": [], "fit": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the difference is of one, and several wait for each other
    for i in range(rounds):
        report(f"Lightning, round {i + 1} of {rounds}")
        seconds["bare"].append(bare(config, steps))
        seconds["fit"].append(fit(config, steps))
    torch.set_num_threads(threads)
    extra = statistics.median(f - b for b, f in zip(*seconds.values(), strict=True))
    rows = [[name, f"{statistics.median(v) * 1e3:.2f}"] for name, v in seconds.items()]
    rows.append(["difference, median of the rounds", f"{extra * 1e3:.2f}"])
    return (
        markdown(["the smoke network, one thread", "ms a step"], rows)
        + f"\n\n`bare` is `DDPM.update` on the loader's batches, `fit` the same by `Trainer.fit` "
        f"with this project's callbacks and TensorBoard; {rounds} rounds of {steps} steps in turn. "
        "The difference is the host's time, which goes by while a GPU works on the steps before; "
        f"of a step of 15.1 ms (CIFAR-10 on an H200 at 40%) it is {extra / 0.0151:.1%}."
    )


def marks(steps: int) -> tuple[int, int]:
    """Return the steps that are timed: neither the first steps nor the last, which saves."""
    return steps // 10, steps - 2


def bare(config, steps: int) -> float:
    ddpm, batches = DDPM(config), train_batches(open_images(config)["train"], config)
    optimizer, (first, last) = ddpm.configure_optimizers(), marks(steps)
    for step, batch in enumerate(batches, start=1):
        ddpm.update(batch, optimizer, step=step - 1)
        if step == first:
            began = time.perf_counter()
        if step == last:
            return (time.perf_counter() - began) / (last - first)
    raise AssertionError("the loader never ends")


def fit(config, steps: int) -> float:
    class Clock(pl.Callback):
        times: dict[int, float] = {}  # noqa: RUF012 (one use)

        def on_train_batch_end(self, trainer, *_):
            self.times[trainer.global_step] = time.perf_counter()

    quiet_libraries()
    first, last = marks(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, Path(folder, "run"), Console(quiet=True))
        trainer.callbacks.append(clock := Clock())
        trainer.fit(DDPM(config), ImageData(config))
    return (clock.times[last] - clock.times[first]) / (last - first)


# ---- growth


def growth_tables(options: Options, rounds: int) -> str:
    """Measure the CIFAR-10 network on larger images, larger batches and more sampling steps."""
    calls = 1 if options.device.type == "cpu" else 40
    sizes = []
    for size in (32, 64, 128, 256):
        report(f"growth: images of {size}")
        ddpm, call, step = growing(options, size, 1, calls)
        sizes.append(
            [
                str(size),
                si(flops_per_image(ddpm.config)[0], "FLOP"),
                digits(middle(call, options, rounds) / calls * 1e3),
                digits(middle(step, options, rounds) * 1e3),
            ]
        )
    batches = []
    for batch in (1, 2, 4, 8, 16, 32, 64):
        report(f"growth: batches of {batch}")
        _, call, step = growing(options, 32, batch, calls)
        batches.append(
            [
                str(batch),
                digits(batch * calls / middle(call, options, rounds)),
                digits(batch / middle(step, options, rounds)),
            ]
        )
    ddpm, *_ = growing(options, 32, 1, calls)
    counts = []
    for count in (5, 10, 20, 40):
        report(f"growth: {count} sampling steps")
        turn = sampling(ddpm, count, 1)
        counts.append([str(count), digits(middle(turn, options, rounds) / count * 1e3)])
    return "\n\n".join(
        [
            f"The CIFAR-10 network, medians of {rounds}. Images, batch 1:",
            markdown(["side", "forward", "ms a sampling step", "ms a training step"], sizes),
            "Batches, 32x32:",
            markdown(["batch", "images/s of one sampling step", "images/s in training"], batches),
            "Sampling steps, one image:",
            markdown(["steps", "ms a step"], counts),
        ]
    )


def growing(options: Options, size: int, batch: int, calls: int):
    """Return the model, the first `calls` sampling steps of it, and one training step."""
    attention = "[16]" if size <= 128 else "[]"  # at 256 four levels do not reach 16
    config = load_config(
        ROOT / "configs/cifar10.yml",
        [
            f"dataset.image_size={size}",
            f"training.batch_size={batch}",
            f"model.attention_resolutions={attention}",
        ],
    )
    ddpm = DDPM(config).to(options.device)
    wake(ddpm.unet), wake(ddpm.ema)
    optimizer = ddpm.configure_optimizers()
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    images = Batch(images.to(options.device))
    return ddpm, sampling(ddpm, calls, batch), partial(ddpm.update, images, optimizer, step=1)


def sampling(ddpm: DDPM, calls: int, batch: int):
    """Return a turn: the first `calls` sampling steps of a batch by the EMA."""
    data = ddpm.config.dataset
    steps = make_steps(ddpm.diffusion, **ddpm.config.sampling.model_dump())[:calls]
    network = at_precision(ddpm.ema, ddpm.precision)
    denoiser = make_denoiser(network, ddpm.diffusion, times=[step.t for step in steps])
    shape = (data.channels, data.image_size, data.image_size)
    return lambda: list(
        generate(denoiser, steps, list(range(batch)), shape=shape, device=ddpm.device)
    )


def middle(turn, options: Options, rounds: int) -> float:
    timed(turn, options.device)
    return statistics.median(timed(turn, options.device) for _ in range(rounds))


# ---- noise


def noise_table(options: Options, rounds: int) -> str:
    """Compare a generator for each image with one for the batch, in calls that a chain makes."""
    shape, calls, rows = (3, options.image_size, options.image_size), 128, []
    for batch in (16, 256):
        report(f"noise: {batch} images")
        generators = [torch.Generator(options.device) for _ in range(batch)]
        draws = [
            partial(torch.randn, shape, generator=g, device=options.device) for g in generators
        ]
        ways = {
            "as it is, some steps ahead": SeedNoise(list(range(batch)), shape, options.device),
            "each step by itself": lambda draws=draws: torch.stack([draw() for draw in draws]),
            "one generator for all": partial(torch.randn, batch, *shape, device=options.device),
        }
        for name, way in ways.items():
            run = lambda way=way: [way() for _ in range(calls)]
            rows.append([str(batch), name, digits(middle(run, options, rounds) / calls * 1e3)])
    return markdown(["images", "", "ms a step"], rows)


# ---- memory


def training(options: Options, recompute: bool) -> Contestant:
    ddpm = DDPM(options.config()).to(options.device)
    wake(ddpm.unet).recompute = recompute
    optimizer, size = ddpm.configure_optimizers(), options.image_size
    batch = torch.randint(0, 256, (options.batch_size, 3, size, size), dtype=torch.uint8)
    turn = partial(ddpm.update, Batch(batch.to(options.device)), optimizer, step=1)
    return Contestant(turn, flops_per_image(ddpm.config)[1] * options.batch_size)


def memory_table(options: Options, rounds: int) -> str:
    builders = {
        "activations kept": partial(training, recompute=False),
        "recomputed": partial(training, recompute=True),
    }
    return race_table(
        builders,
        options,
        rounds,
        base="activations kept",
        calls=1,
        images=options.batch_size,
    )


PARTS = ("step", "lightning", "growth", "memory", "noise", "loader")


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    image_size: Annotated[int, typer.Option(help="Of step, memory, noise: 32 or 256.")] = 32,
    batch_size: Annotated[
        int | None, typer.Option(help="Of step and memory. Default: 16, on CUDA 128.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="That are profiled.")] = 3,
    write: Annotated[bool, typer.Option("--write", help="Into benchmarks/RESULTS.md.")] = False,
):
    place = pick_device(device)
    batch_size = batch_size or (128 if place.type == "cuda" else 16)
    options = Options(image_size, batch_size, place, compile=False)
    shape = f"{image_size}x{image_size}, batch {batch_size}, {place.type}"
    headings = {
        "step": f"Where a step's time goes, {shape}",
        "lightning": f"What Lightning adds, {place.type}",
        "growth": f"How cost grows, {place.type}",
        "memory": f"Activation checkpointing, {shape}",
        "noise": f"Noise of its own for each image, {options.image_size}x{options.image_size}, "
        f"{place.type}",
        "loader": f"Whether the data keeps up, {place.type}",
    }
    tables = {
        "step": lambda: step_table(options, steps),
        "lightning": lambda: lightning_table(rounds, 100 * rounds),
        "growth": lambda: growth_tables(options, rounds),
        "memory": lambda: memory_table(options, rounds),
        "noise": lambda: noise_table(options, rounds),
        "loader": lambda: loader_table(options, float(rounds)),
    }
    for part in parts or PARTS:
        if part not in PARTS:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(PARTS)}")
        text = tables[part]()
        publish(headings[part], f"{environment(place)}\n\n{text}", write=write)


if __name__ == "__main__":
    typer.run(main)
