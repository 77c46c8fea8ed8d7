"""What the figures show: a model's chains, mixes, neighbours and bound, as pictures and numbers."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data import Data
from dataset import Pictures, fit_picture
from diffusion_utils import Step, from_uint8, reverse, to_uint8
from drawing import Board, plot_rate_distortion, plot_schedule, write_animation, write_figure
from likelihood import Bound, bits_per_dim
from pl_utils import DDPM, SeedNoise


class Job(NamedTuple):
    """What a figure is made of."""

    ddpm: DDPM
    steps: list[Step]
    recipe: dict
    caption: str  # the run
    sampling: str  # the sampler
    asked: SimpleNamespace
    track: Callable  # wraps an iterable and knows `total=`

    def __str__(self) -> str:
        return f"{self.caption}; {self.sampling}"

    def seeds(self, count: int) -> list[int]:
        return list(range(self.asked.seed, self.asked.seed + (self.asked.num_images or count)))

    def write(self, figure, output: Path) -> None:
        write_figure(figure, output, recipe=json.dumps(self.recipe, default=str))


# ---- the chain


State = tuple[int, Tensor, Tensor]  # t, x_t and x0_hat, uint8 [B, C, H, W] on the CPU


def samples(ddpm: DDPM, steps: list[Step], seeds: list[int]) -> Iterator[State]:
    """The chains that sample.py walks for these seeds."""
    data = ddpm.config.dataset
    noise = SeedNoise(seeds, (data.channels, data.image_size, data.image_size), ddpm.device)
    return states(ddpm, steps, noise(), noise)


@torch.inference_mode()
def states(
    ddpm: DDPM, steps: list[Step], x: Tensor, noise: Callable[[Step], Tensor]
) -> Iterator[State]:
    """A chain from x, [B, C, H, W]: its state before each step, then (-1, x_0, x_0)."""
    for step, x_s, x0_hat in reverse(ddpm.diffusion, ddpm, x, steps, noise):
        yield step.t, to_uint8(x).cpu(), to_uint8(x0_hat).cpu()
        x = x_s
    yield -1, to_uint8(x).cpu(), to_uint8(x).cpu()


def some_states(job: Job, seeds: list[int], count: int) -> list[State]:
    """About `count` states, evenly spaced over the whole chain, its ends among them."""
    total = len(job.steps) + 1
    kept = evenly(total, count)
    chain = job.track(samples(job.ddpm, job.steps, seeds), total=total)
    return [state for i, state in enumerate(chain) if i in kept]


def draw_progressive(job: Job, output: Path) -> None:
    seeds = job.seeds(4)
    kept = some_states(job, seeds, 11)
    cells = [[state[row][i] for state in kept] for i in range(len(seeds)) for row in (1, 2)]
    board = Board(
        cells,
        title="Progressive generation",
        note=f"{job}. Below each x_t what the model takes the end to be",
        columns=[*(f"{t}" for t, *_ in kept[:-1]), "sample"],
        rows=["$x_t$", r"$\hat{x}_0$"] * len(seeds),
        corner="$t$",
        column_gaps=[len(kept) - 1],
        row_gaps=range(2, len(cells), 2),
    )
    job.write(board.figure, output)


def draw_chain(job: Job, output: Path) -> None:
    seeds = job.seeds(9)
    across = math.ceil(math.sqrt(len(seeds)))

    def grid(pictures) -> list[list]:
        cells = [*pictures, *[None] * (-len(pictures) % across)]
        return [cells[i : i + across] for i in range(0, len(cells), across)]

    frames = (
        (
            f"$t$ = {t}" if t >= 0 else "samples",
            [a + b for a, b in zip(grid(x), grid(x_0), strict=True)],
        )
        for t, x, x_0 in some_states(job, seeds, 40)
    )
    headings = ("$x_t$", 0, across - 1), (r"$\hat{x}_0$", across, 2 * across - 1)
    write_animation(frames, output, note=str(job), headings=headings, column_gaps=[across])


# ---- interpolation


def steps_from(steps: list[Step], t: int) -> list[Step]:
    """The part of a step table from t on, inclusive, or from the time before that it visits."""
    start = max((step.t for step in steps if step.t <= t), default=steps[-1].t)
    first, *rest = [step for step in steps if step.t <= start]
    # a second-order step has none before it here: c_0 + c_1 makes it one of the first order
    return [first._replace(c_0=first.c_0 + first.c_1, c_1=0.0), *rest]


def interpolate(
    ddpm: DDPM, steps: list[Step], pair: Tensor, *, mixes: list[float], seed: int
) -> Tensor:
    """Mixes (1 - m) x_t + m x_t' of a pair, run from t, inclusive, down to the data (section 4.3).

    As in the official code each picture has its own noise. Those two, and the noise of the chain,
    are the same for all mixes and all t.

    Args:
        steps: from t on. pair: uint8 [2, C, H, W].

    Returns:
        uint8 [len(mixes), C, H, W] on the CPU.
    """
    noise = SeedNoise([seed], tuple(pair.shape[1:]), ddpm.device)
    eps = torch.cat([noise(), noise()])
    ends = ddpm.diffusion.q_sample(from_uint8(pair.to(ddpm.device)), steps[0].t, eps)
    m = torch.tensor(mixes, device=ddpm.device).view(-1, 1, 1, 1)
    *_, (_, x_0, _) = states(ddpm, steps, (1 - m) * ends[:1] + m * ends[1:], noise)
    return x_0


def draw_interpolation(job: Job, output: Path) -> None:
    T, mixes = job.ddpm.diffusion.timesteps, [i / 8 for i in range(9)]
    wanted = job.asked.t or [max(1, T * share // 8) - 1 for share in (1, 2, 3, 4, 8)]
    if out := [t for t in wanted if not 0 <= t < T]:
        raise ValueError(f"--t {out[0]} is outside 0 ... {T - 1}")
    tables = {(table := steps_from(job.steps, t))[0].t: table for t in sorted(wanted)}
    pairs = load_pairs(job)
    work = [(i, t) for i in range(len(pairs)) for t in tables]
    cells, rows = [], []
    for i, t in job.track(work, total=len(work)):
        seed = job.asked.seed + i
        mixed = interpolate(job.ddpm, tables[t], pairs[i], mixes=mixes, seed=seed)
        cells.append([pairs[i][0], *mixed, pairs[i][1]])
        rows.append(f"t = {t}")
    board = Board(
        cells,
        title="Interpolation",
        note=f"{job}. Two pictures with noise up to t, mixed by λ, and denoised",
        columns=["$x_0$", *(f"{m:.3g}" for m in mixes), "$x_0'$"],
        rows=rows,
        corner="λ",
        column_gaps=[1, 10],
        row_gaps=range(len(tables), len(cells), len(tables)),
    )
    job.write(board.figure, output)


def load_pairs(job: Job) -> Tensor:
    """uint8 [N, 2, C, H, W] of files, or of pictures that were held out, if some were."""
    files, data = job.asked.picture, job.ddpm.config.dataset
    if not files:
        count = job.asked.num_images or 1
        pictures, _ = unseen_pictures(job.ddpm)
        if 2 * count > len(pictures):
            raise ValueError(f"--num-images {count}: there are {len(pictures)} for such pairs")
        rows = np.random.default_rng(job.asked.seed).choice(len(pictures), (count, 2), False)
        return pictures[rows.flatten().tolist()].unflatten(0, (count, 2))
    if len(files) != 2 or job.asked.num_images:
        raise ValueError("--picture is given twice, for one pair, and without --num-images")
    fit = dict(image_size=data.image_size, channels=data.channels)
    try:
        pair = [fit_picture(Image.open(file), **fit) for file in files]
    except UnidentifiedImageError as error:
        raise ValueError(f"--picture: {error}") from None
    return torch.from_numpy(np.stack(pair))[None]


def real_pictures(ddpm: DDPM) -> dict[str, Pictures]:
    """Those of training, and those that were held out."""
    data = Data(ddpm.config)
    data.prepare_data()
    data.setup()
    return {split: data.pictures[split] for split in ("train", "validation")}


def unseen_pictures(ddpm: DDPM) -> tuple[Pictures, str]:
    """Those that were held out, or where none were those of training; and which they are."""
    train, held_out = real_pictures(ddpm).values()
    return (held_out, "held-out") if len(held_out) else (train, "training")


def evenly(total: int, count: int) -> list[int]:
    """Up to `count` of `total` rows, evenly spaced, the first and the last among them."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(int).tolist()


# ---- neighbours


def nearest(queries: Tensor, others: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The Euclidean distances and rows of the `count` nearest of `others`, [Q, count] each.

    Args:
        queries: [Q, D]. others: [B, D] each, one after the other.
    """
    best, rows, seen = torch.empty(len(queries), 0), torch.empty(len(queries), 0).long(), 0
    for part in others:
        # by differences: a picture is at distance 0 from itself, which products would round
        distance = torch.cdist(queries, part, compute_mode="donot_use_mm_for_euclid_dist")
        best = torch.cat([best, distance], dim=1)
        rows = torch.cat([rows, torch.arange(seen, seen + len(part)).expand_as(distance)], dim=1)
        best, kept = best.topk(min(count, best.shape[1]), largest=False)
        rows, seen = rows.gather(1, kept), seen + len(part)
    return best, rows


def middle_features(ddpm: DDPM) -> Callable[[Tensor], Tensor]:
    """uint8 [B, C, H, W] -> [B, D]: the U-Net's middle, averaged over positions.

    x_t is of T / 10, with the same noise for all pictures: there the middle knows what a picture
    shows, and not yet its every pixel.
    """
    data, t = ddpm.config.dataset, ddpm.diffusion.timesteps // 10
    eps = SeedNoise([0], (data.channels, data.image_size, data.image_size), ddpm.device)()
    net = ddpm.net

    def features(pictures: Tensor) -> Tensor:
        found = []
        hook = net.mid.block_2.register_forward_hook(lambda *args: found.append(args[-1]))
        try:
            x_t = ddpm.diffusion.q_sample(from_uint8(pictures.to(ddpm.device)), t, eps)
            ddpm(x_t, torch.full((len(pictures),), t, device=ddpm.device))
        finally:
            hook.remove()
        return found[0].float().mean(dim=(2, 3)).cpu()

    return features


def extractor_features(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 [B, C, H, W] -> [B, D] of an extractor that evaluate.py knows."""
    from metrics import load_extractor

    extractor = load_extractor(name).to(device)
    return lambda pictures: extractor(pictures.to(device))[0].float().flatten(1).cpu()


@torch.inference_mode()
def draw_neighbours(job: Job, output: Path) -> None:
    name = job.asked.extractor
    extract = extractor_features(name, job.ddpm.device) if name else middle_features(job.ddpm)
    train, held_out = real_pictures(job.ddpm).values()
    across = min(5, len(train))
    batches = torch.arange(len(train)).split(job.asked.batch_size)
    drawn = job.ddpm.sample(job.steps, job.seeds(8)).cpu()

    queries = torch.cat([drawn, held_out[evenly(len(held_out), 64)]]).flatten(1).float()
    pixels = (train[rows.tolist()].flatten(1).float() for rows in job.track(batches))
    distance, by_pixels = nearest(queries, pixels, across)
    features = torch.cat([extract(train[rows.tolist()]) for rows in job.track(batches)])
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    unit = lambda f: torch.nn.functional.normalize((f - mean) / std)  # angles, each number alike
    _, by_features = nearest(unit(extract(drawn)), unit(features).split(4096), across)

    neighbours = torch.cat([by_pixels[: len(drawn)], by_features], dim=1).tolist()
    rmse = distance[:, 0] / math.sqrt(queries.shape[1])
    near = f"{rmse[: len(drawn)].median():.0f} for these"
    if len(held_out):
        near += f", {rmse[len(drawn) :].median():.0f} for pictures that were held out"
    where = f"features of {Path(name).name}" if name else "the U-Net's features"
    board = Board(
        [[picture, *train[rows]] for picture, rows in zip(drawn, neighbours, strict=True)],
        title="Nearest training pictures",
        note=f"{job}. Median RMSE to the nearest in pixels, of 255: {near}",
        headings=[
            ("sample", 0, 0),
            ("nearest in pixels", 1, across),
            (f"nearest in {where}", across + 1, 2 * across),
        ],
        column_gaps=[1, across + 1],
    )
    job.write(board.figure, output)


# ---- the bound, the schedule


class RateDistortion(NamedTuple):
    """Of a code that sends x_t and stops there (section 4.3), means over pictures; [T] each.

    Entry t is what has been sent once x_t is known, in bits/dim, and the error of x0_hat(x_t) on
    the scale of 0 ... 255. The paper's table calls T - t the reverse time.
    """

    rate: np.ndarray
    rmse: np.ndarray
    distortion: float  # L_0, bits/dim


def rate_distortion(bound: Bound) -> RateDistortion:
    terms = bound.bits.mean(0).numpy()
    sent = np.append(np.cumsum(terms[:0:-1])[::-1], 0.0)  # of the terms after t
    rmse = 127.5 * np.sqrt(bound.mse.mean(0).numpy())
    return RateDistortion(bound.prior.mean().item() + sent, rmse, float(terms[0]))


def draw_rate_distortion(job: Job, output: Path) -> None:
    sampling = job.ddpm.config.sampling.model_copy(update={"variance": job.recipe["variance"]})
    job.ddpm.config = job.ddpm.config.model_copy(update={"sampling": sampling})
    (pictures, which), seeds = unseen_pictures(job.ddpm), job.seeds(16)
    rows = evenly(len(pictures), len(seeds))
    bound = bits_per_dim(
        job.ddpm,
        pictures[rows],
        seeds[: len(rows)],
        batch_size=job.asked.batch_size,
        progress=job.track,
    )
    curve = rate_distortion(bound)
    note = (
        f"{job.caption}. {curve.rate[0] + curve.distortion:.2f} bits/dim = rate "
        f"{curve.rate[0]:.2f} + distortion {curve.distortion:.2f}, with {sampling.variance} "
        f"variance, over {len(rows)} {which} pictures"
    )
    job.write(plot_rate_distortion(*curve[:2], name=job.caption.split(",")[0], note=note), output)


def draw_schedule(job: Job, output: Path) -> None:
    alpha_bar = job.ddpm.diffusion.alpha_bar(torch.arange(job.ddpm.diffusion.timesteps)).numpy()
    job.write(plot_schedule(alpha_bar, job.steps, note=str(job)), output)


PLATES = {
    "progressive": draw_progressive,
    "interpolation": draw_interpolation,
    "neighbours": draw_neighbours,
    "rate-distortion": draw_rate_distortion,
    "chain": draw_chain,
    "schedule": draw_schedule,
}
