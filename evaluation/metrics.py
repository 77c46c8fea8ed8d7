"""FID, IS, KID, precision and recall: torch-fidelity's mathematics, in one pass over the images.

The numbers are those of its `calculate_metrics` on the same images in the same order.
"""

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.extractor import Extractor
from files import atomic_write

KEPT = 50_000  # features of so many evenly spaced reference images are kept
SPLITS = 10  # of IS
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
SHUFFLE_SEED = 2020  # torch-fidelity's: it decides which image falls into which split
NEIGHBOURS = 3  # of precision and recall


class Tally:
    """Sums over the features of N images, from which all metrics follow, on the CPU.

    FID and IS need float64 sums; KID, precision and recall the features themselves. Images come in
    any order, and each in one process: adding `tensors()` over all processes gives the whole.

    Args:
        count: N. width: D, of the features. classes: K, of the logits; 0 is none.
        keep: how many features, evenly spaced over the N, to keep as they are.
    """

    def __init__(self, count: int, width: int, classes: int = 0, *, keep: int = 0):
        self.count, self.classes = count, classes
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)
        self.features = torch.zeros(min(keep, count), width)
        self.slot = torch.full((count,), -1)  # where a row's features are kept
        kept = torch.tensor(spread(len(self.features), count), dtype=torch.long)
        self.slot[kept] = torch.arange(len(kept))
        # p(y | x) and p log p summed over each split of IS, the splits being torch-fidelity's
        splits = min(SPLITS, count)
        self.p = torch.zeros(splits, classes, dtype=torch.float64)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64)
        order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
        self.split_sizes = torch.tensor([i * count // splits for i in range(splits + 1)]).diff()
        self.split_of = torch.empty(count, dtype=torch.long)
        self.told = torch.zeros(count, dtype=torch.long)  # the likeliest class of each image
        self.split_of[order] = torch.arange(splits).repeat_interleave(self.split_sizes)

    @classmethod
    def of(
        cls, extractor: Extractor, count: int, shape: tuple[int, ...], *, keep: int = 0
    ) -> "Tally":
        """Return an empty tally of `count` images of `shape` (C, H, W), sized for an extractor."""
        device = next((v.device for v in extractor.state_dict().values()), torch.device("cpu"))
        features, logits = extractor(torch.zeros(1, *shape, dtype=torch.uint8, device=device))
        classes = 0 if logits is None else logits.shape[1]
        return cls(count, features.shape[1], classes, keep=keep)

    def add(self, rows: list[int], features: Tensor, logits: Tensor | None = None) -> None:
        """Add features [B, D] and logits [B, K] of the images `rows`, from 0 to N - 1."""
        features = features.cpu()
        exact = features.double()
        self.sum += exact.sum(dim=0)
        self.products += exact.T @ exact
        slots = self.slot[rows]
        self.features[slots[slots >= 0]] = features[slots >= 0].float()
        if logits is not None:
            self.told[rows] = logits.argmax(dim=1).cpu()
            p = logits.cpu().double().log_softmax(dim=1).exp()
            self.p.index_add_(0, self.split_of[rows], p)
            # xlogy: a class of probability 0 adds nothing
            self.p_log_p.index_add_(0, self.split_of[rows], torch.xlogy(p, p).sum(dim=1))

    def tensors(self) -> list[Tensor]:
        """Return all that adds up over processes."""
        return [self.sum, self.products, self.p, self.p_log_p, self.features, self.told]

    def statistics(self) -> "Statistics":
        """Return what FID, KID, precision and recall compare."""
        mu = self.sum / self.count
        sigma = (self.products - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return Statistics(self.count, mu.numpy(), sigma.numpy(), self.features)

    def inception_score(self) -> tuple[float, float]:
        """Return exp of the mean KL(p(y | x) to p(y)), mean and std over splits.

        Salimans et al. 2016. That KL is the mean of p log p less q log q of q, p's mean.
        """
        sizes = self.split_sizes.double()
        q = self.p / sizes[:, None]
        scores = (self.p_log_p / sizes - torch.xlogy(q, q).sum(dim=1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


class Statistics(NamedTuple):
    """Mean and covariance of features, float64, and some of the features, float32 on the CPU."""

    count: int | None  # type: ignore[assignment]  # of images, over tuple.count
    mu: np.ndarray  # [D]
    sigma: np.ndarray  # [D, D], over n - 1
    features: Tensor | None = None  # [up to KEPT, D]

    def digest(self) -> str:
        content = self.mu.tobytes() + self.sigma.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: Path) -> Statistics:
    """Read ours, or any .npz with `mu` and `sigma`, such as those of TTUR and pytorch-fid.

    Raises:
        FileNotFoundError: nothing there. ValueError: not such a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in Statistics._fields if key in file}
        mu, sigma = (arrays[key].astype(np.float64) for key in ("mu", "sigma"))
        features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
        count = int(arrays["count"]) if "count" in arrays else None
        (width,) = mu.shape
        fit = sigma.shape == (width, width) and (features is None or features.shape[1:] == (width,))
        if not (fit and np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("finite mu [D], sigma [D, D], features [N, D] are needed")
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no statistics: {error}") from None
    return Statistics(count, mu, sigma, features)


def spread(count: int, total: int) -> list[int]:
    """Return up to `count` of range(total), evenly spaced, the first and the last among them."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


# ---- scores


class Score(NamedTuple):
    """A number, how far it may be off, and in which sense."""

    value: float
    error: float | None = None
    error_is: str = ""


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Return |mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2)), Heusel et al. 2017."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    pair = ({"mu": s.mu, "sigma": s.sigma} for s in (one, other))
    return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]


def kernel_distance(features: Tensor, reference: Tensor) -> Score:
    """Return the KID (Binkowski et al. 2018), unbiased at any N; features [N, D], [M, D]."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(SUBSET_SIZE, len(features), len(reference))
    found = kid_features_to_metric(
        features, reference, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False
    )
    mean, std = (found[f"kernel_inception_distance_{key}"] for key in ("mean", "std"))
    return Score(mean, std, f"standard deviation over {SUBSETS} subsets of {size}")


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return precision and recall (Kynkaanniemi et al. 2019); features [N, D] made, [M, D] real."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        features, reference, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
    )
    return found["precision"], found["recall"]


def compute(metrics: Iterable[str], tally: Tally, reference: Statistics | None) -> dict[str, Score]:
    """Return {name: Score} of `metrics` (fid, is, kid, pr); all but `is` need a reference."""
    # KID is unbiased at any N; the others' names say N, unless it is the literature's
    name = lambda metric: metric if tally.count == 50_000 else f"{metric}-{tally.count}"
    scores, real = {}, reference.features if reference else None
    if "fid" in metrics and reference:
        scores[name("FID")] = Score(frechet_distance(tally.statistics(), reference))
    if "is" in metrics:
        error_is = f"standard deviation over {len(tally.split_sizes)} splits"
        scores[name("IS")] = Score(*tally.inception_score(), error_is)
    if "kid" in metrics and real is not None:
        scores["KID"] = kernel_distance(tally.features, real)
    if "pr" in metrics and real is not None:
        precision, recall = precision_recall(tally.features, real)
        scores[name("precision")] = Score(precision)
        scores[name("recall")] = Score(recall)
    return scores
