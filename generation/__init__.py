"""Images from a loaded model and seeds."""

from generation.generate import (
    Guidance,
    SeedNoise,
    chain,
    generate,
    make_denoiser,
    pays_to_compile,
    quick_settings,
    quick_steps,
    resolve_precision,
)
from generation.recipe import Sampling

__all__ = [
    "Guidance",
    "Sampling",
    "SeedNoise",
    "chain",
    "generate",
    "make_denoiser",
    "pays_to_compile",
    "quick_settings",
    "quick_steps",
    "resolve_precision",
]
