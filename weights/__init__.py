"""Trained weights: checkpoint files, models of any dialect in and out."""

from weights.checkpoint import can_continue as can_continue
from weights.checkpoint import newest_checkpoint as newest_checkpoint
from weights.checkpoint import point_last_to as point_last_to
from weights.checkpoint import read_checkpoint as read_checkpoint
from weights.checkpoint import saved_steps as saved_steps
from weights.checkpoint import up_to_date as up_to_date
from weights.checkpoint import write_checkpoint as write_checkpoint
from weights.load import ModelFiles as ModelFiles
from weights.load import copy_tensors as copy_tensors
from weights.load import read_model as read_model
from weights.model import Model as Model
from weights.model import load_model as load_model
from weights.model import starting_weights as starting_weights
