"""A set of colour drawings with labels that anybody can make: the emoji of a font.

Google's Noto Color Emoji (SIL Open Font License 1.1), in the groups of Unicode's emoji-test.txt.
Both are packages of Debian: fonts-noto-color-emoji, unicode-data.
"""

import re
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from sources.files import Source
from sources.labels import Labels

FONT, TABLE = "NotoColorEmoji.ttf", "emoji-test.txt"
PLACES = Path("/usr/share/fonts/truetype/noto"), Path("/usr/share/unicode/emoji")
SIZE, SIDE = 109, 136  # pixels: the font's one size, and a square that holds each drawing
PEOPLE = {0x1F468, 0x1F469, 0x1F9D1}  # man, woman, person
SELECTORS = {0xFE0F, 0x200D, 0x2640, 0x2642, 0x27A1}  # emoji style, joiner, signs of gender, right
TWINS = "BV SJ UM CP MF HM DG EA"  # territories whose flag is another country's, pixel by pixel


def open_emoji(root: Path) -> dict[str, Source]:
    """Return {"train": ..., "validation": ...}; a class is a group, without the skin tones.

    A tenth of the base characters validates: variants of one (woman, man running) stay together.

    Args:
        root: a folder with the font and the table, where Debian's are not meant.
    """
    font, table = (
        next((p for p in (root / name, place / name) if p.is_file()), None)
        for name, place in zip((FONT, TABLE), PLACES, strict=True)
    )
    if not font or not table:
        raise FileNotFoundError(
            f"no {FONT if not font else TABLE} at {root} (dataset.root): "
            "apt install fonts-noto-color-emoji unicode-data, or put both files there"
        )
    if not features.check("raqm") or not features.check_feature("fribidi"):
        raise ValueError(
            "Pillow joins emoji by raqm and FriBiDi, which are missing: apt install libfribidi0"
        )
    rows, draw = read_table(table), Drawer(font)
    classes = list(dict.fromkeys(group for group, _, _ in rows))
    bases = sorted({base_of(text) for _, text, _ in rows})
    order = np.random.default_rng(0).permutation(len(bases))
    kept = {bases[i] for i in order[: round(len(bases) / 10)]}
    stats = [(path.name, path.stat().st_size) for path in (font, table)]

    def part(split: str) -> Source:
        some = [row for row in rows if (base_of(row[1]) in kept) == (split == "validation")]
        return Source(
            ["emoji", stats, split],
            [name for _, _, name in some],
            lambda row: draw(some[row][1]),
            labels=lambda: Labels(np.array([classes.index(row[0]) for row in some]), classes),
        )

    return {split: part(split) for split in ("train", "validation")}


def read_table(path: Path) -> list[tuple[str, str, str]]:
    """Return (group, text, name) of each emoji but skin tones and copies."""
    rows, group = [], ""
    twins = {"".join(chr(0x1F1E6 + ord(c) - ord("A")) for c in code) for code in TWINS.split()}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif match := re.match(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)", line):
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            if "skin tone" not in match[2] and text not in twins:
                rows.append((group, text, match[2]))
    if not rows:
        raise ValueError(f"{path} is no table of emoji, as Unicode's emoji-test.txt")
    return rows


def base_of(text: str) -> str:
    """Return what variants of an emoji share: the astronaut of woman astronaut."""
    codes = [ord(letter) for letter in text if ord(letter) not in SELECTORS]
    rest = [code for code in codes if code not in PEOPLE]
    if all(0x1F1E6 <= code <= 0x1F1FF for code in codes):  # a flag is spelled in letters
        return text
    return chr((rest or codes)[0])


class Drawer:
    """Draw emoji as RGBA on a transparent ground."""

    def __init__(self, font: Path):
        self.font, self.lock = ImageFont.truetype(font, SIZE), Lock()  # it is not for threads

    def __call__(self, text: str) -> Image.Image:
        image = Image.new("RGBA", (SIDE, SIDE))
        with self.lock:
            ImageDraw.Draw(image).text((0, 4), text, font=self.font, embedded_color=True)
        return image
