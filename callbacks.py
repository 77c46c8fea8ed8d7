"""What happens beside the training step: checkpoints, signals, numbers, previews."""

import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from config import TrainingConfig
from diffusion_utils import make_steps


class Interrupted(Exception):
    """A signal ended training at a step boundary, with everything saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Checkpoints(pl.Callback):
    """Saves at intervals, at the end and on SIGINT or SIGTERM; keeps the last few.

    `last.ckpt` is a second name of the newest file.
    """

    def __init__(self, folder: Path, every: int, keep: int):
        self.folder, self.every, self.keep = folder, every, keep
        self.last: Path | None = None
        self.received = 0

    def on_train_start(self, trainer, module) -> None:
        self._handlers = {
            s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)
        }
        # ranks agree on a signal through the hosts: nothing waits for a device
        several = trainer.world_size > 1
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(minutes=30)) if several else None
        )
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # this replaces it

    def _receive(self, signum: int, _) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        signum = self.received
        if self._group:
            flag = torch.tensor(signum)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            signum = int(flag)
        step = trainer.global_step
        if signum or step == trainer.max_steps or (self.every and step % self.every == 0):
            self._save(trainer)
        if signum:
            raise Interrupted(signum)

    def _save(self, trainer) -> None:
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        self.last = path
        if trainer.is_global_zero:
            link = self.folder / ".last.tmp"
            link.unlink(missing_ok=True)
            os.link(path, link)
            link.replace(self.folder / "last.ckpt")
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()

    def teardown(self, trainer, module, stage) -> None:
        for signum, handler in getattr(self, "_handlers", {}).items():
            signal.signal(signum, handler)


class Monitor(pl.Callback):
    """Reads the sums at intervals, sends them to the loggers, moves the bar or prints a line."""

    def __init__(self, config: TrainingConfig, console: Console):
        self.config, self.console = config, console
        self.bar: Progress | None = None

    def on_train_start(self, trainer, module) -> None:
        self.total_skipped = 0
        self.start = self.mark = (time.perf_counter(), trainer.global_step)
        if trainer.is_global_zero and self.console.is_terminal:
            self.bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("[progress.description]{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=2,
            )
            self.bar.start()
            self.task = self.bar.add_task(
                "", total=trainer.max_steps, completed=trainer.global_step
            )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if self.bar:
            self.bar.update(self.task, completed=step)
        if step % self.config.log_every == 0 or step == trainer.max_steps:
            self._log(trainer, module, step)

    def _log(self, trainer, module, step: int) -> None:
        tally = trainer.strategy.reduce(module.tally, reduce_op="mean")
        loss, norm, count, skipped = tally.tolist()
        in_a_row = int(module.skipped_in_a_row)
        module.tally.zero_()
        now = time.perf_counter()
        rate = (step - self.mark[1]) / (now - self.mark[0])
        self.mark = now, step
        self.total_skipped += round(skipped)
        metrics = {
            "train/loss": loss / count if count else math.nan,
            "train/gradient norm": norm / count if count else math.nan,
            "train/learning rate": module.learning_rate(step - 1),
            "train/images per second": rate * self.config.batch_size,
            "train/skipped steps": self.total_skipped,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        text = f"loss {metrics['train/loss']:.4f}  {rate * self.config.batch_size:,.0f} images/s"
        if self.total_skipped:
            text += f"  {self.total_skipped} steps skipped"
        if self.bar:
            self.bar.update(self.task, description=text)
        elif trainer.is_global_zero:
            left = timedelta(seconds=round((trainer.max_steps - step) / rate))
            self.console.print(f"step {step:,} of {trainer.max_steps:,}  {text}  {left} left")
        if in_a_row >= self.config.max_skipped_steps:
            raise FloatingPointError(
                f"loss or gradients were not finite for {in_a_row} steps up to step {step}; the "
                "weights are those before. Try a lower training.learning_rate or "
                "training.precision=32-true, from the last checkpoint"
            )

    def teardown(self, trainer, module, stage) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


class Previews(pl.Callback):
    """A grid from fixed seeds by 20 steps of DPM-Solver++, under one tag.

    While the average still remembers the initial weights, the raw weights' grid stands beside it.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        every, step = self.config.preview_every, trainer.global_step
        due = every and (step % every == 0 or step == trainer.max_steps)
        if not due or not trainer.is_global_zero:
            return
        steps = make_steps(
            module.diffusion,
            sampler="dpm++",
            variance="large",
            eta=0.0,
            timesteps=min(20, module.diffusion.timesteps),
            spacing="trailing",
        )
        initial_share = self.config.ema_decay**step
        module.eval()
        for weights in ("ema", "raw") if initial_share > 0.01 else ("ema",):
            module.weights = weights
            grid = picture_grid(module.sample(steps, list(range(self.config.preview_images))))
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"samples/{weights}", grid, step)
        module.weights = "ema"
        module.train()


def picture_grid(pictures: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> one near-square uint8 [3, H', W'], tiny pictures enlarged."""
    channels = 3 if pictures.shape[1] >= 3 else 1  # without alpha
    pictures = pictures[:, :channels].cpu()
    scale = max(1, 64 // pictures.shape[-1])
    if scale > 1:
        pictures = interpolate(pictures, scale_factor=scale, mode="bicubic")
    return make_grid(pictures, nrow=math.ceil(math.sqrt(len(pictures))), padding=2, pad_value=128)
