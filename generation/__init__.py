"""Images from a loaded model and seeds."""

from generation.generate import (
    SeedNoise,
    chain,
    generate,
    make_denoiser,
    pays_to_compile,
    quick_steps,
    resolve_precision,
)
from generation.recipe import sampling_recipe

__all__ = [
    "SeedNoise",
    "chain",
    "generate",
    "make_denoiser",
    "pays_to_compile",
    "quick_steps",
    "resolve_precision",
    "sampling_recipe",
]
