"""Numbers of many images by all devices together: each takes a share, then sums are added up."""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evaluation.extractor import Extractor
from evaluation.metrics import Tally

PATIENCE = timedelta(days=7)  # a rank may be slower than the others; that is no failure


class Ranks:
    """This process among those that share the work; they meet through their hosts."""

    def __init__(self, trainer: pl.Trainer):
        self.rank, self.count = trainer.global_rank, trainer.world_size
        self.is_first = trainer.is_global_zero
        self.device = trainer.strategy.root_device
        several = self.count > 1
        self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def share(self, count: int, batch_size: int) -> list[list[int]]:
        """Return this rank's batches of range(count), as many as others': the last may be empty.

        They depend on nothing else, so that sums always end in the same digits.
        """
        batches = -(-count // (self.count * batch_size))
        mine = list(range(self.rank, count, self.count))
        return [mine[i * batch_size : (i + 1) * batch_size] for i in range(batches)]

    def first(self, value: Any) -> Any:
        """Return what rank 0 has for `value`."""
        box = [value]
        if self._hosts:
            dist.broadcast_object_list(box, src=0, group=self._hosts)
        return box[0]

    def add_up(self, *tensors: Tensor) -> None:
        """Replace the tensors of rank 0 by their sums over all ranks."""
        if self._hosts:
            for tensor in tensors:
                dist.reduce(tensor, dst=0, group=self._hosts)

    def measure(
        self,
        images: Iterable[tuple[list[int], Tensor]],
        tally: Tally,
        extractor: Extractor,
        *,
        first: int = 0,
    ) -> None:
        """Fill a tally, which then holds on rank 0 what the metrics need of all ranks' images.

        Args:
            images: this rank's, as (seeds or rows, uint8 [B, C, H, W]): a model's, a folder's, a
                dataset's.
            first: the seed or row of the first of all.
        """
        for rows, pixels in images:
            tally.add([row - first for row in rows], *extractor(pixels.to(self.device)))
        self.add_up(*tally.tensors())


class OnEachDevice(pl.LightningModule):
    """`Trainer.predict` of this calls `work(ranks)` once on each device, with `nets` there."""

    def __init__(self, work: Callable[[Ranks], None], *nets: nn.Module):
        super().__init__()
        self.work, self.nets = work, nn.ModuleList(nets)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, *_: Any) -> None:
        self.work(Ranks(self.trainer))


def build_predictor(device: str, devices: int | None) -> pl.Trainer:
    """Build a Trainer for `OnEachDevice`; torchrun and SLURM say themselves how many there are.

    Args:
        device: cpu, cuda, cuda:1 or mps. devices: how many; None is every GPU, or one CPU.

    Raises:
        ValueError: there are not so many.
    """
    kind, _, index = device.partition(":")
    index, nodes = index if kind != "cpu" else "", 1
    if TorchElasticEnvironment.detect():
        devices, nodes = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        devices = int(os.environ["SLURM_NTASKS"]) // nodes
    if index and (devices or 1) * nodes > 1:
        raise ValueError(f"--device {device} is one device, and {devices} are asked for")
    devices = devices or (torch.cuda.device_count() if kind == "cuda" and not index else 1)
    try:
        return pl.Trainer(
            accelerator={"cuda": "gpu"}.get(kind, kind),
            devices=[int(index)] if index else devices,
            num_nodes=nodes,
            strategy=DDPStrategy(timeout=PATIENCE) if devices * nodes > 1 else "auto",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise ValueError(f"--device {device}, --devices {devices}: {error}") from None
