"""The Trainer that drives `DDPM` on `Data`: hardware, ranks, loggers, callbacks."""

import os
import secrets
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from callbacks import Checkpoints, Monitor, Previews
from checkpoint import read_checkpoint, write_checkpoint
from config import Config, divisors
from evaluation import Evaluation
from files import atomic_write, explained


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's door to `checkpoint.py`."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        return read_checkpoint(path)


def build_trainer(
    config: Config,
    run: Path,
    console: Console,
    *,
    resumed_from: Path | None = None,
    step: int = 0,
    on_failure: Callable | None = None,
) -> pl.Trainer:
    """A Trainer that drives `DDPM` on `Data`; logs and checkpoints go into the folder `run`.

    Args:
        resumed_from, step: the checkpoint that `fit` will be given, and its step.
        on_failure: called with an error and the last checkpoint, before anything is torn down.

    Raises:
        ValueError: hardware that is not there, or a batch that it cannot share.
    """
    training = config.training
    gpus = torch.cuda.device_count() if training.accelerator in ("auto", "gpu") else 0
    devices = training.devices if training.devices != "auto" else max(1, gpus)
    ranks = devices * training.num_nodes
    check_launcher(ranks)
    check_division(training.batch_size, training.micro_batch_size, ranks)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on CUDA
    checkpoints = Checkpoints(run / "checkpoints", training, resumed_from, on_failure)
    callbacks = [Monitor(config, run, console), checkpoints]
    if {*training.logger} & {"tensorboard", "wandb"}:  # which show pictures
        callbacks.append(Previews(training))
    if training.evaluate_every:
        callbacks.append(Evaluation(config, console))
    plugins = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # `Checkpoints` requeues, at a step boundary
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        return pl.Trainer(
            accelerator=training.accelerator,
            devices=devices,
            num_nodes=training.num_nodes,
            strategy=DDPStrategy(broadcast_buffers=False) if ranks > 1 else "auto",
            max_steps=training.max_steps,
            max_epochs=-1,
            val_check_interval=training.validate_every or None,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if training.validate_every else 0,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=[naming(build_logger(kind, run, step), run) for kind in training.logger],
            plugins=plugins,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        asked = f"training.accelerator={training.accelerator}, devices={training.devices}"
        raise ValueError(f"{asked}: {error}") from None


def build_logger(kind: str, run: Path, step: int) -> Logger:
    """Numbers of the same names to TensorBoard, a CSV file, or Weights & Biases."""
    if kind == "csv":  # a file for each start: it would overwrite one that is there
        return CSVLogger(run, name="csv", version=f"from-step-{step}")
    if kind == "wandb":
        if not find_spec("wandb"):
            raise ValueError("training.logger: wandb needs `pip install wandb`")
        name = run.resolve().name
        return WandbLogger(name=name, id=f"{name}-{run_id(run)}", save_dir=run, resume="allow")
    logger = TensorBoardLogger(
        run.parent,
        name=run.name,
        version="",
        default_hp_metric=False,
        purge_step=step + 1 if step else None,  # what was logged past the checkpoint
    )
    logger.save = lambda: None  # it would write an empty hparams.yaml; ours is config.yml
    return logger


def naming(logger: Logger, run: Path) -> Logger:
    """Make errors of the system in `logger` name the run's folder and say what to do."""
    for name in ("log_metrics", "save", "finalize"):
        setattr(logger, name, explained(run, kept=False)(getattr(logger, name)))
    return logger


def run_id(run: Path) -> str:
    """8 hexadecimal digits that stay with the folder, so that a resumed run goes on in its page."""
    file = run / ".id"
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_text(secrets.token_hex(4))
    return file.read_text()


def check_launcher(ranks: int) -> None:
    """Raises ValueError where torchrun or srun started another number of processes."""
    launched = ranks
    if TorchElasticEnvironment.detect():
        launched = int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        launched = int(os.environ.get("SLURM_NTASKS", ranks))
    if launched != ranks:
        raise ValueError(
            f"{launched} processes were started, and the config has training.devices x "
            f"training.num_nodes = {ranks}; say both on the line"
        )


def check_division(batch_size: int, micro_batch_size: int | None, ranks: int) -> None:
    """Raises ValueError, with sizes that would do, where the global batch cannot be shared out."""
    if batch_size % ranks:
        down = batch_size // ranks * ranks
        near = " or ".join(str(size) for size in (down, down + ranks) if size)
        raise ValueError(
            f"training.batch_size {batch_size} cannot be shared by {ranks} devices; try {near}"
        )
    share = batch_size // ranks
    if micro_batch_size and share % micro_batch_size:
        raise ValueError(
            f"training.micro_batch_size {micro_batch_size} does not divide the {share} pictures of "
            f"each device; these do: {divisors(share)}"
        )
