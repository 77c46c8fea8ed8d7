"""FID, IS and KID of a few images while training."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console

from config import Config
from evaluation.classes import (
    as_matrix,
    assign_labels,
    overall_accuracy,
    rows_by_label,
    share_by_label,
)
from evaluation.distributed import Ranks, reference_statistics
from evaluation.extractor import load_extractor
from evaluation.metrics import Tally, compute
from generation import quick_steps
from generation.recipe import label_vector
from model import at_precision
from pl_utils import DDPM, quick_images
from training import Checkpoints

BATCH = 64  # images at a time


class Evaluation(pl.Callback):
    """Logs metrics of a few of the EMA's images, by a fast sampler, on all ranks.

    Labels are drawn as often as training sees them. Like previews it leaves no trace in training:
    seeds are fixed, and everything of the metrics lives here. A signal ends it, and is obeyed
    after the step.
    """

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.extractor = load_extractor(config.evaluation.extractor)

    @torch.inference_mode()
    def on_fit_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        self.ranks = Ranks(trainer)
        self.extractor.to(self.ranks.device)
        images = trainer.datamodule.images["train"]  # type: ignore[attr-defined]
        self.shape, self.classes = images.shape, images.classes
        found = rows_by_label(images, range(len(images)))
        weights = {label: len(rows) for label, rows in found.items()}
        self.by_label = assign_labels(self.config.evaluation.evaluate_images, weights)
        self.console.print(f"evaluation: against {len(images):,} images, by {self.extractor}")
        cache = Path(self.config.dataset.cache)
        self.reference = reference_statistics(images, self.extractor, self.ranks, cache, BATCH)

    @torch.inference_mode()
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: object
    ) -> None:
        step, count = trainer.global_step, self.config.evaluation.evaluate_images
        if step % self.config.evaluation.evaluate_every:
            return
        assert isinstance(module, DDPM)
        tally = Tally.of(self.extractor, count, self.shape, keep=count)
        module.eval()
        for batch, drawn in self._batches(module):
            if Checkpoints.of(trainer).signalled():  # all ranks ask together
                break
            if batch:
                seeds, images = next(drawn)
                tally.add(seeds, *self.extractor(images.to(self.ranks.device)))
        else:
            self.ranks.add_up(*tally.tensors())
            if self.ranks.is_first:
                by = f"dpm++ {len(quick_steps(module.diffusion))}"
                wanted = ("fid", "is", "kid") if tally.classes else ("fid", "kid")
                scores = compute(wanted, tally, self.reference)
                scores |= overall_accuracy(tally, as_matrix(self.by_label, self.classes))
                values = {
                    f"evaluation/{name if '-' in name else f'{name}-{count}'} {by}": score.value
                    for name, score in scores.items()
                }
                for logger in trainer.loggers:
                    logger.log_metrics(values, step)
        module.train()

    def _batches(self, module: DDPM) -> Iterator[tuple[list[int], Iterator]]:
        """Yield this rank's batches, as many as others', each with what makes its images next."""
        network = at_precision(module.ema, module.precision)
        for label, batches in share_by_label(self.ranks, self.by_label, BATCH):
            vector = label_vector(label, self.classes) if label else None
            drawn = quick_images(module, network, [*chain(*batches)], BATCH, vector)
            yield from ((batch, drawn) for batch in batches)
