"""The Trainer that drives `DDPM` on `ImageData`: hardware, ranks, loggers, callbacks."""

import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from config import Config
from files import atomic_write, divisors, explained
from pl_utils import Previews
from training.averages import Averages
from training.checkpoints import Checkpoints, OnFailure
from training.fitting import FitIntoMemory
from training.monitor import Monitor
from weights.checkpoint import read_checkpoint, write_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's door to `weights.checkpoint`; it hands over once what is `loaded` already."""

    def __init__(self, loaded: tuple[Path, dict] | None):
        super().__init__()
        self.loaded = loaded

    def save_checkpoint(self, checkpoint: dict, path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict:
        loaded, self.loaded = self.loaded, None
        return loaded[1] if loaded and loaded[0] == Path(path) else read_checkpoint(path)


def build_trainer(
    config: Config,
    run: Path,
    console: Console,
    *,
    loaded: tuple[Path, dict] | None = None,
    on_failure: OnFailure = None,
) -> pl.Trainer:
    """Return a Trainer that drives `DDPM` on `ImageData`; it logs and saves in the folder `run`.

    Args:
        loaded: the path that `fit` will be given, and the checkpoint read from it.

    Raises:
        ValueError: hardware that is not there, or a batch that it cannot share.
    """
    hardware, logging, every = config.hardware, config.logging, config.evaluation.validate_every
    gpus = torch.cuda.device_count() if hardware.accelerator in ("auto", "gpu") else 0
    devices = hardware.devices if hardware.devices != "auto" else max(1, gpus)
    ranks = devices * hardware.num_nodes
    check_launcher(ranks)
    check_division(config.training.batch_size, hardware.micro_batch_size, ranks)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on CUDA
    path, step = (loaded[0], loaded[1]["global_step"]) if loaded else (None, 0)
    ours: list[pl.Callback] = [Averages(config, run)] if config.training.ema_lengths else []
    ours += [
        FitIntoMemory(config, step),
        Monitor(config, run, console),
        Checkpoints(run / "checkpoints", config, path, on_failure),
    ]
    if {*logging.logger} & {"tensorboard", "wandb"}:  # which show images
        ours.append(Previews(config))
    plugins: list[Any] = [AtomicCheckpointIO(loaded)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # `Checkpoints` does, after a step
    try:
        return pl.Trainer(
            accelerator=hardware.accelerator,
            devices=devices,
            num_nodes=hardware.num_nodes,
            strategy=DDPStrategy(broadcast_buffers=False) if ranks > 1 else "auto",
            max_steps=config.training.max_steps,
            max_epochs=-1,
            val_check_interval=every or None,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if every else 0,
            num_sanity_val_steps=0,
            callbacks=ours,
            logger=[build_logger(kind, run, step) for kind in logging.logger],
            plugins=plugins,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        asked = f"hardware.accelerator={hardware.accelerator}, devices={hardware.devices}"
        raise ValueError(f"{asked}: {error}") from None


def build_logger(kind: str, run: Path, step: int) -> Logger:
    """Return a logger of some kind, whose errors of the system name the run's folder."""
    logger: Logger
    if kind == "csv":  # a file for each start: it would overwrite one that is there
        logger = CSVLogger(run, name="csv", version=f"from-step-{step}")
    elif kind == "wandb":
        if not find_spec("wandb"):
            raise ValueError(
                "logging.logger: wandb needs `pip install wandb`, or all of requirements-extras.txt"
            )
        file = run / ".id"  # stays with the folder, so that the page does too
        if not file.exists():
            with atomic_write(file) as temporary:
                temporary.write_text(secrets.token_hex(4))
        name = run.resolve().name
        page = f"{name}-{file.read_text()}"
        logger = WandbLogger(name=name, id=page, save_dir=run, resume="allow")
    else:
        logger = TensorBoardLogger(
            run.parent,
            name=run.name,
            version="",
            default_hp_metric=False,
            purge_step=step + 1 if step else None,  # what was logged past the checkpoint
        )
        logger.save = lambda: None  # type: ignore[method-assign]  # an empty hparams.yaml
    for method in ("log_metrics", "save", "finalize"):
        setattr(logger, method, explained(run, kept=False)(getattr(logger, method)))
    return logger


def check_launcher(ranks: int) -> None:
    """Raise ValueError where torchrun or srun started another number of processes."""
    name = "WORLD_SIZE" if TorchElasticEnvironment.detect() else "SLURM_NTASKS"
    slurm_or_torchrun = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
    launched = int(os.environ.get(name, ranks)) if slurm_or_torchrun else ranks
    if launched != ranks:
        raise ValueError(
            f"{launched} processes were started, and the config has hardware.devices x "
            f"hardware.num_nodes = {ranks}; give both on the command line"
        )


def check_division(batch_size: int, micro_batch_size: int | None, ranks: int) -> None:
    """Raise ValueError, with sizes that would do, where ranks cannot share the global batch."""
    share, rest = divmod(batch_size, ranks)
    if rest:
        near = " or ".join(str(n * ranks) for n in (share, share + 1) if n)
        raise ValueError(
            f"training.batch_size {batch_size} cannot be shared by {ranks} devices; try {near}"
        )
    if micro_batch_size and share % micro_batch_size:
        raise ValueError(
            f"hardware.micro_batch_size {micro_batch_size} does not divide the {share} images of "
            f"each device; these do: {divisors(share)}"
        )
