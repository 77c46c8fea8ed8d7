"""Draw 1,788 sprites for configs/sprites.yml: python docs/sprites.py [FOLDER], by default data.

Colour images of 16x16 on white in six kinds, each mirrored about its middle, with their labels in
a file beside them. The same sprites on every machine, and nothing is downloaded.
"""

import sys
from collections.abc import Callable
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np

COUNT, SIDE = 1788, 16
IMAGES, LABELS = "sprites_1788_16x16.npy", "sprite_labels_nc_1788_16x16.npy"
y, x = np.mgrid[:SIDE, :SIDE]
aside = np.abs(x - 7.5)  # pixels from the middle: a shape of it is mirrored
Random = np.random.Generator


class Sprite:
    """An image that is painted by masks, [16, 16], the later over the earlier."""

    def __init__(self):
        self.pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
        self.inside = np.zeros((SIDE, SIDE), bool)

    def paint(self, mask: np.ndarray, hue: float, strength: float, value: float) -> None:
        """Fill a mask: lighter above and to the left, darker below."""
        if not mask.any():
            return
        rows = y[mask]
        down = (y - rows.min()) / max(1, rows.max() - rows.min())
        for level, part in enumerate((down < 0.3, (down >= 0.3) & (down < 0.7), down >= 0.7)):
            light = value * (1.12, 1.0, 0.8)[level]
            color = hsv_to_rgb(hue % 1, strength * (0.75, 1.0, 1.0)[level], min(1.0, light))
            self.pixels[mask & part] = np.round(255 * np.array(color)).astype(np.uint8)
        self.inside |= mask

    def outline(self, hue: float) -> np.ndarray:
        """Return the image with a dark line around all that is painted."""
        wide = np.pad(self.inside, 1)
        near = wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]
        line = np.round(255 * np.array(hsv_to_rgb(hue % 1, 0.6, 0.2))).astype(np.uint8)
        self.pixels[near & ~self.inside] = line
        return self.pixels


def ellipse(top: float, bottom: float, width: float) -> np.ndarray:
    """Return the mask of an ellipse between two rows, `width` to each side."""
    middle, height = (top + bottom) / 2, (bottom - top) / 2 + 0.5
    return ((y - middle) / height) ** 2 + (aside / (width + 0.5)) ** 2 <= 1


def box(top: int, bottom: int, width: float, inner: float = 0) -> np.ndarray:
    """Return the mask of rows top ... bottom, `inner` to `width` from the middle."""
    return (y >= top) & (y <= bottom) & (aside <= width) & (aside >= inner)


def creature(sprite: Sprite, random: Random, hue: float) -> None:
    top, bottom = int(random.integers(2, 5)), int(random.integers(11, 13))
    width = random.choice([3.5, 4.5, 5.5])
    body = ellipse(top, bottom, width)
    sprite.paint(box(top - 1, top + 2, width, width - 1), hue + 0.05, 0.7, 0.75)  # ears
    sprite.paint(box(bottom - 1, 14, width - 1, random.choice([0.5, 1.5])), hue, 0.8, 0.6)  # feet
    if random.random() < 0.5:
        sprite.paint(box(8, 10, width + 1, width), hue, 0.7, 0.7)  # arms
    sprite.paint(body, hue, random.uniform(0.5, 0.85), random.uniform(0.7, 0.9))
    sprite.paint(body & ellipse(9, bottom, 2.5), hue + 0.08, 0.3, 0.95)  # belly
    eyes = box(top + 2, top + 3, 2.5, 1.5)
    sprite.pixels[eyes] = 255
    sprite.pixels[eyes & (y == top + 3)] = 20


def slime(sprite: Sprite, random: Random, hue: float) -> None:
    top, width = int(random.integers(4, 9)), random.choice([4.5, 5.5, 6.5])
    body = (ellipse(top, 19 if top > 5 else 16, width) & (y <= 13)) | box(12, 13, width)
    sprite.paint(body, hue, random.uniform(0.45, 0.8), random.uniform(0.8, 0.95))
    sprite.pixels[(y == top + 1) & (x >= 5) & (x <= 6) & body] = 255
    sprite.pixels[box(top + 4 if top < 8 else 11, 11, 2.5, 1.5)] = 20
    if random.random() < 0.5:
        sprite.pixels[box(12, 12, 0.5)] = 20


def potion(sprite: Sprite, random: Random, hue: float) -> None:
    top, width = int(random.integers(6, 8)), random.choice([3.5, 4.5, 5.5])
    glass = ellipse(top, 14, width) if random.random() < 0.6 else box(top, 14, width - 1)
    sprite.paint(box(4, top, 1.5), 0.55, 0.12, 0.95)
    sprite.paint(glass, 0.55, 0.12, 0.95)
    sprite.paint(glass & (y >= random.integers(8, 12)), hue, 0.85, 0.9)
    sprite.paint(box(2, 3, 1.5), 0.08, 0.6, 0.6)  # cork
    sprite.pixels[(x == 6) & (y == 10) & glass] = 255


def sword(sprite: Sprite, random: Random, hue: float) -> None:
    tip, guard = int(random.integers(1, 4)), int(random.integers(9, 12))
    width = random.choice([0.5, 1.5])
    blade = box(tip + 1, guard - 1, width) | box(tip, tip, width - 1 if width > 1 else 0.5)
    sprite.paint(blade, 0.58, random.uniform(0.05, 0.25), 0.85)
    sprite.paint(blade & (x == 8), 0.58, 0.2, 0.65)
    sprite.paint(box(guard, guard, random.choice([2.5, 3.5, 4.5])), hue, 0.7, 0.85)
    sprite.paint(box(guard + 1, 14, 0.5), hue + 0.05, 0.6, 0.5)
    if random.random() < 0.6:
        sprite.paint(box(14, 14, 1.5), hue, 0.7, 0.85)


def gem(sprite: Sprite, random: Random, hue: float) -> None:
    top, wide, width = int(random.integers(2, 4)), int(random.integers(5, 7)), 5.5
    crown = (y >= top) & (y <= wide) & (aside <= width - (wide - y))
    steep = random.choice([0.7, 0.85])
    cut = (y > wide) & (y <= 14) & (aside <= width + 0.5 - (y - wide) * steep)
    sprite.paint(crown | cut, hue, random.uniform(0.55, 0.9), 0.9)
    sprite.paint(crown & (aside <= 2.5), hue, 0.35, 1.0)  # table
    sprite.paint(cut & (aside <= 2.5) & (aside >= 1.5), hue, 0.8, 0.75)
    sprite.pixels[(x == 5) & (y == top + 1)] = 255


def mushroom(sprite: Sprite, random: Random, hue: float) -> None:
    top, brim = int(random.integers(2, 5)), int(random.integers(8, 10))
    width = random.choice([4.5, 5.5, 6.5])
    cap = ellipse(top, 2 * brim - top, width) & (y <= brim)
    sprite.paint(box(brim, 14, random.choice([1.5, 2.5])), 0.11, 0.2, 0.95)
    sprite.paint(cap, hue, 0.8, random.uniform(0.75, 0.9))
    row, out = int(random.integers(top + 1, brim)), random.choice([2.5, 3.5])
    sprite.pixels[cap & (box(row, row + 1, out, out - 1) | box(top + 1, top + 2, 0.5))] = 245


KINDS: list[Callable[[Sprite, Random, float], None]]
KINDS = [creature, slime, potion, sword, gem, mushroom]


def draw(number: int) -> np.ndarray:
    """Return a sprite, uint8 [16, 16, 3]; its kind is number modulo 6."""
    random, sprite = np.random.default_rng(number), Sprite()
    hue = random.random()
    KINDS[number % len(KINDS)](sprite, random, hue)
    return sprite.outline(hue)


def main(folder: Path = Path("data")) -> None:
    paths = folder / IMAGES, folder / LABELS
    if there := [path for path in paths if path.exists()]:
        raise SystemExit(f"{there[0]} is there already, and nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(COUNT)
    np.save(paths[0], np.stack([draw(number) for number in numbers]))
    np.save(paths[1], numbers % len(KINDS))
    names = ",".join(kind.__name__ for kind in KINDS)
    print(f"wrote {paths[0]}, and its labels: {paths[1]}")
    root = "" if folder == Path("data") else f" dataset.root={paths[0]}"
    print(
        f"python train.py configs/sprites.yml{root} dataset.labels=true dataset.classes=[{names}]"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
