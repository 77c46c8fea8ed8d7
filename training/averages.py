"""EMAs of several relative lengths, beside the one that samples."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import Config
from optim import power_decay
from pl_utils import DDPM
from training.checkpoints import set_aside
from weights import saved_steps
from weights.ema import SUFFIX, ByLength, write_snapshot


class Averages(pl.Callback):
    """Keep a power EMA of each of `training.ema_lengths`; write snapshots of them to RUN/ema.

    `convert.py ema` makes one of any other length from those. A snapshot is of its step: a run that
    goes on from an earlier one writes the same, and those of later steps are set aside.
    """

    def __init__(self, config: Config, run: Path):
        self.config, self.folder, self.every = config, run / "ema", snapshot_interval(config)
        self.averages: ByLength = {}

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages = state_dict["averages"]

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DDPM)
        self.weights = {name: p.detach() for name, p in module.unet.named_parameters()}
        before = self.averages  # of the checkpoint, on the CPU
        self.averages = {
            length: {name: torch.zeros_like(p) for name, p in self.weights.items()}
            for length in self.config.training.ema_lengths
        }
        for length, values in before.items():
            for name, value in values.items():
                self.averages[length][name].copy_(value)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for path in saved_steps(self.folder, SUFFIX):
                if int(path.stem[5:]) > trainer.global_step:
                    print(f"set aside: {set_aside(path)}")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step, weights = trainer.global_step, [*self.weights.values()]
        for length, values in self.averages.items():
            update = get_ema_multi_avg_fn(power_decay(length, step))
            update([*values.values()], weights, None)
        last = step == self.config.training.max_steps
        if self.every and (last or step % self.every == 0) and trainer.is_global_zero:
            write_snapshot(self.averages, self.folder / f"step-{step:08d}{SUFFIX}")


def snapshot_interval(config: Config) -> int:
    """Return the steps between snapshots; 0 is never."""
    every = config.logging.ema_snapshot_every
    if every is None:
        every = max(1, config.training.max_steps // 32)
    return every if config.training.ema_lengths else 0


def disk_cost(config: Config, parameters: int) -> str:
    """Return what the snapshots of a run take, for people; nothing where it writes none."""
    if not (every := snapshot_interval(config)):
        return ""
    last = config.training.max_steps
    count = len({*range(every, last + 1, every), last})
    size = 2 * parameters * len({*config.training.ema_lengths})
    return (
        f"{count} x {size / 1e6:,.4g} MB = {count * size / 1e6:,.4g} MB, one every {every:,} steps"
    )
