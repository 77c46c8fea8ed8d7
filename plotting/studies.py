"""The figures' content: a model's chains, mixes, neighbours and bound, as images and numbers."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dataset import Images, fit_image, load_images
from diffusion_utils import Denoiser, from_uint8, to_uint8
from evaluation.classes import assign_labels, count_labels, rows_by_label
from evaluation.copies import features_of, find_pairs, find_pairs_by_features
from evaluation.extractor import Extractor, load_extractor
from evaluation.health import (
    SAMPLED,
    both_weights,
    check_up,
    losses_of,
    make_probes,
)
from evaluation.likelihood import Bound, bits_per_dim
from evaluation.metrics import spread
from evaluation.yardsticks import bin_edges, get_yardsticks
from generation import Sampling, SeedNoise, Step, generate, reverse
from generation.edit import steps_from
from plotting import boards
from plotting.boards import Board, Cells, write_figure
from weights import Model


@dataclass(frozen=True)
class Study:
    """A model, how it is sampled, and what was asked of a figure."""

    plan: Sampling
    recipe: dict[str, Any]
    track: Callable[..., Iterable[Any]]  # wraps an iterable and knows `total=`
    seed: int = 0
    num_images: int | None = None
    t: list[int] | None = None
    image: list[Path] | None = None
    extractor: str | None = None
    batch_size: int = 256

    @property
    def model(self) -> Model:
        return self.plan.model

    @property
    def steps(self) -> list[Step]:
        return self.plan.steps

    @cached_property
    def denoiser(self) -> Denoiser:
        return self.plan.denoiser(self.plan.labels[0])

    @property
    def loaded_extractor(self) -> Extractor | None:
        return load_extractor(self.extractor).to(self.model.device) if self.extractor else None

    @property
    def run(self) -> str:
        """The name of the run, for people."""
        path = Path(self.recipe["checkpoint"])
        return path.parent.parent.name if path.parent.name == "checkpoints" else path.name

    def __str__(self) -> str:
        recipe, sampler = self.recipe, self.recipe["sampler"]
        raw = ", raw weights" if recipe["weights"] == "raw" else ""
        detail = {"ddpm": f" {recipe['variance']}", "ddim": f" eta {recipe['eta']:g}"}
        sampling = f"{sampler}{detail.get(sampler, '')}, {len(self.steps)} steps"
        label = f", class {recipe['class_label']}" if "class_label" in recipe else ""
        guided = f", guidance {scale:g}" if (scale := recipe.get("guidance_scale")) else ""
        return f"{self.run}, step {recipe['step']:,}{raw}{label}; {sampling}{guided}"

    def seeds(self, count: int) -> list[int]:
        return list(range(self.seed, self.seed + (self.num_images or count)))

    def noise(self, seeds: list[int]) -> SeedNoise:
        return SeedNoise(seeds, self.model.shape, self.model.device)

    def split(self) -> tuple[Images, Images]:
        """Return the images of training, and of validation."""
        config = self.model.config.dataset
        keys = config.model_dump(exclude={"random_flip"})
        loaded = load_images(**keys, progress=self.track)
        return loaded["train"], loaded["validation"]

    def unseen(self) -> tuple[Images, str]:
        """Return the validation set, or the training set where it is empty; and which it is."""
        train, validation = self.split()
        return (validation, "validation") if len(validation) else (train, "training")


# ---- the chain


State = tuple[int, Tensor, Tensor]  # t, x_t and x0_hat, uint8 [B, C, H, W] on the CPU


@torch.inference_mode()
def states(
    denoiser: Denoiser, steps: list[Step], x: Tensor, noise: Callable[[Step], Tensor]
) -> Iterator[State]:
    """Yield a chain from x [B, C, H, W]: its state before each step, then (-1, x_0, x_0)."""
    for step, x_s, x0_hat in reverse(denoiser, x, steps, noise):
        yield step.t, to_uint8(x).cpu(), to_uint8(x0_hat).cpu()
        x = x_s
    yield -1, to_uint8(x).cpu(), to_uint8(x).cpu()


def some_states(study: Study, seeds: list[int], count: int) -> list[State]:
    """Return about `count` states of the chains that sample.py walks, evenly spaced, both ends."""
    total, noise = len(study.steps) + 1, study.noise(seeds)
    kept = set(spread(count, total))
    chain = states(study.denoiser, study.steps, noise(), noise)
    return [state for i, state in enumerate(study.track(chain, total=total)) if i in kept]


def draw_progressive(study: Study, output: Path) -> None:
    seeds = study.seeds(4)
    kept = some_states(study, seeds, 11)
    rows = [[state[1:][row] for state in kept] for row in (0, 1)]  # of x_t, of x0_hat
    cells: Cells = [[x[i] for x in row] for i in range(len(seeds)) for row in rows]
    board = Board(
        cells,
        title="Progressive generation",
        note=f"{study}. Below each x_t the model's estimate of x_0",
        columns=[*(f"{t}" for t, *_ in kept[:-1]), "sample"],
        rows=["$x_t$", r"$\hat{x}_0$"] * len(seeds),
        corner="$t$",
        column_gaps=[len(kept) - 1],
        row_gaps=range(2, len(cells), 2),
    )
    write_figure(board.figure, output, study.recipe)


def draw_chain(study: Study, output: Path) -> None:
    seeds = study.seeds(9)
    across = math.ceil(math.sqrt(len(seeds)))

    def grid(images: Tensor) -> Cells:
        cells = [*images, *[None] * (-len(images) % across)]
        return [cells[i : i + across] for i in range(0, len(cells), across)]

    frames = [
        (
            f"$t$ = {t}" if t >= 0 else "samples",
            [a + b for a, b in zip(grid(x), grid(x_0), strict=True)],
        )
        for t, x, x_0 in some_states(study, seeds, 40)
    ]
    headings = ("$x_t$", 0, across - 1), (r"$\hat{x}_0$", across, 2 * across - 1)
    boards.write_animation(frames, output, note=str(study), headings=headings, column_gaps=[across])


# ---- interpolation


def interpolate(
    study: Study, steps: list[Step], pair: Tensor, *, mixes: list[float], seed: int
) -> Tensor:
    """Mix a pair as (1 - m) x_t + m x_t', and run it from t, inclusive, to the data (section 4.3).

    As in the official code each image has its own noise. Those two, and the noise of the chain,
    are the same for all mixes and all t.

    Args:
        steps: from t on. pair: uint8 [2, C, H, W].

    Returns:
        uint8 [len(mixes), C, H, W] on the CPU.
    """
    noise, device = study.noise([seed]), study.model.device
    eps = torch.cat([noise(), noise()])
    ends = study.model.diffusion.q_sample(from_uint8(pair.to(device)), steps[0].t, eps)
    m = torch.tensor(mixes, device=device).view(-1, 1, 1, 1)
    *_, (_, x_0, _) = states(study.denoiser, steps, (1 - m) * ends[:1] + m * ends[1:], noise)
    return x_0


def draw_interpolation(study: Study, output: Path) -> None:
    T, mixes = study.model.diffusion.timesteps, [i / 8 for i in range(9)]
    wanted = study.t or [max(1, T * share // 8) - 1 for share in (1, 2, 3, 4, 8)]
    if out := [t for t in wanted if not 0 <= t < T]:
        raise ValueError(f"--t {out[0]} is outside 0 ... {T - 1}")
    tables = {(table := steps_from(study.steps, t))[0].t: table for t in sorted(wanted)}
    pairs = load_pairs(study)
    work = [(i, t) for i in range(len(pairs)) for t in tables]
    cells: Cells = []
    for i, t in study.track(work, total=len(work)):
        mixed = interpolate(study, tables[t], pairs[i], mixes=mixes, seed=study.seed + i)
        cells.append([pairs[i][0], *mixed, pairs[i][1]])
    board = Board(
        cells,
        title="Interpolation",
        note=f"{study}. Two images with noise up to t, mixed by λ, and denoised",
        columns=["$x_0$", *(f"{m:.3g}" for m in mixes), "$x_0'$"],
        rows=[f"t = {t}" for _, t in work],
        corner="λ",
        column_gaps=[1, 10],
        row_gaps=range(len(tables), len(cells), len(tables)),
    )
    write_figure(board.figure, output, study.recipe)


def load_pairs(study: Study) -> Tensor:
    """Return uint8 [N, 2, C, H, W]: two files, or images that the model has not seen."""
    files, data = study.image, study.model.config.dataset
    if not files:
        count = study.num_images or 1
        images, _ = study.unseen()
        if 2 * count > len(images):
            raise ValueError(f"--num-images {count}: there are {len(images)} for such pairs")
        rows = np.random.default_rng(study.seed).choice(len(images), (count, 2), False)
        return images[rows.flatten().tolist()].images.unflatten(0, (count, 2))
    if len(files) != 2 or study.num_images:
        raise ValueError("--image is given twice, for one pair, and without --num-images")
    try:
        pair = [
            fit_image(Image.open(file), image_size=data.size, channels=data.channels)
            for file in files
        ]
    except UnidentifiedImageError as error:
        raise ValueError(f"--image: {error}") from None
    return torch.from_numpy(np.stack(pair))[None]


# ---- neighbours


@torch.inference_mode()
def draw_neighbours(study: Study, output: Path) -> None:
    model, (train, validation) = study.model, study.split()
    across, rows = min(5, len(train)), np.arange(len(train))
    samples = generate(
        study.denoiser, study.steps, study.seeds(8), shape=model.shape, device=model.device
    )
    drawn = torch.cat([images for _, images in samples])
    others = validation[spread(64, len(validation))].images
    queries = torch.cat([drawn, others])
    pixels = find_pairs(queries, train, rows, False, model.device, count=across, coarse=10**6)
    name, extract = features_of(model, study.loaded_extractor)
    (features,) = find_pairs_by_features(
        [drawn], train, rows, False, extract, count=across, track=study.track
    )
    neighbours = torch.cat([pixels.rows[: len(drawn)], features.rows], dim=1).tolist()
    rmse = pixels.distance[:, 0] / math.sqrt(math.prod(model.shape))
    near = f"{rmse[: len(drawn)].median():.0f} for these"
    if len(others):
        near += f", {rmse[len(drawn) :].median():.0f} for validation images"
    board = Board(
        [[image, *train[rows].images] for image, rows in zip(drawn, neighbours, strict=True)],
        title="Nearest training images",
        note=f"{study}. Median RMSE to the nearest in pixels, of 255: {near}",
        headings=[
            ("sample", 0, 0),
            ("nearest in pixels", 1, across),
            (f"nearest in {name}", across + 1, 2 * across),
        ],
        column_gaps=[1, across + 1],
    )
    write_figure(board.figure, output, study.recipe)


# ---- health


def draw_health(study: Study, output: Path) -> None:
    model, plan, device = study.model, study.plan, study.model.device
    train, validation = study.split()
    images, data = {"train": train, "validation": validation}, model.config.dataset
    how: dict[str, Any] = {"flips": data.random_flip, "cache": Path(data.cache), "say": print}
    yardsticks = get_yardsticks(images, model.diffusion, **how)
    models = both_weights(study.recipe["checkpoint"], model)
    probes = make_probes(images, model.diffusion, data.random_flip)
    losses = losses_of(models, probes, device=device, batch_size=study.batch_size)
    seeds, drawn = study.seeds(SAMPLED), []
    for label, rows in assign_labels(len(seeds), count_labels(train)).items():
        some = [seeds[row] for row in rows]
        made = generate(plan.denoiser(label), plan.steps, some, shape=model.shape, device=device)
        drawn += [images for _, images in made]
    samples = torch.cat(drawn)
    checkup = check_up(
        model, losses, images=images, probes=probes, yardsticks=yardsticks, samples=samples,
        extractor=study.loaded_extractor,
    )  # fmt: skip
    nearest = checkup.pairs["pixels"][0]
    shown = nearest.ratio.argsort()[:12].tolist()
    cells = [[samples[i], *train[nearest.rows[i].tolist()].images] for i in shown]
    ratios = [f"{nearest.ratio[i]:.2f}" for i in shown]
    facts = checkup.facts()
    said = [f"{study.run}, step {model.step:,}. {facts['summary']}", *facts["advice"].values()]
    edges = bin_edges(model.diffusion.timesteps)
    figure = boards.plot_health(checkup.lines, edges, cells, ratios, notes=said)
    write_figure(figure, output, study.recipe | {"health": facts})


# ---- the bound, the schedule


def rate_distortion(bound: Bound) -> tuple[np.ndarray, np.ndarray, float]:
    """Return rate [T], RMSE [T] and L_0 of a code that sends x_t and stops there (section 4.3).

    Entry t is what has been sent once x_t is known, in bits/dim, and the error of x0_hat(x_t) on
    the scale of 0 ... 255; means over images. The paper's table calls T - t the reverse time.
    """
    terms = bound.bits.mean(0).numpy()
    sent = np.append(np.cumsum(terms[:0:-1])[::-1], 0.0)  # of the terms after t
    rmse = 127.5 * np.sqrt(bound.mse.mean(0).numpy())
    return bound.prior.mean().item() + sent, rmse, float(terms[0])


def draw_rate_distortion(study: Study, output: Path) -> None:
    (images, which), seeds = study.unseen(), study.seeds(16)
    rows, parts = spread(len(seeds), len(images)), []
    for label, some in rows_by_label(images, rows).items():
        part = bits_per_dim(
            study.plan.denoiser(label),
            study.model.diffusion,
            images[[rows[i] for i in some]].images.to(study.model.device),
            [seeds[i] for i in some],
            variance=study.recipe["variance"],
            batch_size=study.batch_size,
            progress=study.track,
        )
        parts.append(part)
    bound = Bound(parts[0].t, *(torch.cat(terms) for terms in list(zip(*parts, strict=True))[1:]))
    rate, rmse, distortion = rate_distortion(bound)
    labelled = images.labels is not None
    note = (
        f"{study}. {rate[0] + distortion:.2f} bits/dim = rate {rate[0]:.2f} + distortion "
        f"{distortion:.2f}, over {len(rows)} {which} images{', each with its label' * labelled}"
    )
    figure = boards.plot_rate_distortion(rate, rmse, name=study.run, note=note)
    write_figure(figure, output, study.recipe)


def draw_schedule(study: Study, output: Path) -> None:
    diffusion = study.model.diffusion
    alpha_bar = diffusion.alpha_bar(torch.arange(diffusion.timesteps)).numpy()
    figure = boards.plot_schedule(alpha_bar, study.steps, note=str(study))
    write_figure(figure, output, study.recipe)


STUDIES: dict[str, Callable[[Study, Path], None]] = {
    "progressive": draw_progressive,
    "interpolation": draw_interpolation,
    "neighbours": draw_neighbours,
    "rate-distortion": draw_rate_distortion,
    "chain": draw_chain,
    "schedule": draw_schedule,
    "health": draw_health,
}
