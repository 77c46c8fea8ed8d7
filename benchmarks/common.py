"""Contestants that take turns, and tables of it: shared by the scripts of this folder."""

import copy
import multiprocessing
import platform
import re
import shlex
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from config import Config, load_config
from model import has_bf16
from training.hardware import count_flops, memory, si, timed
from weights.dialects import to_diffusers

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PEERS = ("torch", "pytorch-lightning", "diffusers", "denoising-diffusion-pytorch")
AS_THEY_SHIP = (
    "Ours is as it ships: bfloat16 where the hardware multiplies it. Peers are as they ship where "
    "nothing is added."
)


class Options(NamedTuple):
    """Options of one race."""

    image_size: int
    batch_size: int
    device: torch.device
    compile: bool

    @property
    def bf16(self) -> bool:
        return has_bf16(self.device)

    def config(self, *overrides: str) -> Config:
        """Return the paper's network for images of this size."""
        name = {32: "cifar10", 256: "celeba"}[self.image_size]
        batch = f"training.batch_size={self.batch_size}"
        return load_config(ROOT / f"configs/{name}.yml", [batch, *overrides])


class Contestant(NamedTuple):
    """One way of doing the work."""

    turn: Callable[[], object]
    flops: float  # of a turn


Builder = Callable[[Options], Contestant]


def pick_device(name: str) -> torch.device:
    """Return the device; `auto` is CUDA where there is any."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


# ---- networks


def wake(net: nn.Module) -> nn.Module:
    """Draw layers that start near zero at a usual size: else denormals slow the first steps."""
    for parameter in net.parameters():
        if parameter.ndim > 1 and parameter.std() < 1e-3:
            nn.init.xavier_uniform_(parameter)
    return net


def diffusers_net(options: Options) -> nn.Module:
    from diffusers import UNet2DModel

    config = options.config()
    net = wake(UNet2DModel.from_config(to_diffusers(config)[0]))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.model.dropout
    return net.to(options.device)


def denoising_diffusion_net(options: Options) -> nn.Module:
    """Return the peer's U-Net with our widths, and full attention where we have attention."""
    from denoising_diffusion_pytorch import Unet

    model = options.config().model
    sizes = [options.image_size // 2**i for i in range(len(model.channel_multipliers))]
    net = Unet(
        dim=model.base_channels,
        dim_mults=tuple(model.channel_multipliers),
        full_attn=tuple(size in model.attention_resolutions for size in sizes),
        dropout=model.dropout,
    )
    return wake(net).to(options.device)


def equip(net: nn.Module, options: Options) -> nn.Module:
    """Give a peer channels_last and bfloat16 autocast for the fair race; compile it if asked."""
    net.to(memory_format=torch.channels_last)
    forward = net.forward
    call = lambda *arguments, **named: forward(*arguments, **named)
    # Dynamo's cache belongs to a code object: one of its own for each network
    call = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    if options.compile:
        call = torch.compile(call)

    def run(*arguments, **named):
        with torch.autocast(options.device.type, torch.bfloat16, enabled=options.bf16):
            return call(*arguments, **named)

    net.forward = run
    return net


def with_tf32(turn: Callable, allowed: bool) -> Callable:
    """Return `turn` with TF32 for float32 matrix products on CUDA; PyTorch ships without."""

    def run():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        turn()

    return run


def flops_of(net: nn.Module, image_size: int) -> tuple[int, int]:
    """Return the FLOPs of one image, forward and in training; counted on the meta device."""
    with torch.device("meta"):
        x, t = torch.empty(1, 3, image_size, image_size), torch.zeros(1, dtype=torch.long)
        return count_flops(copy.deepcopy(net).to("meta"), x, t)


# ---- races


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the best of five blocks of large square matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    once = min(timed(lambda: a @ b, device) for _ in range(2))
    count = max(1, round(0.1 / once))
    block = lambda: [torch.mm(a, b, out=c) for _ in range(count)]
    c = torch.empty_like(a)
    return 2 * n**3 * count / min(timed(block, device) for _ in range(5))


def line_up(ours: dict[str, Builder], peers: dict[str, Builder], options: Options, *, fair: bool):
    """Return who takes turns: ours, the peers as they ship, and with all that they can be given."""
    extra = " + bfloat16" * options.bf16 + " + channels_last" + " + compiled" * options.compile
    equipped = {f"{name}{extra}": partial(build, fair=True) for name, build in peers.items()}
    return ours | peers | (equipped if fair else {})


def in_turn(builders: dict[str, Builder], options: Options, rounds: int):
    """Return seconds of each contestant's turns, A, B, A, B, ..., and the FLOPs of one."""
    contestants = {}
    for name, build in builders.items():
        report(f"{name}: warming up")
        contestants[name] = build(options)
        for _ in range(3):
            timed(contestants[name].turn, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        report(f"round {i + 1} of {rounds}")
        for name, contestant in contestants.items():
            seconds[name].append(timed(contestant.turn, options.device))
    return seconds, {name: contestant.flops for name, contestant in contestants.items()}


def memory_alone(build: Builder, options: Options) -> float:
    """Return the most GiB of a fresh process that takes two turns; on a CPU with libraries."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_two_turns, args=(build, options, queue))
    process.start()
    process.join()
    return queue.get() / 2**30 if process.exitcode == 0 else float("nan")


def _two_turns(build: Builder, options: Options, queue) -> None:
    contestant = build(options)
    for _ in range(2):
        timed(contestant.turn, options.device)
    queue.put(memory(options.device)[0])


def race_table(
    builders: dict[str, Builder],
    options: Options,
    rounds: int,
    *,
    base: str,
    calls: int,
    images: float,
) -> str:
    """Return Markdown of a race.

    Args:
        base: the contestant that the ratios are against.
        calls: network calls in a turn. images: images that a turn finishes.
    """
    gibibytes = {}
    for name, build in builders.items():
        report(f"{name}: memory, in a process of its own")
        gibibytes[name] = memory_alone(build, options)
    seconds, flops = in_turn(builders, options, rounds)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    peak = matmul_peak(options.device, dtype)
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [b / t for b, t in zip(seconds[base], times, strict=True)]
        rows.append(
            [
                name,
                digits(median / calls),
                digits(images / median),
                f"{flops[name] / median / peak:.1%}",
                f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{gibibytes[name]:.2f}",
            ]
        )
    heads = ["", "s a step", "images/s", "MFU", f"times as fast as {base}", "GiB"]
    return (
        markdown(heads, rows)
        + f"\n\nMedians of {rounds} rounds, in one process and in turn; the ratio is the median of "
        "the rounds' (lowest to highest). MFU: share of "
        f"{si(peak, 'FLOP/s')}, the {str(dtype)[6:]} matrix products measured here. GiB: the "
        f"most of a process of its own{'' if options.device.type == 'cuda' else ', libraries too'}."
    )


def report(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


# ---- RESULTS.md


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(value: float) -> str:
    """Return four digits, never an exponent of ten that a person would not write."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def environment(device: torch.device) -> str:
    """Return hardware, versions, commit and command."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = found[1] if found else platform.processor()
        bf16 = "with" if has_bf16(device) else "without"
        name += f", {torch.get_num_threads()} threads, {bf16} bfloat16"
    git = lambda *words: (
        subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout
    )
    results = ":!benchmarks/RESULTS.md", ":!benchmarks/*.png"
    status = git("status", "--porcelain", "-uno", "--", ".", *results)
    changed = " with changes" if status.strip() else ""
    versions = [f"Python {platform.python_version()}"]
    for package in PEERS:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    script = Path(sys.argv[0]).name
    words = [word for word in sys.argv[1:] if word != "--write"]
    return (
        f"`python benchmarks/{shlex.join([script, *words])}` on {name}, "
        f"{memory(device)[1] / 2**30:.0f} GiB; {', '.join(versions)}; commit "
        f"{git('rev-parse', '--short', 'HEAD').strip()}{changed}."
    )


def publish(heading: str, text: str, *, write: bool) -> None:
    """Print a section; with `write` put it into RESULTS.md, in the place of one so called."""
    section = f"## {heading}\n\n{text.strip()}\n"
    print(section, flush=True)
    if write:
        parts = re.split(r"(?m)^(?=## )", RESULTS.read_text(encoding="utf-8"))
        parts = [part.rstrip() + "\n" for part in parts]
        same = [i for i, part in enumerate(parts) if part.startswith(f"## {heading}\n")]
        if same:
            parts[same[0]] = section
        else:
            parts.append(section)
        RESULTS.write_text("\n".join(parts), encoding="utf-8")
