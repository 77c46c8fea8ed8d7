"""Images from a loaded model and seeds."""

from generation.generate import (
    MANY_CALLS,
    SeedNoise,
    chain,
    generate,
    make_denoiser,
    quick_steps,
    resolve_precision,
)
from generation.recipe import sampling_recipe

__all__ = [
    "MANY_CALLS",
    "SeedNoise",
    "chain",
    "generate",
    "make_denoiser",
    "quick_steps",
    "resolve_precision",
    "sampling_recipe",
]
