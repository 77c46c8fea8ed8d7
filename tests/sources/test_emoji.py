"""The emoji of a font: by a table of a few lines, and by the true font where it is installed."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from helpers import load
from PIL import Image

from sources import emoji, find_images
from sources.emoji import PLACES, base_of, open_emoji, read_table

LINES = """
# group: Smileys & Emotion
1F600                 ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F             ; fully-qualified     # ☺️ E0.6 smiling face
263A                  ; unqualified         # ☺ E0.6 smiling face

# group: People & Body
1F44B                 ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB           ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
1F3C3                 ; fully-qualified     # 🏃 E0.6 person running
1F3C3 200D 2642 FE0F  ; fully-qualified     # 🏃‍♂️ E4.0 man running
1F3C3 200D 2640       ; minimally-qualified # 🏃‍♀ E4.0 woman running
1F469 200D 1F680      ; fully-qualified     # 👩‍🚀 E4.0 woman astronaut
1F468 200D 1F680      ; fully-qualified     # 👨‍🚀 E4.0 man astronaut

# group: Component
1F3FB                 ; component           # 🏻 E1.0 light skin tone

# group: Flags
1F1F3 1F1F4           ; fully-qualified     # 🇳🇴 E2.0 flag: Norway
1F1F8 1F1EF           ; fully-qualified     # 🇸🇯 E2.0 flag: Svalbard & Jan Mayen
"""


def draw(text):
    """Return a drawing of its own for each text, half of it clear."""
    color = hashlib.md5(text.encode()).digest()[:3]
    image = Image.new("RGBA", (136, 136))
    image.paste((*color, 255), (0, 0, 68, 136))
    return image


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A table with enough lines to split, and a font that is no font."""
    more = "".join(
        f"{code:X} ; fully-qualified # x E1.0 face {code:X}\n{code:X} 200D 2640 FE0F"
        f" ; fully-qualified # x E4.0 woman face {code:X}\n"
        for code in range(0x1F900, 0x1F91C)
    )
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / emoji.TABLE).write_text(LINES + more, encoding="utf-8")
    (tmp_path / "root" / emoji.FONT).write_bytes(b"font")
    monkeypatch.setattr(emoji, "Drawer", lambda font: draw)
    monkeypatch.setattr(emoji.features, "check", lambda _: True)
    monkeypatch.setattr(emoji.features, "check_feature", lambda _: True)
    return tmp_path / "root"


def test_a_table_is_read_without_tones_and_copies(stand_in):
    table = stand_in / emoji.TABLE
    table.write_text(LINES, encoding="utf-8")
    names = [(group, name) for group, _, name in read_table(table)]
    people = "waving hand", "person running", "man running", "woman astronaut", "man astronaut"
    assert names == [
        ("Smileys & Emotion", "grinning face"),
        ("Smileys & Emotion", "smiling face"),
        *(("People & Body", name) for name in people),
        ("Flags", "flag: Norway"),
    ]
    table.write_text("<html>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"emoji-test\.txt is no table of emoji"):
        open_emoji(stand_in)


@pytest.mark.parametrize(
    ("texts", "base"),
    [
        ("🏃 🏃‍♂️ 🏃‍♀️ 🏃‍♂️‍➡️", "🏃"),
        ("👩‍🚀 👨‍🚀 🧑‍🚀", "🚀"),
        ("👩", "👩"),
        ("❤️ ❤️‍🔥 👩‍❤️‍👨", "❤"),
        ("🇳🇴", "🇳🇴"),
        ("🏳️ 🏳️‍🌈", "🏳"),
        ("♀️", "♀️"),
    ],
)
def test_variants_share_a_base(texts, base):
    assert {base_of(text) for text in texts.split()} == {base}


def test_a_part_of_the_bases_validates(stand_in):
    parts = open_emoji(stand_in)
    rows = {row[2]: row for row in read_table(stand_in / emoji.TABLE)}
    bases = {s: {base_of(rows[n][1]) for n in part.names} for s, part in parts.items()}
    assert not bases["train"] & bases["validation"]
    count = len(bases["train"] | bases["validation"])
    assert len(bases["validation"]) == round(count / 10)
    assert sorted(parts["train"].names + parts["validation"].names) == sorted(rows)
    for part in parts.values():
        labels = part.labels()
        for i, name in enumerate(part.names):
            group, text, _ = rows[name]
            assert labels.names[labels.of[i]] == group
            assert part.open(i).tobytes() == draw(text).tobytes()


def test_emoji_with_and_without_alpha(stand_in, tmp_path):
    kept = load(tmp_path, "emoji", image_size=136, channels=4)["train"]
    drawn = find_images("emoji", stand_in)["train"]
    for i in range(3):
        expected = np.asarray(drawn.open(i)).transpose(2, 0, 1)
        assert np.array_equal(kept[[i]].images[0], expected)
        plain = load(tmp_path, "emoji", image_size=136)["train"][[i]].images[0]
        assert np.array_equal(plain[:, :, :68], expected[:3, :, :68])
        assert (plain[:, :, 68:] == 255).all()  # on white


def test_what_is_missing_is_said(stand_in, monkeypatch):
    monkeypatch.setattr(emoji, "PLACES", (stand_in / "no", stand_in / "no"))
    monkeypatch.setattr(emoji.features, "check_feature", lambda _: False)
    with pytest.raises(ValueError, match="apt install libfribidi0"):
        open_emoji(stand_in)
    for name in (emoji.TABLE, emoji.FONT):
        (stand_in / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no {name} at .*dataset\.root.*apt install"):
            open_emoji(stand_in)


@pytest.mark.skipif(
    not (PLACES[0] / emoji.FONT).is_file() or not (PLACES[1] / emoji.TABLE).is_file(),
    reason="apt install fonts-noto-color-emoji unicode-data",
)
def test_debians_font(tmp_path):
    parts = open_emoji(tmp_path)
    drawn, inside = Counter(), True
    for part in parts.values():
        for row in range(len(part.names)):
            image = part.open(row)
            left, top, right, bottom = image.getbbox()  # none is empty
            inside &= left > 0 and top > 0 and right < image.width and bottom < image.height
            drawn[image.tobytes()] += 1
    assert inside
    assert drawn.total() > 1500
    assert drawn.total() - len(drawn) <= 1  # the family is drawn as one of the families
    assert len(parts["train"].labels().names) == 9
    assert len(set(parts["train"].labels().of)) == 9
    rows = {row[2]: row[1] for row in read_table(PLACES[1] / emoji.TABLE)}
    bases = [{base_of(rows[name]) for name in part.names} for part in parts.values()]
    assert not bases[0] & bases[1]
