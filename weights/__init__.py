"""Trained weights: checkpoint files, models of any dialect in and out."""

from weights.checkpoint import (
    can_continue,
    newest_checkpoint,
    point_last_to,
    read_checkpoint,
    saved_steps,
    up_to_date,
    write_checkpoint,
)
from weights.load import ModelFiles, copy_tensors, read_model
from weights.model import Model, load_model, model_of

__all__ = [
    "Model",
    "ModelFiles",
    "can_continue",
    "copy_tensors",
    "load_model",
    "model_of",
    "newest_checkpoint",
    "point_last_to",
    "read_checkpoint",
    "read_model",
    "saved_steps",
    "up_to_date",
    "write_checkpoint",
]
