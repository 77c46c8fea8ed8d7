"""`python dataset.py CONFIG`: what it finds, and what it advises."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import invoke, noise_image
from PIL import Image

import dataset
from config import load_config
from sources import open_files
from sources.files import of_array
from sources.report import (
    Headers,
    Values,
    advise,
    describe_fit,
    read_headers,
    read_values,
    summarize_classes,
    write_contact_sheet,
)


def report(line, monkeypatch, code=0):
    return invoke(f"dataset.py {line}", Path.cwd(), monkeypatch, code)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twelve good images, a copy, and one of every kind of bad file."""
    root = tmp_path / "mine"
    root.mkdir()
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    for i in range(12):
        noise_image(i, (178, 218)).save(root / f"{i:02}.png")
    (root / "again.png").write_bytes((root / "03.png").read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(20, (100, 60)).save(root / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(root / "tiny.png")
    (root / "zero.png").write_bytes(b"")
    (root / "page.jpg").write_text("<html>")
    whole = (root / "00.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "bent.png").write_bytes(whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:])
    (root / "nowhere.png").symlink_to("/nowhere.png")
    monkeypatch.chdir(tmp_path)
    return root


def test_a_folder_with_every_kind_of_bad_file(folder, monkeypatch):
    line = f"configs/folder.yml 'dataset.root={folder}' --contact-sheet deep/s.png"
    output = report(line, monkeypatch)
    for line in (
        "15  178x218 -> centre 178x178 -> 64x64",  # cut.png and bent.png have good headers
        "1  60x100 -> centre 60x60 -> 64x64 (enlarged)",
        "17  RGB",
        "5 of 19 files",
        "bent.png: ",
        "cut.png: ",
        "page.jpg: not an image",
        "tiny.png: too small: 1x1 pixels",
        "zero.png: not an image",
        "13 images to train on, 1 for validation (the same random ones for every seed)",
        "again.png = 03.png",
        "a step takes 64 images and there are 13",
    ):
        assert line in output, output
    with Image.open("deep/s.png") as sheet:
        assert sheet.size == (8 * 66 + 2, 2 * 66 + 2)


def test_headers(tmp_path):
    """Of gray images stored as RGB, one with transparency, in many sizes."""
    for i in range(9):
        noise_image(i, (20 + i, 20), "L").convert("RGB").save(tmp_path / f"{i}.png")
    clear = Image.new("RGBA", (5, 6), "gray")
    clear.save(tmp_path / "clear.png")
    read = partial(read_headers, progress=lambda x, total: x)
    headers = read([open_files(tmp_path)])
    assert headers.sizes == Counter({(20 + i, 20): 1 for i in range(9)} | {(5, 6): 1})
    assert headers.modes == Counter(RGB=9, RGBA=1)
    assert (headers.transparent, headers.colored) == (1, False)
    noise_image(0).save(tmp_path / "color.png")
    assert read([open_files(tmp_path)]).colored
    pixels = np.zeros((7, 4, 5, 3), np.uint8)
    assert read([of_array(pixels)] * 2) == (Counter({(5, 4): 14}), Counter(RGB=14), 0, False)


def test_the_report_and_training_see_the_same_images(folder, monkeypatch):
    report(f"configs/folder.yml 'dataset.root={folder}'", monkeypatch)
    decoded = {p: p.stat().st_mtime_ns for p in Path("data/cache").iterdir()}
    config = load_config("configs/folder.yml", [f"dataset.root={folder}"])
    dataset.load_images(**config.dataset.model_dump(exclude={"random_flip"}))
    assert {p: p.stat().st_mtime_ns for p in Path("data/cache").iterdir()} == decoded


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("configs/foldr.yml", "did you mean configs/folder.yml?"),
        ("configs/folder.yml dataset.root=nowhere", "nowhere (dataset.root) does not exist"),
        ("configs/folder.yml dataset.root=mine dataset.image_size=30", "try 32"),
        ("configs/folder.yml dataset.root=bad", "12 of 12 files in bad cannot be used"),
        (
            "configs/folder.yml dataset.root=mine dataset.labels=true",
            "labels of mine (dataset.labels=true): 00.png is in no sub-folder; each class is one",
        ),
        ("configs/digits.yml --contact-sheet mine", "must end in .png"),
        ("configs/digits.yml --contact-sheet /proc/no/s.png", "/proc/no"),
    ],
)
def test_mistakes_end_in_one_message(line, says, folder, monkeypatch):
    Path("bad").mkdir()
    for i in range(12):
        (Path("bad") / f"{i}.png").write_bytes(b"")
    output = report(line, monkeypatch, code=2)
    assert "error: " in output
    assert says in output


@pytest.mark.parametrize(
    ("size", "fit", "says"),
    [
        ((64, 64), "crop", "64x64, as it is"),
        ((178, 218), "crop", "178x218 -> centre 178x178 -> 64x64"),
        ((178, 178), "pad", "178x178 -> 64x64"),
        ((200, 100), "pad", "200x100 -> 64x32 -> on black 64x64"),
        ((1000, 1), "pad", "1000x1 -> 64x1 -> on black 64x64"),
        ((30, 20), "crop", "30x20 -> centre 20x20 -> 64x64 (enlarged)"),
        ((30, 30), "pad", "30x30 -> 64x64 (enlarged)"),
    ],
)
def test_preprocessing_in_words(size, fit, says):
    assert describe_fit(size, (64, 64), fit) == says


@pytest.mark.parametrize(
    ("size", "fit", "says"),
    [
        ((20, 12), "pad", "20x12, as it is"),
        ((100, 60), "crop", "100x60 -> 20x12"),
        ((60, 100), "crop", "60x100 -> centre 60x36 -> 20x12"),
        ((60, 100), "pad", "60x100 -> 7x12 -> on black 20x12"),
        ((10, 6), "crop", "10x6 -> 20x12 (enlarged)"),
    ],
)
def test_preprocessing_to_another_shape_in_words(size, fit, says):
    assert describe_fit(size, (12, 20), fit) == says


def test_values():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 3, 4, 4), np.uint8)
    pixels[7], pixels[299] = pixels[200], 9
    values = read_values([pixels[:256], pixels[256:]])
    assert (values.histogram.sum(1) == 300 * 16).all()
    assert values.histogram[1, 9] == (pixels[:, 1] == 9).sum()
    assert len(set(values.digests)) == 299
    assert values.digests[7] == values.digests[200]
    assert (values.plain, values.gray, values.opaque) == (1, False, True)
    gray = np.repeat(pixels[:, :1], 3, axis=1)
    assert read_values([gray]).gray
    clear = np.concatenate([gray, pixels[:, :1]], axis=1)
    values = read_values([clear])
    assert (values.gray, values.opaque) == (True, False)


FINE = Headers(Counter({(64, 64): 9000}), Counter(RGB=9000), 0, colored=True)
GRAY = FINE._replace(colored=False)


@pytest.mark.parametrize(
    ("overrides", "headers", "changes", "says"),
    [
        ([], FINE, dict(), None),
        ([], GRAY, dict(gray=True), "all images are gray: dataset.channels=1"),
        (["dataset.channels=4"], FINE, dict(), "nothing is transparent: dataset.channels=3"),
        (["dataset.channels=1"], FINE, dict(), "color images: dataset.channels=3"),
        (["dataset.channels=1"], GRAY, dict(), None),
        ([], FINE._replace(transparent=5), dict(), "dataset.channels=4 keeps it"),
        (["dataset.image_size=128"], FINE._replace(sizes=Counter({(70, 80): 9})), dict(),
         "smaller than 128x128; enlarging makes them soft: dataset.image_size=64"),
        (["dataset.image_size=[96, 160]", "model.attention_resolutions=[12]"],
         FINE._replace(sizes=Counter({(120, 80): 9})), dict(),
         "smaller than 160x96; enlarging makes them soft: dataset.image_size=[72, 120]"),
        (["dataset.image_size=[96, 64]"], FINE._replace(sizes=Counter({(200, 300): 9})), dict(),
         None),
        ([], FINE._replace(sizes=Counter({(64, 128): 9})), dict(),
         "leaves 50% of the area out: dataset.fit=pad keeps it, dataset.image_size=[128, 64] has"),
        (["dataset.image_size=[128, 64]"], FINE._replace(sizes=Counter({(90, 90): 9})), dict(),
         "leaves 50% of the area out: dataset.fit=pad keeps it, dataset.image_size=64 has"),
        ([], FINE, dict(classes=Counter(cats=8981, dogs=19)), "8,981 images are of 'cats', 19 of"),
        ([], FINE, dict(classes=Counter(cats=8900, dogs=100)), "100 of 'dogs': rare classes"),
        ([], FINE, dict(classes=Counter(cats=8000, dogs=1000)), None),
        (["dataset.fit=pad"], FINE._replace(sizes=Counter({(64, 128): 9})), dict(), "black margin"),
        ([], FINE, dict(levels=16), "all values lie in 0 ... 15"),
        ([], FINE, dict(plain=2), "2 images are of a single color"),
        ([], FINE, dict(digests=[b"a"] * 9000), "8,999 of 9,000 training images are copies"),
        ([], FINE, dict(validation=[b"3", b"3", b"x"]), "2 validation images are trained on, too"),
        ([], FINE, dict(validation=[]), "dataset.validation_fraction=0.05"),
        (["dataset.random_flip=false"], FINE, dict(count=99), "dataset.random_flip=true doubles"),
        (["model.dropout=0"], FINE, dict(count=99), "model.dropout=0.1"),
        ([], FINE, dict(count=63), "a step takes 64 images and there are 63"),
        (["dataset.name=mnist", "dataset.validation_fraction=0", "dataset.random_flip=true"], FINE,
         dict(), "a mirrored digit is no digit: dataset.random_flip=false"),
    ],
)  # fmt: skip
def test_advice(overrides, headers, changes, says):
    digests = [str(i).encode() for i in range(changes.pop("count", 9000))]
    validation, classes = changes.pop("validation", [b"x"]), changes.pop("classes", Counter())
    config = load_config("configs/folder.yml", overrides)
    histogram = np.zeros((config.dataset.channels, 256), int)
    histogram[:, : changes.pop("levels", 256)] = 1
    values = Values(histogram, digests, plain=0, gray=False, opaque=True)._replace(**changes)
    advice = list(advise(config, headers, values, validation, classes))
    if says is None:
        assert advice == []
    else:
        assert len([line for line in advice if says in line]) == 1, advice


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_folder_of_classes_that_are_not_square(fit, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    for i in range(30):
        folder = tmp_path / "mine" / ("cats" if i < 20 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        noise_image(i, (40, 24)).save(folder / f"{i:02}.png")
    monkeypatch.chdir(tmp_path)
    line = (
        f"configs/folder.yml dataset.root=mine dataset.labels=true dataset.fit={fit} "
        "'dataset.image_size=[12, 20]' 'model.channel_multipliers=[1, 2]' "
        "'model.attention_resolutions=[6]' dataset.validation_fraction=0"
    )
    output = report(line, monkeypatch)
    assert "30  40x24 -> 20x12\n" in output
    assert "classes 2: cats 20, dogs 10\n" in output
    with Image.open("samples/folder-data.png") as sheet:  # eight in a row, three times their size
        assert sheet.size == (8 * 62 + 2, 4 * 38 + 2)


def test_classes_in_one_line():
    assert summarize_classes(Counter()) == {}
    classes = Counter({f"c{i}": 1000 * i for i in range(1, 16)})
    (line,) = summarize_classes(classes)["classes"]
    assert line.startswith("15: c15 15,000, c14 14,000, ")
    assert line.endswith("c10 10,000, ..., c3 3,000, c2 2,000, c1 1,000")


def test_only_a_contact_sheet_is_replaced(tmp_path, monkeypatch):
    mine = tmp_path / "mine.png"
    line = f"configs/digits.yml --contact-sheet '{mine}'"
    Image.new("L", (9, 9)).save(mine)
    assert "is another image" in report(line, monkeypatch, code=2)
    assert Image.open(mine).size == (9, 9)
    mine.unlink()
    for _ in range(2):
        report(line, monkeypatch)


def test_a_contact_sheet_shows_what_is_trained_on(tmp_path):
    def sheet(images):
        write_contact_sheet(images, tmp_path / "s.png")
        return np.asarray(Image.open(tmp_path / "s.png"))

    pixels = np.zeros((3, 1, 8, 8), np.uint8)
    pixels[1] = 200
    assert sheet(pixels).shape == (68, 200, 3)
    assert (sheet(pixels)[34, [34, 100, 166]] == [[0] * 3, [200] * 3, [0] * 3]).all()
    clear = np.zeros((2, 4, 300, 300), np.uint8)
    assert sheet(clear).shape == (260, 518, 3)
    assert sheet(clear)[128, 128].tolist() == [255] * 3
    clear[:, 3] = 255
    assert sheet(clear)[128, 128].tolist() == [0] * 3
