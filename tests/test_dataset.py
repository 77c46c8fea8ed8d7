"""Datasets: the order of images, where they come from, and the cache of decoded ones."""

import errno
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROJECT, Evil, failing, load, noise_image, run, write_cifar
from PIL import Image
from torch.utils.data import DataLoader

import files
from dataset import Batch, FolderImages, Images, StepSampler, fit_image

# ---- the order


def test_each_epoch_is_a_permutation():
    sampler = StepSampler(count=10, batch_size=4, seed=3)
    stream = [row for step in range(25) for row in sampler.rows(step)]
    epochs = [stream[i : i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert stream != [
        r for s in range(25) for r in StepSampler(count=10, batch_size=4, seed=4).rows(s)
    ]


def test_a_batch_may_be_larger_than_the_data():
    rows = StepSampler(count=3, batch_size=7, seed=0).rows(5)
    assert len(rows) == 7
    assert set(rows) == {0, 1, 2}


def test_it_starts_anywhere():
    from_0 = iter(StepSampler(count=10, batch_size=4, seed=0))
    batches = [next(from_0) for _ in range(20)]
    from_13 = iter(StepSampler(count=10, batch_size=4, seed=0, start_step=13))
    assert [next(from_13) for _ in range(7)] == batches[13:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_one_batch(world_size):
    whole = StepSampler(count=100, batch_size=8, seed=0)
    ranks = [
        StepSampler(count=100, batch_size=8, seed=0, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for step in (0, 12, 13):
        assert [row for rank in ranks for row in rank.rows(step)] == whole.rows(step)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_yields_the_rows(num_workers, tmp_path):
    data = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    np.save(tmp_path / "p.npy", data)
    for source in (data, tmp_path / "p.npy"):
        sampler = StepSampler(count=20, batch_size=6, seed=0)
        loader = iter(
            DataLoader(Images(source), batch_size=None, sampler=sampler, num_workers=num_workers)
        )
        for step in range(8):
            batch = next(loader)
            assert isinstance(batch, Batch)
            assert batch.labels is None
            assert batch.images.dtype == torch.uint8
            assert batch.images.flatten().tolist() == sampler.rows(step)


# ---- the sources


def test_digits(tmp_path):
    parts = load(tmp_path, "digits", channels=1, validation_fraction=0.1)
    assert (len(parts["train"]), len(parts["validation"])) == (1617, 180)
    assert parts["train"].shape == (1, 8, 8)
    together = torch.cat([p[list(range(len(p)))].images for p in parts.values()])
    assert (together.min(), together.max()) == (0, 255)
    from sklearn.datasets import load_digits

    expected = np.sort((load_digits().images * 255 / 16).round().reshape(1797, -1).sum(1))
    assert np.array_equal(np.sort(together.flatten(1).sum(1).numpy()), expected)
    labelled = load(tmp_path, "digits", channels=1, validation_fraction=0.1, labels=True)
    for split, part in labelled.items():
        assert np.array_equal(part.rows, parts[split].rows)
        rows = list(range(len(part)))
        assert np.array_equal(part[rows].labels.argmax(1), load_digits().target[part.rows])
    assert sum(labelled["train"].count_classes().values()) == 1617
    assert labelled["train"].fingerprint() == parts["train"].fingerprint()


def test_validation_images_are_not_trained_on(tmp_path):
    one = load(tmp_path, "digits", channels=1, validation_fraction=0.2)
    two = load(tmp_path, "digits", channels=1, validation_fraction=0.2)
    assert not set(one["train"].rows) & set(one["validation"].rows)
    assert np.array_equal(one["train"].rows, two["train"].rows)
    with pytest.raises(ValueError, match="leaves"):
        load(tmp_path, "digits", channels=1, validation_fraction=0.9999)


@pytest.mark.parametrize("form", ["py", "bin"])
def test_cifar10_in_its_own_formats(form, tmp_path):
    pixels = write_cifar(tmp_path / "root", count=20, form=form)
    parts = load(tmp_path, "cifar10", image_size=32, labels=True)
    assert parts["train"].classes[:2] == ["airplane", "automobile"]
    for part, expected in (
        ("train", pixels[:5].reshape(100, 3, 32, 32)),
        ("validation", pixels[5]),
    ):
        batch = parts[part][list(range(len(expected)))]
        assert np.array_equal(batch.images, expected)
        assert np.array_equal(batch.labels, np.eye(10)[expected[:, 0, 0, 0] % 10])


def test_a_cifar10_file_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "root")
    batch = tmp_path / "root" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(ValueError, match=r"data_batch_3.*system.*refused"):
        load(tmp_path, "cifar10", image_size=32)
    assert not (tmp_path / "stolen").exists()
    batch.write_bytes(batch.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"data_batch_3 is damaged"):
        load(tmp_path, "cifar10", image_size=32)
    batch.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 is missing"):
        load(tmp_path, "cifar10", image_size=32)


def test_folder_of_everything(tmp_path, capsys):
    root = tmp_path / "root"
    for i, ext in enumerate(["jpg", "JPEG", "png", "webp", "bmp", "gif", "tiff", "PNG"]):
        path = root / f"{i // 3}" / f"{i}.{ext}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, (20, 12)).save(path)
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_text("not an image")
    (root / "empty.png").write_bytes(b"")
    whole = (root / "0" / "0.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    images = load(tmp_path)["train"]
    said = capsys.readouterr().out
    assert len(images) == 8
    assert "2 of 10" in said
    assert "empty.png" in said
    assert "cut.jpg" in said
    for row, (i, ext) in enumerate([(0, "jpg"), (1, "JPEG"), (2, "png")]):
        with Image.open(root / "0" / f"{i}.{ext}") as image:
            expected = fit_image(image, image_size=8, channels=3)
        assert np.array_equal(images[[row]].images[0], expected)


def test_zip_is_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        noise_image(i).save(tmp_path / "images" / f"{i}.png")
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "images").iterdir():
            file.write(path, f"deep/{path.name}")
    rows = list(range(5))
    from_zip = load(tmp_path, root=str(archive))["train"][rows].images
    from_folder = load(tmp_path, root=str(tmp_path / "images"))["train"][rows].images
    assert torch.equal(from_zip, from_folder)


def test_cache_follows_the_files(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    noise_image(0).save(root / "a.png")
    before = load(tmp_path)["train"][[0]].images
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    load(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == files
    noise_image(1).save(root / "a.png")
    os.utime(root / "a.png", ns=(1, 1))
    assert not torch.equal(load(tmp_path)["train"][[0]].images, before)
    assert load(tmp_path, channels=1)["train"].shape == (1, 8, 8)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_damaged_cache_is_made_again(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    noise_image(0).save(root / "a.png")
    before = load(tmp_path)["train"][[0]].images
    (array,), (skipped,) = ((tmp_path / "cache").glob(f"*.{end}") for end in ("npy", "json"))
    damages = [
        array.unlink,
        lambda: array.write_bytes(array.read_bytes()[:-1]),
        lambda: array.write_bytes(b""),
        lambda: skipped.write_text(""),
        lambda: skipped.write_text("[]"),
    ]
    for damage in damages:
        damage()
        assert torch.equal(load(tmp_path)["train"][[0]].images, before)


def test_decoded_images_are_found_again_by_any_version(tmp_path):
    """The name of the cache's file is a promise; so are fingerprints: checkpoints hold them."""
    root = tmp_path / "root"
    root.mkdir()
    noise_image(0).save(root / "a.png")
    stat = (root / "a.png").stat()
    files = [["a.png", stat.st_size, stat.st_mtime_ns]]
    recipe = json.dumps(["1: fit_picture", str(root.resolve()), files, 8, 3])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    load(tmp_path)
    there = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert there == [f"{digest}-8x8x3.json", f"{digest}-8x8x3.npy"]
    load(tmp_path, fit="pad")
    assert len(list((tmp_path / "cache").iterdir())) == 4
    recipe = json.dumps([[str(root.resolve()), files], [3, 8]])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    assert FolderImages(root, (3, 8, 8)).fingerprint() == digest
    assert FolderImages(root, (3, 8, 12)).fingerprint() != digest
    digits = load(tmp_path, "digits", channels=1, validation_fraction=0.1)
    assert digits["train"].fingerprint() == "f670761aceeed3d3"
    assert digits["validation"].fingerprint() == "5edc7d37149f42d9"


def test_what_an_older_version_left_out_stays_out(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3 * 64 * 3, dtype=np.uint8).reshape(3, 8, 8, 3))
    load(tmp_path, "npy", root=str(tmp_path / "a.npy"))
    (skipped,) = (tmp_path / "cache").glob("*.json")
    skipped.write_text('{"picture 1": "too small: 1x1 pixels"}')
    assert load(tmp_path, "npy", root=str(tmp_path / "a.npy"))["train"].rows.tolist() == [0, 2]


def test_a_tiny_image_is_left_out(tmp_path, capsys):
    (tmp_path / "root").mkdir()
    for side in (1, 7, 8, 64):
        Image.new("RGB", (side, 70)).save(tmp_path / "root" / f"{side}.png")
    assert len(load(tmp_path, image_size=64)["train"]) == 2
    assert "7.png: too small: 7x70 pixels" in capsys.readouterr().out


def test_too_many_bad_files_are_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for i in range(12):
        (root / f"{i}.png").write_bytes(b"no")
    for i in range(12, 20):
        noise_image(i).save(root / f"{i}.png")
    with pytest.raises(ValueError, match=r"12 of 20 files"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["folder", "celebahq"])
def test_no_images_is_said(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="root"):
        load(tmp_path, name)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "readme.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no images \(\.jpg"):
        load(tmp_path, name)


def test_celebahq_takes_a_folder_as_it_is(tmp_path):
    (tmp_path / "root").mkdir()
    noise_image(0, (256, 256)).save(tmp_path / "root" / "00000.png")
    assert load(tmp_path, "celebahq", image_size=256)["train"].shape == (3, 256, 256)


def test_a_set_of_another_shape(tmp_path):
    """From files, from an array on disk and in memory; the cache is named by height, width."""
    (tmp_path / "root").mkdir()
    pixels = np.stack([np.asarray(noise_image(i, (20, 12))) for i in range(3)])
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "root" / f"{i}.png")
    np.save(tmp_path / "a.npy", pixels)
    for name, root in (("folder", "root"), ("npy", "a.npy")):
        images = load(tmp_path, name, root=str(tmp_path / root), image_size=[12, 20])["train"]
        assert np.array_equal(images[[0, 1, 2]].images, pixels.transpose(0, 3, 1, 2))
    assert len(list((tmp_path / "cache").glob("*-12x20x3.npy"))) == 2
    load(tmp_path, image_size=[20, 12])
    assert len(list((tmp_path / "cache").glob("*-20x12x3.npy"))) == 1
    digits = load(tmp_path, "digits", channels=1, image_size=[8, 6])["train"][[5]].images
    assert torch.equal(digits, load(tmp_path, "digits", channels=1)["train"][[5]].images[..., 1:7])


# ---- when the system fails


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_no_file_is_renamed_while_it_is_mapped(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    for i in range(3):
        noise_image(i).save(tmp_path / "root" / f"{i}.png")
    mapped = []

    def replace(source, target):
        mapped.append(str(source) in Path("/proc/self/maps").read_text())
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    images = load(tmp_path)["train"]
    assert mapped == [False, False]  # the array, the list of those left out
    assert isinstance(images, Images)
    assert len(images) == 3


def test_a_failure_of_the_system_is_no_bad_image(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    for i in range(3):
        noise_image(i).save(tmp_path / "root" / f"{i}.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", failing(Image.open, errno.EMFILE))
        with pytest.raises(OSError, match="Too many open files; allow more"):
            load(tmp_path)
    assert not list((tmp_path / "cache").iterdir())
    assert len(load(tmp_path)["train"]) == 3
    assert torch.is_tensor(load(tmp_path)["train"][[0]].images)


def test_a_large_image_is_no_warning(tmp_path):
    """In a process of its own, where warnings are shown: 95 million pixels, which Pillow minds."""
    (tmp_path / "root").mkdir()
    Image.new("1", (9500, 10_000)).save(tmp_path / "root" / "large.png")
    config = PROJECT / "configs" / "digits.yml"
    line = f"dataset.py '{config}' dataset.name=folder dataset.root=root dataset.labels=false"
    output = run(line, tmp_path, env={"PYTHONWARNINGS": "default"})
    assert "9500x10000 -> centre 9500x9500 -> 8x8" in output
    assert "DecompressionBomb" not in output
