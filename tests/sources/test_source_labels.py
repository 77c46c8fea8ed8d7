"""Labels: from every place they can stand in, with their own image, or one message."""

import io
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from helpers import load, tiny
from PIL import Image
from torch.utils.data import DataLoader

from dataset import Images, StepSampler, with_facts
from sources import find_images
from sources.labels import labels_of_folders

NAMES = ["apple", "fig", "pear"]


def image_of(number, i=0):
    """Return an image that tells its class: its red is the number."""
    return Image.new("RGB", (8, 8), (number, i % 256, 0))


def write_files(root, paths):
    """Write images by path; the class is the name of a folder in NAMES."""
    for i, path in enumerate(paths):
        number = next(NAMES.index(part) for part in path.split("/") if part in NAMES)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image_of(number, i).save(root / path)


def told(images):
    """Return what labels say and what the images show."""
    batch = images[list(range(len(images)))]
    assert batch.labels.dtype == torch.float32
    assert batch.labels.sum(1).eq(1).all()
    return batch.labels.argmax(1).tolist(), batch.images[:, 0, 0, 0].tolist()


def packed(root, kind):
    """Return a folder as it is, or as an archive."""
    if kind == "folder":
        return root
    path = root.parent / f"a.{kind}"
    files = [file for file in sorted(root.rglob("*"), reverse=True) if file.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(root))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, f"./{file.relative_to(root)}")
    return path


# ---- folders


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("outer", ["", "all/", "all/train/"])
def test_a_class_is_a_sub_folder(outer, kind, tmp_path):
    paths = [f"{outer}{name}/{i}/{i}.png" for i in range(4) for name in NAMES]
    write_files(tmp_path / "root", paths)
    images = load(tmp_path, root=str(packed(tmp_path / "root", kind)), labels=True)["train"]
    assert images.classes == NAMES
    labels, shown = told(images)
    assert labels == shown
    assert images.count_classes() == dict.fromkeys(NAMES, 4)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_file_in_no_folder_is_named(kind, tmp_path):
    write_files(tmp_path / "root", ["all/fig/0.png", "all/pear/1.png"])
    image_of(0).save(tmp_path / "root" / "all" / "loose.png")
    place = packed(tmp_path / "root", kind)
    with pytest.raises(ValueError, match=r"labels of .*: (\./)?all/loose\.png is in no sub-folder"):
        load(tmp_path, root=str(place), labels=True)
    assert len(load(tmp_path, root=str(place))["train"]) == 3  # without labels it is welcome


def test_one_folder_is_no_class():
    for files in (["a.png"], ["a/1.png", "a/2.png"], ["1.png", "a/2.png"]):
        with pytest.raises(ValueError, match="in no sub-folder"):
            labels_of_folders(files)


# ---- arrays


@pytest.fixture
def arrays(tmp_path):
    """Write root/pixels.npy of 12 images; return its folder, the numbers and a loader."""
    numbers = np.random.default_rng(0).permutation(np.arange(12) % 3)
    pixels = np.stack([np.asarray(image_of(number, i)) for i, number in enumerate(numbers)])
    (tmp_path / "root").mkdir()
    np.save(tmp_path / "root" / "pixels.npy", pixels)
    return tmp_path / "root", numbers, partial(load, tmp_path, "npy", labels=True)


@pytest.mark.parametrize("file", ["labels.npy", "pixels_labels.npy", "label.npz", "y.npy"])
@pytest.mark.parametrize("form", ["numbers", "float64", "[N, 1]", "one-hot", "bool", "float32"])
def test_labels_beside_an_array(form, file, arrays):
    root, numbers, read = arrays
    one_hot = np.eye(3)[numbers]
    array = {
        "numbers": numbers.astype(np.uint8),
        "float64": numbers.astype(float),
        "[N, 1]": numbers[:, None],
        "one-hot": one_hot,
        "bool": one_hot.astype(bool),
        "float32": one_hot.astype(np.float32),
    }[form]
    (np.save if file.endswith("npy") else np.savez)(root / file, array)
    for place in (root, root / "pixels.npy"):
        labels, shown = told(read(root=str(place))["train"])
        assert labels == shown == numbers.tolist()
    assert read(root=str(root))["train"].classes == ["0", "1", "2"]
    assert read(root=str(root), classes=NAMES)["train"].classes == NAMES


@pytest.mark.parametrize("key", ["labels", "label", "y", "train_labels"])
def test_labels_inside_an_npz(key, arrays):
    root, numbers, read = arrays
    test = dict(test_images=np.zeros((2, 8, 8, 3), np.uint8), test_labels=np.array([0, 1]))
    np.savez(root / "a.npz", images=np.load(root / "pixels.npy"), **{key: numbers}, **test)
    labels, shown = told(read(root=str(root / "a.npz"))["train"])
    assert labels == shown == numbers.tolist()


def test_sprites_under_their_own_names(tmp_path):
    """One-hot of five, called heroes, food ... by the config."""
    numbers = np.arange(20) % 5
    pixels = np.stack([np.asarray(image_of(number)) for number in numbers])
    np.save(tmp_path / "sprites_1788_16x16.npy", pixels)
    np.save(tmp_path / "sprite_labels_nc_1788_16x16.npy", np.eye(5)[numbers])
    root = str(tmp_path / "sprites_1788_16x16.npy")
    images = load(tmp_path, "npy", root=root, labels=True, classes=list("abcde"))["train"]
    assert told(images) == (numbers.tolist(),) * 2
    assert images.classes == list("abcde")


def test_an_image_may_have_several_classes_or_none(arrays):
    root, _, read = arrays
    several = np.random.default_rng(1).integers(0, 2, (12, 4))
    several[3] = 0
    several[4] = 1
    np.save(root / "labels.npy", several)
    images = read(root=str(root), validation_fraction=0.25)
    for part in images.values():
        assert np.array_equal(part[list(range(len(part)))].labels, several[part.rows])
    counts = several[images["train"].rows].sum(0).tolist()
    assert list(images["train"].count_classes().values()) == counts


def test_whose_labels_they_are(arrays):
    root, numbers, read = arrays
    np.save(root / "pixels_labels.npy", numbers)
    np.save(root / "other.npy", np.load(root / "pixels.npy"))
    np.save(root / "other_labels.npy", (numbers + 1) % 3)
    place = str(root / "pixels.npy")
    assert told(read(root=place)["train"])[0] == numbers.tolist()
    assert told(read(root=str(root / "other.npy"))["train"])[0] == ((numbers + 1) % 3).tolist()
    (root / "pixels_labels.npy").unlink()  # those of the other are not taken
    with pytest.raises(ValueError, match=r"none beside it; call them pixels_labels\.npy"):
        read(root=place)
    np.savez(root / "a.npz", np.load(root / "pixels.npy"), labels=numbers, y=numbers)
    with pytest.raises(ValueError, match=r"may be any of .*npz:labels, .*npz:y; keep one"):
        read(root=str(root / "a.npz"))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(11, int), r"labels\.npy holds \(11,\); give \(12,\) or \(12, classes\)"),
        (np.zeros((12, 2, 2)), r"holds \(12, 2, 2\); give"),
        (np.zeros(()), r"holds \(\); give"),
        (np.arange(12) - 1, r"holds other values than the numbers of classes, 0, 1, 2"),
        (np.arange(12) / 2, r"holds other values than the numbers"),
        (np.full(12, np.nan), r"holds other values than the numbers"),
        (np.array(["fig"] * 12), r"holds other values than the numbers"),
        (np.full((12, 3), 2), r"holds 2; rows of 3 are of 0 and 1"),
        (np.array([None] * 12), r"labels\.npy cannot be read as an array"),
        (np.arange(12) % 2 * 2, r"has no images of '1' to train on"),
        (np.arange(12) // 6 * 9, r"no images of '1' and 7 other classes to train on; add some"),
        (np.arange(12) * 10**12, r"holds class 11000000000000; there are at most 12, from 0 on"),
        (np.eye(4)[np.arange(12) % 3], r"has no images of '3' to train on"),
        (None, r"there are none beside it; call them pixels_labels\.npy"),
    ],
)
def test_wrong_labels_end_in_one_message(array, says, arrays):
    root, _, read = arrays
    if array is not None:
        np.save(root / "labels.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=says) as caught:
        read(root=str(root))
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("classes", "labels", "says"),
    [
        (["a", "b"], np.arange(12) % 3, r"they are 3, and dataset\.classes names 2: \['a', 'b'\]"),
        (["a"], np.eye(3)[np.arange(12) % 3], r"they are 3, and dataset\.classes names 1"),
        (list("abcd"), np.eye(3)[np.arange(12) % 3], r"they are 3, and dataset\.classes names 4"),
        (list("abcd"), np.arange(12) % 3, r"no images of 'd'"),
    ],
)
def test_other_classes_than_the_config_names(classes, labels, says, arrays):
    root, _, read = arrays
    np.save(root / "labels.npy", labels)
    with pytest.raises(ValueError, match=says):
        read(root=str(root), classes=classes)


def test_folders_called_otherwise_than_in_the_config(tmp_path):
    write_files(tmp_path / "root", ["fig/0.png", "pear/1.png"])
    says = r"they are not dataset\.classes \(their order\)"
    with pytest.raises(ValueError, match=says):
        load(tmp_path, labels=True, classes=["pear", "fig"])


@pytest.mark.parametrize("name", ["npy", "celebahq", "lsun-church"])
def test_a_set_without_labels(name, tmp_path):
    (tmp_path / "root").mkdir()
    image_of(0).save(tmp_path / "root" / "0.png")
    np.save(tmp_path / "root" / "a.npy", np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"^labels of .*root \(dataset\.labels=true\): "):
        load(tmp_path, name, labels=True)


# ---- the Hub


def test_labels_of_a_hub_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    numbers, values = [2, 0, 1, 1, 2, 0], []
    for i, number in enumerate(numbers):
        stream = io.BytesIO()
        image_of(number, i).save(stream, "png")
        values.append({"bytes": stream.getvalue(), "path": None})
    kinds = {"fruit": datasets.ClassLabel(names=NAMES), "n": datasets.Value("int32")}
    data = datasets.Dataset.from_dict(
        {"image": values, "n": numbers, "fruit": numbers},
        features=datasets.Features(image=datasets.Image(), **kinds),
    )
    data.save_to_disk(tmp_path / "root")
    images = load(tmp_path, "huggingface", labels=True)["train"]
    assert told(images) == (numbers, numbers)
    assert images.classes == NAMES
    data.remove_columns("fruit").save_to_disk(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no column of ClassLabel: \['image', 'n'\]"):
        load(tmp_path, "huggingface", root=str(tmp_path / "plain"), labels=True)


# ---- all the way


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_labels_stay_with_their_images(kind, num_workers, tmp_path):
    """Past unreadable files, the split, the order of steps, and processes that load."""
    write_files(tmp_path / "root", [f"{name}/{i:02}.png" for i in range(9) for name in NAMES])
    for name in ("apple/02", "fig/00", "pear/08"):
        (tmp_path / "root" / f"{name}.png").write_bytes(b"no")
    place = str(packed(tmp_path / "root", kind))
    parts = load(tmp_path, root=place, labels=True, validation_fraction=0.25)
    assert [len(part) for part in parts.values()] == [18, 6]
    for part in parts.values():
        sampler = StepSampler(count=len(part), batch_size=5, seed=1)
        loader = DataLoader(part, batch_size=None, sampler=sampler, num_workers=num_workers)
        for _, batch in zip(range(8), loader, strict=False):
            assert torch.equal(batch.labels.argmax(1), batch.images[:, 0, 0, 0].long())
            assert batch.labels.shape == (5, 3)
    labels, shown = told(parts["train"].of(np.array([5, 0, 3])))
    assert labels == shown


def test_a_class_that_only_validates_is_told(tmp_path):
    write_files(tmp_path / "root", ["apple/0.png", *(f"fig/{i}.png" for i in range(9))])
    order = np.random.default_rng(0).permutation(10)
    share = (list(order).index(0) + 1) / 10  # so that the only apple is kept
    with pytest.raises(ValueError, match=r"no images of 'apple' .* dataset\.validation_fraction"):
        load(tmp_path, labels=True, validation_fraction=share)
    (tmp_path / "root" / "apple" / "0.png").write_bytes(b"no")  # nor can it be read
    with pytest.raises(ValueError, match="no images of 'apple' to train on"):
        load(tmp_path, labels=True)


def test_a_validation_set_may_lack_classes():
    labels = np.array([0, 1, 2, 0])
    images = Images(np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 3]), labels, NAMES)
    assert images[[0, 1]].labels.tolist() == [[1, 0, 0]] * 2
    assert images.count_classes() == {"apple": 2, "fig": 0, "pear": 0}
    assert Images(np.zeros((4, 1, 2, 2), np.uint8))[[0]].labels is None


def test_the_config_learns_the_classes(tmp_path):
    write_files(tmp_path / "root", ["fig/0.png", "pear/1.png"])
    place = ["dataset.name=folder", f"dataset.root={tmp_path / 'root'}", "dataset.labels=true"]
    config = with_facts(tiny(*place))
    assert config.dataset.classes == ["fig", "pear"]
    assert with_facts(config) == config
    assert with_facts(tiny()).dataset.classes == []
    digits = find_images("digits", tmp_path)["train"].labels()
    assert with_facts(tiny("dataset.labels=true")).dataset.classes == digits.names
