"""Classes of the measured images: which labels are drawn how often, and numbers by class."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from dataset import Images
from evaluation.distributed import Ranks
from evaluation.metrics import Score, Statistics, Tally, compute
from generation.recipe import label_vector

Label = str | None  # a class, or several joined by +, as in a recipe; None is without
SHOWN = 12  # classes in the printed table; of more, the worst few
WORST = 5


# ---- labels and their rows


def rows_by_label(images: Images, rows: Sequence[int]) -> dict[Label, list[int]]:
    """Return {label: positions in `rows` of its images}, in the order of the classes."""
    if images.labels is None:
        return {None: list(range(len(rows)))}
    labels, names = images.labels[images.rows[list(rows)]], images.classes
    several = labels.ndim == 2
    # negated, images of the first class are sorted first
    kinds, which = np.unique(
        -labels.astype(np.int8) if several else labels, axis=0, return_inverse=True
    )
    found: dict[Label, list[int]] = {}
    for i, kind in enumerate(kinds):
        of = [names[k] for k in (np.flatnonzero(kind) if several else [kind])]
        found["+".join(of) or None] = np.flatnonzero(which.ravel() == i).tolist()
    return found


def count_labels(images: Images) -> dict[Label, int]:
    """Return {label: how many images have it}: how often training sees it."""
    return {label: len(rows) for label, rows in rows_by_label(images, range(len(images))).items()}


def apportion(count: int, weights: Sequence[int]) -> list[int]:
    """Return whole numbers that add up to `count`, in proportion to `weights`.

    Those with the largest remainders are rounded up, the first of equal ones before others.
    """
    shares = [divmod(count * weight, sum(weights)) for weight in weights]
    counts = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: -shares[i][1])
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    return counts


def assign_labels(count: int, weights: dict[Label, int]) -> dict[Label, list[int]]:
    """Return {label: its rows} of range(count), labels one after the other, by their weights."""
    counts = apportion(count, list(weights.values()))
    ends = np.cumsum(counts).tolist()
    rows = [list(range(end - n, end)) for n, end in zip(counts, ends, strict=True)]
    return {label: some for label, some in zip(weights, rows, strict=True) if some}


def as_matrix(rows: dict[Label, list[int]], classes: list[str]) -> np.ndarray:
    """Return uint8 [N, classes], with a 1 for each class of a row, of {label: its rows}."""
    matrix = np.zeros((sum(map(len, rows.values())), len(classes)), np.uint8)
    for label, some in rows.items():
        if label:
            matrix[some] = label_vector(label, classes).numpy()
    return matrix


def share_by_label(
    ranks: Ranks, rows: dict[Label, list[int]], batch_size: int
) -> Iterator[tuple[Label, list[list[int]]]]:
    """Yield each label and this rank's batches of its rows, as many as other ranks have."""
    for label, some in rows.items():
        batches = ranks.share(len(some), batch_size)
        yield label, [[some[i] for i in batch] for batch in batches]


# ---- numbers


class Labelled(NamedTuple):
    """Classes of the measured images, and of the real ones whose features are kept."""

    classes: list[str]
    labels: np.ndarray  # uint8 [N, classes]
    real: np.ndarray | None = None  # uint8 [M, classes]


def told_right(tally: Tally, labels: np.ndarray) -> np.ndarray | None:
    """Return bool [N]: the extractor tells a class of the image; None where it knows others."""
    if not tally.classes or tally.classes != labels.shape[1]:
        return None
    return labels[np.arange(len(labels)), tally.told.numpy()] > 0


def overall_accuracy(tally: Tally, labels: np.ndarray) -> dict[str, Score]:
    """Return {"accuracy": Score} of the images that have a class, where it can be told."""
    right, has = told_right(tally, labels), labels.any(axis=1)
    if right is None or not has.any():
        return {}
    share, count = float(right[has].mean()), int(has.sum())
    error = (share * (1 - share) / count) ** 0.5
    return {"accuracy": Score(share, error, f"standard error over {count} images")}


def class_scores(
    metrics: Iterable[str],
    tally: Tally,
    reference: Statistics | None,
    known: Labelled,
    batch_size: int,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return {class: {name: value}}, and what is left out, in words.

    An image of several classes counts in each. A FID needs more images than features, both real
    and made, as its covariances are else singular.
    """
    right, features = told_right(tally, known.labels), tally.features
    real = reference.features if reference and known.real is not None else None
    least = {"fid": features.shape[1] + 1, "kid": 2, "pr": 4}
    asked = [m for m in metrics if m in least] if real is not None else []
    found: dict[str, dict[str, float]] = {}
    without: dict[str, list[str]] = {metric: [] for metric in asked}
    for k, name in enumerate(known.classes):
        mine = np.flatnonzero(known.labels[:, k])
        if not len(mine):
            continue
        found[name] = {"images": len(mine)}
        if right is not None:
            found[name]["accuracy"] = float(right[mine].mean())
        if real is None or known.real is None:
            continue
        theirs = np.flatnonzero(known.real[:, k])
        found[name]["real images"] = len(theirs)
        enough = [m for m in asked if min(len(mine), len(theirs)) >= least[m]]
        for metric in set(asked) - set(enough):
            without[metric].append(name)
        if enough:
            made, of_real = (replay(some, batch_size) for some in (features[mine], real[theirs]))
            scores = compute(enough, made, of_real.statistics())
            found[name] |= {key: score.value for key, score in scores.items()}
    lines = []
    for metric, names in without.items():
        if names:
            which = "all classes" if len(names) == len(found) else ", ".join(names[:8])
            more = f" and {len(names) - 8} more" if 8 < len(names) < len(found) else ""
            words = {"fid": "FID", "kid": "KID", "pr": "precision, recall"}[metric]
            few = f"fewer than {least[metric]} images, made or real"
            lines.append(f"without {words} of {which}{more}: {few}")
    return found, lines


def replay(features: Tensor, batch_size: int) -> Tally:
    """Return the tally of images whose features [N, D] are there."""
    tally = Tally(len(features), features.shape[1], keep=len(features))
    for rows in torch.arange(len(features)).split(batch_size):
        tally.add(rows.tolist(), features[rows])
    return tally


def class_table(found: dict[str, dict[str, Any]]) -> Table:
    """Return a row for each class, or for the worst few of many, and their means."""
    rows = {
        name: {key.partition("-")[0]: v for key, v in some.items()} for name, some in found.items()
    }
    columns = [c for c in ("FID", "KID", "precision", "recall", "accuracy")
               if any(c in row for row in rows.values())]  # fmt: skip
    shown, title = list(rows), "class"
    if len(rows) > SHOWN and columns:
        by = "accuracy" if "accuracy" in columns else columns[0]
        sign = -1 if by in ("FID", "KID") else 1
        having = [name for name in rows if by in rows[name]]
        shown = sorted(having, key=lambda name: sign * rows[name][by])[:WORST]
        title = f"class, the worst {len(shown)} of {len(rows)}"
    table = Table(title, "images", *columns)
    digits = lambda column: 6 if column == "KID" else 4
    for name in shown:
        values = [f"{rows[name][c]:.{digits(c)}f}" if c in rows[name] else "" for c in columns]
        table.add_row(name, f"{rows[name]['images']}", *values)
    means = [np.mean([row[c] for row in rows.values() if c in row]) for c in columns]
    table.add_row(
        "mean of classes", "", *(f"{m:.{digits(c)}f}" for c, m in zip(columns, means, strict=True))
    )
    return table
