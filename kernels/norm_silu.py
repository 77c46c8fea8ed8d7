"""GroupNorm and SiLU as one function, with a kernel of our own for channels_last on the CPU.

In bfloat16 PyTorch's CPU GroupNorm is two to three times slower in channels_last than in the other
layout, which eats what the convolutions gain there. `norm_silu.cpp` is compiled on
first use, in a second or two, and kept in the user's cache; where there is no compiler PyTorch's
functions give the same result up to rounding.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("norm_silu.cpp")
FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class GroupNorm(nn.GroupNorm):
    """GroupNorm, and SiLU after it unless `silu` is False; [B, C, H, W] -> the same."""

    def __init__(self, groups: int, width: int, *, silu: bool = True, eps: float = 1e-6):
        super().__init__(groups, width, eps=eps)  # TensorFlow's eps, not PyTorch's 1e-5
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type == "cpu"
            and x.dtype in NAMES
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.compiler.is_compiling()
            and not torch.compiler.is_exporting()
            and len(x)
            and kernel()
        ):
            return _Kernel.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        y = super().forward(x)
        return F.silu(y) if self.silu else y


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        B, C, H, W = x.shape
        weight, bias = weight.float(), bias.float()
        mean, rstd = torch.empty(2, B, groups)
        y = torch.empty_like(x)
        arguments = [_pointer(v) for v in (x, weight, bias, y, mean, rstd)]
        run = getattr(kernel(), f"forward_{NAMES[x.dtype]}")
        run(*arguments, *map(ctypes.c_int64, (B, H * W, C, groups)), ctypes.c_float(eps), int(silu))
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        B, C, H, W = x.shape
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        d_weight, d_bias = torch.empty(2, B, C)
        arguments = [_pointer(v) for v in (dy, x, weight, bias, mean, rstd, dx, d_weight, d_bias)]
        run = getattr(kernel(), f"backward_{NAMES[x.dtype]}")
        run(*arguments, *map(ctypes.c_int64, (B, H * W, C, ctx.groups)), int(ctx.silu))
        return dx, d_weight.sum(0), d_bias.sum(0), None, None, None


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def kernel() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None where it cannot be built."""
    compiler = []
    try:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        target = Path("/proc/cpuinfo")  # `native` differs between machines that share a home
        lines = target.read_text().splitlines()
        flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    except (OSError, ValueError, subprocess.SubprocessError):
        version, flags = b"", [platform.processor()]
    recipe = [SOURCE.read_text(), FLAGS, str(version), platform.machine(), *flags]
    digest = hashlib.sha256("".join(recipe).encode()).hexdigest()[:16]
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache_home) / "ddpm"
    library = folder / f"norm_silu-{digest}.so"
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [*compiler, *FLAGS.split(), str(SOURCE), "-o", str(temporary)]
            subprocess.run(command, capture_output=True, check=True)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # half a library is a crash
            temporary.rename(library)
        loaded = ctypes.CDLL(str(library))
        return loaded if hasattr(loaded, "backward_bfloat16") else None
    except (OSError, subprocess.SubprocessError):
        temporary.unlink(missing_ok=True)
        return None
