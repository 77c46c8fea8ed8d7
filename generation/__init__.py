"""Images from a loaded model and seeds."""

from generation.generate import (
    SeedNoise,
    chain,
    generate,
    make_denoiser,
    quick_steps,
    resolve_precision,
)

__all__ = ["SeedNoise", "chain", "generate", "make_denoiser", "quick_steps", "resolve_precision"]
