#!/usr/bin/env python3
"""Pictures from anywhere -> uint8 [N, C, H, W], and the order in which training sees them.

Small sets live in memory. Files are decoded once, cut to size, and kept as one memory-mapped array
under `cache`, so that a bad file is found before the first step and never in hour three.
"""

if __name__ == "__main__":
    import terminal

    terminal.guard()  # before a package that may be missing is imported

import errno
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from config import keys_like, load_config
from files import atomic_write
from named_sets import find_pictures
from sources import Source, explain, in_threads, open_files
from terminal import fail, plain_console

# errors of the system while a file is read, which say nothing about the file
PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Pictures(Dataset):
    """uint8 pictures, indexed by a list of rows so that a batch is one gather.

    Args:
        source: uint8 [N, C, H, W], or the .npy file that holds it (opened lazily, in each process).
        rows: which of the N, in order; None is all.
    """

    def __init__(self, source: np.ndarray | Path, rows: np.ndarray | None = None):
        self._source = source
        self.rows = np.arange(len(self.array)) if rows is None else rows

    @property
    def array(self) -> np.ndarray:
        if isinstance(self._source, Path):
            return _open(self._source, os.getpid())
        return self._source

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of how many there are and of 64 evenly spaced ones."""
        some = np.linspace(0, len(self) - 1, min(64, len(self))).astype(int)
        content = self[some].numpy().tobytes() if len(self) else b""
        return hashlib.sha256(f"{len(self)} {self.shape}".encode() + content).hexdigest()[:16]

    def __getitem__(self, indices: list[int]) -> Tensor:
        """The pictures at `indices`, uint8 [len(indices), C, H, W]."""
        return torch.from_numpy(np.asarray(self.array[self.rows[indices]]))


@lru_cache
def _open(path: Path, pid: int) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


class StepSampler(Sampler[list[int]]):
    """The rows of each step's batch, forever: a function of (seed, step) alone.

    Step k takes positions k B ... (k + 1) B - 1 of an endless stream of permutations, the e-th
    drawn from (seed, e). Rank r of W takes the r-th of W equal parts. It has no length on purpose.

    Args:
        count: pictures. batch_size: B, of all ranks together; W divides it.
        start_step: where iteration begins.
    """

    def __init__(
        self,
        *,
        count: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start_step = start_step
        share = batch_size // world_size
        self.part = slice(rank * share, (rank + 1) * share)
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def rows(self, step: int) -> list[int]:
        """This rank's rows of the batch of `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
        return [int(self._permutation(int(p) // self.count)[p % self.count]) for p in positions]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.rows, itertools.count(self.start_step))


def load_pictures(
    *,
    name: str,
    root: str,
    image_size: int,
    channels: int,
    fit: str,
    validation_fraction: float,
    cache: str,
    progress: Callable | None = None,
) -> dict[str, Pictures]:
    """The training and the held-out pictures: {"train": ..., "validation": ...}.

    `validation` may be empty. A set with an official test set holds that out; of others a fixed
    random `validation_fraction`, the same for every seed.

    Args:
        name, root: as of `find_pictures`. image_size, channels, fit: as of `fit_picture`.
        cache: a folder for decoded files.
        progress: wraps an iterable and knows `total=`, to show what a long decoding does.

    Raises:
        FileNotFoundError: nothing at `root`. ValueError: too many files that cannot be used.
    """
    shape = dict(image_size=image_size, channels=channels, fit=fit)
    parts = {
        key: Pictures(_fit_array(found, **shape))
        if isinstance(found, np.ndarray)
        else _decode(found, root, Path(cache), progress, **shape)
        for key, found in find_pictures(name, Path(root)).items()
    }
    if "validation" in parts:
        return parts
    pictures = parts["train"]
    order = np.random.default_rng(0).permutation(len(pictures))
    held_out = round(validation_fraction * len(order))
    if held_out >= len(order):
        raise ValueError(
            f"dataset.validation_fraction {validation_fraction} of {len(order)} pictures leaves "
            "none to train on"
        )
    parts = {"train": np.sort(order[held_out:]), "validation": np.sort(order[:held_out])}
    return {key: Pictures(pictures._source, pictures.rows[part]) for key, part in parts.items()}


def fit_picture(
    image: Image.Image, *, image_size: int, channels: int, fit: Literal["crop", "pad"] = "crop"
) -> np.ndarray:
    """One picture as uint8 [C, S, S]: upright, whole range, antialiased, never stretched.

    Args:
        fit: `crop` keeps the largest square about the centre; `pad` keeps all, on black
            (with alpha: on nothing).
        channels: 1 grey, 3 colour, 2 and 4 the same with alpha. Without a place for it,
            transparency is laid on white. 16-bit grey becomes 8-bit.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I"):
            pixels = pixels / 257  # 0 ... 65535 -> 0 ... 255
        elif pixels.max() <= 1:
            pixels = pixels * 255
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


def _fit_array(images: np.ndarray, *, image_size: int, channels: int, fit: str) -> np.ndarray:
    """uint8 [N, H, W, C] -> [N, channels, image_size, image_size]."""
    if images.shape[1:] == (image_size, image_size, channels):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    fit = partial(fit_picture, image_size=image_size, channels=channels, fit=fit)
    return np.stack([fit(Image.fromarray(image.squeeze())) for image in images])


def _decode(source: Source, root: str, cache: Path, progress, *, fit: str, **shape) -> Pictures:
    """All pictures of a source, decoded once into `cache` and memory-mapped."""
    size, channels = shape["image_size"], shape["channels"]
    recipe = ["1: fit_picture", *source.identity, size, channels, *([fit] if fit != "crop" else [])]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    array_file = cache / f"{digest}-{size}x{size}x{channels}.npy"
    skipped_file = array_file.with_suffix(".json")  # written last: where it is, all is
    count = len(source.names)
    if not is_whole(array_file, skipped_file, (count, channels, size, size)):
        for leftover in cache.glob("*.tmp"):  # of a run that was killed
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 24 * 3600:
                    leftover.unlink()
        with atomic_write(array_file, unique=True) as temporary:
            skipped = _decode_into(temporary, source, progress, fit=fit, **shape)
        with atomic_write(skipped_file, unique=True) as temporary:
            temporary.write_text(json.dumps(skipped))

    skipped = json.loads(skipped_file.read_text())
    if skipped:
        shown = "\n".join(f"  {name}: {why}" for name, why in itertools.islice(skipped.items(), 10))
        more = f"\n  and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        message = f"{len(skipped)} of {count} files in {root} cannot be used:\n{shown}{more}"
        if len(skipped) > max(10, count // 100) or len(skipped) == count:
            raise ValueError(f"{message}\nMend or remove them.")
        print(f"{message}\n  They are left out.")
    rows = [row for row, name in enumerate(source.names) if name not in skipped]
    return Pictures(array_file, np.array(rows))


def _decode_into(file: Path, source: Source, progress, *, fit: str, **shape) -> dict[str, str]:
    """Decode all pictures into an .npy file; return the names of those left out, and why.

    The memory map is closed when this returns: Windows renames no file that is mapped.
    """
    count, size = len(source.names), shape["image_size"]
    shape_of_all = (count, shape["channels"], size, size)
    array = np.lib.format.open_memmap(file, "w+", np.uint8, shape_of_all)
    if hasattr(os, "posix_fallocate"):  # a full disk is said now, not by a dead process
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)

    def decode(row: int) -> tuple[str, str] | None:
        try:
            with source.open(row) as image:
                if min(image.size) * 8 < size:
                    raise ValueError(f"too small: {image.width}x{image.height} pixels")
                array[row] = fit_picture(image, fit=fit, **shape)
        except Exception as error:  # a decoder can raise anything on a broken file
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            return source.names[row], explain(error)

    outcomes = in_threads(decode, count)
    if progress:
        outcomes = progress(outcomes, total=count)
    skipped = dict(outcome for outcome in outcomes if outcome)
    array.flush()
    return skipped


def is_whole(array_file: Path, skipped_file: Path, shape: tuple[int, ...]) -> bool:
    """Whether both files of the cache are there and as they were written."""
    try:
        skipped = json.loads(skipped_file.read_text())
        return isinstance(skipped, dict) and np.load(array_file, mmap_mode="r").shape == shape
    except (OSError, ValueError, EOFError):
        return False


class Files:
    """Pictures of a folder, zip or tar, in the order of their names; read as they are asked for.

    Args:
        fit: (channels, size) to bring them to, as those of a dataset are; None takes them as they
            are, in colour and without alpha, and wants all of one size.

    Raises:
        FileNotFoundError, ValueError: no folder, zip or tar of pictures.
    """

    def __init__(self, root: Path, fit: tuple[int, int] | None = None):
        self.root, self.fit, self.shape = root, fit, None
        self.source = open_files(root)
        self.shape = tuple(self[[0]].shape[1:])

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, rows: list[int]) -> Tensor:
        """uint8 [B, C, H, W]. ValueError: one cannot be read, or is of another size."""
        read = lambda i: self._read(rows[i])
        return torch.from_numpy(np.stack(list(in_threads(read, len(rows)))))

    def _read(self, row: int) -> np.ndarray:
        name = self.source.names[row]
        try:
            with self.source.open(row) as image:
                if self.fit:
                    channels, size = self.fit
                    return fit_picture(image, image_size=size, channels=channels)
                pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except Exception as error:  # a decoder can raise anything on a broken file
            raise ValueError(f"{name} in {self.root}: {explain(error)}") from None
        if self.shape and pixels.shape != self.shape:
            raise ValueError(
                f"{name} in {self.root} is {sides(pixels.shape)} and the first picture is "
                f"{sides(self.shape)}; they must be of one size"
            )
        return pixels

    def fingerprint(self) -> str:
        recipe = [self.source.identity, self.fit]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def sides(shape: tuple[int, int, int]) -> str:
    """'32x32' of (C, H, W)."""
    return f"{shape[2]}x{shape[1]}"


HELP = """
Look at a config's pictures before training: what they are and what becomes of them.

Counts, sizes, kinds, unreadable files, copies, the split and the values; 64 of them as training
sees them, as a PNG; and what had better change. Whatever is missing is fetched and decoded, as
training would.

Examples:

\b
  python dataset.py configs/cifar10.yml
  python dataset.py configs/folder.yml dataset.root=mine dataset.image_size=32
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
def check_pictures(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/cifar10.yml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE",
            help="Values that win over the file's.",
            autocompletion=keys_like,
        ),
    ] = None,
    contact_sheet: Annotated[
        Path | None,
        typer.Option(help="Where the PNG goes. Default: samples/CONFIG-data.png."),
    ] = None,
):
    import check

    console = plain_console()
    bar = partial(track, console=console, transient=True, disable=not console.is_terminal)
    sheet = contact_sheet or Path("samples", f"{config_file.stem}-data.png")
    try:
        if sheet.suffix.lower() != ".png":
            raise ValueError(f"--contact-sheet {sheet} must end in .png")
        if sheet.exists() and not check.is_contact_sheet(sheet):
            raise ValueError(f"{sheet} is another picture; choose another --contact-sheet")
        config = load_config(config_file, overrides or ())
        data = config.dataset
        found = find_pictures(data.name, Path(data.root))
        headers = check.read_headers(found.values(), progress=partial(bar, description="Headers"))
        check.print_headers(config, headers, console)
        parts = load_pictures(
            **data.model_dump(exclude={"random_flip"}),
            progress=partial(bar, description="Decoding pictures"),
        )
        measure = partial(check.measure, progress=partial(bar, description="Reading pictures"))
        train, held_out = measure(parts["train"]), measure(parts["validation"]).digests
        names = [
            name
            for key, part in parts.items()
            for name in _names(found.get(key, found["train"]), part.rows.tolist())
        ]
        check.print_values(config, train, held_out, names, console)
        check.write_contact_sheet(parts["train"], sheet)
        check.print_advice(check.advise(config, headers, train, held_out), sheet, console)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(fail(error)) from None


def _names(found: np.ndarray | Source, rows: list[int]) -> list[str]:
    return [found.names[r] if isinstance(found, Source) else f"picture {r}" for r in rows]


if __name__ == "__main__":
    app()
