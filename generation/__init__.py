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
from generation.samplers import Step, make_steps, reverse, spaced_timesteps

__all__ = [
    "Guidance",
    "Sampling",
    "SeedNoise",
    "Step",
    "chain",
    "generate",
    "make_denoiser",
    "make_steps",
    "pays_to_compile",
    "quick_settings",
    "quick_steps",
    "resolve_precision",
    "reverse",
    "spaced_timesteps",
]
