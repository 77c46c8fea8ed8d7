"""Is a model healthy? Its loss beside the yardsticks of its data, copies, and what to do."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from config import Config
from dataset import Images
from diffusion_utils import GaussianDiffusion, from_uint8
from evaluation.yardsticks import (
    Pairs,
    Probe,
    Yardsticks,
    bin_edges,
    by_quarter,
    find_pairs,
    memoriser_set,
    nearest,
    take_probe,
)
from generation import SeedNoise
from model import exact_float32
from pl_utils import SAMPLED as SAMPLED
from weights import Model, load_model

NAMES = {"ema": "EMA", "raw": "raw weights"}
SPLITS = {"train": "training", "validation": "validation"}
PredictEps = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x_t, t, labels) -> eps_hat


# ---- a model's lines


def both_weights(source: str | Path, model: Model) -> dict[str, Model]:
    """Return a model by its weights, and its other ones where the source holds both sets."""
    models = {model.weights: model}
    with suppress(ValueError):
        other: Literal["ema", "raw"] = "raw" if model.weights == "ema" else "ema"
        found = load_model(source, other).to(model.device)
        if found.digest() != model.digest():
            models[other] = found
    return models


def take_probes(
    images: dict[str, Images], diffusion: GaussianDiffusion, flips: bool
) -> dict[str, Probe]:
    """Return what is looked at in each split that has images; the memoriser knows the first."""
    parts = {"train": memoriser_set(images["train"], flips), "validation": images["validation"]}
    return {split: take_probe(some, diffusion.timesteps) for split, some in parts.items() if some}


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

    The noise's type is that of all that is computed.
    """
    line = torch.zeros(len(probe.t), dtype=torch.float64)
    rows = torch.arange(len(probe.images)).split(batch_size)
    for k in range(len(line)) if bins is None else bins:
        for some in rows:
            t, eps = probe.t[k, some].to(device), probe.eps[some].to(device)
            x_0 = (probe.images[some].to(device).to(eps.dtype) / 127.5) - 1
            labels = None if probe.labels is None else probe.labels[some].to(device)
            error = eps - predict_eps(diffusion.q_sample(x_0, t, eps), t, labels)
            line[k] += error.double().square().flatten(1).mean(1).sum().cpu() / len(probe.images)
            advance(len(some) / len(line))
    return line


# ---- features, in which copies are looked for too


def network_features(model: Model) -> Callable[[Tensor], Tensor]:
    """Return uint8 [B, C, H, W] -> [B, D] on the CPU, by the U-Net itself.

    It sees x_t at T / 10 with the same noise for all: there it knows what an image shows, and not
    yet its every pixel.
    """
    device, t = model.device, model.diffusion.timesteps // 10
    eps, times = SeedNoise([0], model.shape, device)(), torch.tensor([t], device=device)

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        x_t = model.diffusion.q_sample(from_uint8(images.to(device)), t, eps)
        with exact_float32():
            return model.network.features(x_t, times).cpu()

    return features


def find_pairs_by_features(
    queries: list[Tensor],
    train: Images,
    rows: np.ndarray,
    extract: Callable[[Tensor], Tensor],
    *,
    count: int = 2,
    batch_size: int = 256,
    track: Callable[..., Iterable] = lambda work, total: work,
) -> list[Pairs]:
    """Return, for each set of uint8 images, the nearest of the training images `rows`.

    Features are brought to one scale and compared by their angle.
    """
    batches = [rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
    features = torch.cat(
        [extract(train[batch].images) for batch in track(batches, total=len(batches))]
    )
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    unit = lambda f: normalize((f - mean) / std)
    known, found = unit(features).split(4096), []
    for images in queries:
        own = torch.cat([extract(some) for some in images.split(batch_size)])
        distance, places = nearest([unit(own)], known, count)
        found.append(Pairs(distance, torch.from_numpy(rows)[places]))
    return found


# ---- the verdict


class Advice(NamedTuple):
    """Something that is wrong: its name, and a number with a hint."""

    kind: str
    text: str


@dataclass(kw_only=True)
class Health:
    """What is known of a run at a step.

    `losses` are means over t by weights ("ema", "raw") and split, `linear` is the best linear
    denoiser's; `copies` and `validation_copies` are (how many, of how many); `clipped` and
    `skipped` are shares of the last steps; `best` is the lowest validation loss so far, its step.
    """

    config: Config
    step: int
    losses: dict[tuple[str, str], float]
    linear: float
    copies: tuple[int, int] = (0, 0)
    validation_copies: tuple[int, int] = (0, 0)
    clipped: float = 0.0
    skipped: float = 0.0
    best: tuple[float, int] | None = None
    before: list[Advice] = field(default_factory=list)  # what was wrong from the start

    @property
    def split(self) -> str:
        return "validation" if any(split == "validation" for _, split in self.losses) else "train"

    @property
    def remembered(self) -> float:
        """The share of initial weights in the EMA."""
        return self.config.training.ema_decay**self.step

    @property
    def loss(self) -> float:
        return self.losses.get(("ema", self.split), math.nan)

    def summary(self) -> str:
        """Return the state of a run in one line."""
        parts = [
            f"{'validation' if self.split == 'validation' else 'training'} loss {self.loss:.4g}"
        ]
        if self.linear:
            parts[0] += f": {_compare(self.loss, self.linear)} the best linear denoiser"
        trained = self.losses.get(("ema", "train"))
        if self.split == "validation" and trained:
            parts[0] += f", {_compare(self.loss, trained)} training"
        if self.copies[1]:
            parts.append(f"{self.copies[0]:,} of {self.copies[1]:,} copies")
        raw = self.losses.get(("raw", self.split))
        if self.remembered > 0.01:
            beside = f", raw weights have {raw:.4g}" if raw is not None else ""
            parts.append(f"EMA is {self.remembered:.0%} initial weights{beside}")
        else:
            parts.append("EMA has forgotten its start")
        return "; ".join(parts)

    def advice(self) -> Iterator[Advice]:
        """Yield what is wrong, each with a number and a hint."""
        yield from self.before
        training, raw = self.config.training, self.losses.get(("raw", self.split), math.nan)
        # on images that it trains on: what is learned by heart is another matter
        known = [self.losses.get((weights, "train"), math.nan) for weights in ("ema", "raw")]
        loss = min((value for value in known if value == value), default=math.nan)
        rate = f"training.learning_rate ({training.learning_rate:g})"
        # a young network that aims at x_0 has a loss far above 1
        too_high = loss >= 1 and self.config.diffusion.prediction == "eps"
        if self.step > training.warmup_steps and (too_high or math.isnan(loss)):
            yield Advice(
                "diverged",
                f"diverged: the loss is {loss:.3g}, and an untrained model's is 1; lower {rate} "
                "and begin again",
            )
        elif loss > self.linear and self.step > training.warmup_steps:
            yield Advice(
                "below linear",
                f"less learned than a covariance: loss {loss:.3g}, and a linear denoiser has "
                f"{self.linear:.3g}; train longer than {self.step:,} steps, or with another {rate}",
            )
        elif known[0] > self.linear:
            yield Advice(
                "EMA lags",
                f"the EMA lags: its loss is {self.loss:.3g}, a linear denoiser's {self.linear:.3g} "
                f"and the raw weights' {raw:.3g}; {self.remembered:.0%} of it are initial weights. "
                f"Train longer, or lower training.ema_decay ({training.ema_decay})",
            )
        if self.skipped > 0.01:
            yield Advice(
                "skipped",
                f"{self.skipped:.0%} of the last steps were skipped, as their gradients were not "
                f"finite; lower {rate}",
            )
        if self.clipped > 0.05 and self.step > 2 * training.warmup_steps:
            yield Advice(
                "clipped",
                f"gradients of {self.clipped:.0%} of the last steps were clipped to "
                f"{training.gradient_clip_norm:g}; lower {rate}",
            )
        copied, drawn = self.copies
        theirs = self.validation_copies[0] / max(1, self.validation_copies[1])
        if drawn and copied >= 3 and copied / drawn > theirs + 0.02:
            beside = f", and {theirs:.0%} of validation images" if self.validation_copies[1] else ""
            yield Advice(
                "copies",
                f"memorising: {copied:,} of {drawn:,} generated images ({copied / drawn:.0%}) are "
                f"copies of training images{beside}; stop earlier, get more images, or raise "
                f"model.dropout ({self.config.model.dropout:g})",
            )
        trained = self.losses.get(("ema", "train"), math.nan)
        if self.split == "validation" and self.loss > 1.3 * trained and self.remembered < 0.5:
            yield Advice(
                "gap",
                f"memorising: the validation loss {self.loss:.3g} is "
                f"{_compare(self.loss, trained)} that of training images, {trained:.3g}; stop "
                f"earlier, get more images, or raise model.dropout ({self.config.model.dropout:g})",
            )
        if self.best and self.loss > 1.05 * self.best[0]:
            yield Advice(
                "rising",
                f"the validation loss has risen by {self.loss / self.best[0] - 1:.0%} since step "
                f"{self.best[1]:,}; training.keep_best=validation keeps that checkpoint",
            )


def _compare(value: float, other: float) -> str:
    ratio = value / other
    if ratio >= 2:
        return f"{ratio:.2g} times"
    return f"{abs(ratio - 1):.0%} {'below' if ratio < 1 else 'above'}"


def advice_before(
    config: Config, diffusion: GaussianDiffusion, yardsticks: Yardsticks, count: int
) -> Iterator[Advice]:
    """Yield what is wrong before the first step; `count`: of the training images."""
    training, T = config.training, diffusion.timesteps
    if (signal := diffusion.alpha_bar(T - 1)) > 0.01:
        yield Advice(
            "schedule",
            f"at the last t {signal:.0%} of the variance is still the image's, and sampling begins "
            f"in pure noise; raise diffusion.timesteps ({T}) or diffusion.beta_end "
            f"({config.diffusion.beta_end:g})",
        )
    low, high = yardsticks.levels.tolist()
    if high - low < 64:
        yield Advice(
            "range",
            f"pixels lie in {low} ... {high} of 0 ... 255: scale the files of dataset.root "
            f"({config.dataset.root}) to the whole range",
        )
    if (flat := float(yardsticks.flat)) > 0.1:
        yield Advice(
            "flat", f"{flat:.0%} of the images are nearly of one color: look at `python dataset.py`"
        )
    if (left := training.ema_decay**training.max_steps) > 0.01:
        suits = 1 - float(f"{1 - 0.001 ** (1 / training.max_steps):.0e}")
        yield Advice(
            "EMA too slow",
            f"the EMA is too slow for {training.max_steps:,} steps: {left:.0%} of it will be "
            f"initial weights; lower training.ema_decay ({training.ema_decay}) to {suits:.6g}",
        )
    epochs = training.max_steps * training.batch_size / count
    if epochs >= 1000 and count < 10_000:
        yield Advice(
            "epochs",
            f"each of {count:,} images is seen {epochs:,.0f} times, which learns them by heart; "
            f"get more, or lower training.max_steps ({training.max_steps:,})",
        )


# ---- a model's health at once


class Checkup(NamedTuple):
    """What is measured of a model, and said about it."""

    lines: dict[str, np.ndarray]  # error of eps by bin of t
    pairs: dict[str, list[Pairs]]  # by pixels and by features: of samples, of validation images
    health: Health
    timesteps: int  # T

    def facts(self) -> dict[str, Any]:
        """Return all numbers and words, as JSON: losses over all t, then by its quarters."""
        return {
            "losses": {name: by_quarter(line, self.timesteps) for name, line in self.lines.items()},
            "copies": {
                name: [(found.copies, len(found.rows)) for found in several]
                for name, several in self.pairs.items()
            },
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
    extract: Callable[[Tensor], Tensor] | None = None,
    features: str = "the network's features",
) -> Checkup:
    """Look for copies among samples, uint8 [N, C, H, W], and put everything together.

    `extract` is uint8 [B, C, H, W] -> [B, D]; None is `network_features`.
    """
    config, diffusion, T = model.config, model.diffusion, model.diffusion.timesteps
    train, flips, distinct = images["train"], config.dataset.random_flip, yardsticks.distinct
    queries = [samples, *(p.images for split, p in probes.items() if split == "validation")]
    pairs = {}
    if len(distinct) > 1:
        pairs["pixels"] = [find_pairs(q, train, distinct, flips, model.device) for q in queries]
        by_features = find_pairs_by_features
        pairs[features] = by_features(queries, train, distinct, extract or network_features(model))
    lines = {"untrained": np.ones(len(bin_edges(T)) - 1)}
    alpha_bar = diffusion.alpha_bar(probes["train"].t).numpy()
    lines["best linear"] = yardsticks.linear(alpha_bar).mean(axis=1)
    for split, line in zip(SPLITS, yardsticks.memoriser, strict=True):
        if split in probes:
            lines[f"memoriser, {SPLITS[split]}"] = line
    lines |= {f"{NAMES[w]}, {SPLITS[s]}": line.numpy() for (w, s), line in losses.items()}
    found = [(some.copies, len(some.rows)) for some in pairs.get("pixels", [])]
    health = Health(
        config=config,
        step=model.step,
        losses={kind: by_quarter(line.numpy(), T)[0] for kind, line in losses.items()},
        linear=by_quarter(lines["best linear"], T)[0],
        copies=found[0] if found else (0, 0),
        validation_copies=found[1] if len(found) > 1 else (0, 0),
        before=[*advice_before(config, diffusion, yardsticks, len(train))],
    )
    return Checkup(lines, pairs, health, T)
