"""Training: the trainer, its data, checkpoints and signals, and the dry run."""

from training.checkpoints import Checkpoints, Interrupted
from training.datamodule import ImageData
from training.trainer import build_trainer

__all__ = ["Checkpoints", "ImageData", "Interrupted", "build_trainer"]
