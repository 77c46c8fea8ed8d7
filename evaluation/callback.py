"""Measure while training: FID, IS and KID of a few images, and the health of the run."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config import Config
from dataset import Images
from diffusion_utils import GaussianDiffusion
from evaluation.classes import (
    Label,
    as_matrix,
    assign_labels,
    count_labels,
    overall_accuracy,
    share_by_label,
)
from evaluation.copies import find_pairs
from evaluation.distributed import Ranks, reference_statistics
from evaluation.extractor import load_extractor
from evaluation.health import Advice, Health, advice_before, searched_in
from evaluation.metrics import Tally, compute, spread
from evaluation.yardsticks import by_quarter, get_yardsticks
from files import explained
from generation import quick_settings, quick_steps
from generation.recipe import label_vector
from model import at_precision
from pl_utils import DDPM, SAMPLED, VALIDATION_TAGS, quick_images
from training import Checkpoints
from training.monitor import Monitor

BATCH = 64  # images at a time
LABELS = 32  # of which copies are looked for


def draw_together(
    trainer: pl.Trainer, module: DDPM, ranks: Ranks, rows: dict[Label, list[int]]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield this rank's share of the EMA's images, (seeds, uint8 [B, C, H, W]), by {label: seeds}.

    A signal to any rank ends training here, at this step, with everything saved.
    """
    checkpoints, size = Checkpoints.of(trainer), min(BATCH, 4 * (module.micro or BATCH))
    network, classes = at_precision(module.ema, module.precision), module.config.dataset.classes
    for label, batches in share_by_label(ranks, rows, size):
        vector = label_vector(label, classes) if label else None
        drawn = quick_images(module, network, [*chain(*batches)], size, vector)
        for batch in batches:
            checkpoints.save(trainer, checkpoints.signalled())  # all ranks ask together
            if batch:
                yield next(drawn)


class Evaluation(pl.Callback):
    """Logs metrics of a few of the EMA's images, by a fast sampler, on all ranks.

    Labels are drawn as often as training sees them. Like previews it leaves no trace in training:
    seeds are fixed, and everything of the metrics lives here.
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
        self.by_label = assign_labels(self.config.evaluation.evaluate_images, count_labels(images))
        self.console.print(f"evaluation: against {len(images):,} images, by {self.extractor}")
        cache = Path(self.config.dataset.cache)
        self.reference = reference_statistics(images, self.extractor, self.ranks, cache, BATCH)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        every, step = self.config.evaluation.evaluate_every, trainer.global_step
        if Checkpoints.of(trainer).missed("evaluation", every, step):
            self._evaluate(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: object
    ) -> None:
        if trainer.global_step % self.config.evaluation.evaluate_every == 0:
            self._evaluate(trainer, module)

    @torch.inference_mode()
    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step, count = trainer.global_step, self.config.evaluation.evaluate_images
        assert isinstance(module, DDPM)
        tally, lowest = Tally.of(self.extractor, count, self.shape, keep=count), dict[str, float]()
        module.eval()
        for seeds, images in draw_together(trainer, module, self.ranks, self.by_label):
            tally.add(seeds, *self.extractor(images.to(self.ranks.device)))
        self.ranks.add_up(*tally.tensors())
        if self.ranks.is_first:
            steps = quick_steps(module.diffusion)
            by = f"{quick_settings(module.diffusion)['sampler']} {len(steps)}"
            wanted = ("fid", "is", "kid") if tally.classes else ("fid", "kid")
            scores = compute(wanted, tally, self.reference)
            lowest = {metric: scores[name].value for metric in ("fid", "kid")
                      for name in scores if name.lower().startswith(metric)}  # fmt: skip
            scores |= overall_accuracy(tally, as_matrix(self.by_label, self.classes))
            values = {
                f"evaluation/{name if '-' in name else f'{name}-{count}'} {by}": score.value
                for name, score in scores.items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step)
        how = f"of {count} images, {self.extractor}"
        Checkpoints.of(trainer).record(trainer, "evaluation", self.ranks.first(lowest), how)
        module.train()


class HealthCheck(pl.Callback):
    """Says after each validation how the run stands beside the yardsticks of its data.

    They are measured at the start, and kept with the data; in TensorBoard they are runs of their
    own, so that they share the losses' charts. It leaves no trace in training: seeds are fixed.

    Args:
        step: at which training begins.
    """

    def __init__(self, config: Config, console: Console, step: int = 0):
        self.config, self.console = config, console
        every = config.evaluation.validate_every
        last = config.training.max_steps // every * every  # step that is validated
        self.active = last >= max(1, step)
        self.said, self.writers = set[str](), dict[str, SummaryWriter]()

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.active:
            return
        assert isinstance(module, DDPM)
        self.ranks, images = Ranks(trainer), trainer.datamodule.images  # type: ignore[attr-defined]
        self.train = images["train"]
        weights = list(count_labels(self.train).items())
        some = dict(weights[i] for i in spread(LABELS, len(weights)))
        self.by_label = assign_labels(SAMPLED, some)
        if self.ranks.is_first:
            self._measure(images, module.diffusion)

    def _measure(self, images: dict[str, Images], diffusion: GaussianDiffusion) -> None:
        """Measure the yardsticks, and say what they are and what is wrong already."""
        data, T = self.config.dataset, diffusion.timesteps
        known = self.yardsticks = get_yardsticks(
            images, diffusion, flips=data.random_flip, cache=Path(data.cache),
            say=self.console.print,
        )  # fmt: skip
        t = torch.linspace(0, T - 1, min(T, 4000)).round().long()
        alpha_bar, quarter = diffusion.alpha_bar(t).numpy(), t.numpy() * 4 // T
        linear = known.linear(alpha_bar)
        parts = [linear, *(linear[quarter == i] for i in range(4))]
        self.lines = {
            "untrained": [1.0] * 5,
            "best-linear": [float(some.mean()) if len(some) else math.nan for some in parts],
            "memoriser": by_quarter(known.memoriser[0], T),
        }
        found, whole = known.sampled.tolist(), len(self.train)
        part = f" (from {min(found):,} of {whole:,} images)" if min(found) < whole else ""
        self.console.print(
            f"yardsticks{part}: loss {linear.mean():.3g}{known.uncertain(alpha_bar)} for the best "
            f"linear denoiser, {self.lines['memoriser'][0]:.2g} on training images for one that "
            "knows them by heart"
        )
        self.before = [*advice_before(self.config, diffusion, known, whole)]
        self._say(self.before)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.active:
            return
        assert isinstance(module, DDPM)
        samples = torch.zeros(SAMPLED, *self.train.shape, dtype=torch.uint8)
        for seeds, images in draw_together(trainer, module, self.ranks, self.by_label):
            samples[seeds] = images.cpu()
        self.ranks.add_up(samples)
        if not self.ranks.is_first:
            return
        means, lines, step = module.validation_means, dict(self.lines), trainer.global_step
        lines["training-images"] = means["ema", "train"]
        if raw := means.get(("raw", "validation")):
            lines["raw-weights"] = raw
        self._log(trainer, lines, step)
        known, flips = self.yardsticks, self.config.dataset.random_flip
        pairs = find_pairs(samples, self.train, known.distinct, flips, self.ranks.device)
        shares = Monitor.of(trainer).shares
        health = Health(
            config=self.config,
            step=step,
            losses={kind: mean for kind, (mean, *_) in means.items()},
            linear=self.lines["best-linear"][0],
            few=bool(known.few),
            copies=(pairs.copies, SAMPLED),
            validation_copies=(int(known.validation_copies[0]), int(known.validation_copies[1])),
            searched=searched_in(known, len(self.train)),
            clipped=shares["clipped"],
            skipped=shares["skipped"],
            best=Checkpoints.of(trainer).lowest.get("validation"),
            before=self.before,
        )
        self.console.print(f"health at step {step:,}: {health.summary()}")
        self._say(health.advice())

    def _say(self, found: Iterable[Advice]) -> None:
        """Print what has not been said yet."""
        for advice in found:
            if advice.kind not in self.said:
                self.said.add(advice.kind)
                self.console.print(f"advice: {advice.text}")

    def _log(self, trainer: pl.Trainer, lines: dict[str, list[float]], step: int) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                values = {f"val/loss, {name}": line[0] for name, line in lines.items()}
                logger.log_metrics(values, step)
                continue
            with explained(logger.log_dir, kept=False):
                for name, line in lines.items():
                    if name not in self.writers:  # what was logged past the checkpoint goes
                        folder = str(Path(logger.log_dir, "yardsticks", name))
                        self.writers[name] = SummaryWriter(folder, purge_step=step)
                    for tag, value in zip(VALIDATION_TAGS, line, strict=True):
                        self.writers[name].add_scalar(tag, value, step)
                    self.writers[name].flush()

    def teardown(self, *_: object, **__: object) -> None:
        while self.writers:
            self.writers.popitem()[1].close()
