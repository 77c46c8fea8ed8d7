"""FID, IS, KID, precision and recall: torch-fidelity's extractors and mathematics, in one pass.

An extractor makes features of pictures; a `Tally` takes them in any order, from any number of
processes, and holds what all metrics need. FID and IS are float64 sums, flat in memory; KID,
precision and recall need the features themselves. Two tallies, or one and saved statistics, give
what torch-fidelity's `calculate_metrics` gives on the same pictures in the same order.
"""

import hashlib
import itertools
import os
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from files import atomic_write

INCEPTION = "inception-v3-compat"  # the TF graph of 2015-12-05 that FID and IS are defined with
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
KEPT = 50_000  # features of so many evenly spaced reference pictures are kept
SPLITS = 10  # of IS
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
SHUFFLE_SEED = 2020  # torch-fidelity's: which picture falls into which split
NEIGHBOURS = 3  # of precision and recall


def import_fidelity():
    """torch-fidelity, which is an extra.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import torch_fidelity.registry as registry
    except ImportError:
        raise ValueError(
            "FID, IS, KID and precision/recall are torch-fidelity's: pip install torch-fidelity"
        ) from None
    return registry


# ---- features


class Extractor(nn.Module):
    """uint8 [B, C, H, W] -> features [B, D] and, where it tells classes, logits [B, K] or None.

    Grey is repeated to three channels, alpha dropped. It runs in float32 throughout, without TF32.

    Args:
        net: uint8 [B, 3, H, W] -> features, or a tuple of features and logits.
        name, digest: what a number is written with; the digest is of the weights (sha256).
    """

    def __init__(self, net: nn.Module, name: str, digest: str):
        super().__init__()
        self.net, self.name, self.digest = net.eval(), name, digest

    @property
    def is_literature(self) -> bool:
        """Whether these are the weights that published FIDs and ISs are computed with."""
        return self.name == INCEPTION and self.digest == INCEPTION_SHA256

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        pictures = pictures[:, :1].expand(-1, 3, -1, -1) if pictures.shape[1] < 3 else pictures
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                out = self.net(pictures[:, :3].contiguous())
        finally:
            torch.set_float32_matmul_precision(precision)  # of training
        features, logits = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        if isinstance(features, tuple):
            (features,) = features
        if features.ndim != 2 or len(features) != len(pictures):
            raise ValueError(
                f"extractor {self.name}: features are {list(features.shape)} for {len(pictures)} "
                "pictures; they must be [B, D]"
            )
        return features, logits

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.digest[:16]})"

    def new_tally(self, count: int, shape: tuple[int, int, int], *, keep: int = 0) -> "Tally":
        """A `Tally` for what this makes of `count` pictures of `shape` (C, H, W)."""
        tensors = itertools.chain(self.net.parameters(), self.net.buffers())
        device = next(tensors, torch.empty(0)).device
        blank = torch.zeros(1, *shape, dtype=torch.uint8, device=device)
        features, logits = self(blank)
        classes = logits.shape[1] if logits is not None else 0
        return Tally(count, features.shape[1], classes, keep=keep)


def load_extractor(name: str = INCEPTION, weights: Path | None = None) -> Extractor:
    """An extractor that torch-fidelity has registered, or a TorchScript file, on the CPU.

    Inception's weights are fetched where the network allows, and checked against their digest.

    Args:
        weights: a file in torch-fidelity's own format, instead of what it would fetch.

    Raises:
        ValueError: an unknown name, no torch-fidelity, or a file that does not hold weights.
        FileNotFoundError: a file is missing and cannot be fetched.
    """
    registry = import_fidelity()
    if name not in registry.FEATURE_EXTRACTORS_REGISTRY:
        if weights:
            raise ValueError(f"extractor {name!r} is a file and holds its own weights")
        return _load_torchscript(Path(name), registry)
    if name.startswith("dinov2"):
        raise ValueError(
            f"extractor {name} fetches code and runs it when it is loaded, which is refused; "
            "save it as TorchScript, and give that file"
        )
    if weights and not weights.is_file():
        raise FileNotFoundError(f"no extractor weights at {weights}")
    if name == INCEPTION and not weights:
        weights = _fetch_inception()
    from torch_fidelity.utils import create_feature_extractor

    kind = registry.FEATURE_EXTRACTORS_REGISTRY[name]
    features, logits = (kind.get_default_feature_layer_for_metric(m) for m in ("fid", "isc"))
    layers = [features] if features == logits else [features, logits]  # one layer: no classes
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # the library would unpickle anything
    try:
        net = create_feature_extractor(
            name, layers, cuda=False, verbose=False,
            feature_extractor_weights_path=str(weights) if weights else None,
        )  # fmt: skip
    except OSError as error:
        raise FileNotFoundError(f"extractor {name} cannot be fetched ({error})") from None
    except Exception as error:  # a file that is no weights can raise anything
        reason = str(error).splitlines()[0]
        raise ValueError(f"{weights or name} does not hold weights of {name}: {reason}") from None
    return Extractor(net, name, _file_digest(weights) if weights else _state_digest(net))


def _load_torchscript(path: Path, registry) -> Extractor:
    if not path.is_file():
        names = ", ".join(n for n in registry.FEATURE_EXTRACTORS_REGISTRY if "dino" not in n)
        raise ValueError(f"extractor {str(path)!r} is no TorchScript file, nor one of: {names}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is old
            net = torch.jit.load(path, map_location="cpu")  # builds no Python objects
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a TorchScript file: {reason}") from None
    return Extractor(net, path.name, _file_digest(path))


def _fetch_inception() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"Inception's weights cannot be fetched ({error}); bring {url} here and name it "
                f"by --extractor-weights, or put it at {path}"
            ) from None
    return path


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _state_digest(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- sums


class Tally:
    """What the metrics need to know of N pictures' features, in float64 sums on the CPU.

    Pictures come in any order, and each in one process: rows that another has are zero here, so
    that adding `tensors()` over all processes gives the whole.

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
        kept = np.linspace(0, count - 1, len(self.features)).round()
        self.slot[torch.from_numpy(kept).long()] = torch.arange(len(self.features))
        # p(y | x) and p log p summed over each split of IS, the splits being torch-fidelity's
        splits = min(SPLITS, count)
        self.p = torch.zeros(splits, classes, dtype=torch.float64)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64)
        order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
        bounds = [i * count // splits for i in range(splits + 1)]
        self.split_sizes = torch.tensor(bounds).diff()
        self.split_of = torch.empty(count, dtype=torch.long)
        self.split_of[order] = torch.arange(splits).repeat_interleave(self.split_sizes)

    def add(self, rows: list[int], features: Tensor, logits: Tensor | None = None) -> None:
        """Features [B, D] and logits [B, K] of the pictures `rows`, from 0 to N - 1."""
        features = features.cpu()
        exact = features.double()
        self.sum += exact.sum(dim=0)
        self.products += exact.T @ exact
        slots = self.slot[rows]
        self.features[slots[slots >= 0]] = features[slots >= 0].float()
        if self.classes:
            log_p = logits.cpu().double().log_softmax(dim=1)
            p = log_p.exp()
            self.p.index_add_(0, self.split_of[rows], p)
            # xlogy: a class of probability 0 adds nothing
            self.p_log_p.index_add_(0, self.split_of[rows], torch.xlogy(p, p).sum(dim=1))

    def tensors(self) -> list[Tensor]:
        """All that adds up over processes."""
        return [self.sum, self.products, self.p, self.p_log_p, self.features]

    def statistics(self) -> "Statistics":
        mu = self.sum / self.count
        scatter = self.products - self.count * torch.outer(mu, mu)
        sigma = scatter / (self.count - 1)
        return Statistics(self.count, mu.numpy(), sigma.numpy(), self.features)

    def inception_score(self) -> tuple[float, float]:
        """exp of the mean KL(p(y | x) to p(y)) (Salimans et al. 2016): mean and std of the splits.

        The mean of p log p less q log q of its mean is that KL, and needs sums alone.
        """
        sizes = self.split_sizes.double()
        q = self.p / sizes[:, None]
        scores = (self.p_log_p / sizes - torch.xlogy(q, q).sum(dim=1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


class Statistics(NamedTuple):
    """Mean and covariance of features, float64, and some of the features, float32 on the CPU."""

    count: int | None
    mu: np.ndarray  # [D]
    sigma: np.ndarray  # [D, D], over n - 1
    features: Tensor | None = None  # [up to KEPT, D]

    def digest(self) -> str:
        content = self.mu.tobytes() + self.sigma.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


def save_statistics(path: Path, statistics: Statistics) -> None:
    """As an .npz, whole or not at all."""
    arrays = {k: v for k, v in statistics._asdict().items() if v is not None}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: Path) -> Statistics:
    """Ours, or any .npz with `mu` and `sigma`, such as those of TTUR and pytorch-fid.

    Raises:
        FileNotFoundError: nothing there. ValueError: not such a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in Statistics._fields if key in file}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or not an .npz: {error}") from None
    mu, sigma = arrays.get("mu"), arrays.get("sigma")
    none = ValueError(f"{path} holds no statistics: finite mu [D], sigma [D, D], features [N, D]")
    if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != (*mu.shape, *mu.shape):
        raise none
    try:
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
        count = int(arrays["count"]) if "count" in arrays else None
    except (ValueError, TypeError):
        raise none from None
    widths = (len(mu),) if features is None else features.shape[1:]
    if widths != (len(mu),) or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise none
    return Statistics(count, mu, sigma, features)


# ---- metrics


class Score(NamedTuple):
    value: float
    error: float | None = None
    error_is: str = ""

    def facts(self) -> dict:
        """Without what is not known."""
        return {"value": self.value} if self.error is None else self._asdict()


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """FID (Heusel et al. 2017): |mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2)).

    Raises:
        ValueError: features of different extractors.
    """
    if one.mu.shape != other.mu.shape:
        raise ValueError(
            f"the reference has features of {len(other.mu)} numbers and this extractor makes "
            f"{len(one.mu)}: another extractor made it"
        )
    import_fidelity()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    pair = ({"mu": s.mu, "sigma": s.sigma} for s in (one, other))
    return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]


def kernel_distance(features: Tensor, reference: Tensor) -> Score:
    """KID (Binkowski et al. 2018), unbiased at any number of pictures; features [N, D], [M, D]."""
    import_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(SUBSET_SIZE, len(features), len(reference))
    found = kid_features_to_metric(
        features, reference, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False
    )
    mean, std = (found[f"kernel_inception_distance_{key}"] for key in ("mean", "std"))
    return Score(mean, std, f"standard deviation over {SUBSETS} subsets of {size}")


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), of 3 neighbours; [N, D] made, [M, D] real.

    Distances are taken in blocks of 10,000 rows: some 2 GB at 50,000 pictures.
    """
    import_fidelity()
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        features, reference, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
    )
    return found["precision"], found["recall"]


def compute(metrics: tuple[str, ...], tally: Tally, reference: Statistics | None) -> dict:
    """{name: Score} of `metrics` (fid, is, kid, pr), in that order.

    A name says how many pictures there were, unless they are the 50,000 of the literature, for all
    but KID, which does not depend on it.
    """
    name = lambda metric: metric if tally.count == 50_000 else f"{metric}-{tally.count}"
    scores = {}
    if "fid" in metrics:
        scores[name("FID")] = Score(frechet_distance(tally.statistics(), reference))
    if "is" in metrics:
        error_is = f"standard deviation over {len(tally.split_sizes)} splits"
        scores[name("IS")] = Score(*tally.inception_score(), error_is)
    if "kid" in metrics:
        scores["KID"] = kernel_distance(tally.features, reference.features)
    if "pr" in metrics:
        precision, recall = precision_recall(tally.features, reference.features)
        scores[name("precision")] = Score(precision)
        scores[name("recall")] = Score(recall)
    return scores
