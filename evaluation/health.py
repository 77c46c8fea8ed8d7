"""The health of a model: its loss beside the yardsticks of its data, copies, and advice."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from dataset import Images
from diffusion_utils import GaussianDiffusion
from evaluation.copies import Pairs, features_of, find_pairs, find_pairs_by_features
from evaluation.extractor import Extractor
from evaluation.metrics import KEPT, spread
from evaluation.yardsticks import (
    Probe,
    Yardsticks,
    bin_edges,
    by_quarter,
    make_probe,
    memoriser_set,
)
from pl_utils import SAMPLED as SAMPLED
from pl_utils import initial_share
from weights import Model, load_model

WEIGHTS = {"ema": "EMA", "raw": "raw weights"}
PredictEps = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x_t, t, labels) -> eps_hat


# ---- a model's lines


def both_weights(source: str | Path, model: Model) -> dict[str, Model]:
    """Return a model by its weights, and its other ones where the source holds both sets."""
    models = {model.weights: model}
    with suppress(ValueError):
        other: Literal["ema", "raw"] = "raw" if model.weights == "ema" else "ema"
        found = load_model(source, other).to(model.device)
        # a run that is still training may have gone on
        if found.step == model.step and found.digest() != model.digest():
            models[other] = found
    return models


def make_probes(
    images: dict[str, Images], diffusion: GaussianDiffusion, flips: bool
) -> dict[str, Probe]:
    """Return a probe of each split that has images; the memoriser knows those of training."""
    parts = {"train": memoriser_set(images["train"], flips), "validation": images["validation"]}
    return {split: make_probe(some, diffusion.timesteps) for split, some in parts.items() if some}


@torch.inference_mode()
def model_loss(
    predict_eps: PredictEps,
    diffusion: GaussianDiffusion,
    probe: Probe,
    *,
    device: torch.device,
    batch_size: int,
    bins: Iterable[int] | None = None,
    advance: Callable[[float], object] = lambda images: None,
) -> Tensor:
    """Return a model's error of eps in each bin of t, [bins] float64; 0 where not in `bins`.

    All is computed in the type of the probe's noise.
    """
    line = torch.zeros(len(probe.t), dtype=torch.float64)
    rows = torch.arange(len(probe.images)).split(batch_size)
    for k in range(len(line)) if bins is None else bins:
        for some in rows:
            t, eps = probe.t[k, some].to(device), probe.eps[some].to(device)
            x_0 = (probe.images[some].to(device).to(eps.dtype) / 127.5) - 1
            labels = None if probe.labels is None else probe.labels[some].to(device)
            error = eps - predict_eps(diffusion.q_sample(x_0, t, eps), t, labels)
            errors = error.square().flatten(1).mean(1).cpu().double()
            line[k] += errors.sum() / len(probe.images)
            advance(len(some) / len(line))
    return line


# ---- the verdict


class Advice(NamedTuple):
    """Something that is wrong: its name, and a number with a hint."""

    kind: str
    text: str


@dataclass(kw_only=True)
class Health:
    """The state of a run at a step; step 0 is an unknown one.

    `losses` are means over t by weights ("ema", "raw") and split, `linear` is the best linear
    denoiser's, and `few` says that it knows its few images by heart; `copies` and
    `validation_copies` are (how many, of how many), `searched` where they were looked for;
    `clipped` and `skipped` are shares of the last steps; `best` is the lowest validation loss so
    far, and its step.
    """

    config: Config
    step: int
    losses: dict[tuple[str, str], float]
    linear: float
    few: bool = False
    copies: tuple[int, int] = (0, 0)
    validation_copies: tuple[int, int] = (0, 0)
    searched: str = ""
    clipped: float = 0.0
    skipped: float = 0.0
    best: tuple[float, int] | None = None
    before: list[Advice] = field(default_factory=list)  # what was wrong from the start

    @property
    def split(self) -> str:
        return "validation" if any(split == "validation" for _, split in self.losses) else "train"

    @property
    def loss(self) -> float:
        return self._loss(self.split)

    def _loss(self, split: str) -> float:
        of = self.losses
        return of.get(("ema", split), of.get(("raw", split), math.nan))

    @property
    def remembered(self) -> float:
        """The share of initial weights in the EMA."""
        ema = self.step and any(weights == "ema" for weights, _ in self.losses)
        return initial_share(self.config.training, self.step) if ema else 0.0

    def summary(self) -> str:
        """Return the state of a run in one line."""
        words = "validation" if self.split == "validation" else "training"
        text = f"{words} loss {self.loss:.4g}"
        if self.linear:
            few = " of so few images" * self.few
            text += f": {_compare(self.loss, self.linear)} the best linear denoiser{few}"
        if self.split == "validation" and (trained := self._loss("train")):
            text += f", {_compare(self.loss, trained)} training"
        if self.copies[1]:
            text += f"; {self.copies[0]:,} of {self.copies[1]:,} copies{self.searched}"
        if self.remembered > 0.01:
            text += f"; EMA is {self.remembered:.0%} initial weights"
            if raw := self.losses.get(("raw", self.split)):
                text += f", raw weights have {raw:.4g}"
        elif self.step:
            text += "; EMA has forgotten its start"
        return text

    def advice(self) -> Iterator[Advice]:
        """Yield what is wrong, each with a number and a hint."""
        yield from self.before
        training, dropout = self.config.training, self.config.model.dropout
        rate = f"training.learning_rate ({training.learning_rate:g})"
        mend = f"stop earlier, get more images, or raise model.dropout ({dropout:g})"
        # on images that it trains on: what is learned by heart is another matter
        known = [x for (_, split), x in self.losses.items() if split == "train" and x == x]
        loss = min(known, default=math.nan)
        # a young network that aims at x_0 has a loss far above 1
        too_high = loss >= 1 and self.config.diffusion.prediction != "x0"
        forgets = initial_share(training, training.max_steps) < 0.01
        if self.step <= training.warmup_steps and self.step:
            pass  # it is young
        elif too_high or math.isnan(loss):
            text = f"diverged: the loss is {loss:.3g}, and an untrained model's is 1"
            yield Advice("diverged", f"{text}; lower {rate} and begin again")
        elif loss > self.linear and not self.few and 4 * self.step >= training.max_steps:
            text = f"the loss is {loss:.3g}, above a linear denoiser's {self.linear:.3g}"
            longer = f"train longer than {self.step:,} steps, or with another {rate}"
            yield Advice("above linear", f"{text}; {longer}")
        elif len(known) == 2 and max(known) > self.linear and not (forgets or self.few):
            text = f"the EMA lags: its loss is {max(known):.3g}, and the raw weights' {loss:.3g}"
            share = f"{self.remembered:.0%} of it are initial weights"
            yield Advice("EMA lags", f"{text}; {share}: lower training.ema_decay")
        if self.skipped > 0.01:
            text = f"{self.skipped:.0%} of the last steps were skipped: gradients were not finite"
            yield Advice("skipped", f"{text}; lower {rate}")
        # Muon's updates are of one size, whatever the gradient's
        feels = training.optimizer != "muon"
        if feels and self.clipped > 0.05 and self.step > 2 * training.warmup_steps:
            text = f"gradients of {self.clipped:.0%} of the last steps were clipped"
            norm = f"training.gradient_clip_norm ({training.gradient_clip_norm:g})"
            yield Advice("clipped", f"{text} to {norm}; lower {rate}")
        (copied, drawn), (alike, of) = self.copies, self.validation_copies
        if copied >= 3 and copied / drawn > alike / max(1, of) + 0.02:
            text = f"memorising: {copied:,} of {drawn:,} generated images are copies of training"
            beside = (
                f" images, and {alike:,} of {of:,} validation images look so" if of else " images"
            )
            yield Advice("copies", f"{text}{beside}; {mend}")
        trained = self._loss("train")
        if self.split == "validation" and self.loss > 1.3 * trained and self.remembered < 0.5:
            text = f"memorising: the validation loss {self.loss:.3g} is"
            text += f" {_compare(self.loss, trained)} that of training images, {trained:.3g}"
            yield Advice("gap", f"{text}; {mend}")
        if self.best and self.loss > 1.05 * self.best[0]:
            text = f"the validation loss is {_compare(self.loss, self.best[0])} that of step"
            keep = "training.keep_best=validation keeps such a checkpoint"
            yield Advice("rising", f"{text} {self.best[1]:,}, the lowest; {keep}")


def _compare(value: float, other: float) -> str:
    ratio = value / other
    if ratio >= 2:
        return f"{ratio:.2g} times"
    return f"{abs(ratio - 1):.0%} {'below' if ratio < 1 else 'above'}"


def advice_before(
    config: Config, diffusion: GaussianDiffusion, yardsticks: Yardsticks, count: int
) -> Iterator[Advice]:
    """Yield what is wrong before the first step; `count`: of the training images."""
    training, T, steps = config.training, diffusion.timesteps, config.training.max_steps
    if (signal := diffusion.alpha_bar(T - 1)) > 0.01:
        text = (
            f"at the last t {signal:.0%} of the variance is still the image's, and sampling begins"
        )
        end = f"diffusion.beta_end ({config.diffusion.beta_end:g})"
        yield Advice("schedule", f"{text} in pure noise; raise diffusion.timesteps ({T}) or {end}")
    low, high = yardsticks.levels.tolist()
    if high - low < 64:
        text = f"pixels lie in {low} ... {high} of 0 ... 255: scale the files of dataset.root"
        yield Advice("range", f"{text} ({config.dataset.root}) to the whole range")
    if (flat := float(yardsticks.flat)) > 0.1:
        text = f"{flat:.0%} of the images are nearly of one color: see"
        yield Advice("flat", f"{text} `python dataset.py CONFIG`")
    if (left := initial_share(training, steps)) > 0.01:
        suits = 1 - float(f"{1 - 0.001 ** (1 / steps):.0e}")
        text = f"the EMA is too slow for {steps:,} steps: {left:.0%} of it will be initial weights"
        hint = f"lower training.ema_decay ({training.ema_decay}) to {suits:.6g}"
        yield Advice("EMA too slow", f"{text}; {hint}")
    if (epochs := steps * training.batch_size / count) >= 1000 and count < 10_000:
        text = f"each of {count:,} images is seen {epochs:,.0f} times, enough to memorise them"
        yield Advice("epochs", f"{text}; get more, or lower training.max_steps ({steps:,})")


# ---- a model's health at once


class Checkup(NamedTuple):
    """A model's lines, its pairs, and the verdict."""

    lines: dict[str, np.ndarray]  # error of eps by bin of t
    pairs: dict[str, list[Pairs]]  # by pixels and by features: of samples, of validation images
    health: Health
    sampled: dict[str, int]  # how many training images are behind the yardsticks
    timesteps: int  # T

    def facts(self) -> dict[str, Any]:
        """Return all numbers and words, as JSON: losses over all t, then by its quarters."""
        return {
            "losses": {
                name: [None if math.isnan(x) else x for x in by_quarter(line, self.timesteps)]
                for name, line in self.lines.items()
            },
            "copies": {
                name: [(found.copies, len(found.rows)) for found in several]
                for name, several in self.pairs.items()
            },
            "training images": self.sampled,
            "summary": self.health.summary(),
            "advice": {advice.kind: advice.text for advice in self.health.advice()},
        }


def losses_of(
    models: dict[str, Model], probes: dict[str, Probe], **how: Any
) -> dict[tuple[str, str], Tensor]:
    """Return each model's line for each probe; `how`: options of `model_loss`."""
    return {
        (weights, split): model_loss(model, model.diffusion, probe, **how)
        for weights, model in models.items()
        for split, probe in probes.items()
    }


def check_up(
    model: Model,
    losses: dict[tuple[str, str], Tensor],
    *,
    images: dict[str, Images],
    probes: dict[str, Probe],
    yardsticks: Yardsticks,
    samples: Tensor,
    extractor: Extractor | None = None,
) -> Checkup:
    """Look for copies among samples, uint8 [N, C, H, W], and put everything together.

    Features are the extractor's, or the network's own.
    """
    config, diffusion, T = model.config, model.diffusion, model.diffusion.timesteps
    train, flips, distinct = images["train"], config.dataset.random_flip, yardsticks.distinct
    queries = [samples, *(p.images for split, p in probes.items() if split == "validation")]
    name, extract = features_of(model, extractor)
    some = distinct[spread(KEPT, len(distinct))]
    pairs = {
        "pixels": [find_pairs(q, train, distinct, flips, model.device) for q in queries],
        name: find_pairs_by_features(queries, train, some, flips, extract),
    }
    alpha_bar = diffusion.alpha_bar(probes["train"].t).numpy()
    lines = {"untrained": np.ones(len(bin_edges(T)) - 1)}
    lines["best linear"] = yardsticks.linear(alpha_bar).mean(axis=1)
    words = {"train": "training", "validation": "validation"}
    for split, line in zip(words, yardsticks.memoriser, strict=True):
        if split in probes:
            lines[f"memoriser, {words[split]}"] = line
    lines |= {f"{WEIGHTS[w]}, {words[s]}": line.numpy() for (w, s), line in losses.items()}
    found = [(some.copies, len(some.rows)) for some in pairs["pixels"]]
    before = [*advice_before(config, diffusion, yardsticks, len(train))]
    health = Health(
        config=config,
        step=model.step,
        losses={kind: by_quarter(line.numpy(), T)[0] for kind, line in losses.items()},
        linear=by_quarter(lines["best linear"], T)[0],
        few=bool(yardsticks.few),
        copies=found[0],
        validation_copies=found[1] if len(found) > 1 else (0, 0),
        searched=searched_in(yardsticks, len(train)),
        # files of others do not say how they were trained
        before=[a for a in before if model.step or a.kind not in ("EMA too slow", "epochs")],
    )
    kinds = "best linear", "memoriser", "copies", "features"
    counts = [*yardsticks.sampled.tolist(), len(some)]
    return Checkup(lines, pairs, health, dict(zip(kinds, counts, strict=True)), T)


def searched_in(yardsticks: Yardsticks, count: int) -> str:
    """Return where copies are looked for, for people; nothing where it is everywhere."""
    searched = int(yardsticks.sampled[2])
    return f" (among {searched:,} of {count:,} training images)" if searched < count else ""
