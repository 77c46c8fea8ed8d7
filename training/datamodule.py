"""Lightning's side of the data: uint8 batches, addressed by step."""

import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
from rich.progress import track
from torch.utils.data import DataLoader

from config import Config
from dataset import Pictures, StepSampler, load_pictures


class Data(pl.LightningDataModule):
    """uint8 batches of the global batch, addressed by step."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.pictures: dict[str, Pictures] = {}

    def prepare_data(self) -> None:  # once a node: whatever is fetched or decoded
        self._load(progress=partial(track, description="Decoding pictures", transient=True))

    def setup(self, stage: str | None = None) -> None:
        self.pictures = self._load()

    def _load(self, progress=None) -> dict[str, Pictures]:
        keys = self.config.dataset.model_dump(exclude={"random_flip"})
        return load_pictures(**keys, progress=progress)

    def fingerprints(self) -> dict[str, str]:
        return {split: pictures.fingerprint() for split, pictures in self.pictures.items()}

    def train_dataloader(self) -> DataLoader:
        return self._loader(
            self.pictures["train"],
            StepSampler(
                count=len(self.pictures["train"]),
                batch_size=self.config.training.batch_size,
                seed=self.config.training.seed,
                start_step=self.trainer.global_step,
                rank=self.trainer.global_rank,
                world_size=self.trainer.world_size,
            ),
        )

    def val_dataloader(self) -> DataLoader:
        rows = range(len(self.pictures["validation"]))
        size = self.config.training.batch_size
        batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        mine = batches[self.trainer.global_rank :: self.trainer.world_size]
        if batches and not mine:
            mine = [[]]  # every rank takes part, and waits for none
        return self._loader(self.pictures["validation"], mine)

    def _loader(self, pictures: Pictures, batches) -> DataLoader:
        return DataLoader(
            pictures,
            batch_size=None,  # the sampler yields whole batches
            sampler=batches,
            num_workers=self.config.training.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_the_parent,
        )


def leave_signals_to_the_parent(_: int) -> None:
    """A terminal and SLURM signal every process; workers must outlive it to end the step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):  # Windows lacks some
            signal.signal(getattr(signal, name), signal.SIG_IGN)


# ---- a look at what is there already


class NotDecoded(Exception):
    """The pictures are not in the cache yet."""


def refuse_to_decode(*_, **__):
    raise NotDecoded("they are not decoded yet")


def open_data(config: Config, ranks: int) -> tuple[Data, str]:
    """The run's data; or random pictures of its shape, and why: nothing is fetched or decoded."""
    data, keys, reason = Data(config), config.dataset, ""
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=ranks)
    try:
        if keys.name != "digits" and not Path(keys.root).exists():
            raise FileNotFoundError(f"{keys.root} (dataset.root) does not exist")
        data.pictures = data._load(progress=refuse_to_decode)
    except (FileNotFoundError, NotDecoded) as error:
        reason = str(error).partition(";")[0]
        shape = (config.training.batch_size, keys.channels, keys.image_size, keys.image_size)
        random = torch.randint(0, 256, shape, dtype=torch.uint8).numpy()
        data.pictures = {"train": Pictures(random), "validation": Pictures(random[:0])}
    return data, reason
