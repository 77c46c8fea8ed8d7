"""The classes of images: by the folders they lie in, by arrays beside them, or of a named set."""

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

NAMED = re.compile(r"(^|[-_. ])labels?([-_. ]|$)|^y$", re.IGNORECASE)  # files, and keys of .npz


class Labels(NamedTuple):
    """The classes of N images."""

    of: np.ndarray  # int64 [N], the number of a class, or uint8 [N, K] with a 1 for each
    names: Sequence[str] = ()  # of the K classes, where there are any


def no_labels() -> Labels:
    """Raise ValueError: the answer of a set without labels."""
    raise ValueError("this set has none")


def as_labels(array: np.ndarray, count: int, names: Sequence[str] = (), at: str = "") -> Labels:
    """Return the labels of `count` images: numbers, [N] or [N, 1], or 0 and 1, [N, K].

    Raises:
        ValueError: it holds something else; the message begins with `at`.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2) or len(array) != count or not array.size:
        raise ValueError(f"{at} holds {array.shape}; give ({count},) or ({count}, classes)")
    finite = array.dtype.kind in "biuf" and bool(np.isfinite(array).all())
    if not finite or array.min() < 0 or (array != np.floor(array)).any():
        raise ValueError(f"{at} holds other values than the numbers of classes, 0, 1, 2 ...")
    if array.ndim == 2 and array.max() > 1:
        raise ValueError(f"{at} holds {array.max():g}; rows of {array.shape[1]} are of 0 and 1")
    classes = int(array.max()) + 1 if array.ndim == 1 else array.shape[1]
    if classes > (most := len(names) or max(count, array.shape[-1])):
        raise ValueError(f"{at} holds class {classes - 1}; there are at most {most}, from 0 on")
    return Labels(array.astype(np.int64 if array.ndim == 1 else np.uint8), names)


def labels_of_folders(files: Sequence[str]) -> Labels:
    """Return the sub-folders that files lie in, the first after the folders of all."""
    folders = [PurePosixPath(file).parent.parts for file in files]
    depth = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))))
    for file, folder in zip(files, folders, strict=True):
        if len(folder) == depth:
            raise ValueError(f"{file} is in no sub-folder; each class is one")
    firsts = [folder[depth] for folder in folders]
    names = sorted(set(firsts))
    return Labels(np.searchsorted(names, firsts), names)


def labels_beside(root: Path, inside: dict[str, np.ndarray], count: int) -> Labels:
    """Return the labels of an array: from the same .npz, or from a file beside it, by their names.

    Args:
        inside: small arrays of the .npz.
        count: of images; among several labels, those of as many are meant.
    """
    found = {f"{root.name}:{key}": array for key, array in inside.items() if NAMED.search(key)}
    others = [path for path in sorted(root.parent.glob("*.np[yz]")) if path != root]
    beside = [path for path in others if NAMED.search(path.stem)]
    own = [path for path in beside if path.stem.startswith(root.stem)]
    alone = len(beside) == len(others)  # else those of another name may be another array's
    for path in () if found else own or beside * alone:
        try:
            loaded = np.load(path, allow_pickle=False)
            is_npz = isinstance(loaded, np.lib.npyio.NpzFile)
            found[path.name] = loaded[loaded.files[0]] if is_npz else loaded
        except Exception as error:  # zip, header, pickle: many kinds
            raise ValueError(f"{path.name} cannot be read as an array: {error}") from None
    if not found:
        raise ValueError(f"there are none beside it; call them {root.stem}_labels.npy")
    if len(found) > 1:
        found = {at: array for at, array in found.items() if array.shape[:1] == (count,)} or found
    if len(found) > 1:
        raise ValueError(f"they may be any of {', '.join(found)}; keep one")
    ((at, array),) = found.items()
    return as_labels(array, count, at=at)


def name_classes(labels: Labels, known: Sequence[str] = ()) -> list[str]:
    """Return the names of classes: their own, else those that are known, else their numbers.

    Raises:
        ValueError: they are others than are known, or of another number.
    """
    held = len(count_classes(labels.of))
    names = list(labels.names or known or map(str, range(held)))
    if known and names != list(known):
        other = sorted(set(names) ^ set(known))[:8] or "their order"
        raise ValueError(f"they are not dataset.classes ({other}); take the data of the run")
    if held > len(names) or (labels.of.ndim == 2 and held < len(names)):
        raise ValueError(f"they are {held}, and dataset.classes names {len(names)}: {names}")
    return names


def count_classes(labels: np.ndarray, classes: int = 0) -> np.ndarray:
    """Return how many images each class has, [K]; of numbers, K is at least `classes`."""
    return np.bincount(labels, minlength=classes) if labels.ndim == 1 else labels.sum(0)
