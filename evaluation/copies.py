"""Copies of training images: near to one of them, and far from the next, by pixels or features."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from dataset import Images
from diffusion_utils import from_uint8
from evaluation.extractor import Extractor
from generation import SeedNoise
from model import exact_float32
from weights import Model

COPY = 1 / 3  # distance to the nearest training image over that to the second nearest
COARSE = 64  # pixels of a side that are enough to know a copy
Extract = Callable[[Tensor], Tensor]  # uint8 [B, C, H, W] -> features [B, D] on the CPU


def square_distances(queries: Tensor, others: Tensor) -> Tensor:
    """Return |q - o|^2, [Q, N], of [Q, D] and [N, D]; exact for bytes in float64."""
    squares = queries.square().sum(1, keepdim=True) + others.square().sum(1)
    return torch.addmm(squares, queries, others.T, alpha=-2).clamp(min=0)


def nearest(queries: list[Tensor], others: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the distances and places of the `count` nearest of `others`, [Q, count] each.

    Args:
        queries: [Q, D] each: several views of the same Q, of which the nearest counts.
        others: [B, D] each, one after the other.
    """
    best = queries[0].new_empty(len(queries[0]), 0)
    places, seen = best.long(), 0
    for part in others:
        with exact_float32():
            distance = torch.stack([square_distances(view, part) for view in queries]).amin(0)
        best = torch.cat([best, distance], dim=1)
        here = torch.arange(seen, seen + len(part), device=best.device)
        places = torch.cat([places, here.expand_as(distance)], dim=1)
        best, kept = best.topk(min(count, best.shape[1]), largest=False)
        places, seen = places.gather(1, kept), seen + len(part)
    return best.sqrt().cpu(), places.cpu()


class Pairs(NamedTuple):
    """The training images that are nearest to each of Q images, two or more."""

    distance: Tensor  # [Q, count]
    rows: Tensor  # [Q, count], of the training set

    @property
    def ratio(self) -> Tensor:
        """The distance to the nearest over that to the second, [Q]; 1 where there is no second."""
        if self.distance.shape[1] < 2:
            return torch.ones(len(self.distance))
        return (self.distance[:, 0] / self.distance[:, 1]).nan_to_num(1.0)

    @property
    def copies(self) -> int:
        """The number of images much nearer to one training image than to any other."""
        return int((self.ratio < COPY).sum())


def find_pairs(
    queries: Tensor,
    train: Images,
    rows: np.ndarray,
    flips: bool,
    device: torch.device,
    *,
    count: int = 2,
    coarse: int = COARSE,
) -> Pairs:
    """Return the nearest of the training images `rows` to uint8 images [Q, C, H, W], by pixels.

    Larger ones are brought down towards `coarse` pixels a side; distances are of levels.
    """
    shrink = max(1, min(train.shape[1:]) // coarse)

    def flat(images: Tensor) -> Tensor:
        x = images.to(device).float() - 128  # nearer to 0: products are exact up to 1,024 values
        return shrink * avg_pool2d(x, shrink).flatten(1)

    views = [flat(view) for view in ((queries, queries.flip(-1)) if flips else (queries,))]
    size = max(1, 10**8 // math.prod(train.shape))
    batches = (rows[i : i + size].tolist() for i in range(0, len(rows), size))
    distance, places = nearest(views, (flat(train[some].images) for some in batches), count)
    return Pairs(distance, torch.from_numpy(rows)[places])


# ---- features, in which copies are looked for too


def features_of(model: Model, extractor: Extractor | None) -> tuple[str, Extract]:
    """Return what features are called, and an extractor's, or the network's where there is none.

    The network sees x_t at T / 10 with the same noise for all: there it knows what an image shows,
    and not yet its every pixel.
    """
    device, t = model.device, model.diffusion.timesteps // 10
    if extractor:
        extract = lambda images: extractor(images.to(device))[0].float().flatten(1).cpu()
        return f"features of {extractor.name}", extract
    eps, times = SeedNoise([0], model.shape, device)(), torch.tensor([t], device=device)

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        x_t = model.diffusion.q_sample(from_uint8(images.to(device)), t, eps)
        with exact_float32():
            return model.network.features(x_t, times).cpu()

    return "the U-Net's features", features


def find_pairs_by_features(
    queries: list[Tensor],
    train: Images,
    rows: np.ndarray,
    flips: bool,
    extract: Extract,
    *,
    count: int = 2,
    batch_size: int = 256,
    track: Callable[..., Iterable] = lambda work, total: work,
) -> list[Pairs]:
    """Return, for each set of uint8 images, the nearest of the training images `rows`.

    Features are brought to one scale and compared by their angle.
    """
    batches = [rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
    parts = [extract(train[batch].images) for batch in track(batches, total=len(batches))]
    features = torch.cat(parts)
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    unit = lambda images: normalize(
        (torch.cat([extract(some) for some in images.split(batch_size)]) - mean) / std
    )
    known, found = normalize((features - mean) / std).split(4096), []
    for images in queries:
        views = [unit(images), unit(images.flip(-1))] if flips else [unit(images)]
        distance, places = nearest(views, known, count)
        found.append(Pairs(distance, torch.from_numpy(rows)[places]))
    return found
