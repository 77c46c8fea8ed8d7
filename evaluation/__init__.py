"""Evaluation: FID, IS, KID, precision and recall, and the likelihood, of any iterator of images."""

from evaluation.extractor import Extractor, load_extractor
from evaluation.likelihood import Bound, bits_per_dim

__all__ = ["Bound", "Extractor", "bits_per_dim", "load_extractor"]
