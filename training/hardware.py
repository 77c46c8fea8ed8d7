"""What the hardware is and does: seconds, memory, its fastest matrix products; FLOPs, in words."""

import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Attention, ResBlock


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
    with suppress(OSError, TypeError):  # Linux; what `resource` says began with the parent's size
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    with suppress(ImportError):  # Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return math.nan


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


def activation_bytes(net: nn.Module, x: Tensor, t: Tensor) -> int:
    """Bytes that `net(x, t)` keeps for its gradient beside weights, in float32; on the meta device.

    Where `net.recompute` is set, blocks keep their inputs alone, and the largest of them is
    recomputed at a time.
    """
    blocks = [m for m in net.modules() if isinstance(m, ResBlock | Attention)]
    inputs: dict[nn.Module, tuple] = {}
    hooks = [b.register_forward_pre_hook(inputs.__setitem__) for b in blocks if net.recompute]
    kept = _kept_bytes(net, net, x, t)
    for hook in hooks:
        hook.remove()
    if not net.recompute:
        return sum(kept.values())
    for tensors in inputs.values():
        kept |= {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in tensors}
    largest = max(sum(_kept_bytes(net, b, *tensors).values()) for b, tensors in inputs.items())
    return sum(kept.values()) + largest


def _kept_bytes(net: nn.Module, part: nn.Module, *inputs: Tensor) -> dict[int, int]:
    """Bytes of each storage that autograd keeps when `part` runs, less the weights of `net`."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        part(*inputs)
    return {k: v.untyped_storage().nbytes() for k, v in kept.items() if k not in weights}


def duration(seconds: float) -> str:
    """'15.1 ms', '3.2 s', '4 min 10 s', '3 h 24 min', '36 d 4 h'."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    for (unit, size), (small_unit, small) in pairwise(units):
        big, rest = divmod(round(seconds / small), size // small)
        if big:
            return f"{big:,} {unit} {rest} {small_unit}"
    return f"{seconds:.3g} s"


def si(value: float, unit: str) -> str:
    """'12.44 GFLOP'."""
    power = min(6, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:,.4g} {' kMGTPE'[power].strip()}{unit}"
