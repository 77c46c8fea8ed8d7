"""Save and stop training: intervals, the end, signals, SLURM."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from config import Config
from files import remove
from pl_utils import DDPM
from weights import point_last_to, saved_steps

# called with an error and the last checkpoint, before anything is torn down
OnFailure = Callable[[BaseException, Path | None], None] | None


class Interrupted(Exception):
    """A signal ended training at a step boundary, with everything saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Checkpoints(pl.Callback):
    """Save at intervals, at the end and on SIGINT, SIGTERM or SIGHUP; keep the last few.

    `last.ckpt` is a second name of the newest file. Where a run goes on from an earlier step, the
    files of later ones are set aside, so that the newest is always the run's own. `best.ckpt` is
    that of the lowest score that `training.keep_best` names.

    Each checkpoint holds the lowest scores so far and the steps at which they were last measured.
    What a stop has left out is measured when the run goes on, so that a stop changes none of it.
    """

    def __init__(self, folder: Path, config: Config, last: Path | None, on_failure: OnFailure):
        self.folder, self.config, self.on_failure = folder, config, on_failure
        self.last, self.began, self._received = last, False, 0
        self._handlers: dict[int, Any] = {}
        self._hosts: Any = None
        self.lowest: dict[str, tuple[float, int]] = {}  # by score: its value and step
        self.kept = "", math.inf  # name and score of best.ckpt
        self.measured: dict[str, int] = {}  # by kind: "validation" or "evaluation"

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Checkpoints":
        """Return a trainer's."""
        return next(c for c in trainer.callbacks if isinstance(c, cls))  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": {**self.lowest}, "kept": self.kept, "measured": {**self.measured}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest, self.kept = state_dict["lowest"], tuple(state_dict["kept"])
        self.measured = state_dict["measured"]

    def record(
        self, trainer: pl.Trainer, kind: str, scores: dict[str, float], how: str = ""
    ) -> None:
        """Note the scores, the same on all ranks, and keep the checkpoint if it is the best.

        Args:
            kind: "validation" or "evaluation". how: scores are compared with those measured so.
        """
        step, chosen = trainer.global_step, self.config.training.keep_best
        self.measured[kind] = step
        for name, value in scores.items():
            if value < self.lowest.get(name, (math.inf, 0))[0]:
                self.lowest[name] = value, step
        name, value = f"{chosen} {how}", scores.get(chosen or "", math.inf)
        if value < (self.kept[1] if name == self.kept[0] else math.inf):
            self.kept = name, value
            trainer.save_checkpoint(self.folder / "best.ckpt")

    def missed(self, kind: str, every: int, step: int) -> bool:
        """Tell whether a stop has left out what was to be measured at a step."""
        return bool(every and step and step % every == 0 and self.measured.get(kind) != step)

    def on_save_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict) -> None:
        checkpoint["hyper_parameters"] = self.config.model_dump(mode="json")
        checkpoint["data"] = trainer.datamodule.fingerprints()  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict) -> None:
        data = trainer.datamodule.fingerprints()  # type: ignore[attr-defined]
        if checkpoint.get("data", data) != data:
            raise ValueError(
                "the images, or their labels, are not those that this run has trained on "
                "(dataset.root): going on would mix the validation set into training; start "
                "another run"
            )
        # Lightning saves in the middle of its batch count; ours are steps, so both are one number
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, checkpoint["global_step"]))
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:  # older ones have none
            self.load_state_dict(state)
            every, step = self.config.evaluation.validate_every, checkpoint["global_step"]
            if self.missed("validation", every, step):  # as if it had stopped within
                progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
                progress["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
                progress["current"] |= dict.fromkeys(progress["current"], 0)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        validation = trainer.datamodule.images["validation"]  # type: ignore[attr-defined]
        if self.config.training.keep_best == "validation" and not len(validation):
            raise ValueError(
                "training.keep_best=validation: there are no validation images; set "
                "dataset.validation_fraction=0.1"
            )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
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
        if trainer.world_size > 1:  # ranks agree through their hosts: nothing waits for a device
            self._hosts = dist.new_group(backend="gloo")
        # Lightning's own exchange of SIGTERM waits for the device before every batch
        assert hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.is_global_zero:
            here = self._path(trainer.global_step)
            for path in saved_steps(self.folder):
                if path.name > here.name:
                    print(f"set aside: {set_aside(path)}")
            if here.exists():
                point_last_to(here)
            for leftover in self.folder.glob(".*.tmp"):
                remove(leftover)

    def _receive(self, signum: int, _: Any) -> None:
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
        """Return the signal that any rank has received, or 0; all ranks ask together."""
        signum = torch.tensor(self._received)
        if self._hosts:
            dist.all_reduce(signum, dist.ReduceOp.MAX, group=self._hosts)
        return int(signum)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step, every = trainer.global_step, self.config.logging.save_every
        due = step == trainer.max_steps or bool(every and step % every == 0)
        self.save(trainer, self.signalled(), due)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self._hosts:  # several ranks wait for the next step
            self.save(trainer, self._received)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DDPM)
        means = module.validation_means.get(("ema", "validation"))
        self.record(trainer, "validation", {"validation": means[0]} if means else {})

    def save(self, trainer: pl.Trainer, signum: int, due: bool = False) -> None:
        """Save where that is due or a signal has come, which then ends training."""
        if not (signum or due):
            return
        path = self._path(trainer.global_step)
        trainer.save_checkpoint(path)
        self.last = path
        if trainer.is_global_zero:
            point_last_to(path)
            for old in saved_steps(self.folder)[: -self.config.logging.keep_checkpoints]:
                remove(old)  # or after the next
            if signum == getattr(signal, "SIGUSR1", None):
                requeue_slurm_job()
        if signum:
            raise Interrupted(signum)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.ckpt"

    def on_exception(self, trainer: pl.Trainer, _: Any, exception: BaseException) -> None:
        self.teardown()
        if isinstance(exception, Interrupted | KeyboardInterrupt):
            return
        if self.on_failure:
            self.on_failure(exception, self.last)
        if trainer.world_size > 1:
            # the other ranks may wait in a collective that never ends: leave, and take them along
            for logger in trainer.loggers:
                logger.finalize("failed")
            if trainer.strategy.launcher:
                trainer.strategy.launcher.kill(signal.SIGKILL)
            sys.stdout.flush()
            os._exit(1 if self.began else 2)

    def teardown(self, *_: Any, **__: Any) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def set_aside(path: Path) -> Path:
    """Rename a file to NAME.aside, or .aside2, ...; return where it is."""
    names = (path.with_name(f"{path.name}.aside{n if n > 1 else ''}") for n in count(1))
    return path.rename(next(name for name in names if not name.exists()))


def requeue_slurm_job() -> None:
    """Put this job back in the queue; run again, it continues by itself (SLURM_RESTART_COUNT)."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"job {job} could not be requeued: {error}")
