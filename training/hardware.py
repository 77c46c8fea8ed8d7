"""Measures of hardware: seconds, memory and FLOPs, and how to say them."""

import math
import os
import re
import time
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until `run` is done, on the device too."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def memory(device: torch.device) -> tuple[float, float]:
    """Return bytes: the most that was used, on a CPU by this process; and all there are."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device), there
    if not hasattr(os, "sysconf"):  # Windows
        return math.nan, math.nan
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where `resource` begins with the parent's size
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]), there
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, there


def count_flops(network: nn.Module, x: Tensor, t: Tensor) -> tuple[int, int]:
    """Return the FLOPs of network(x, t), and with its backward pass; a multiply-add is 2.

    On the meta device nothing is computed.
    """
    # MATH: the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y = network(x, t)
        forward = counter.get_total_flops()
        getattr(y, "sample", y).sum().backward()  # diffusers' networks give a `sample`
    return forward, counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that operations have made and that are still there."""

    now = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before, after = (
            {v.untyped_storage() for v in tree_leaves(side) if isinstance(v, Tensor)}
            for side in ((args, kwargs), result)
        )
        for storage in after - before:
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def duration(seconds: float) -> str:
    """Return '15.1 ms', '3.2 s', '4 min 10 s', '3 h 24 min' or '36 d 4 h'."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    for (unit, size), (small_unit, small) in pairwise(UNITS.items()):
        big, rest = divmod(round(seconds / small), size // small)
        if big:
            return f"{big:,} {unit} {rest} {small_unit}"
    return f"{seconds:.3g} s"


def si(value: float, unit: str) -> str:
    """Return '12.44 GFLOP' of 12.44e9 and 'FLOP'."""
    power = min(6, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:,.4g} {' kMGTPE'[power].strip()}{unit}"
