"""What a set of pictures is like, what preprocessing makes of it, and what had better change."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from torch.utils.data import Dataset

from config import WITH_TEST_SET, Config
from files import atomic_write
from sources import Source, in_threads

MIRROR_MATTERS = ("digits", "mnist")
TITLE = "contact sheet of dataset.py"
BARS = " ▁▂▃▄▅▆▇█"


class Headers(NamedTuple):
    """Counts over the files as they are.

    sizes: of (width, height), upright. modes: of Pillow's names. transparent: how many are.
    coloured: whether any of 64 evenly spaced ones has colour.
    """

    sizes: Counter
    modes: Counter
    transparent: int
    coloured: bool


def read_headers(parts: Iterable[np.ndarray | Source], *, progress: Callable) -> Headers:
    """Of all parts together, hardly decoding; files that cannot be opened are left out."""
    sizes, modes, transparent, coloured = Counter(), Counter(), 0, False
    for part in parts:
        if isinstance(part, np.ndarray):
            count, height, width, _ = part.shape
            sizes[width, height] += count
            modes[Image.fromarray(part[0].squeeze()).mode] += count
            coloured |= bool((part[:64] != part[:64, ..., :1]).any())
            continue
        count = len(part.names)
        for header in progress(in_threads(partial(_look, part), count), total=count):
            if header:
                sizes[header[0]] += 1
                modes[header[1]] += 1
                transparent += header[2]
        some = np.linspace(0, count - 1, min(64, count)).astype(int).tolist()
        coloured = coloured or any(_coloured(part, row) for row in some)
    return Headers(sizes, modes, transparent, coloured)


def _coloured(source: Source, row: int) -> bool:
    try:
        with source.open(row) as image:
            pixels = np.asarray(image.convert("RGB"))
            return bool((pixels != pixels[..., :1]).any())
    except Exception:  # the decoding will say it
        return False


def _look(source: Source, row: int) -> tuple[tuple[int, int], str, bool] | None:
    try:
        with source.open(row) as image:
            if image.format == "PNG" and "exif" not in image.info:  # else it would be decoded
                turned = False
            else:
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations on their side
            size = image.size[::-1] if turned else image.size
            return size, image.mode, image.has_transparency_data
    except Exception:  # the decoding will say it
        return None


class Values(NamedTuple):
    """What training sees.

    histogram: int64 [C, 256]. digests: one a picture; equal pictures have equal ones.
    plain: how many are of a single colour. grey: no picture has colour. opaque: no transparency.
    """

    histogram: np.ndarray
    digests: list[bytes]
    plain: int
    grey: bool
    opaque: bool


def measure(pictures: Dataset, *, progress: Callable) -> Values:
    """All pixels of a `Pictures`, read once."""
    channels = pictures.shape[0]
    histogram, digests, plain, grey, opaque = np.zeros((channels, 256), np.int64), [], 0, True, True
    colours = channels - (channels in (2, 4))
    starts = range(0, len(pictures), 256)
    for start in progress(starts, total=len(starts)):
        batch = pictures[list(range(start, min(start + 256, len(pictures))))].numpy()
        for channel in range(channels):
            histogram[channel] += np.bincount(batch[:, channel].ravel(), minlength=256)
        digests += [hashlib.blake2b(picture, digest_size=16).digest() for picture in batch]
        plain += int((batch == batch[..., :1, :1]).all((1, 2, 3)).sum())
        grey &= bool((batch[:, :colours] == batch[:, :1]).all())
        opaque &= colours == channels or bool((batch[:, -1] == 255).all())
    return Values(histogram, digests, plain, grey, opaque)


def describe_fit(size: tuple[int, int], image_size: int, fit: str) -> str:
    """'218x178 -> centre 178x178 -> 64x64': what happens to a picture of (width, height)."""
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


def draw_histogram(counts: np.ndarray, *, bars: str = BARS, width: int = 32) -> str:
    """256 counts as `width` bars, as high as their square roots; what is not zero can be seen."""
    bins = np.sqrt(counts.reshape(width, -1).sum(1))
    heights = np.ceil(bins / max(1.0, bins.max()) * (len(bars) - 1)).astype(int)
    return "".join(bars[height] for height in heights)


def advise(config: Config, headers: Headers, values: Values, held_out: list[bytes]) -> list[str]:
    """One sentence for each thing that may want changing, with the override that does it.

    Args:
        values: of the training pictures. held_out: digests of the others.
    """
    data, training = config.dataset, config.training
    count, size, channels = len(values.digests), data.image_size, data.channels
    total = max(1, headers.sizes.total())
    advice = []

    if channels >= 3 and values.grey:
        advice.append(f"all pictures are grey: dataset.channels={channels - 2} has less to learn")
    if channels in (2, 4) and values.opaque:
        advice.append(f"nothing is transparent: dataset.channels={channels - 1}")
    if channels <= 2 and headers.coloured:
        advice.append(f"there are coloured pictures: dataset.channels={channels + 2} keeps colour")
    if channels in (1, 3) and headers.transparent:
        advice.append(
            f"{headers.transparent:,} of {total:,} pictures are partly transparent and are laid on "
            f"white: dataset.channels={channels + 1} keeps it"
        )

    small = sum(n for sides, n in headers.sizes.items() if min(sides) < size)
    if small > total // 100:
        factor = 2 ** (len(config.model.channel_multipliers) - 1)
        median = int(np.median([min(s) for s, n in headers.sizes.items() for _ in range(n)]))
        nearest = max(factor, median // factor * factor)
        advice.append(
            f"{small:,} of {total:,} pictures are smaller than {size}x{size} and are enlarged, "
            "which makes them soft"
            + (f": dataset.image_size={nearest}" if 4 <= nearest < size else "")
        )
    lost = sum(n * (1 - min(sides) / max(sides)) for sides, n in headers.sizes.items()) / total
    if lost > 0.3:
        effect = {
            "crop": f"the centre crop leaves {lost:.0%} of the area out: dataset.fit=pad keeps it",
            "pad": f"{lost:.0%} of the area is black margin: dataset.fit=crop cuts instead",
        }
        advice.append(effect[data.fit])

    used = np.flatnonzero(values.histogram[:3].sum(0))
    if used[-1] - used[0] < 64:
        advice.append(
            f"all values lie in {used[0]} ... {used[-1]} of 0 ... 255: are the files scaled right?"
        )
    if values.plain:
        advice.append(f"{values.plain:,} pictures are of a single colour: look at them")
    trained_on = set(values.digests)
    copies = count - len(trained_on)
    if copies:
        advice.append(
            f"{copies:,} of {count:,} training pictures are copies of others: those are learned "
            "by heart first"
        )
    leaked = sum(digest in trained_on for digest in held_out)
    if leaked:
        advice.append(f"{leaked:,} held-out pictures are trained on, too: remove the copies")

    if data.random_flip and data.name in MIRROR_MATTERS:
        advice.append("a mirrored digit is no digit: dataset.random_flip=false")
    if count < 5000 and not data.random_flip and data.name not in MIRROR_MATTERS:
        advice.append(
            f"{count:,} pictures are few: dataset.random_flip=true doubles them, where left and "
            "right do not matter"
        )
    if count < 5000 and config.model.dropout == 0:
        advice.append(f"{count:,} pictures can be learned by heart: model.dropout=0.1 delays it")
    if not held_out:
        advice.append(
            "nothing is held out, so that learning by heart goes unseen: "
            "dataset.validation_fraction=0.05"
        )
    if training.batch_size > count:
        advice.append(
            f"a step takes {training.batch_size} pictures and there are {count}: "
            "training.batch_size can be smaller"
        )
    return advice


def contact_sheet(pictures: Dataset, *, columns: int = 8, rows: int = 8) -> Image.Image:
    """Evenly spaced pictures as training sees them (before flips), transparency on white."""
    count, side = min(columns * rows, len(pictures)), pictures.shape[1]
    cell = min(256, side * max(1, 64 // side))  # pixel by pixel when tiny
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * (cell + 2) + 2, -(-count // columns) * (cell + 2) + 2))
    sheet.paste((128, 128, 128), (0, 0, *sheet.size))
    chosen = np.linspace(0, len(pictures) - 1, count).astype(int)
    for place, pixels in enumerate(pictures[chosen].permute(0, 2, 3, 1).numpy()):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        if pixels.shape[2] in (2, 4):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        kind = Image.Resampling.NEAREST if cell >= side else Image.Resampling.LANCZOS
        image = image.convert("RGB").resize((cell, cell), kind)
        row, column = divmod(place, columns)
        sheet.paste(image, (column * (cell + 2) + 2, row * (cell + 2) + 2))
    return sheet


def write_contact_sheet(pictures: Dataset, path: Path) -> None:
    """As a PNG that says what it is."""
    text = PngInfo()
    text.add_text("Title", TITLE)
    sheet = contact_sheet(pictures)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=text)


def is_contact_sheet(path: Path) -> bool:
    """Whether it may be replaced by another."""
    try:
        with Image.open(path) as image:
            return image.info.get("Title") == TITLE
    except (OSError, ValueError):
        return False


def print_headers(config: Config, headers: Headers, console: Console) -> None:
    data = config.dataset
    _print(console, "set", data.name + (f" at {data.root}" if data.name != "digits" else ""))
    for label, counts, describe in (
        ("sizes", headers.sizes, lambda s: describe_fit(s, data.image_size, data.fit)),
        ("kinds", headers.modes, str),
    ):
        common = counts.most_common(5)
        for i, (kind, count) in enumerate(common):
            _print(console, label * (i == 0), f"{count:>9,}  {describe(kind)}")
        if others := counts.keys() - dict(common).keys():
            rest = sum(counts[kind] for kind in others)
            line = f"{rest:>9,}  of {len(others):,} others"
            if label == "sizes":
                by_area = sorted(others, key=math.prod)
                line += " from {}x{} to {}x{}".format(*by_area[0], *by_area[-1])
            _print(console, "", line)


def print_values(
    config: Config, values: Values, held_out: list[bytes], names: list[str], console: Console
) -> None:
    """The split, the steps, the values, the copies. names: trained on, then held out."""
    data, training, count = config.dataset, config.training, len(values.digests)
    how = "its test set" if data.name in WITH_TEST_SET else "the same random ones for every seed"
    kept = f"{len(held_out):,} held out ({how})" if held_out else "none held out"
    _print(console, "split", f"{count:,} pictures to train on, {kept}")
    epochs = training.max_steps * training.batch_size / count
    _print(
        console,
        "steps",
        f"{training.max_steps:,} of {training.batch_size} pictures: {epochs:,.1f} epochs, flips "
        + ("on" if data.random_flip else "off"),
    )
    bars = BARS if (console.encoding or "").lower().startswith("utf") else " .:-=+*#@"
    channels = ["grey", "alpha"] if data.channels < 3 else ["red", "green", "blue", "alpha"]
    for i, (name, counts) in enumerate(zip(channels, values.histogram, strict=False)):
        there, levels = np.flatnonzero(counts), np.arange(256)
        mean = (counts * levels).sum() / counts.sum()
        deviation = np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum())
        _print(
            console,
            "values" * (i == 0),
            f"{name:<6}|{draw_histogram(counts, bars=bars)}| {there[0]} ... {there[-1]}, "
            f"mean {mean:.0f}, deviation {deviation:.0f}",
        )
    groups: dict[bytes, list[str]] = {}
    for digest, name in zip(values.digests + held_out, names, strict=True):
        groups.setdefault(digest, []).append(name)
    for i, same in enumerate([group for group in groups.values() if len(group) > 1][:5]):
        more = f" and {len(same) - 4} more" if len(same) > 4 else ""
        _print(console, "copies" * (i == 0), " = ".join(same[:4]) + more)


def print_advice(advice: list[str], sheet: Path, console: Console) -> None:
    _print(console, "sheet", str(sheet))
    console.print("\nwhat may want changing:" if advice else "\nnothing to change")
    for line in advice:
        console.print(f"  * {line}")


def _print(console: Console, label: str, text: str) -> None:
    console.print(f"{label:<8}{text}")
