"""Look at a dataset before training: what it is, what preprocessing makes of it, what to change."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from config import WITH_TEST_SET, Config
from files import atomic_write
from sources.files import Progress, Source, in_threads

if TYPE_CHECKING:
    from torch import Tensor

MIRROR_MATTERS = ("digits", "mnist")
TITLE = "contact sheet of dataset.py"


def as_source(found: np.ndarray | Source) -> Source:
    """Return an array, uint8 [N, H, W, C], as a source like the others."""
    if isinstance(found, Source):
        return found
    names = [f"image {row}" for row in range(len(found))]
    return Source([], names, lambda row: Image.fromarray(found[row].squeeze()))


class Headers(NamedTuple):
    """Counts over the files as they are.

    sizes: of (width, height), upright. modes: of Pillow's names. transparent: how many are.
    colored: whether any of 64 evenly spaced ones has color.
    """

    sizes: Counter
    modes: Counter
    transparent: int
    colored: bool


def read_headers(sources: Iterable[Source], *, progress: Progress) -> Headers:
    """Read the headers of all sources together; files that cannot be opened are left out."""
    sizes: Counter = Counter()
    modes: Counter = Counter()
    transparent, colored = 0, False
    for source in sources:
        count = len(source.names)
        for header in progress(in_threads(partial(_read_header, source), count), total=count):
            if header:
                sizes[header[0]] += 1
                modes[header[1]] += 1
                transparent += header[2]
        some = np.linspace(0, count - 1, min(64, count)).astype(int).tolist()
        colored = colored or any(_is_colored(source, row) for row in some)
    return Headers(sizes, modes, transparent, colored)


def _is_colored(source: Source, row: int) -> bool:
    with suppress(Exception), source.open(row) as image:  # the decoding will say it
        pixels = np.asarray(image.convert("RGB"))
        return bool((pixels != pixels[..., :1]).any())
    return False


def _read_header(source: Source, row: int) -> tuple[tuple[int, int], str, bool] | None:
    with suppress(Exception), source.open(row) as image:  # the decoding will say it
        undecoded = image.format == "PNG" and "exif" not in image.info  # `getexif` would decode it
        turned = not undecoded and image.getexif().get(0x0112, 1) >= 5  # lies on its side
        size = (image.height, image.width) if turned else image.size
        return size, image.mode, image.has_transparency_data
    return None


class Values(NamedTuple):
    """What training sees.

    histogram: int64 [C, 256]. digests: one for each image; equal images have equal ones.
    plain: how many are of a single color. gray: no image has color. opaque: no transparency.
    """

    histogram: np.ndarray
    digests: list[bytes]
    plain: int
    gray: bool
    opaque: bool


def read_values(batches: Iterable[np.ndarray], channels: int) -> Values:
    """Read all pixels of batches, uint8 [B, C, H, W]."""
    histogram, colors = np.zeros((channels, 256), np.int64), channels - (channels in (2, 4))
    digests: list[bytes] = []
    plain, gray, opaque = 0, True, True
    for batch in batches:
        for channel in range(channels):
            histogram[channel] += np.bincount(batch[:, channel].ravel(), minlength=256)
        digests += [hashlib.blake2b(image, digest_size=16).digest() for image in batch]
        plain += int((batch == batch[..., :1, :1]).all((1, 2, 3)).sum())
        gray &= bool((batch[:, :colors] == batch[:, :1]).all())
        opaque &= colors == channels or bool((batch[:, -1] == 255).all())
    return Values(histogram, digests, plain, gray, opaque)


def describe_fit(size: tuple[int, int], image_size: int, fit: str) -> str:
    """Return what happens to an image of (width, height): '218x178 -> centre 178x178 -> 64x64'."""
    width, height = size
    steps = [f"{width}x{height}"]
    if width != height and fit == "crop":
        steps.append("centre {0}x{0}".format(min(size)))
    if width != height and fit == "pad":
        scale = image_size / max(size)
        inside = [max(1, round(side * scale)) for side in size]
        steps.append(f"{inside[0]}x{inside[1]}")
        steps.append(f"on black {image_size}x{image_size}")
    elif (width, height) != (image_size, image_size):
        steps.append(f"{image_size}x{image_size}" + (" (enlarged)" * (min(size) < image_size)))
    return " -> ".join(steps) if len(steps) > 1 else f"{steps[0]}, as it is"


# ---- what had better change


def advise(config: Config, headers: Headers, values: Values, validation: list[bytes]) -> list[str]:
    """Return one sentence for each thing that may want changing, with the override that does it.

    Args:
        values: of the training images. validation: digests of the others.
    """
    return [*_advise_on_files(config, headers, values), *_advise_on_set(config, values, validation)]


def _advise_on_files(config: Config, headers: Headers, values: Values) -> Iterable[str]:
    data = config.dataset
    size, channels, total = data.image_size, data.channels, max(1, headers.sizes.total())
    if channels >= 3 and values.gray:
        yield f"all images are gray: dataset.channels={channels - 2} has less to learn"
    if channels in (2, 4) and values.opaque:
        yield f"nothing is transparent: dataset.channels={channels - 1}"
    if channels <= 2 and headers.colored:
        yield f"there are color images: dataset.channels={channels + 2} keeps color"
    if channels in (1, 3) and headers.transparent:
        yield (
            f"{headers.transparent:,} of {total:,} images are partly transparent and are laid on "
            f"white: dataset.channels={channels + 1} keeps it"
        )
    small = sum(n for sides, n in headers.sizes.items() if min(sides) < size)
    if small > total // 100:
        factor = 2 ** (len(config.model.channel_multipliers) - 1)
        median = int(np.median([min(s) for s, n in headers.sizes.items() for _ in range(n)]))
        nearest = max(factor, median // factor * factor)
        better = f": dataset.image_size={nearest}" if 4 <= nearest < size else ""
        yield (
            f"{small:,} of {total:,} images are smaller than {size}x{size} and are enlarged, "
            f"which makes them soft{better}"
        )
    lost = sum(n * (1 - min(sides) / max(sides)) for sides, n in headers.sizes.items()) / total
    if lost > 0.3 and data.fit == "crop":
        yield f"the centre crop leaves {lost:.0%} of the area out: dataset.fit=pad keeps it"
    if lost > 0.3 and data.fit == "pad":
        yield f"{lost:.0%} of the area is black margin: dataset.fit=crop cuts instead"
    used = np.flatnonzero(values.histogram[:3].sum(0))
    if used[-1] - used[0] < 64:
        yield f"all values lie in {used[0]} ... {used[-1]} of 0 ... 255: are the files well scaled?"
    if values.plain:
        yield f"{values.plain:,} images are of a single color: look at them"


def _advise_on_set(config: Config, values: Values, validation: list[bytes]) -> Iterable[str]:
    data, count, trained_on = config.dataset, len(values.digests), set(values.digests)
    may_flip = data.name not in MIRROR_MATTERS
    if copies := count - len(trained_on):
        yield f"{copies:,} of {count:,} training images are copies: those are memorized first"
    if leaked := sum(digest in trained_on for digest in validation):
        yield f"{leaked:,} validation images are trained on, too: remove the copies"
    if data.random_flip and not may_flip:
        yield "a mirrored digit is no digit: dataset.random_flip=false"
    if count < 5000 and not data.random_flip and may_flip:
        yield (
            f"{count:,} images are few: dataset.random_flip=true doubles them, where left and "
            "right do not matter"
        )
    if count < 5000 and config.model.dropout == 0:
        yield f"{count:,} images can be memorized: model.dropout=0.1 delays it"
    if not validation:
        yield "nothing validates, so memorization goes unseen: dataset.validation_fraction=0.05"
    if (size := config.training.batch_size) > count:
        yield f"a step takes {size} images and there are {count}: lower training.batch_size"


# ---- the contact sheet


def contact_sheet(images: "Tensor") -> Image.Image:
    """Draw uint8 [N, C, S, S], eight in a row, transparency on white, tiny ones enlarged."""
    from torch.nn.functional import interpolate
    from torchvision.utils import make_grid

    channels, side = images.shape[1:3]
    cell = min(256, side * max(1, 64 // side))  # pixel by pixel when tiny
    pixels = images.float()
    if channels in (2, 4):
        colour, alpha = pixels[:, :-1], pixels[:, -1:] / 255
        pixels = 255 + (colour - 255) * alpha
    smooth = cell < side
    mode = "bilinear" if smooth else "nearest"
    pixels = interpolate(pixels, (cell, cell), mode=mode, antialias=smooth)
    grid = make_grid(pixels, nrow=8, padding=2, pad_value=128)
    return Image.fromarray(grid.round().byte().permute(1, 2, 0).numpy())


def write_contact_sheet(images: "Tensor", path: Path) -> None:
    """Write the contact sheet as a PNG that says what it is."""
    text = PngInfo()
    text.add_text("Title", TITLE)
    with atomic_write(path) as temporary:
        contact_sheet(images).save(temporary, format="PNG", pnginfo=text)


def is_contact_sheet(path: Path) -> bool:
    """Tell whether a file may be replaced by another contact sheet."""
    try:
        with Image.open(path) as image:
            return image.info.get("Title") == TITLE
    except (OSError, ValueError):
        return False


# ---- in words: lines under labels


def summarize_headers(config: Config, headers: Headers) -> dict[str, list[str]]:
    """Return what the files are, and what becomes of each size."""
    data = config.dataset
    sizes = _most_common(headers.sizes, lambda s: describe_fit(s, data.image_size, data.fit))
    if others := headers.sizes.keys() - dict(headers.sizes.most_common(5)).keys():
        by_area = sorted(others, key=math.prod)
        sizes[-1] += " from {}x{} to {}x{}".format(*by_area[0], *by_area[-1])
    place = f" at {data.root}" if data.name != "digits" else ""
    return {"set": [data.name + place], "sizes": sizes, "kinds": _most_common(headers.modes, str)}


def _most_common(counts: Counter, describe: Callable[..., str]) -> list[str]:
    common = counts.most_common(5)
    lines = [f"{count:>9,}  {describe(kind)}" for kind, count in common]
    if others := len(counts) - len(common):
        rest = counts.total() - sum(count for _, count in common)
        lines.append(f"{rest:>9,}  of {others:,} others")
    return lines


def summarize_values(
    config: Config, values: Values, validation: list[bytes], names: list[str]
) -> dict[str, list[str]]:
    """Return the split, the steps, the values, the copies. names: training, then validation."""
    data, training, count = config.dataset, config.training, len(values.digests)
    how = "its test set" if data.name in WITH_TEST_SET else "the same random ones for every seed"
    kept = f"{len(validation):,} for validation ({how})" if validation else "none for validation"
    epochs = training.max_steps * training.batch_size / count
    flips = "on" if data.random_flip else "off"
    channels = ["gray", "alpha"] if data.channels < 3 else ["red", "green", "blue", "alpha"]
    levels, lines = np.arange(256), []
    for name, counts in zip(channels, values.histogram, strict=False):
        there, mean = np.flatnonzero(counts), (counts * levels).sum() / counts.sum()
        deviation = np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum())
        lines.append(
            f"{name:<6}{there[0]} ... {there[-1]}, mean {mean:.0f}, deviation {deviation:.0f}"
        )
    groups: dict[bytes, list[str]] = {}
    for digest, name in zip(values.digests + validation, names, strict=True):
        groups.setdefault(digest, []).append(name)
    copies = [group for group in groups.values() if len(group) > 1][:5]
    return {
        "split": [f"{count:,} images to train on, {kept}"],
        "steps": [
            f"{training.max_steps:,} of {training.batch_size} images: {epochs:,.1f} epochs, "
            f"flips {flips}"
        ],
        "values": lines,
        "copies": [
            " = ".join(c[:4]) + (f" and {len(c) - 4} more" if len(c) > 4 else "") for c in copies
        ],
    }
