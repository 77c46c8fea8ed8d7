#!/usr/bin/env python3
"""Images from anywhere -> uint8 [N, C, H, W], and the order in which training sees them.

Small datasets live in memory. Files are decoded once, cut to size, and kept as one memory-mapped
array under `cache`, so that a bad file is found before the first step and never in hour three.
"""

if __name__ == "__main__":  # before torch is imported, to print help
    import cli  # noqa: F401  (first: it speaks of packages that are missing)
    from sources.command import app

    app(obj=lambda: __import__("dataset").load_images)  # it ends the process

import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from files import atomic_write, remove_leftovers
from sources import (
    Progress,
    Source,
    count_classes,
    find_images,
    in_threads,
    name_classes,
    open_files,
    why_unusable,
)

if TYPE_CHECKING:
    from config import Config

# errors of the system while a file is read, which say nothing about the file
PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
Fit = Literal["crop", "pad"]


class Batch(NamedTuple):
    """Images, uint8 [B, C, H, W], and their labels, float32 [B, classes], where there are any.

    A row of labels has a 1 for each class of the image.
    """

    images: Tensor
    labels: Tensor | None = None


class Images(Dataset):
    """Images, indexed by a list of rows so that a batch is one gather.

    `source` is uint8 [N, C, H, W], or the .npy file of it (opened lazily, in each process); `rows`
    are those of the N that count, in order. `labels` are of all N: [N], the number of a class, or
    [N, classes]; `classes` are their names.
    """

    def __init__(
        self,
        source: np.ndarray | Path,
        rows: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
    ):
        self.source, self.labels, self.classes = source, labels, list(classes)
        self.rows = np.arange(len(self.array)) if rows is None else rows

    @property
    def array(self) -> np.ndarray:
        return _open(self.source) if isinstance(self.source, Path) else self.source

    @property
    def shape(self) -> tuple[int, int, int]:  # (C, H, W)
        return self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of the count and of 64 evenly spaced images."""
        some = np.linspace(0, len(self) - 1, min(64, len(self))).astype(int).tolist()
        return digest(f"{len(self)} {self.shape}".encode() + self[some].images.numpy().tobytes())

    def of(self, rows: np.ndarray) -> "Images":
        """Return some of the images, in the order of `rows`."""
        return Images(self.source, self.rows[rows], self.labels, self.classes)

    def labels_of(self, rows: Sequence[int]) -> np.ndarray | None:
        """Return [B, classes], uint8, with a 1 for each class of an image."""
        if self.labels is None:
            return None
        some = self.labels[self.rows[rows]]
        if some.ndim == 1:
            some = (some[:, None] == np.arange(len(self.classes))).astype(np.uint8)
        return some

    def labels_fingerprint(self) -> str:
        """Return 16 hexadecimal digits of all labels."""
        labels = self.labels_of(range(len(self)))
        return digest(b"" if labels is None else labels.tobytes())

    def count_classes(self) -> dict[str, int]:
        """Return how many images each class has."""
        if self.labels is None:
            return {}
        counts = count_classes(self.labels[self.rows], len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))

    def __getitem__(self, rows: list[int]) -> Batch:
        labels = self.labels_of(rows)
        images = torch.from_numpy(np.asarray(self.array[self.rows[rows]]))
        return Batch(images, None if labels is None else torch.from_numpy(labels).float())


@lru_cache
def _open(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def digest(content: bytes) -> str:
    """Return 16 hexadecimal digits that name `content`."""
    return hashlib.sha256(content).hexdigest()[:16]


class FolderImages:
    """Images of a folder, zip or tar, in the order of their names; read as they are asked for.

    `fit`: (channels, height, width) to bring them to; None takes them as RGB, all of one size.
    """

    def __init__(self, root: Path, fit: tuple[int, int, int] | None = None):
        self.root, self.fit, self.source = root, fit, open_files(root)
        self.shape: tuple[int, int, int] = (0, 0, 0)  # (C, H, W)
        self.shape = self._read(0).shape

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, rows: list[int]) -> Batch:
        """Read images; ValueError: one cannot be read, or is of another size."""
        arrays = in_threads(lambda i: self._read(rows[i]), len(rows))
        return Batch(torch.from_numpy(np.stack(list(arrays))))

    def _read(self, row: int) -> np.ndarray:
        name = f"{self.source.names[row]} in {self.root}"
        try:
            with self.source.open(row) as image:
                if self.fit:
                    return fit_image(image, channels=self.fit[0], image_size=self.fit[1:])
                pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except Exception as error:  # a decoder can raise anything on a broken file
            raise ValueError(f"{name}: {why_unusable(error)}") from None
        if self.shape not in ((0, 0, 0), pixels.shape):
            first = f"the first image is {sides(self.shape)}; they must be of one size"
            raise ValueError(f"{name} is {sides(pixels.shape)} and {first}")
        return pixels

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when the files do."""
        fit = self.fit and (self.fit if self.fit[1] != self.fit[2] else self.fit[:2])
        return digest(json.dumps([self.source.identity, fit]).encode())


def sides(shape: tuple[int, ...]) -> str:
    """Return '32x32' of (C, H, W)."""
    return f"{shape[2]}x{shape[1]}"


@dataclass(kw_only=True, eq=False)
class StepSampler(Sampler[list[int]]):
    """The rows of each step's batch, forever: a function of (seed, step) alone.

    Step k takes positions k B ... (k + 1) B - 1 of an endless stream of permutations, the e-th
    drawn from (seed, e). Rank r of W takes the r-th of W equal parts. It has no length on purpose.
    """

    count: int  # of images
    batch_size: int  # B, of all ranks together; W divides it
    seed: int
    start_step: int = 0  # where iteration begins
    rank: int = 0
    world_size: int = 1

    def rows(self, step: int) -> list[int]:
        """Return this rank's rows of the batch of `step`."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        epochs = (divmod(position, self.count) for position in range(first, first + share))
        return [int(_permutation(self.count, self.seed, e)[place]) for e, place in epochs]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.rows, itertools.count(self.start_step))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def load_images(
    *,
    name: str,
    root: str,
    image_size: int | Sequence[int],
    channels: int,
    fit: Fit,
    split: str,
    validation_fraction: float,
    cache: str,
    labels: bool,
    classes: list[str],
    progress: Progress | None = None,
) -> dict[str, Images]:
    """Return {"train": ..., "validation": ...}; `validation` may be empty.

    A dataset with an official test set validates on that, unless `split` is "all"; else validates
    a random `validation_fraction`, the same for every seed. Decoded files are kept in `cache`.
    Where `labels` are wanted, each class has images to train on; `classes` are its names, if known.

    Raises:
        FileNotFoundError: nothing at `root`. ValueError: too many files that cannot be used, no
            labels, other classes.
    """
    form = dict(image_size=image_size, channels=channels, fit=fit)
    show = progress or (lambda outcomes, total: outcomes)
    parts = {}
    for part, source in find_images(name, Path(root), split).items():
        if source.pixels is not None:
            parts[part] = Images(_fit_array(source, form))
        else:
            parts[part] = _decode(source, root, Path(cache), show, form)
        if labels:
            parts[part].labels, classes = _read_labels(source, root, classes)
            parts[part].classes = classes
    if "validation" not in parts:
        images = parts["train"]
        order = np.random.default_rng(0).permutation(len(images))
        count = round(validation_fraction * len(order))
        if count >= len(order):
            hint = f"leaves none of {count} images to train on"
            raise ValueError(f"dataset.validation_fraction {validation_fraction} {hint}")
        rows = {"train": order[count:], "validation": order[:count]}
        parts = {part: images.of(np.sort(some)) for part, some in rows.items()}
    if empty := [name for name, count in parts["train"].count_classes().items() if not count]:
        which = f"{empty[0]!r}" + f" and {len(empty) - 1} other classes" * (len(empty) > 1)
        hint = "add some, or lower dataset.validation_fraction"
        raise ValueError(f"{root} (dataset.root) has no images of {which} to train on; {hint}")
    return parts


def _read_labels(source: Source, root: str, known: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the labels of all images of a source and the names of their classes."""
    try:
        labels = source.labels()
        return labels.of, name_classes(labels, known)
    except ValueError as error:
        raise ValueError(f"labels of {root} (dataset.labels=true): {error}") from None


def with_facts(config: "Config", progress: Progress | None = None) -> "Config":
    """Return a config with the facts of its data: its classes, and the steps of its max_epochs.

    To count those the images are opened, which decodes what is not in the cache.

    Raises as `load_images`.
    """
    data = config.dataset
    if config.training.max_epochs:
        images = load_images(**data.model_dump(exclude={"random_flip"}), progress=progress)
        config = config.with_steps(len(images["train"]))
    if not data.labels:
        return config
    source = find_images(data.name, Path(data.root), data.split)["train"]
    _, classes = _read_labels(source, data.root, data.classes)
    return config.model_copy(update={"dataset": data.model_copy(update={"classes": classes})})


def fit_image(
    image: Image.Image, *, image_size: int | Sequence[int], channels: int, fit: Fit = "crop"
) -> np.ndarray:
    """Return one image as uint8 [C, H, W]: upright, whole range, antialiased, never stretched.

    Args:
        image_size: of a square, or (height, width).
        fit: `crop` keeps the largest part of that aspect about the centre; `pad` keeps all, on
            black (with alpha: on nothing).
        channels: 1 gray, 3 RGB, 2 and 4 the same with alpha; without it, transparency is white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        scale = 255 if pixels.max() <= 1 else 1
        pixels = pixels * scale if image.mode == "F" else pixels / 257  # of 0 ... 65535
        image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels not in (2, 4):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif channels in (2, 4) and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # from here there is a way to each of them
    image = image.convert({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels])
    height, width = height_width(image_size)
    if image.size != (width, height):
        resize = ImageOps.pad if fit == "pad" else ImageOps.fit
        image = resize(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of the config's image_size."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def _fit_array(source: Source, form: dict) -> np.ndarray:
    """Return the images of a source in memory as [N, channels, H, W] of the form."""
    assert source.pixels is not None
    if source.pixels.shape[1:] == (*height_width(form["image_size"]), form["channels"]):
        return np.ascontiguousarray(source.pixels.transpose(0, 3, 1, 2))
    return np.stack([fit_image(source.open(i), **form) for i in range(len(source.names))])


def _decode(source: Source, root: str, cache: Path, show: Progress, form: dict) -> Images:
    """Decode all images of a source once into `cache`, and map them into memory."""
    size, channels, fit = form.values()
    count, (height, width) = len(source.names), height_width(size)
    # the first word names a way of decoding, not a function: caches are found by it
    recipe = ["1: fit_picture", *source.identity, size, channels, *([fit] if fit != "crop" else [])]
    array_file = cache / f"{digest(json.dumps(recipe).encode())}-{height}x{width}x{channels}.npy"
    skipped_file = array_file.with_suffix(".json")  # written last: where it is, all is
    skipped = None
    with suppress(OSError, ValueError, EOFError):  # one of them is not there or not whole
        if np.load(array_file, mmap_mode="r").shape == (count, channels, height, width):
            skipped = json.loads(skipped_file.read_text())
    if not isinstance(skipped, dict):
        remove_leftovers(cache)
        with atomic_write(array_file, unique=True) as temporary:
            skipped = _decode_into(temporary, source, show, form)
        with atomic_write(skipped_file, unique=True) as temporary:
            temporary.write_text(json.dumps(skipped))
    if skipped:
        shown = "\n".join(f"  {name}: {why}" for name, why in itertools.islice(skipped.items(), 10))
        more = f"\n  and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        message = f"{len(skipped)} of {count} files in {root} cannot be used:\n{shown}{more}"
        if len(skipped) > max(10, count // 100) or len(skipped) == count:
            raise ValueError(f"{message}\nRepair or remove them.")
        print(f"{message}\n  They are left out.")
    bad = {re.sub(r"^picture (?=\d+$)", "image ", name) for name in skipped}  # as it once was
    return Images(array_file, np.array([i for i, n in enumerate(source.names) if n not in bad]))


def _decode_into(file: Path, source: Source, show: Progress, form: dict) -> dict[str, str]:
    """Decode all images into an .npy file; return the names of those left out, and why.

    The memory map is closed when this returns: Windows renames no file that is mapped.
    """
    count, (height, width) = len(source.names), height_width(form["image_size"])
    shape = count, form["channels"], height, width
    array = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is said now, not by a dead process
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)

    def decode(row: int) -> tuple[str, str] | None:
        try:
            with source.open(row) as image:
                if image.width * 8 < width or image.height * 8 < height:
                    raise ValueError(f"too small: {image.width}x{image.height} pixels")
                array[row] = fit_image(image, **form)
        except Exception as error:  # a decoder can raise anything on a broken file
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            return source.names[row], why_unusable(error)
        return None

    skipped = dict(filter(None, show(in_threads(decode, count), total=count)))
    array.flush()
    return skipped
