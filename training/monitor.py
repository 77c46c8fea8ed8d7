"""Report a run while it trains: a summary, numbers at intervals, a bar or lines."""

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from config import Config
from files import atomic_write, explained, to_yaml
from pl_utils import DDPM
from training.averages import disk_cost
from weights.card import about_ema


class Monitor(pl.Callback):
    """Read the sums at intervals, send them to the loggers, move the bar or print a line."""

    def __init__(self, config: Config, run: Path, console: Console):
        self.config, self.run, self.console = config, run, console
        self.bar: Progress | None = None
        self.shares = {"skipped": 0.0, "clipped": 0.0}  # of the steps last logged

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Monitor":
        """Return a trainer's."""
        return next(c for c in trainer.callbacks if isinstance(c, cls))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DDPM)
        self._summarise(trainer, module)
        self.total_skipped = 0
        step = trainer.global_step
        self.mark = time.perf_counter(), step
        if trainer.is_global_zero and self.console.is_terminal:
            columns = BarColumn(), MofNCompleteColumn(), "{task.description}", TimeRemainingColumn()
            self.bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self.bar.start()
            self.task = self.bar.add_task("", total=trainer.max_steps, completed=step)

    def _summarise(self, trainer: pl.Trainer, module: DDPM) -> None:
        data, training = self.config.dataset, self.config.training
        images = trainer.datamodule.images  # type: ignore[attr-defined]
        parameters = sum(p.numel() for p in module.unet.parameters())
        share = training.batch_size // trainer.world_size
        micro = module.micro or share
        count, size = len(images["train"]), training.batch_size
        epochs = training.max_steps * size / count
        classes = f", {len(data.classes)} classes" if data.classes else ""
        snapshots = f"\nsnapshots: {cost}" if (cost := disk_cost(self.config, parameters)) else ""
        self.console.print(
            f"data: {data.name}, {count:,} images of "
            f"{'x'.join(map(str, data.shape))}, {len(images['validation']):,} "
            f"for validation, flips {'on' if data.random_flip else 'off'}{classes}\n"
            f"model: {parameters:,} parameters, T = {self.config.diffusion.timesteps}, on "
            f"{module.device}, {module.precision}\n"
            f"training: {training.max_steps:,} steps of {size} images: "
            f"{epochs:,.{1 if epochs >= 1 else 3}f} epochs of {count:,}\n"
            f"batch: {trainer.world_size} device(s) x {share // micro} micro-batch(es) x {micro}, "
            f"learning rate {training.learning_rate:g}, EMA {about_ema(training)}, "
            f"seed {training.seed}{snapshots}"
        )
        if trainer.is_global_zero:  # a folder with this file holds a run
            with atomic_write(self.run / "config.yml") as temporary:
                temporary.write_text(to_yaml(self.config), encoding="utf-8")
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                text = "\n".join(f"    {line}" for line in to_yaml(self.config).splitlines())
                with explained(self.run, kept=False):
                    logger.experiment.add_text("config", text, trainer.global_step)
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(self.config.model_dump(), allow_val_change=True)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.bar:
            self.bar.update(self.task, completed=step)
        if step % self.config.logging.log_every == 0 or step == trainer.max_steps:
            assert isinstance(module, DDPM)
            self._log(trainer, module, step)

    def _log(self, trainer: pl.Trainer, module: DDPM, step: int) -> None:
        tally = trainer.strategy.reduce(module.tally, reduce_op="mean")
        loss, norm, count, skipped, clipped = tally.tolist()
        in_a_row = int(module.longest_streak)
        module.tally.zero_()
        module.longest_streak.zero_()
        before, self.mark = self.mark, (time.perf_counter(), step)
        rate = (step - before[1]) / (self.mark[0] - before[0])
        self.total_skipped += round(skipped)
        metrics = {
            "train/loss": loss / count if count else math.nan,
            "train/gradient norm": norm / count if count else math.nan,
            "train/learning rate": module.learning_rate(step - 1),
            "train/images per second": rate * self.config.training.batch_size,
            "train/skipped steps": self.total_skipped,
            "train/clipped share": clipped / count if count else math.nan,
        }
        self.shares = {"skipped": skipped / (count + skipped), "clipped": clipped / max(1, count)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        text = f"loss {metrics['train/loss']:.4f}  "
        text += f"{metrics['train/images per second']:,.0f} images/s"
        if self.total_skipped:
            text += f"  {self.total_skipped} steps skipped"
        if self.bar:
            self.bar.update(self.task, description=text)
        elif trainer.is_global_zero:
            left = timedelta(seconds=round((trainer.max_steps - step) / rate))
            self.console.print(f"step {step:,} of {trainer.max_steps:,}  {text}  {left} left")
        if in_a_row >= self.config.training.max_skipped_steps:
            raise FloatingPointError(
                f"loss or gradients were not finite for {in_a_row} steps up to step {step}; the "
                "weights are those before. Try a lower training.learning_rate or "
                "hardware.precision=32-true, from the last checkpoint"
            )

    def teardown(self, *_: Any, **__: Any) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    on_exception = teardown
