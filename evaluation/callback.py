"""What is measured while training: FID, IS and KID of a few images; how healthy the run is."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from config import Config
from evaluation.classes import (
    as_matrix,
    assign_labels,
    count_labels,
    overall_accuracy,
    share_by_label,
)
from evaluation.distributed import Ranks, reference_statistics
from evaluation.extractor import load_extractor
from evaluation.health import Advice, Health, advice_before
from evaluation.metrics import Tally, compute
from evaluation.yardsticks import by_quarter, find_pairs, get_yardsticks
from files import explained
from generation import quick_steps
from generation.recipe import label_vector
from model import at_precision
from pl_utils import DDPM, SAMPLED, VALIDATION_TAGS, quick_images
from training import Checkpoints
from training.monitor import Monitor

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
        checkpoints, lowest = Checkpoints.of(trainer), dict[str, float]()
        tally = Tally.of(self.extractor, count, self.shape, keep=count)
        module.eval()
        for batch, drawn in self._batches(module):
            if checkpoints.signalled():  # all ranks ask together
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
                lowest = {name.partition("-")[0].lower(): s.value for name, s in scores.items()}
            checkpoints.hear(trainer, "evaluation", self.ranks.first(lowest))
        module.train()

    def _batches(self, module: DDPM) -> Iterator[tuple[list[int], Iterator]]:
        """Yield this rank's batches, as many as others', each with what makes its images next."""
        network = at_precision(module.ema, module.precision)
        for label, batches in share_by_label(self.ranks, self.by_label, BATCH):
            vector = label_vector(label, self.classes) if label else None
            drawn = quick_images(module, network, [*chain(*batches)], BATCH, vector)
            yield from ((batch, drawn) for batch in batches)


class HealthCheck(pl.Callback):
    """Says after each validation how the run stands beside the yardsticks of its data.

    They are measured at the start, and kept with the data; in TensorBoard they are runs of their
    own, so that they share the losses' charts. It leaves no trace in training: seeds are fixed, and
    rank 0 alone draws images.
    """

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.said, self.writers = set[str](), dict[str, SummaryWriter]()

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DDPM)
        config, every = self.config, self.config.evaluation.validate_every
        last = config.training.max_steps // every * every  # step that is validated
        self.active = last >= max(1, trainer.global_step)
        if not (self.active and trainer.is_global_zero):
            return
        self.images = trainer.datamodule.images  # type: ignore[attr-defined]
        known = self.yardsticks = get_yardsticks(
            self.images, module.diffusion, flips=config.dataset.random_flip,
            cache=Path(config.dataset.cache), say=self.console.print,
        )  # fmt: skip
        T = module.diffusion.timesteps
        t = torch.linspace(0, T - 1, min(T, 4000)).round().long()
        linear = known.linear(module.diffusion.alpha_bar(t).numpy())
        quarters = [linear[t.numpy() * 4 // T == i] for i in range(4)]
        self.lines = {
            "best-linear": [float(linear.mean()), *(float(some.mean()) for some in quarters)],
            "memoriser": by_quarter(known.memoriser[0], T),
        }
        found, whole = known.sampled.tolist(), len(self.images["train"])
        part = f", from {min(found):,} of {whole:,} images" if min(found) < whole else ""
        self.console.print(
            f"yardsticks{part}: loss {linear.mean():.3g} for the best linear denoiser, "
            f"{self.lines['memoriser'][0]:.2g} on training images for one that knows them by heart"
        )
        self.before = [*advice_before(config, module.diffusion, known, whole)]
        self._say(self.before)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not (self.active and trainer.is_global_zero):
            return
        assert isinstance(module, DDPM)
        lines, step = dict(self.lines), trainer.global_step
        if ("ema", "train") in module.validated:
            lines["training-images"] = module.validated["ema", "train"]
        if raw := module.validated.get(("raw", "validation")):
            lines["raw-weights"] = raw
        self._log(trainer, lines, step)
        checkpoints = Checkpoints.of(trainer)
        alone = trainer.world_size == 1  # else all would have to ask
        health = Health(
            config=self.config,
            step=step,
            losses={kind: mean for kind, (mean, *_) in module.validated.items()},
            linear=self.lines["best-linear"][0],
            copies=(0, 0) if alone and checkpoints.signalled() else self._count_copies(module),
            validation_copies=tuple(self.yardsticks.validation_copies.tolist()),
            best=checkpoints.best.get("validation"),
            before=self.before,
            **next(c.shares for c in trainer.callbacks if isinstance(c, Monitor)),  # type: ignore[attr-defined]
        )
        self.console.print(f"health at step {step:,}: {health.summary()}")
        self._say(health.advice())

    def _say(self, found: Iterable[Advice]) -> None:
        """Print what has not been said yet."""
        for advice in found:
            if advice.kind not in self.said:
                self.said.add(advice.kind)
                self.console.print(f"advice: {advice.text}")

    @torch.inference_mode()
    def _count_copies(self, module: DDPM) -> tuple[int, int]:
        train = self.images["train"]
        network, found = at_precision(module.ema, module.precision), []
        for label, rows in assign_labels(SAMPLED, count_labels(train)).items():
            vector = label_vector(label, train.classes) if label else None
            found += [x for _, x in quick_images(module, network, rows, BATCH, vector)]
        flips = self.config.dataset.random_flip
        pairs = find_pairs(torch.cat(found), train, self.yardsticks.distinct, flips, module.device)
        return pairs.copies, SAMPLED

    def _log(self, trainer: pl.Trainer, lines: dict[str, list[float]], step: int) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                values = {f"val/loss, {name}": line[0] for name, line in lines.items()}
                logger.log_metrics(values, step)
                continue
            with explained(logger.log_dir, kept=False):
                for name, line in lines.items():
                    if name not in self.writers:
                        folder = Path(logger.log_dir, "yardsticks", name)
                        self.writers[name] = SummaryWriter(str(folder))
                    for tag, value in zip(VALIDATION_TAGS, line, strict=True):
                        self.writers[name].add_scalar(tag, value, step)
                    self.writers[name].flush()

    def teardown(self, *_: object, **__: object) -> None:
        while self.writers:
            self.writers.popitem()[1].close()
