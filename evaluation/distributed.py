"""Numbers of many images by all devices together: each takes a share, then sums are added up."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset import FolderImages, Images
from evaluation.extractor import Extractor
from evaluation.metrics import KEPT, Statistics, Tally, load_statistics, save_arrays

AnyImages = Images | FolderImages
Advance = Callable[[float], object]  # hears how many images more are done
PATIENCE = timedelta(days=7)  # a rank may be slower than the others; that is no failure


class Ranks:
    """This process among those that share the work; they meet through their hosts."""

    def __init__(self, trainer: pl.Trainer):
        self.rank, self.count = trainer.global_rank, trainer.world_size
        self.is_first = trainer.is_global_zero
        self.device = trainer.strategy.root_device
        several = self.count > 1
        self._hosts: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

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
        self, images: Iterable[tuple[list[int], Tensor]], tally: Tally, extractor: Extractor
    ) -> None:
        """Add this rank's images, (rows, uint8 [B, C, H, W]), to a tally; rank 0 then has all."""
        for rows, pixels in images:
            tally.add(rows, *extractor(pixels.to(self.device)))
        self.add_up(*tally.tensors())


# ---- images that are there already


def read(
    images: AnyImages, rows: Sequence[int], batches: Iterable[list[int]], advance: Advance
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (batch, uint8 images) of each batch of positions in `rows` that is not empty."""
    for batch in filter(None, batches):
        yield batch, images[[rows[i] for i in batch]].images
        advance(len(batch))


def reference_statistics(
    images: AnyImages,
    extractor: Extractor,
    ranks: Ranks,
    cache: Path,
    batch_size: int,
    advance: Advance = lambda count: None,
) -> Statistics | None:
    """Return the statistics of real images, kept in `cache`; None on ranks other than 0."""
    count, shape = len(images), images.shape
    key = ["1", images.fingerprint(), count, list(shape), extractor.name, extractor.digest]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache / f"reference-{name}.npz"
    found = None
    if ranks.is_first and path.exists():
        with suppress(ValueError):  # damaged: once more
            found = load_statistics(path)
    if ranks.first(found is not None):
        return found
    tally = Tally.of(extractor, count, shape, keep=KEPT)
    batches = ranks.share(count, batch_size)
    ranks.measure(read(images, range(count), batches, advance), tally, extractor)
    if ranks.is_first:
        found = tally.statistics()
        save_arrays(path, **found._asdict())
    return found


# ---- Lightning starts the ranks


class OnEachDevice(pl.LightningModule):
    """`Trainer.predict` of this calls `work(ranks)` once on each device, with `nets` there."""

    def __init__(self, work: Callable[[Ranks], None], *nets: nn.Module | None):
        super().__init__()
        self.work, self.nets = work, nn.ModuleList(net for net in nets if net)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, *_: Any) -> None:
        self.work(Ranks(self.trainer))


def build_predictor(device: str, devices: int | None) -> pl.Trainer:
    """Build a Trainer for `OnEachDevice`; torchrun and SLURM say themselves how many there are.

    Args:
        device: cpu, cuda, cuda:1 or mps. devices: how many; None is every GPU, or one CPU.
            ValueError where there are fewer.
    """
    kind, _, index = device.replace("cpu:0", "cpu").partition(":")
    nodes = 1
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
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
    except MisconfigurationException as error:
        raise ValueError(f"--device {device}, --devices {devices}: {error}") from None
