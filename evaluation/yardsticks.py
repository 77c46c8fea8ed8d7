"""Yardsticks for a diffusion model's loss that follow from its data alone, and are kept with them.

The loss here is always the plain error of eps: the mean over pixels of (eps - eps_hat)^2, which is
1 untrained. With a = alpha_bar_t, and x_0 from a dataset of N images with D values each:

- The best linear denoiser of x_t (the Wiener filter) has L_t = 1/D sum_i a l_i / (a l_i + 1 - a),
  l_i the eigenvalues of the dataset's covariance. A model above it has learned less than that.
- The memoriser predicts the posterior mean over the training set itself, E[x_0 | x_t] = sum w_i x_i
  with w the softmax over i of -|x_t - sqrt(a) x_i|^2 / (2 (1 - a)): the best on images that it
  knows, and worse than nothing on others.

A training set that is mirrored at random counts with its mirror images.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset import Images
from diffusion_utils import GaussianDiffusion
from evaluation.copies import find_pairs, square_distances
from evaluation.metrics import save_arrays, spread

BINS = 20  # of t
PROBED = 256  # images of each split, unless they are huge
BLOCK = 256  # as many squares of a byte add up exactly in float32
WIDEST = 4096  # matrix whose eigenvalues are computed
# values of a sample, which bound time and memory
PROBED_VALUES = 2 * 10**7
MEMORISER_VALUES = 6 * 10**7
SPECTRUM_VALUES = 2 * 10**8
COPIES_VALUES = 6 * 10**9


class Probe(NamedTuple):
    """Q images of a split, each with one noise and one t of every bin, to measure all lines on."""

    images: Tensor  # uint8 [Q, C, H, W]
    labels: Tensor | None  # [Q, classes]
    t: Tensor  # int64 [bins, Q]
    eps: Tensor  # [Q, C, H, W]


def make_probe(images: Images, timesteps: int) -> Probe:
    """Return evenly spaced images with noise; over them a bin's t are as even."""
    batch = images[spread(probed(images), len(images))]
    edges = bin_edges(timesteps)
    u = np.arange(len(batch.images)) * 0.6180339887498949 % 1
    t = edges[:-1, None] + np.diff(edges)[:, None] * u
    eps = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    return Probe(batch.images, batch.labels, torch.from_numpy(t.astype(int)), eps)


def probed(images: Images) -> int:
    """Return how many images a probe has."""
    return min(PROBED, max(16, PROBED_VALUES // math.prod(images.shape)))


def bin_edges(timesteps: int) -> np.ndarray:
    """Return where the bins of t begin, and T."""
    bins = min(BINS, timesteps)
    return -(-np.arange(bins + 1) * timesteps // bins)


def by_quarter(line: np.ndarray, timesteps: int) -> list[float]:
    """Return the mean over t of a line [bins], then those over each quarter of t."""
    edges = bin_edges(timesteps)
    widths, quarter = np.diff(edges), edges[:-1] * 4 // timesteps
    parts = [np.ones(len(line), bool), *(quarter == i for i in range(4))]
    return [
        float(np.average(line[part], weights=widths[part])) if part.any() else math.nan
        for part in parts
    ]


# ---- the best linear denoiser


class Spectrum(NamedTuple):
    """Eigenvalues of a covariance, [D]; where they are too many, of two that enclose its loss."""

    values: np.ndarray  # no lower loss than the best's
    least: np.ndarray  # no higher one, in expectation
    images: int  # how many it is of


def measure_spectrum(images: Images, flips: bool) -> Spectrum:
    """Return the spectrum of images in [-1, 1], by N x N or D x D products, whichever is smaller.

    Where both are too large: the loss is concave in the covariance. So it is no lower for the
    diagonal in any basis, here the cosine transform with its channels apart, and in expectation no
    higher for a sample's covariance.
    """
    width, count = math.prod(images.shape), len(images)
    if width <= min(WIDEST, count * (1 + flips)):
        rows = spread(SPECTRUM_VALUES // width, count)
        values = np.linalg.eigvalsh(covariance(images, rows, flips))
        return Spectrum(_in_range(values, width), _in_range(values, width), len(rows))
    most = min(WIDEST, math.isqrt(5 * 10**11 // width)) // (1 + flips)
    rows = spread(most, count)
    least = _in_range(np.linalg.eigvalsh(gram(images, rows, flips)), width)
    if len(rows) == count:
        return Spectrum(least, least, count)
    rows = spread(SPECTRUM_VALUES // width, count)
    return Spectrum(_in_range(cosine_variances(images, rows, flips), width), least, len(rows))


def _in_range(values: np.ndarray, width: int) -> np.ndarray:
    """Return eigenvalues of levels as those of [-1, 1], at least 0, with zeros up to `width`."""
    found = np.maximum(values, 0) / 127.5**2
    return np.pad(found, (max(0, width - len(found)), 0))[-width:]


def _blocks(images: Images, rows: list[int]) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BLOCK):
        yield images[rows[start : start + BLOCK]].images.numpy()


def _products(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Return the sum of B^T B over blocks B of bytes, [up to BLOCK, M]; exact, in float64."""
    total = np.zeros(())
    for block in blocks:
        exact = block.astype(np.float32)
        total = total + exact.T @ exact
    return total.astype(np.float64)


def covariance(images: Images, rows: list[int], flips: bool) -> np.ndarray:
    """Return the covariance of levels, [D, D]."""
    flat = (block.reshape(len(block), -1) for block in _blocks(images, rows))
    second = _products(np.append(block, np.ones((len(block), 1), np.uint8), 1) for block in flat)
    mean, second = second[-1, :-1] / len(rows), second[:-1, :-1] / len(rows)
    if flips:
        mirror = np.arange(len(mean)).reshape(images.shape)[..., ::-1].ravel()
        mean, second = (mean + mean[mirror]) / 2, (second + second[np.ix_(mirror, mirror)]) / 2
    return second - np.outer(mean, mean)


def gram(images: Images, rows: list[int], flips: bool) -> np.ndarray:
    """Return the [N, N] matrix with the covariance's eigenvalues that are not 0, of levels."""
    pixels = images[rows].images.numpy()
    pixels = np.concatenate([pixels, pixels[..., ::-1]]) if flips else pixels
    pixels = pixels.reshape(len(pixels), -1)
    products = _products(pixels[:, i : i + BLOCK].T for i in range(0, pixels.shape[1], BLOCK))
    means = products.mean(axis=0)
    return (products - means[:, None] - means + means.mean()) / len(pixels)


def cosine_variances(images: Images, rows: list[int], flips: bool) -> np.ndarray:
    """Return the eigenvalues of each frequency's covariance of channels, all in one array."""
    from scipy.fft import dctn

    channels = images.shape[0]
    sums, products, count = 0.0, 0.0, 0
    for block in _blocks(images, rows):
        for pixels in (block, block[..., ::-1]) if flips else (block,):
            wave = dctn(pixels.astype(np.float32), axes=(2, 3), norm="ortho")
            wave = wave.reshape(len(wave), channels, -1).astype(np.float64)
            sums, count = sums + wave.sum(0), count + len(wave)
            products = products + np.einsum("bcf,bdf->fcd", wave, wave)
    mean = sums / count
    return np.linalg.eigvalsh(products / count - np.einsum("cf,df->fcd", mean, mean)).ravel()


def linear_loss(values: np.ndarray, alpha_bar: np.ndarray) -> np.ndarray:
    """Return the best linear denoiser's error of eps at each alpha_bar < 1, of its shape."""
    kinds, which = np.unique(alpha_bar, return_inverse=True)
    loss = np.array([(a * values / (a * values + 1 - a)).mean() for a in kinds])
    return loss[which].reshape(alpha_bar.shape)


# ---- the memoriser


def memoriser_loss(
    known: np.ndarray, probe: Probe, diffusion: GaussianDiffusion, flips: bool
) -> np.ndarray:
    """Return the error of eps of the posterior mean over `known`, uint8 [N, C, H, W]; [bins].

    With x_t = s x_0 + n eps, |x_t - s x_i|^2 / (2 n^2) is SNR |x_0 - x_i|^2 / 2 + (s/n) eps (x_0 -
    x_i) but for a constant: distances of bytes, which are exact, and one product with eps.
    """
    if flips:
        known = np.concatenate([known, known[..., ::-1]])
    x = torch.from_numpy(known).flatten(1).float()
    x_0, eps = probe.images.flatten(1).double(), probe.eps.flatten(1).double()
    parts = [part.double() for part in x.split(2048)]
    squares = torch.cat([square_distances(x_0, part) for part in parts], dim=1)
    along = (eps * x_0).sum(1, keepdim=True) - torch.cat([eps @ part.T for part in parts], dim=1)
    del parts
    alpha_bar = diffusion.alpha_bar(probe.t)
    line = []
    for a in alpha_bar[:, :, None]:
        snr = a / (1 - a)
        logits = -snr * squares / (2 * 127.5**2) - snr.sqrt() * along / 127.5
        error = logits.softmax(dim=1).float() @ x - x_0.float()
        line.append((snr[:, 0] * error.double().square().mean(1)).mean() / 127.5**2)
    return torch.stack(line).numpy()


# ---- all of it


class Yardsticks(NamedTuple):
    """All that is measured of a dataset for a process, as arrays."""

    spectrum: np.ndarray  # [D], see Spectrum
    least: np.ndarray
    memoriser: np.ndarray  # [2, bins], on training images and on validation images
    distinct: np.ndarray  # [M] rows of training images that are no copies, mirrored ones neither
    validation_copies: np.ndarray  # [2]: how many of how many validation images look like copies
    levels: np.ndarray  # [2]: the lowest and the highest in use, of 0 ... 255
    flat: np.ndarray  # share of images that are nearly of one color
    sampled: np.ndarray  # [3]: training images behind spectrum, memoriser, copies
    few: np.ndarray  # whether the spectrum is of so few images that it knows them by heart

    def linear(self, alpha_bar: np.ndarray) -> np.ndarray:
        """Return the best linear denoiser's error of eps."""
        return linear_loss(self.spectrum, alpha_bar)

    def uncertain(self, alpha_bar: np.ndarray) -> str:
        """Return by how much its mean may be too high, for people; nothing where it is exact."""
        if np.array_equal(self.spectrum, self.least):
            return ""
        return f" (at least {linear_loss(self.least, alpha_bar).mean():.3g})"


def memoriser_set(train: Images, flips: bool) -> Images:
    """Return the training images that the memoriser knows: all, or a sample."""
    most = MEMORISER_VALUES // math.prod(train.shape) // (1 + flips)
    return train.of(np.array(spread(max(probed(train), min(most, 50_000)), len(train))))


def get_yardsticks(
    images: dict[str, Images],
    diffusion: GaussianDiffusion,
    *,
    flips: bool,
    cache: Path,
    say: Callable[[str], object],
) -> Yardsticks:
    """Return the yardsticks of a dataset by split, from `cache` where they have been measured."""
    prints = [images[split].fingerprint() for split in ("train", "validation")]
    key = ["2", *prints, flips, hashlib.sha256(diffusion.betas.tobytes()).hexdigest()]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache / f"yardsticks-{name}.npz"
    if path.exists():
        with suppress(Exception), np.load(path, allow_pickle=False) as file:  # damaged: once more
            return Yardsticks(**{field: file[field] for field in Yardsticks._fields})
    say("measuring the yardsticks of these images, once: up to a minute")
    found = measure_yardsticks(images, diffusion, flips)
    with suppress(OSError):  # then the next run measures again
        save_arrays(path, **found._asdict())
    return found


def measure_yardsticks(
    images: dict[str, Images], diffusion: GaussianDiffusion, flips: bool
) -> Yardsticks:
    train, validation, T = images["train"], images["validation"], diffusion.timesteps
    spectrum, known = measure_spectrum(train, flips), memoriser_set(train, flips)
    pixels = known[list(range(len(known)))].images.numpy()
    lines = [
        memoriser_loss(pixels, make_probe(some, T), diffusion, flips)
        if len(some)
        else np.full(len(bin_edges(T)) - 1, np.nan)
        for some in (known, validation)
    ]
    distinct, levels, flat, searched = survey(train, flips)
    queries, copies = spread(probed(train), len(validation)), 0
    if queries:
        cpu = torch.device("cpu")
        copies = find_pairs(validation[queries].images, train, distinct, flips, cpu).copies
    exact = np.array_equal(spectrum.values, spectrum.least)
    few = exact and spectrum.images * (1 + flips) < 2 * math.prod(train.shape)
    return Yardsticks(
        spectrum.values,
        spectrum.least,
        np.stack(lines),
        distinct,
        np.array([copies, len(queries)]),
        levels,
        np.array(flat),
        np.array([spectrum.images, len(known), searched]),
        np.array(few),
    )


def survey(train: Images, flips: bool) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Return distinct rows, levels in use, the share of flat images, and of how many that is."""
    channels, height, width = train.shape
    rows = spread(COPIES_VALUES // math.prod(train.shape), len(train))
    seen, distinct, used, flat, looked_at = set[bytes](), list[int](), np.zeros(256, int), 0, 0
    colors = {2: 1, 4: 3}.get(channels, channels)  # alpha aside
    every = max(1, len(rows) * channels * height * width // SPECTRUM_VALUES)  # such block's levels
    for i, start in enumerate(range(0, len(rows), BLOCK)):
        some = rows[start : start + BLOCK]
        block = train[some].images.numpy()
        if i % every == 0:
            color, looked_at = block[:, :colors], looked_at + len(block)
            used += np.bincount(color.ravel(), minlength=256)
            flat += int((np.ptp(color, axis=(2, 3)) < 8).all(1).sum())
        for row, image in zip(some, block, strict=True):
            views = (image, image[..., ::-1]) if flips else (image,)
            digest = hashlib.blake2b(min(v.tobytes() for v in views), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                distinct.append(row)
    # a few stray pixels do not count
    levels = np.searchsorted(used.cumsum() / used.sum(), [5e-4, 1 - 5e-4])
    return np.array(distinct), levels, flat / looked_at, len(rows)
