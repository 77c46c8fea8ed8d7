"""Tell which numbers the hardware multiplies, and choose how exactly."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


def has_bf16(device: torch.device) -> bool:
    """Tell whether the hardware multiplies bfloat16; the variable DDPM_BF16, 0 or 1, overrides."""
    forced = os.environ.get("DDPM_BF16")
    if forced in ("0", "1"):
        return forced == "1"
    return _multiplies_bf16(device)


@cache  # a training step asks
def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep TF32, whose mantissa has 10 bits, out of what is float32 on CUDA."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)  # of training
