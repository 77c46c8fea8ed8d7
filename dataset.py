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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from files import atomic_write, remove_leftovers
from sources import Progress, Source, find_images, in_threads, open_files, why_unusable

# errors of the system while a file is read, which say nothing about the file
PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
Fit = Literal["crop", "pad"]


class Batch(NamedTuple):
    """Images, uint8 [B, C, H, W], and their labels, [B], where there are any."""

    images: Tensor
    labels: Tensor | None = None


class Images(Dataset):
    """Images, indexed by a list of rows so that a batch is one gather.

    `source` is uint8 [N, C, H, W], or the .npy file of it (opened lazily, in each process); `rows`
    are those of the N that count, in order.
    """

    def __init__(self, source: np.ndarray | Path, rows: np.ndarray | None = None):
        self.source = source
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
        """Return 16 hexadecimal digits of how many there are and of 64 evenly spaced ones."""
        some = np.linspace(0, len(self) - 1, min(64, len(self))).astype(int).tolist()
        return digest(f"{len(self)} {self.shape}".encode() + self[some].images.numpy().tobytes())

    def __getitem__(self, rows: list[int]) -> Batch:
        return Batch(torch.from_numpy(np.asarray(self.array[self.rows[rows]])))


@lru_cache
def _open(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def digest(content: bytes) -> str:
    """Return 16 hexadecimal digits that name a content."""
    return hashlib.sha256(content).hexdigest()[:16]


class FolderImages:
    """Images of a folder, zip or tar, in the order of their names; read as they are asked for.

    `fit`: (channels, size) to bring them to; None takes them as RGB, all of one size.
    """

    def __init__(self, root: Path, fit: tuple[int, int] | None = None):
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
                    return fit_image(image, channels=self.fit[0], image_size=self.fit[1])
                pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except Exception as error:  # a decoder can raise anything on a broken file
            raise ValueError(f"{name}: {why_unusable(error)}") from None
        if self.shape not in ((0, 0, 0), pixels.shape):
            first = f"the first image is {sides(self.shape)}; they must be of one size"
            raise ValueError(f"{name} is {sides(pixels.shape)} and {first}")
        return pixels

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when the files do."""
        return digest(json.dumps([self.source.identity, self.fit]).encode())


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
    image_size: int,
    channels: int,
    fit: Fit,
    validation_fraction: float,
    cache: str,
    progress: Progress | None = None,
) -> dict[str, Images]:
    """Return {"train": ..., "validation": ...}; `validation` may be empty.

    A dataset with an official test set validates on that; others on a random
    `validation_fraction`, the same for every seed. Decoded files are kept in `cache`.

    Raises:
        FileNotFoundError: nothing at `root`. ValueError: too many files that cannot be used.
    """
    form = dict(image_size=image_size, channels=channels, fit=fit)
    show = progress or (lambda outcomes, total: outcomes)
    parts = {}
    for split, found in find_images(name, Path(root)).items():
        if isinstance(found, np.ndarray):
            parts[split] = Images(_fit_array(found, form))
        else:
            parts[split] = _decode(found, root, Path(cache), show, form)
    if "validation" in parts:
        return parts
    images = parts["train"]
    order = np.random.default_rng(0).permutation(len(images))
    count = round(validation_fraction * len(order))
    if count >= len(order):
        raise ValueError(f"dataset.validation_fraction leaves none of {count} images to train on")
    rows = {"train": np.sort(order[count:]), "validation": np.sort(order[:count])}
    return {split: Images(images.source, images.rows[some]) for split, some in rows.items()}


def fit_image(
    image: Image.Image, *, image_size: int, channels: int, fit: Fit = "crop"
) -> np.ndarray:
    """Return one image as uint8 [C, S, S]: upright, whole range, antialiased, never stretched.

    Args:
        fit: `crop` keeps the largest square about the centre; `pad` keeps all, on black
            (with alpha: on nothing).
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
    if image.size != (image_size, image_size):
        resize = ImageOps.pad if fit == "pad" else ImageOps.fit
        image = resize(image, (image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(image_size, image_size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _fit_array(images: np.ndarray, form: dict) -> np.ndarray:
    """Bring uint8 [N, H, W, C] to [N, channels, image_size, image_size]."""
    if images.shape[1:] == (form["image_size"], form["image_size"], form["channels"]):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return np.stack([fit_image(Image.fromarray(i.squeeze()), **form) for i in images])


def _decode(source: Source, root: str, cache: Path, show: Progress, form: dict) -> Images:
    """Decode all images of a source once into `cache`, and map them into memory."""
    size, channels, fit = form.values()
    count = len(source.names)
    # the first word names a way of decoding, not a function: caches are found by it
    recipe = ["1: fit_picture", *source.identity, size, channels, *([fit] if fit != "crop" else [])]
    array_file = cache / f"{digest(json.dumps(recipe).encode())}-{size}x{size}x{channels}.npy"
    skipped_file = array_file.with_suffix(".json")  # written last: where it is, all is
    skipped = None
    with suppress(OSError, ValueError, EOFError):  # one of them is not there or not whole
        if np.load(array_file, mmap_mode="r").shape == (count, channels, size, size):
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
    count, size = len(source.names), form["image_size"]
    array = np.lib.format.open_memmap(file, "w+", np.uint8, (count, form["channels"], size, size))
    if hasattr(os, "posix_fallocate"):  # a full disk is said now, not by a dead process
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)

    def decode(row: int) -> tuple[str, str] | None:
        try:
            with source.open(row) as image:
                if min(image.size) * 8 < size:
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
