"""Every place images can come from, each made here in its true layout."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import PROJECT, Evil, invoke, load, noise_image, pixels_of, random_pixels, write_idx
from PIL import Image

from sources import find_images, open_files
from sources.files import open_array

# ---- MNIST and Fashion-MNIST


@pytest.mark.parametrize(
    ("name", "place", "options"),
    [
        ("fashion-mnist", "", dict(packed=True)),  # as Debian has it
        ("fashion-mnist", "FashionMNIST/raw", dict(packed=False)),  # as torchvision has it
        ("mnist", "MNIST/raw", dict(packed=True)),
        ("mnist", "", dict(packed=False, dot=".")),
    ],
)
def test_idx_files_wherever_they_are(name, place, options, tmp_path):
    written = write_idx(tmp_path / "root" / place, count=20, **options)
    parts = load(tmp_path, name, image_size=28, channels=1, labels=True)
    assert np.array_equal(pixels_of(parts)[:, 0], written["train"])
    assert np.array_equal(pixels_of(parts, "validation")[:, 0], written["t10k"])
    for part in parts.values():
        assert np.array_equal(part.labels_of(range(20)), np.tile(np.eye(10), (2, 1)))
    assert parts["train"].classes[9] == {"mnist": "9", "fashion-mnist": "ankle boot"}[name]


def test_a_test_set_that_trains_too(tmp_path, monkeypatch):
    written = write_idx(tmp_path / "root", count=20)
    keys = dict(image_size=28, channels=1, labels=True, split="all")
    parts = load(tmp_path, "fashion-mnist", **keys)
    both = np.concatenate([written["train"], written["t10k"]])
    assert np.array_equal(pixels_of(parts)[:, 0], both)
    assert np.array_equal(parts["train"].labels_of(range(40)), np.tile(np.eye(10), (4, 1)))
    kept = load(tmp_path, "fashion-mnist", **keys, validation_fraction=0.25)
    rows = kept["validation"].rows  # labels follow
    assert np.array_equal(pixels_of(kept, "validation")[:, 0], both[rows])
    assert np.array_equal(kept["validation"].labels_of(range(10)), np.eye(10)[rows % 10])
    # the report counts them as training does
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    line = "dataset.py configs/fashion_mnist.yml dataset.root=root dataset.split=all"
    output = invoke(f"{line} dataset.validation_fraction=0.25", tmp_path, monkeypatch)
    assert "30 images to train on, 10 for validation (the same random ones" in output
    output = invoke("dataset.py configs/fashion_mnist.yml dataset.root=root", tmp_path, monkeypatch)
    assert "20 images to train on, 20 for validation (its test set)" in output


@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_idx_file_is_named(packed, tmp_path):
    write_idx(tmp_path / "root", packed=packed)
    path = next((tmp_path / "root").glob("train-images*"))
    for content in (path.read_bytes()[:-9], b"<html>quota</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.* is damaged .* delete it"):
            load(tmp_path, "mnist", image_size=28, channels=1)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, 2], r"holds \(3,\); give \(5,\)"),
        ([0, 1, 2, 10, 3], "holds class 10; there are at most 10, from 0 on"),
    ],
)
def test_labels_of_other_images_are_told(labels, says, tmp_path):
    write_idx(tmp_path / "root", packed=False)
    path = tmp_path / "root" / "train-labels-idx1-ubyte"
    path.write_bytes(np.array([0x801, len(labels)], ">u4").tobytes() + bytes(labels))
    with pytest.raises(ValueError, match=rf"labels of .*root.*train-labels {says}"):
        load(tmp_path, "mnist", image_size=28, channels=1, labels=True)
    path.unlink()  # they are read where they are wanted
    assert len(load(tmp_path, "mnist", image_size=28, channels=1)["train"]) == 5


def test_debians_fashion_mnist():
    root = Path("/usr/share/datasets/fashion-mnist")
    if not root.is_dir():
        pytest.skip("apt-get install dataset-fashion-mnist")
    found = find_images("fashion-mnist", root)
    assert found["train"].pixels.shape == (60_000, 28, 28, 1)
    assert found["validation"].pixels.shape == (10_000, 28, 28, 1)
    mean = found["train"].pixels.mean() / 255
    assert round(mean, 4) == 0.2860  # that everybody normalises by
    assert (np.bincount(found["train"].labels().of) == 6000).all()
    assert (np.bincount(found["validation"].labels().of) == 1000).all()


# ---- Flowers-102


def write_flowers(home, train=(3, 1), valid=(5,), test=(2, 4, 6)):
    from scipy.io import savemat

    (home / "jpg").mkdir(parents=True)
    for i in (*train, *valid, *test):
        noise_image(i, (30, 20)).save(home / "jpg" / f"image_{i:05d}.jpg")
    ids = dict(trnid=train, valid=valid, tstid=test)
    savemat(home / "setid.mat", {key: np.array([value], np.uint16) for key, value in ids.items()})
    numbers = np.array([[40, 7, 3, 99, 102, 1]], np.uint8)  # of images 1 ... 6, from 1 on
    savemat(home / "imagelabels.mat", {"labels": numbers})


@pytest.mark.parametrize("place", ["", "flowers-102"])
def test_flowers_trains_on_train_and_val(place, tmp_path):
    home = tmp_path / "root" / place
    write_flowers(home)
    parts = load(tmp_path, "flowers102")
    everything = pixels_of(load(tmp_path, root=str(home / "jpg")))  # in the order of their names
    assert np.array_equal(pixels_of(parts), everything[[0, 2, 4]])
    assert np.array_equal(pixels_of(parts, "validation"), everything[[1, 3, 5]])
    sources = find_images("flowers102", tmp_path / "root")
    assert sources["train"].names == ["image_00001.jpg", "image_00003.jpg", "image_00005.jpg"]
    assert sources["train"].labels().of.tolist() == [39, 2, 101]
    assert sources["validation"].labels().of.tolist() == [6, 98, 0]
    assert sources["train"].labels().names[0] == "pink primrose"
    says = r"has no images of 'pink primrose' and 98 other classes to train on"
    with pytest.raises(ValueError, match=says):
        load(tmp_path, "flowers102", labels=True)


def test_flowers_trains_on_all_of_them(tmp_path):
    write_flowers(tmp_path / "root")
    parts = load(tmp_path, "flowers102", split="all")
    everything = pixels_of(load(tmp_path, root=str(tmp_path / "root/jpg")))
    assert np.array_equal(pixels_of(parts), everything[[0, 2, 4, 1, 3, 5]])  # train and val, test
    assert not len(parts["validation"])
    labels = find_images("flowers102", tmp_path / "root", "all")["train"].labels()
    assert labels.of.tolist() == [39, 2, 101, 6, 98, 0]
    kept = load(tmp_path, "flowers102", split="all", validation_fraction=0.34)
    assert (len(kept["train"]), len(kept["validation"])) == (4, 2)
    whole = np.concatenate([pixels_of(kept), pixels_of(kept, "validation")])
    assert sorted(map(bytes, whole)) == sorted(map(bytes, everything))


def test_flowers_that_lack_something(tmp_path):
    write_flowers(tmp_path / "root")
    (tmp_path / "root" / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"image_00004\.jpg is missing"):
        load(tmp_path, "flowers102")
    (tmp_path / "root" / "setid.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(ValueError, match=r"setid\.mat is damaged"):
        load(tmp_path, "flowers102")


# ---- LSUN


def encoded(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("place", ["", "church_outdoor_train_lmdb"])
def test_lsun_as_it_is_distributed(place, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    images = [noise_image(i, (24, 16)) for i in range(6)]
    (tmp_path / "folder").mkdir()
    home = tmp_path / "root" / place
    home.mkdir(parents=True)
    with lmdb.open(str(home), map_size=2**24) as database, database.begin(write=True) as writing:
        for i, image in enumerate(images):
            kind = "webp" if i % 2 else "jpeg"
            key = hashlib.sha1(bytes([i])).hexdigest()
            writing.put(key.encode(), encoded(image, kind))
            (tmp_path / "folder" / f"{key}.{kind}").write_bytes(encoded(image, kind))
        writing.put(b"zz", b"not an image")
    expected = pixels_of(load(tmp_path, "lsun-church", root=str(tmp_path / "folder")))
    assert np.array_equal(pixels_of(load(tmp_path, "lsun-church")), expected)
    assert np.array_equal(pixels_of(load(tmp_path, "lsun-church", image_size=4)).shape[2:], (4, 4))
    (home / "data.mdb").write_bytes(b"no" * 5000)
    os.rename(tmp_path / "root", tmp_path / "other")
    with pytest.raises(ValueError, match=r"is damaged or no lmdb"):
        load(tmp_path, "lsun-church", root=str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match=r"church_outdoor_train_lmdb\.zip"):
        load(tmp_path, "lsun-church")


# ---- tar


@pytest.fixture
def tar_of(tmp_path):
    """Makes a tar of six images and other things, beside the same as a folder."""

    def make(name, mode):
        (tmp_path / "images").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, mode) as archive:
            for i in range(6):
                path = tmp_path / "images" / f"{i}.png"
                noise_image(i, (20, 16)).save(path)
                archive.add(path, f"./deep/{i}.png")
            (tmp_path / "notes.txt").write_text("not an image")
            archive.add(tmp_path / "notes.txt", "notes.txt")
            archive.add(tmp_path / "notes.txt", "._0.png")
            link = tarfile.TarInfo("evil.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        return tmp_path / name

    return make


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a", "w:xz")])
def test_tar_is_a_folder(name, mode, tar_of, tmp_path):
    path = tar_of(name, mode)
    from_tar = pixels_of(load(tmp_path, "tar", root=str(path)))
    assert np.array_equal(from_tar, pixels_of(load(tmp_path, root=str(tmp_path / "images"))))
    source = open_files(path)
    for row in (5, 0, 3, 3, 1):  # in any order, and twice
        with Image.open(tmp_path / "images" / f"{row}.png") as image, source.open(row) as other:
            assert image.tobytes() == other.tobytes()


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_a_tar_cut_short_is_refused(name, mode, tar_of, tmp_path):
    path = tar_of(name, mode)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path, "tar", root=str(path))


# ---- arrays


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
@pytest.mark.parametrize("values", ["uint8", "int64", "0..1", "-1..1", "0..255"])
def test_arrays_of_every_kind(values, layout, tmp_path):
    pixels = random_pixels(10, 16, 16, 1 if layout == "NHW" else 3)
    array = {
        "uint8": lambda x: x,
        "int64": lambda x: x.astype(np.int64),
        "0..1": lambda x: (x / 255).astype(np.float32),
        "-1..1": lambda x: (x / 127.5 - 1).astype(np.float16 if x.max() == 0 else np.float32),
        "0..255": lambda x: x.astype(np.float64),
    }[values](pixels)
    if layout != "NHWC":
        array = array[..., 0] if layout == "NHW" else array.transpose(0, 3, 1, 2)
    np.save(tmp_path / "sprites.npy", array)
    np.savez_compressed(tmp_path / "sprites.npz", labels=np.zeros((10, 5)), images=array)
    shape = dict(image_size=16, channels=pixels.shape[3])
    for name in ("npy", "npz"):
        parts = load(tmp_path, name, root=str(tmp_path / f"sprites.{name}"), **shape)
        assert np.array_equal(pixels_of(parts), pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 8, 8, 3)) - 7, r"float64 from -7 to -7; give uint8"),
        (np.full((4, 8, 8, 3), np.nan), r"from nan to nan"),
        (np.full((4, 8, 8, 3), 256), r"int64 from 256"),
        (np.zeros((4, 8, 8, 3), complex), r"complex128"),
        (np.zeros((4, 192)), r"\(4, 192\); images are \(N, H, W\)"),
        (np.zeros((0, 8, 8, 3)), r"\(0, 8, 8, 3\)"),
        (np.array([[[Evil()]]], dtype=object), r"pickled objects, which are never loaded"),
    ],
)
def test_arrays_that_are_no_images(array, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", array, allow_pickle=True)
    np.savez("a.npz", array, allow_pickle=True)
    for path in (Path("a.npy"), Path("a.npz")):
        if path.suffix == ".npz" and array.ndim < 3:
            says = "holds"
        with pytest.raises(ValueError, match=says):
            open_array(path)
    assert not Path("stolen").exists()


def test_an_array_by_its_folder(tmp_path):
    np.save(tmp_path / "a.npy", random_pixels(3, 8, 8))
    assert len(open_array(tmp_path).names) == 3
    np.save(tmp_path / "b.npy", random_pixels(3, 8, 8))
    with pytest.raises(FileNotFoundError, match=r"holds 2 .* give one of them: a\.npy, b\.npy"):
        open_array(tmp_path)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.npy .* cannot be read"):
        open_array(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"a\.npy .* cannot be read"):
        open_array(tmp_path / "a.npy")


# ---- the Hub


def test_huggingface_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [noise_image(i, (20, 16)) for i in range(4)]
    values = [{"bytes": encoded(image, "png"), "path": None} for image in images]
    features = datasets.Features(label=datasets.Value("int32"), image=datasets.Image())
    train = datasets.Dataset.from_dict({"label": [0] * 4, "image": values}, features=features)
    datasets.DatasetDict(train=train, test=train.select([0])).save_to_disk(tmp_path / "root")
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "images" / f"{i}.png")
    expected = pixels_of(load(tmp_path, root=str(tmp_path / "images")))
    assert np.array_equal(pixels_of(load(tmp_path, "huggingface")), expected)
    train.remove_columns("image").save_to_disk(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"no column of images: \['label'\]"):
        load(tmp_path, "huggingface", root=str(tmp_path / "labels"))


# ---- folders


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
def test_links_that_go_round_pipes_and_devices(tmp_path):
    for i in range(2):
        noise_image(i).save(tmp_path / f"{i}.png")
    (tmp_path / "round").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert open_files(tmp_path).names == ["0.png", "1.png"]
    (tmp_path / "c").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "c")  # of two names a folder has the first
    noise_image(2).save(tmp_path / "c" / "2.png")
    assert open_files(tmp_path).names == ["0.png", "1.png", "a/2.png"]
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        open_files(Path("/dev/zero"))
