"""Evaluation: FID, IS, KID, precision and recall, and the likelihood, of any images."""
