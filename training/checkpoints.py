"""What happens beside the training step: checkpoints, signals, numbers, previews."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import chain, count
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from checkpoint import point_last_to, saved_steps
from config import Config, TrainingConfig, to_yaml
from diffusion_utils import GaussianDiffusion, Step, make_steps
from files import atomic_write, explained, remove


class Interrupted(Exception):
    """A signal ended training at a step boundary, with everything saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Checkpoints(pl.Callback):
    """Saves at intervals, at the end and on SIGINT, SIGTERM or SIGHUP; keeps the last few.

    `last.ckpt` is a second name of the newest file. Where a run goes on from an earlier step, the
    files of later ones are set aside, so that the newest is always the run's own.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainingConfig,
        resumed_from: Path | None = None,
        on_failure: Callable[[BaseException, Path | None], None] | None = None,
    ):
        self.folder, self.config, self.on_failure = folder, config, on_failure
        self.last = resumed_from
        self.began = False
        self._received = 0
        self._handlers: dict = {}
        self._lock = None

    def setup(self, trainer, module, stage) -> None:
        if trainer.is_global_zero:
            self._lock = lock(self.folder.parent)

    def on_train_start(self, trainer, module) -> None:
        self.began = True
        self._main = trainer.is_global_zero
        signals = [signal.SIGINT, signal.SIGTERM]
        # a closed terminal or a lost connection, unless `nohup` is to outlive it
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        if "SLURM_JOB_ID" in os.environ:
            signals.append(signal.SIGUSR1)  # sbatch --signal=SIGUSR1@90: the time is nearly up
        for signum in signals:
            self._handlers[signum] = signal.signal(signum, self._receive)
        # ranks agree on a signal through their hosts: nothing waits for a device
        several = trainer.world_size > 1
        self._hosts = dist.new_group(backend="gloo") if several else None
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # this replaces it
        if trainer.is_global_zero:
            here = self._path(trainer.global_step)
            for path in saved_steps(self.folder):
                if path.name > here.name:
                    names = (path.with_name(f"{path.name}.aside{n}") for n in chain([""], count(2)))
                    print(f"set aside: {path.rename(next(p for p in names if not p.exists()))}")
            if here.exists():
                point_last_to(here)
            for leftover in self.folder.glob(".*.tmp"):
                remove(leftover)

    def _receive(self, signum: int, _) -> None:
        if self._received and signum == getattr(signal, "SIGHUP", None):
            return  # a shell that ends sends it once more
        if self._received:  # the second one: at once, with the cursor back
            os.write(2, b"\x1b[?25h" if os.isatty(2) else b"")
            os._exit(128 + signum)
        self._received = signum
        if self._main:
            with suppress(OSError):  # the terminal may be what has gone
                os.write(2, b"\nsaving after this step; a second signal ends at once\n")

    def signalled(self) -> int:
        """The signal that any rank has received, or 0; all ranks ask together."""
        signum = self._received
        if self._hosts:
            flag = torch.tensor(signum)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._hosts)
            signum = int(flag)
        return signum

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        signum = self.signalled()
        step, every = trainer.global_step, self.config.save_every
        if signum or step == trainer.max_steps or (every and step % every == 0):
            self._save(trainer)
        self._end_if(signum, trainer)

    def on_validation_batch_end(self, trainer, *_) -> None:
        if self._received and not self._hosts:  # several ranks wait for the next step
            self._save(trainer)
            self._end_if(self._received, trainer)

    def _save(self, trainer) -> None:
        path = self._path(trainer.global_step)
        trainer.save_checkpoint(path)
        self.last = path
        if trainer.is_global_zero:
            point_last_to(path)
            for old in saved_steps(self.folder)[: -self.config.keep_checkpoints]:
                remove(old)  # or after the next

    def _end_if(self, signum: int, trainer) -> None:
        if signum == signal.SIGUSR1 and trainer.is_global_zero:
            requeue_slurm_job()
        if signum:
            raise Interrupted(signum)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.ckpt"

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        self.teardown()
        if self.on_failure:
            self.on_failure(exception, self.last)
        orderly = isinstance(exception, Interrupted | KeyboardInterrupt)
        if trainer.world_size > 1 and not orderly:
            # the other ranks may wait in a collective that never ends: leave, and take them along
            for logger in trainer.loggers:
                logger.finalize("failed")
            if trainer.strategy.launcher:
                trainer.strategy.launcher.kill(signal.SIGKILL)
            sys.stdout.flush()
            os._exit(1 if self.began else 2)

    def teardown(self, *_, **__) -> None:
        if self._lock:
            self._lock.close()
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def lock(folder: Path):
    """Holds a run's folder for this process; the file that does must stay open.

    Raises:
        ValueError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        raise ValueError(
            f"another process is training in {folder}; choose another --run-name"
        ) from None
    return file


def requeue_slurm_job() -> None:
    """Puts this job back in the queue; run again, it goes on by itself (SLURM_RESTART_COUNT)."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"job {job} could not be requeued: {error}")


class Monitor(pl.Callback):
    """Reads the sums at intervals, sends them to the loggers, moves the bar or prints a line."""

    def __init__(self, config: Config, run: Path, console: Console):
        self.whole, self.config, self.run, self.console = config, config.training, run, console
        self.bar: Progress | None = None

    def on_train_start(self, trainer, module) -> None:
        self._summarise(trainer, module)
        self.total_skipped = 0
        self.mark = (time.perf_counter(), trainer.global_step)
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

    def _summarise(self, trainer, module) -> None:
        data, training = self.whole.dataset, self.config
        counts = {key: len(pictures) for key, pictures in trainer.datamodule.pictures.items()}
        parameters = sum(p.numel() for p in module.unet.parameters())
        share = training.batch_size // trainer.world_size
        micro = module.micro or share
        epochs = training.max_steps * training.batch_size / counts["train"]
        self.console.print(
            f"data: {data.name}, {counts['train']:,} pictures of "
            f"{data.channels}x{data.image_size}x{data.image_size}, {counts['validation']:,} held "
            f"out, flips {'on' if data.random_flip else 'off'}\n"
            f"model: {parameters:,} parameters, T = {self.whole.diffusion.timesteps}, on "
            f"{module.device}, {'bfloat16' if module.bf16 else 'float32'}\n"
            f"training: {training.max_steps:,} steps ({epochs:,.0f} epochs) of "
            f"{training.batch_size} pictures = {trainer.world_size} device(s) x "
            f"{share // micro} micro-batch(es) x {micro}, learning rate "
            f"{training.learning_rate:g}, EMA {training.ema_decay}, seed {training.seed}"
        )
        if trainer.is_global_zero:  # a folder with this file holds a run
            with atomic_write(self.run / "config.yml") as temporary:
                temporary.write_text(to_yaml(self.whole), encoding="utf-8")
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                text = "\n".join(f"    {line}" for line in to_yaml(self.whole).splitlines())
                with explained(self.run, kept=False):
                    logger.experiment.add_text("config", text, trainer.global_step)
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(self.whole.model_dump(), allow_val_change=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if self.bar:
            self.bar.update(self.task, completed=step)
        if step % self.config.log_every == 0 or step == trainer.max_steps:
            self._log(trainer, module, step)

    def _log(self, trainer, module, step: int) -> None:
        tally = trainer.strategy.reduce(module.tally, reduce_op="mean")
        loss, norm, count, skipped = tally.tolist()
        in_a_row = int(module.longest_streak)
        module.tally.zero_()
        module.longest_streak.zero_()
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

    def on_exception(self, *_) -> None:
        self.teardown()

    def teardown(self, *_, **__) -> None:
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
        if not every or step % every or not trainer.is_global_zero:
            return
        steps = preview_steps(module.diffusion)
        module.eval()
        for weights in preview_weights(self.config, step):
            module.weights = weights
            seeds, net = list(range(self.config.preview_images)), module.sampling_net()
            grid = picture_grid(module.sample(steps, seeds, net=net))
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    with explained(logger.log_dir, kept=False):
                        logger.experiment.add_image(f"samples/{weights}", grid, step)
                if isinstance(logger, WandbLogger):
                    picture = grid.permute(1, 2, 0).numpy()
                    logger.log_image(f"samples/{weights}", [picture], step)
        module.weights = "ema"
        module.train()


def preview_steps(diffusion: GaussianDiffusion) -> list[Step]:
    return make_steps(
        diffusion,
        sampler="dpm++",
        variance="large",
        eta=0.0,
        timesteps=min(20, diffusion.timesteps),
        spacing="trailing",
    )


def preview_weights(config: TrainingConfig, step: int) -> tuple[str, ...]:
    """The raw ones too while more than 1% of the average is still the initial weights."""
    return ("ema", "raw") if config.ema_decay**step > 0.01 else ("ema",)


def picture_grid(pictures: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> one near-square uint8 [3, H', W'], tiny pictures enlarged."""
    channels = 3 if pictures.shape[1] >= 3 else 1  # without alpha
    pictures = pictures[:, :channels].cpu()
    scale = max(1, 64 // pictures.shape[-1])
    if scale > 1:
        pictures = interpolate(pictures, scale_factor=scale, mode="bicubic")
    return make_grid(pictures, nrow=math.ceil(math.sqrt(len(pictures))), padding=2, pad_value=128)
