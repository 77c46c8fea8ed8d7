"""Numbers of many pictures by all devices together: each takes a share, then sums are added up."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import Checkpoints, preview_steps
from config import Config
from metrics import (
    KEPT,
    Extractor,
    Score,
    Statistics,
    Tally,
    compute,
    load_extractor,
    load_statistics,
    save_statistics,
)

BATCH = 64  # pictures at a time while training
PATIENCE = timedelta(days=7)  # a rank may be slower than the others; that is no failure


class Ranks:
    """This process among those that share the work; they meet through their hosts."""

    def __init__(self, trainer: pl.Trainer):
        self.rank, self.count = trainer.global_rank, trainer.world_size
        self.is_first = trainer.is_global_zero
        self.device = trainer.strategy.root_device
        several = self.count > 1
        self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def share(self, rows: list[int], batch_size: int) -> list[list[int]]:
        """This rank's batches of `rows`: as many as any other's, so that the last may be empty."""
        batches = -(-len(rows) // (self.count * batch_size))
        mine = rows[self.rank :: self.count]
        return [mine[i * batch_size : (i + 1) * batch_size] for i in range(batches)]

    def first(self, value: Any) -> Any:
        """What rank 0 has for `value`."""
        box = [value]
        if self._hosts:
            dist.broadcast_object_list(box, src=0, group=self._hosts)
        return box[0]

    def add_up(self, *tensors: Tensor) -> None:
        """Into those of rank 0, the sums over all ranks."""
        if self._hosts:
            for tensor in tensors:
                dist.reduce(tensor, dst=0, group=self._hosts)


class OnEachDevice(pl.LightningModule):
    """`Trainer.predict` of this calls `work(ranks)` once a device, with `nets` on it."""

    def __init__(self, work: Callable[[Ranks], None], *nets: nn.Module):
        super().__init__()
        self.work, self.nets = work, nn.ModuleList(nets)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([0], batch_size=None)

    def predict_step(self, *_) -> None:
        self.work(Ranks(self.trainer))


def build_predictor(device: str, devices: int | None) -> pl.Trainer:
    """A Trainer for `OnEachDevice`; torchrun and SLURM say themselves how many there are.

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


class RealPictures(Protocol):
    """`dataset.Pictures`, or files read as they are asked for."""

    shape: tuple[int, int, int]  # C, H, W

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int]) -> Tensor: ...  # uint8 [B, C, H, W]

    def fingerprint(self) -> str: ...


def measure(
    pictures: Callable[[list[int]], Tensor],
    rows: list[int],
    tally: Tally,
    extractor: Extractor,
    ranks: Ranks,
    *,
    batch_size: int,
    progress: Callable = iter,
) -> Tally:
    """`tally`, which holds on rank 0 what the metrics need to know of the pictures `rows`.

    Args:
        pictures: rows -> uint8 [B, C, H, W].
        rows: from 0 to tally.count - 1, each once, in the order of the work.
        progress: wraps the list of this rank's batches.
    """
    for batch in progress(ranks.share(rows, batch_size)):
        if batch:
            tally.add(batch, *extractor(pictures(batch).to(ranks.device)))
    ranks.add_up(*tally.tensors())
    return tally


def reference_statistics(
    pictures: RealPictures, extractor: Extractor, ranks: Ranks, cache: Path, **options
) -> Statistics | None:
    """Statistics of real pictures, kept in `cache`; None on ranks other than 0.

    Options are those of `measure`.
    """
    count, shape = len(pictures), list(pictures.shape)
    key = ["1", pictures.fingerprint(), count, shape, extractor.name, extractor.digest]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache / f"reference-{name}.npz"
    found = None
    if ranks.is_first and path.exists():
        with suppress(ValueError):  # damaged: once more
            found = load_statistics(path)
    if ranks.first(found is not None):
        return found
    tally = extractor.new_tally(count, pictures.shape, keep=KEPT)
    measure(pictures.__getitem__, list(range(count)), tally, extractor, ranks, **options)
    if not ranks.is_first:
        return None
    statistics = tally.statistics()
    save_statistics(path, statistics)
    return statistics


def measure_likelihood(
    ddpm,
    pictures: Callable[[list[int]], Tensor],
    count: int,
    ranks: Ranks,
    *,
    seed: int,
    batch_size: int,
    stride: int,
    progress: Callable = iter,
):
    """The `likelihood.Bound` of `count` pictures, on rank 0; row i has the noise of `seed` + i."""
    from likelihood import Bound, bits_per_dim

    found = []
    few = max(1, batch_size // 16)  # pictures at a time, several t of each in a network call
    for batch in progress(ranks.share(list(range(count)), few)):
        if batch:
            seeds = [seed + i for i in batch]
            x_0 = pictures(batch)
            options = dict(batch_size=batch_size, stride=stride)
            found.append((batch, bits_per_dim(ddpm, x_0.to(ddpm.device), seeds, **options)))
    t = ranks.first(found[0][1].t.cpu() if found else None)
    bits, mse = torch.zeros(2, count, len(t), dtype=torch.float64)
    prior = torch.zeros(count, dtype=torch.float64)
    for batch, bound in found:
        bits[batch], mse[batch] = bound.bits.cpu(), bound.mse.cpu()
        prior[batch] = bound.prior.cpu()
    ranks.add_up(bits, mse, prior)
    return Bound(t, bits, mse, prior)


def likelihood_scores(bound, *, stride: int, timesteps: int) -> dict[str, Score]:
    """Bits/dim of a `likelihood.Bound`: their sum, and the rate and distortion that it is made of.

    Where t were left out, the terms between are interpolated, and the names say so.
    """
    t = bound.t.numpy()
    every = np.arange(1, min(timesteps - 1, t[-1] + stride - 1) + 1)
    # what each kept t > 0 stands for: 1 where none is left out
    share = np.stack([np.interp(every, t[1:], unit) for unit in np.eye(len(t) - 1)]).sum(axis=1)
    rate = bound.prior + bound.bits[:, 1:] @ torch.from_numpy(share)
    distortion = bound.bits[:, 0]
    mark = "" if stride == 1 else f"-estimate (stride {stride})"
    parts = {
        "NLL" if not mark else f"nll{mark}": rate + distortion,
        f"rate{mark}": rate,
        "distortion": distortion,
        "prior": bound.prior,
    }
    count = len(bound.prior)
    error_is = f"standard error over {count} pictures"
    error = lambda bits: (bits.std() / count**0.5).item() if count > 1 else None
    return {name: Score(bits.mean().item(), error(bits), error_is) for name, bits in parts.items()}


class Evaluation(pl.Callback):
    """FID and what goes with it of a few pictures while training, by a fast sampler, on all ranks.

    Like previews it leaves no trace in training: the average samples from fixed seeds, and
    everything of the metrics lives here. A signal ends it, and is obeyed after the step.
    """

    def __init__(self, config: Config, console: Console):
        self.config, self.training, self.console = config, config.training, console
        self.extractor = load_extractor(config.training.extractor)

    @torch.inference_mode()
    def on_fit_start(self, trainer, module) -> None:
        self.ranks = Ranks(trainer)
        self.extractor.to(self.ranks.device)
        pictures, data = trainer.datamodule.pictures["train"], self.config.dataset
        self.console.print(f"evaluation: against {len(pictures):,} pictures, by {self.extractor}")
        self.reference = reference_statistics(
            pictures, self.extractor, self.ranks, Path(data.cache), batch_size=BATCH
        )

    @torch.inference_mode()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        every, step = self.training.evaluate_every, trainer.global_step
        if step % every:
            return
        count, shape = self.training.evaluate_images, trainer.datamodule.pictures["train"].shape
        steps = preview_steps(module.diffusion)
        tally = self.extractor.new_tally(count, shape, keep=count)
        checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
        module.eval()
        net = module.sampling_net()
        for rows in self.ranks.share(list(range(count)), BATCH):
            if checkpoints.signalled():
                break
            if rows:
                tally.add(rows, *self.extractor(module.sample(steps, rows, net=net)))
        else:
            self.ranks.add_up(*tally.tensors())
            if self.ranks.is_first:
                self._log(trainer, tally, f"dpm++ {len(steps)}")
        module.train()

    def _log(self, trainer, tally: Tally, sampler: str) -> None:
        wanted = ("fid", "is", "kid") if tally.classes else ("fid", "kid")
        scores = compute(wanted, tally, self.reference)
        found = {
            f"evaluation/{name if '-' in name else f'{name}-{tally.count}'} {sampler}": score.value
            for name, score in scores.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
