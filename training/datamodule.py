"""Lightning's side of the data: uint8 batches, addressed by step."""

import os
import signal
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.queues import Queue

import numpy as np
import pytorch_lightning as pl
import torch
from rich.progress import track
from torch.utils.data import DataLoader

from config import Config
from dataset import Images, StepSampler, load_images


class ImageData(pl.LightningDataModule):
    """A run's `images`, {"train": ..., "validation": ...}, in batches of the global batch."""

    images: dict[str, Images]
    measured_splits: list[str]  # splits whose losses are measured, in the order of their loaders

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def prepare_data(self) -> None:
        """Download and decode whatever is missing; Lightning calls it once on each node."""
        open_images(self.config, partial(track, description="Decoding images", transient=True))

    def setup(self, stage: str | None = None) -> None:
        self.images = open_images(self.config)

    def fingerprints(self) -> dict[str, str]:
        """Return what identifies the images of each split."""
        found = {split: images.fingerprint() for split, images in self.images.items()}
        if self.config.dataset.labels:
            found["labels"] = self.images["train"].labels_fingerprint()
        return found

    def train_dataloader(self) -> DataLoader:
        """Return this rank's shares of the batches from the current step on, without end."""
        trainer = self.trainer
        assert trainer
        ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        return train_batches(self.images["train"], self.config, trainer.global_step, **ranks)

    def val_dataloader(self) -> list[DataLoader]:
        """Return this rank's batches, at least an empty one, of each of `measured_splits`.

        Those are the validation images, if there are any, and as many training images.
        """
        assert self.trainer
        train, validation = self.images["train"], self.images["validation"]
        some = np.linspace(0, len(train) - 1, min(len(train), len(validation) or 1000))
        parts = {"validation": validation, "train": train.of(some.round().astype(int))}
        self.measured_splits = [split for split, images in parts.items() if len(images)]
        loaders, size = [], self.config.training.batch_size
        for split in self.measured_splits:
            rows = range(len(parts[split]))
            batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
            # every rank takes part, and waits for none
            mine = batches[self.trainer.global_rank :: self.trainer.world_size] or [[]]
            loaders.append(_loader(parts[split], mine, self.config))
        return loaders


def open_images(config: Config, progress: Callable | None = None) -> dict[str, Images]:
    """Return a run's images by split; `progress` wraps the decoding of those not in the cache."""
    return load_images(**config.dataset.model_dump(exclude={"random_flip"}), progress=progress)


def train_batches(images: Images, config: Config, step: int = 0, **ranks: int) -> DataLoader:
    """Return a loader of the batches from `step` on, without end; `ranks`: rank, world_size."""
    size, seed = config.training.batch_size, config.training.seed
    sampler = StepSampler(count=len(images), batch_size=size, seed=seed, start_step=step, **ranks)
    return _loader(images, sampler, config)


def _loader(images: Images, batches: Iterable[list[int]], config: Config) -> DataLoader:
    return DataLoader(
        images,
        batch_size=None,  # the sampler yields whole batches
        sampler=batches,
        num_workers=config.hardware.num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
    )


def _begin_worker(_: int) -> None:
    """Ignore what a terminal and SLURM send to every process: the parent still ends its step.

    A batch that cannot be handed over, as where /dev/shm is full, ends the worker, which the parent
    sees: the queue would drop it, and the parent wait for it for ever.
    """
    for signum in {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"} & set(dir(signal)):  # Windows: some
        signal.signal(getattr(signal, signum), signal.SIG_IGN)
    Queue._on_queue_feeder_error = lambda *_: os._exit(1)  # type: ignore[attr-defined]  # private
