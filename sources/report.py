"""Look at a dataset before training: what it is, what preprocessing makes of it, what to change."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from config import WITH_TEST_SET, Config
from files import atomic_write
from sources.files import Progress, Source, in_threads

TITLE = "contact sheet of dataset.py"


class Headers(NamedTuple):
    """The files as they are, counted."""

    sizes: Counter  # of (width, height), upright
    modes: Counter  # of Pillow's names
    transparent: int
    colored: bool  # whether any of 64 evenly spaced ones has color


def read_headers(sources: Iterable[Source], *, progress: Progress) -> Headers:
    """Read the headers of all sources together; files that cannot be opened are left out."""
    sizes, modes, transparent, colored = Counter[tuple](), Counter[str](), 0, False
    for source in sources:
        count = len(source.names)
        closely = set(np.linspace(0, count - 1, min(64, count)).astype(int))
        found = in_threads(partial(_read_header, source, closely), count)
        for header in filter(None, progress(found, total=count)):
            sizes[header[0]] += 1
            modes[header[1]] += 1
            transparent += header[2]
            colored |= header[3]
    return Headers(sizes, modes, transparent, colored)


def _read_header(source: Source, closely: set, row: int) -> tuple | None:
    """Return (size, mode, transparent, colored), the last of those rows looked at closely."""
    header = None
    with suppress(Exception), source.open(row) as image:  # the decoding will say it
        undecoded = image.format == "PNG" and "exif" not in image.info  # `getexif` would decode it
        turned = not undecoded and image.getexif().get(0x0112, 1) >= 5  # lies on its side
        size = image.size[::-1] if turned else image.size
        header = size, image.mode, image.has_transparency_data, False
        if row in closely:
            pixels = np.asarray(image.convert("RGB"))
            header = *header[:3], bool((pixels != pixels[..., :1]).any())
    return header


class Values(NamedTuple):
    """The pixels that training sees, counted."""

    histogram: np.ndarray  # int64 [C, 256]
    digests: list[bytes]  # equal images have equal ones
    plain: int  # how many are of a single color
    gray: bool
    opaque: bool


def read_values(batches: Iterable[np.ndarray]) -> Values:
    """Read all pixels of batches, uint8 [B, C, H, W]."""
    histogram: np.ndarray = np.zeros((1, 256), np.int64)
    digests: list[bytes] = []
    plain, gray, opaque = 0, True, True
    for batch in batches:
        colors = {2: 1, 4: 3}.get(batch.shape[1], batch.shape[1])
        histogram = histogram + [np.bincount(c.ravel(), None, 256) for c in batch.swapaxes(0, 1)]
        digests += [hashlib.blake2b(image, digest_size=16).digest() for image in batch]
        plain += int((batch == batch[..., :1, :1]).all((1, 2, 3)).sum())
        gray &= bool((batch[:, :colors] == batch[:, :1]).all())
        opaque &= bool((batch[:, colors:] == 255).all())
    return Values(histogram, digests, plain, gray, opaque)


def describe_fit(size: tuple[int, int], target: tuple[int, int], fit: str) -> str:
    """Return what happens to an image of (width, height): '218x178 -> centre 178x178 -> 64x64'.

    target: (height, width).
    """
    (width, height), (target_height, target_width) = size, target
    steps, wanted = [f"{width}x{height}"], f"{target_width}x{target_height}"
    scale = min(width / target_width, height / target_height)
    inside = round(scale * target_width), round(scale * target_height)
    if inside != size and fit == "crop":
        steps.append("centre {}x{}".format(*inside))
    if inside != size and fit == "pad":
        scale = max(width / target_width, height / target_height)
        kept = max(1, round(width / scale)), max(1, round(height / scale))
        steps += ["{}x{}".format(*kept), f"on black {wanted}"]
    elif size != (target_width, target_height):
        steps.append(wanted + " (enlarged)" * (scale < 1))
    return " -> ".join(steps) if len(steps) > 1 else f"{steps[0]}, as it is"


def advise(
    config: Config,
    headers: Headers,
    values: Values,
    validation: list[bytes],
    classes: Counter[str],
) -> Iterator[str]:
    """Yield what may want changing, with the override; all but headers are of training images."""
    data, count, trained_on = config.dataset, len(values.digests), set(values.digests)
    (height, width), channels, total = data.size, data.channels, max(1, headers.sizes.total())
    if channels >= 3 and values.gray:
        yield f"all images are gray: dataset.channels={channels - 2} has less to learn"
    if channels in (2, 4) and values.opaque:
        yield f"nothing is transparent: dataset.channels={channels - 1}"
    if channels <= 2 and headers.colored:
        yield f"there are color images: dataset.channels={channels + 2} keeps color"
    if channels in (1, 3) and (clear := headers.transparent):
        yield f"transparency of {clear:,} becomes white: dataset.channels={channels + 1} keeps it"
    sizes = np.array(list(headers.sizes.elements())).reshape(-1, 2)[:, ::-1]  # height, width
    factor = 2 ** (len(config.model.channel_multipliers) - 1)
    scale = (sizes / data.size).min(1)
    if (small := int((scale < 1).sum())) > total // 100:
        best = [int(np.median(scale) * side + 1e-6) // factor * factor for side in data.size]
        better = f": {_image_size(*best)}" if 4 <= min(best) < min(data.size) else ""
        what = f"{small:,} images are smaller than {width}x{height}"
        yield f"{what}; enlarging makes them soft{better}"
    if (lost := _lost(sizes, data.size)) > 0.3:
        aspect, short = np.median(sizes[:, 0] / sizes[:, 1]), min(data.size)
        long = round(short * max(aspect, 1 / aspect) / factor) * factor
        theirs = (long, short) if aspect > 1 else (short, long)
        shape = f", {_image_size(*theirs)} has their shape" if _lost(sizes, theirs) < 0.2 else ""
        if data.fit == "crop":
            part = f"the centre crop leaves {lost:.0%} of the area out"
            yield f"{part}: dataset.fit=pad keeps it{shape}"
        else:
            yield f"{lost:.0%} of the area is black margin: dataset.fit=crop cuts instead{shape}"
    used = np.flatnonzero(values.histogram[:3].sum(0))
    if np.ptp(used) < 64:
        yield f"all values lie in {used[0]} ... {used[-1]} of 0 ... 255: are the files well scaled?"
    if values.plain:
        yield f"{values.plain:,} images are of a single color: look at them"
    if copies := count - len(trained_on):
        yield f"{copies:,} of {count:,} training images are copies: those are memorized first"
    if leaked := sum(digest in trained_on for digest in validation):
        yield f"{leaked:,} validation images are trained on, too: remove the copies"
    if classes:
        (most, many), (least, few) = classes.most_common()[0], classes.most_common()[-1]
        if few < 20 or few * 50 < many:
            rare = "rare classes are learned late and memorized"
            yield f"{many:,} images are of {most!r}, {few:,} of {least!r}: {rare}"
    may_flip = data.name not in ("digits", "mnist")
    if data.random_flip and not may_flip:
        yield "a mirrored digit is no digit: dataset.random_flip=false"
    if count < 5000 and may_flip and not data.random_flip:
        yield f"{count:,} images are few: dataset.random_flip=true doubles them, if sides are alike"
    if count < 5000 and config.model.dropout == 0:
        yield f"{count:,} images can be memorized: model.dropout=0.1 delays it"
    if not validation:
        yield "nothing validates, so memorization goes unseen: dataset.validation_fraction=0.05"
    if (batch := config.training.batch_size) > count:
        yield f"a step takes {batch} images and there are {count}: lower training.batch_size"


def _lost(sizes: np.ndarray, target: tuple[int, int]) -> float:
    """Return the mean share of area that a change of aspect loses; sizes: [N, 2], height, width."""
    scale = sizes / target
    return 1 - float((scale.min(1) / scale.max(1)).mean()) if len(sizes) else 0.0


def _image_size(height: int, width: int) -> str:
    return f"dataset.image_size={height if height == width else [height, width]}"


def write_contact_sheet(images: np.ndarray, path: Path) -> None:
    """Write uint8 [N, C, H, W], eight in a row, transparency on white, tiny ones enlarged."""
    import torch
    from torchvision.utils import make_grid

    channels, height, width = images.shape[1:]
    side = max(height, width)
    scale = min(256 / side, max(1, 64 // side))  # pixel by pixel when tiny
    cell = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = torch.from_numpy(images).float()
    if channels in (2, 4):
        pixels = 255 + (pixels[:, :-1] - 255) * pixels[:, -1:] / 255
    mode = "bilinear" if scale < 1 else "nearest"
    pixels = torch.nn.functional.interpolate(pixels, cell, mode=mode, antialias=scale < 1)
    grid = make_grid(pixels, nrow=8, padding=2, pad_value=128).round().byte()
    text = PngInfo()
    text.add_text("Title", TITLE)
    with atomic_write(path) as temporary:
        image = Image.fromarray(grid.permute(1, 2, 0).numpy())
        image.save(temporary, format="PNG", pnginfo=text)


def is_contact_sheet(path: Path) -> bool:
    """Tell whether a file may be replaced by another contact sheet."""
    with suppress(OSError, ValueError), Image.open(path) as image:
        return image.info.get("Title") == TITLE
    return False


def summarize_headers(config: Config, headers: Headers) -> dict[str, list[str]]:
    """Return lines by label: what the files are, and what becomes of each size."""
    data = config.dataset
    place = f" at {data.root}" if data.name not in ("digits", "emoji") else ""
    sizes = _most_common(headers.sizes, lambda s: describe_fit(s, data.size, data.fit))
    return {"set": [data.name + place], "sizes": sizes, "kinds": _most_common(headers.modes, str)}


def summarize_classes(classes: Counter[str]) -> dict[str, list[str]]:
    """Return the number of classes and the images of the most and the least common ones."""
    shown = [f"{name} {count:,}" for name, count in classes.most_common()]
    if len(shown) > 12:
        shown[6:-3] = ["..."]
    return {"classes": [f"{len(classes):,}: {', '.join(shown)}"]} if shown else {}


def _most_common(counts: Counter, describe: Callable[..., str]) -> list[str]:
    common = counts.most_common()
    lines = [f"{count:>9,}  {describe(kind)}" for kind, count in common[:5]]
    if others := sorted(common[5:]):
        ends = " ... ".join(describe(others[i][0]).partition(" -> ")[0] for i in (0, -1))
        lines.append(f"{sum(n for _, n in others):>9,}  of {len(others):,} others, {ends}")
    return lines


def summarize_values(
    config: Config, values: Values, validation: list[bytes], names: list[str]
) -> dict[str, list[str]]:
    """Return the split, the steps, the values, the copies. names: training, then validation."""
    data, batch, count = config.dataset, config.training.batch_size, len(values.digests)
    official = data.name in WITH_TEST_SET and data.split == "train"
    how = "its test set" if official else "the same random ones for every seed"
    kept = f"{len(validation):,} for validation ({how})" if validation else "none for validation"
    steps = config.with_steps(count).training.max_steps
    epochs = f"{steps * batch / count:,.1f} epochs, flips {'on' if data.random_flip else 'off'}"
    channels = ["gray", "alpha"] if data.channels < 3 else ["red", "green", "blue", "alpha"]
    lines, groups = [], dict[bytes, list[str]]()
    for name, counts in zip(channels, values.histogram, strict=False):
        used, mean = np.flatnonzero(counts), np.average(np.arange(256), weights=counts)
        deviation = np.average((np.arange(256) - mean) ** 2, weights=counts) ** 0.5
        span = f"{used[0]} ... {used[-1]}"
        lines.append(f"{name:<6}{span}, mean {mean:.0f}, deviation {deviation:.0f}")
    for digest, name in zip(values.digests + validation, names, strict=True):
        groups.setdefault(digest, []).append(name)
    copies = [group for group in groups.values() if len(group) > 1][:5]
    return {
        "split": [f"{count:,} images to train on, {kept}"],
        "steps": [f"{steps:,} of {batch} images: {epochs}"],
        "values": lines,
        "copies": [" = ".join(c[:4]) + f" and {len(c) - 4} more" * (len(c) > 4) for c in copies],
    }
