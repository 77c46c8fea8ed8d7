"""Fast paths for the CPU."""

from kernels.norm_silu import GroupNorm

__all__ = ["GroupNorm"]
