"""What changes from step to step: the learning rate, and the decay of the EMA."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from config import TrainingConfig

# the learning rate's share that is left, of (step, warmup, max_steps), once it is warm
RATE_DECAYS: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, warmup, end: 1.0,
    "cosine": lambda step, warmup, end: 0.5 + 0.5 * math.cos(math.pi * done(step, warmup, end)),
    "linear": lambda step, warmup, end: 1 - done(step, warmup, end),
    "inverse-sqrt": lambda step, warmup, end: (max(1, warmup) / max(1, step)) ** 0.5,
}


def done(step: int, start: int, end: int) -> float:
    """Return the share of start ... end that lies before a step."""
    return min(1.0, (step - start) / max(1, end - start))


def exponent(length: float) -> float:
    """Return gamma > 0 of a power EMA of so relative a length (Karras et al. 2024, Eq. 123)."""
    root = math.sqrt(3 / length**2 + 1)  # a cubic, solved by cosines
    return (2 * root * math.cos(math.acos((5 - 6 * root**2) / root**3) / 3) - 7) / 3


def power_decay(length: float, n: int) -> float:
    """Return the decay of update n = 1, 2, ... of a power EMA (Karras et al. 2024, Eq. 127)."""
    return (1 - 1 / n) ** (exponent(length) + 1)  # 0 at first, which copies


# the decay of the EMA's update n = 1, 2, ...
DECAYS: dict[str, Callable[["TrainingConfig", int], float]] = {
    "constant": lambda training, n: training.ema_decay,
    "warmup": lambda training, n: min(training.ema_decay, n / (9 + n)),
    "power": lambda training, n: power_decay(training.ema_lengths[0], n),
}


def initial_share(training: "TrainingConfig", step: int) -> float:
    """Return the share of initial weights in the EMA: the product of its decays up to a step."""
    if training.ema == "power":
        return float(step == 0)
    decay, ramp = training.ema_decay, 0
    if training.ema == "warmup":  # n / (9 + n) up to here
        ramp = min(step, int(9 * decay / (1 - decay)))
    return decay ** (step - ramp) / math.comb(9 + ramp, 9)
