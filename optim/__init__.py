"""How weights learn and are averaged: optimizers, and what changes from step to step."""

from typing import Any

import torch

from optim.muon import Muon
from optim.schedules import DECAYS, RATE_DECAYS, exponent, initial_share, power_decay

OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "muon": Muon,
}

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "RATE_DECAYS",
    "Muon",
    "exponent",
    "initial_share",
    "power_decay",
]
