"""Layers without weights, fast paths for the CPU, and the precision of the hardware."""

from kernels.layers import Dropout as Dropout
from kernels.layers import attend as attend
from kernels.layers import timestep_embedding as timestep_embedding
from kernels.norm_silu import GroupNorm as GroupNorm
from kernels.precision import exact_float32 as exact_float32
from kernels.precision import has_bf16 as has_bf16
