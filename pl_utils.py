"""The LightningModule: one training step, EMA and validation; and the sample-logging callback.

Everything random in a step is drawn from (seed, step) for the whole global batch, and each rank
takes its rows; the order of the data is a function of the step too. So a run is a function of its
config: stopping, resuming, validating and looking at samples leave no trace in it.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import Config
from dataset import Batch
from diffusion_utils import (
    CELLS,
    LOSS_WEIGHTS,
    T_DENSITIES,
    GaussianDiffusion,
    cell_edges,
    from_uint8,
)
from files import explained
from generation import generate, make_denoiser, quick_steps, resolve_precision
from generation.images import image_grid
from model import Network, at_precision, build_network, exact_float32
from optim import DECAYS, OPTIMIZERS, RATE_DECAYS, initial_share

VALIDATION_TAGS = "val/loss", *(f"val/loss by t/{quarter} of 4" for quarter in range(1, 5))
SAMPLED = 256  # images that are looked at after each validation, for copies
INITIAL, TRAIN, DROPOUT, VALIDATE = range(4)  # streams of random numbers


def seed_of(*key: int) -> int:
    """Return a well-mixed seed below 2^63 from a few small integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def seed_device(device: torch.device, seed: int) -> None:
    """Do what `torch.manual_seed` does, for one device: for all of them it takes a millisecond."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class Draws(NamedTuple):
    """All that is random in a batch of B images, but dropout."""

    t: Tensor  # [B]
    eps: Tensor  # [B, C, H, W]
    mirrored: Tensor  # bool [B]
    labelled: Tensor  # bool [B]: whose label the network is told


class DDPM(pl.LightningModule):
    """The network, its EMA, and one training step (Algorithm 1).

    `unet` is what trains; `ema` is a second network that follows it and is what samples. The two
    are never exchanged.
    """

    loss_weight: Tensor
    t_edges: Tensor
    tally: Tensor
    streak: Tensor
    longest_streak: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.automatic_optimization = False  # one batch is one update, micro-batches included
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.training.seed, INITIAL))
            unet = build_network(config)
        self.unet = unet.to(memory_format=torch.channels_last)  # convolutions are fastest in it
        self.ema = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.diffusion = GaussianDiffusion(**config.diffusion.model_dump())
        self.micro = config.hardware.micro_batch_size  # images at a time; None is a rank's share
        learn = config.training
        gamma = {} if learn.loss_weight_gamma is None else {"gamma": learn.loss_weight_gamma}
        weight = self.diffusion.column(LOSS_WEIGHTS[learn.loss_weight], **gamma).float()
        normal = {"mean": learn.t_density_mean, "width": learn.t_density_width}
        edges = cell_edges(self.diffusion.column(T_DENSITIES[learn.t_density], **normal))
        # sums since the last log: loss, gradient norm, steps; skipped steps, clipped ones
        zero = torch.zeros(())
        sums = {"tally": torch.zeros(5), "streak": zero, "longest_streak": zero.clone()}
        for name, tensor in {"loss_weight": weight, "t_edges": edges, **sums}.items():
            self.register_buffer(name, tensor, persistent=False)

    def train(self, mode: bool = True) -> "DDPM":
        """Set the mode of `unet`; the EMA never drops out."""
        super().train(mode)
        self.ema.eval()
        return self

    # ---- training

    @property
    def precision(self) -> str:
        """The precision of training steps and previews here: "float32" or "bfloat16"."""
        return resolve_precision(self.config, self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # fused: one kernel, and it skips an update on the device when told `found_inf`
        return OPTIMIZERS[self.config.training.optimizer](
            self.unet.parameters(), lr=self.learning_rate(0), betas=(0.9, 0.999), fused=True
        )

    @cached_property
    def _ema_weights(self) -> list[Tensor]:
        # walking through the modules for them takes milliseconds of each step
        return list(self.ema.parameters())

    def learning_rate(self, step: int) -> float:
        """Return the step's rate: linear from 0, which the first update has, then a decay's."""
        learn = self.config.training
        rate, warmup = learn.learning_rate, learn.warmup_steps
        if step < warmup:
            return rate * step / warmup
        return rate * RATE_DECAYS[learn.learning_rate_decay](step, warmup, learn.max_steps)

    def draw(self, stream: int, index: int, count: int) -> "Draws":
        """Draw what is random in one whole batch."""
        generator = torch.Generator(self.device)
        generator.manual_seed(seed_of(self.config.training.seed, stream, index))
        data, T = self.config.dataset, self.diffusion.timesteps
        t = torch.randint(T, (count,), generator=generator, device=self.device)
        coin = torch.rand(count, generator=generator, device=self.device)
        eps = torch.randn((count, *data.shape), generator=generator, device=self.device)
        kept = torch.rand(count, generator=generator, device=self.device)
        # the coin's side decides the flip, what lies below it where in the step's cells t falls
        cell = t * CELLS + ((2 * coin) % 1 * CELLS).long()
        if stream == TRAIN:  # validation is the same for all densities
            if self.config.training.t_stratified:
                cell = (torch.arange(count, device=self.device) * (T * CELLS) + cell) // count
            t = torch.searchsorted(self.t_edges, cell, right=True)
        return Draws(t, eps, coin < 0.5, kept >= self.config.training.label_dropout)

    def training_step(self, batch: Batch, _: int) -> None:
        """Make one update from this rank's share of the global batch."""
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self.update(
            batch,
            optimizer.optimizer,
            step=self.global_step,
            rank=self.global_rank,
            backward=self.manual_backward,
            alone=getattr(strategy, "block_backward_sync", nullcontext),  # DDP's
            update=optimizer.step,
        )

    def update(
        self,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        rank: int = 0,
        backward: Callable[[Tensor], None] = Tensor.backward,
        alone: Callable[[], AbstractContextManager] = nullcontext,
        update: Callable[[], object] | None = None,
    ) -> None:
        """Make Algorithm 1's update on one batch; nothing waits for the device.

        Args:
            batch: this rank's share; images uint8 [B / ranks, C, H, W].
            backward: a loss's gradients. alone: a context in which it does not meet other ranks.
            update: `optimizer.step`, where a driver has wrapped it.
        """
        config, count = self.config.training, len(batch.images)
        share = slice(rank * count, (rank + 1) * count)
        draws = self.draw(TRAIN, step, config.batch_size)
        t, eps, mirrored, labelled = (draw[share] for draw in draws)
        x_0 = from_uint8(batch.images)
        labels = None if batch.labels is None else batch.labels * labelled[:, None]
        if self.config.dataset.random_flip:
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)

        micro = self.micro or count
        mean_loss = torch.zeros((), device=self.device)
        for i in range(0, count, micro):
            seed_device(self.device, seed_of(config.seed, DROPOUT, step, rank, i))
            rows = slice(i, i + micro)
            with nullcontext() if i + micro >= count else alone():
                network = partial(
                    self.train_network, labels=None if labels is None else labels[rows]
                )
                losses = self.diffusion.training_loss(
                    network, x_0[rows], t[rows], eps[rows], self.loss_weight
                )
                loss = losses.sum() / count
                # a loss that is not finite makes every gradient so, and by that reaches every rank
                backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan).detach())
            mean_loss += loss.detach()

        weights = optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(weights, config.gradient_clip_norm or math.inf)
        fine = norm.isfinite()
        skip = (~fine).float()
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if skips_on_device(self.device):
            # 1: weights and moments stay, with no host sync
            optimizer.found_inf = skip  # type: ignore[attr-defined]
        elif skip:
            optimizer.zero_grad()  # Adam passes over what has no gradient
        (update or optimizer.step)()
        optimizer.zero_grad()
        decay = DECAYS[config.ema](config, step + 1)
        get_ema_multi_avg_fn(decay)(self._ema_weights, weights, None)

        self.streak.add_(1).mul_(skip)
        torch.maximum(self.longest_streak, self.streak, out=self.longest_streak)
        loss, norm = torch.where(fine, mean_loss, 0.0), torch.where(fine, norm, 0.0)
        clipped = (norm > (config.gradient_clip_norm or math.inf)).float()
        self.tally += torch.stack([loss, norm, 1 - skip, skip, clipped])

    def train_network(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the prediction of the weights that train, in the precision of training."""
        bf16 = self.precision == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return self.unet(x, t, labels)

    # ---- validation: the same t and noise every time, in float32, for as many training images too

    def on_validation_epoch_start(self) -> None:
        splits = self.trainer.datamodule.measured_splits  # type: ignore[attr-defined]
        kinds = product(compared_weights(self.config, self.trainer.global_step), splits)
        zeros = torch.zeros(2, 4, device=self.device)  # losses and counts, by quarter of t
        self._quarters = {kind: zeros.clone() for kind in kinds}

    def validation_losses(self, network: Callable, batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
        """Return a network's error of eps of each image, [B]; images: uint8 [B, C, H, W]."""
        micro, losses = self.micro or self.config.training.batch_size, []
        with exact_float32():
            for i in range(0, len(t), micro):
                rows = slice(i, i + micro)
                labels = None if batch.labels is None else batch.labels[rows]
                x_0, F = from_uint8(batch.images[rows]), partial(network, labels=labels)
                losses.append(self.diffusion.loss(F, x_0, t[rows], eps[rows]))
        return torch.cat(losses)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        count, ranks = len(batch.images), self.trainer.world_size
        if not count:  # a rank with no share
            return
        t, eps, *_ = self.draw(VALIDATE, batch_idx * ranks + self.global_rank, count)
        quarter = t * 4 // self.diffusion.timesteps
        measured = self.trainer.datamodule.measured_splits[dataloader_idx]  # type: ignore[attr-defined]
        for (weights, split), sums in self._quarters.items():
            if split == measured:
                # not compiled once more, for one that evaluates
                network = self.ema if weights == "ema" else self.unet.forward
                losses = self.validation_losses(network, batch, t, eps)
                sums.index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))

    def on_validation_epoch_end(self) -> None:
        self.validation_means: dict[tuple[str, str], list[float]] = {}
        for kind, quarters in self._quarters.items():
            sums, counts = self.trainer.strategy.reduce(quarters, reduce_op="sum")
            mean = (sums.sum() / counts.sum()).item()
            self.validation_means[kind] = [mean, *(sums / counts).tolist()]
        if measured := self.validation_means.get(("ema", "validation")):
            metrics = dict(zip(VALIDATION_TAGS, measured, strict=True))
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, self.global_step)


def skips_on_device(device: torch.device) -> bool:
    """Tell whether fused Adam obeys `found_inf` there; on MPS it takes it and drops it."""
    return device.type in ("cpu", "cuda")


# ---- samples while training


def quick_images(
    module: DDPM,
    network: Network,
    seeds: list[int],
    batch_size: int = 64,
    label: Tensor | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (seeds, images) as previews and evaluations while training draw them."""
    steps = quick_steps(module.diffusion)
    denoiser = make_denoiser(
        at_precision(network, module.precision),
        module.diffusion,
        times=[step.t for step in steps],
        label=label,
    )
    where: dict[str, Any] = {"shape": module.config.dataset.shape, "device": module.device}
    return generate(denoiser, steps, seeds, batch_size=batch_size, **where)


class Previews(pl.Callback):
    """Logs a grid of images from fixed seeds by 10 steps of UniPC, under one tag.

    With labels it has a row for each of up to 16 classes, all from the same seeds. While the EMA
    still remembers the initial weights, the raw weights' grid stands beside it.
    """

    def __init__(self, config: Config):
        self.config = config

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: object
    ) -> None:
        every, step = self.config.logging.preview_every, trainer.global_step
        if not every or step % every or not trainer.is_global_zero:
            return
        assert isinstance(module, DDPM)
        module.eval()
        for weights in compared_weights(self.config, step):
            network = module.ema if weights == "ema" else module.unet
            grid = preview_grid(module, network, self.config.logging.preview_images)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    with explained(logger.log_dir, kept=False):
                        logger.experiment.add_image(f"samples/{weights}", grid, step)
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"samples/{weights}", [grid.permute(1, 2, 0).numpy()], step)
        module.train()


def preview_grid(module: DDPM, network: Network, count: int) -> Tensor:
    """Return uint8 [3, H, W] of so many images; of at least two for each class that is shown."""
    classes = len(module.config.dataset.classes)
    shown = np.linspace(0, classes - 1, min(classes, 16)).round().astype(int)
    labels = torch.eye(classes)[shown] if classes else [None]
    columns = max(2, count // len(labels)) if classes else count
    seeds, network = list(range(columns)), at_precision(network, module.precision)
    images = [x for label in labels for _, x in quick_images(module, network, seeds, label=label)]
    return image_grid(torch.cat(images), columns if classes else None)


def compared_weights(config: Config, step: int) -> tuple[str, ...]:
    """Return whose previews and losses are logged: raw ones too while over 1% of EMA is initial."""
    return ("ema", "raw") if initial_share(config.training, step) > 0.01 else ("ema",)
