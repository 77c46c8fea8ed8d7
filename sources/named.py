"""The sets that `dataset.name` names: from a name and a folder to training and validation images.

What is at `root` is used as it is; only what is missing is downloaded.
"""

import gzip
import os
import pickle
import socket
import zlib
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError

import numpy as np

from files import remove_leftovers
from sources.emoji import open_emoji
from sources.files import (
    Source,
    join,
    of_array,
    open_array,
    open_files,
    open_folder,
    open_huggingface,
    open_lmdb,
)
from sources.labels import Labels, as_labels

TIMEOUT = 60.0  # seconds without an answer


DIGITS = [str(i) for i in range(10)]
CLASSES = {
    "mnist": DIGITS,
    "fashion-mnist": ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
                      "sneaker", "bag", "ankle boot"],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                "truck"],
}  # fmt: skip


def find_images(name: str, root: Path, split: str = "train") -> dict[str, Source]:
    """Return {"train": ...} and, where an official test set validates, "validation".

    Args:
        root: where they are; it may also name a dataset of the Hub.
        split: "all" joins the test set to the images to train on.

    Raises:
        FileNotFoundError: nothing at `root`, and it cannot be downloaded. ValueError: damaged.
    """
    parts = find_splits(name, root)
    return {"train": join([*parts.values()])} if split == "all" else parts


def find_splits(name: str, root: Path) -> dict[str, Source]:
    """Return the official splits of a set."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)[..., None]
        return {"train": of_array(pixels, labels=lambda: Labels(digits.target, DIGITS))}
    if name == "cifar10":
        train = _cifar10(root, [f"data_batch_{i}" for i in range(1, 6)])
        return {"train": train, "validation": _cifar10(root, ["test_batch"])}
    if name in ("mnist", "fashion-mnist"):
        parts = {"train": "train", "validation": "t10k"}
        return {split: _mnist(name, root, part) for split, part in parts.items()}
    if name == "flowers102":
        return _flowers102(root)
    if name == "emoji":
        return open_emoji(root)
    if name.startswith("lsun-"):
        return {"train": _lsun(name, root)}
    openers = dict(npy=open_array, npz=open_array, huggingface=open_huggingface, celebahq=_celebahq)
    return {"train": openers.get(name, open_files)(root)}


def download(
    urls: list[str], path: Path, *, md5: str, hint: str, member: str | None = None
) -> None:
    """Download the first of `urls` that answers, or its `member`, to `path`: whole or not at all.

    Raises:
        FileNotFoundError: one message with the reasons and `hint`.
    """
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    reasons, offline, timeout = [], True, socket.getdefaulttimeout()
    fetch = download_and_extract_archive if member else download_url
    for url in urls:
        try:
            socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, ".download-*.tmp")
            with TemporaryDirectory(prefix=".download-", suffix=".tmp", dir=path.parent) as place:
                print(f"downloading {url}")
                fetch(url, place, md5=md5)
                if not path.exists():  # another process may have been faster
                    os.replace(Path(place, member or url.rsplit("/", 1)[-1]), path)
                return
        except (OSError, HTTPException, RuntimeError) as error:
            offline &= type(error) is URLError  # others are an answer
            reason = f"its digest is not {md5}" if isinstance(error, RuntimeError) else error
            reasons.append(f"{url}: {reason}")
        finally:
            socket.setdefaulttimeout(timeout)
    network = "this machine seems to be offline; " if offline else ""
    raise FileNotFoundError(
        f"no {path}, and it cannot be downloaded ({network}{'; '.join(reasons)}); {hint}"
    )


def _mnist(name: str, root: Path, part: str) -> Source:
    """Return the images of `part`, train or t10k, from idx files, packed or not."""
    pixels = _idx(name, root, f"{part}-images", "idx3")[..., None]

    def labels() -> Labels:
        numbers = _idx(name, root, f"{part}-labels", "idx1")
        return as_labels(numbers, len(pixels), CLASSES[name], f"{part}-labels")

    return of_array(pixels, labels=labels)


def _idx(name: str, root: Path, stem: str, kind: str) -> np.ndarray:
    """Return the content of an idx file of bytes, idx3 or idx1; it is downloaded if missing."""
    from torchvision.datasets import MNIST, FashionMNIST

    known = {"mnist": MNIST, "fashion-mnist": FashionMNIST}[name]
    raw = root / known.__name__ / "raw"
    names = [f"{stem}{dot}{kind}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    places = [folder / n for folder in (root, root / "raw", raw) for n in names]
    path = next(filter(Path.exists, places), raw / names[1])
    if not path.exists():
        hint = f"put its four .gz files into {raw}, or set dataset.root to their folder"
        urls = [mirror + path.name for mirror in known.mirrors]
        download(urls, path, md5=dict(known.resources)[path.name], hint=hint)
    dimensions = int(kind[-1])
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        if content[:4] != bytes([0, 0, 8, dimensions]):  # 8: bytes
            raise ValueError("it does not begin as one")
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape.tolist())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or no idx file ({error}); delete it to download it again"
        ) from None


def _cifar10(root: Path, names: list[str]) -> Source:
    """Return 32x32 images from the python or the binary version."""
    python, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    if not python.is_dir() and not binary.is_dir():
        from torchvision.datasets import CIFAR10

        hint = f"unpack cifar-10-python.tar.gz into {root}, or set dataset.root"
        download([CIFAR10.url], python, md5=CIFAR10.tgz_md5, member=python.name, hint=hint)
    rows, labels = [], []
    for name in names:
        path = python / name if python.is_dir() else binary / f"{name}.bin"
        try:
            if python.is_dir():
                with path.open("rb") as file:
                    batch = _ArraysOnly(file, encoding="bytes").load()
                pixels, numbers = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
            else:
                content = np.fromfile(path, np.uint8).reshape(-1, 3073)
                pixels, numbers = content[:, 1:], content[:, 0]  # label, then pixels
            rows.append(pixels.astype(np.uint8, casting="safe").reshape(-1, 3, 32, 32))
            labels.append(numbers)
        except FileNotFoundError:
            hint = "delete its folder to download it again"
            raise FileNotFoundError(f"{path} is missing; {hint}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is damaged or no CIFAR-10 batch: {error}") from None
    images = np.concatenate(rows).transpose(0, 2, 3, 1)
    numbers, names = np.concatenate(labels), CLASSES["cifar10"]
    return of_array(images, labels=lambda: as_labels(numbers, len(images), names, "CIFAR-10"))


class _ArraysOnly(pickle.Unpickler):
    """Read CIFAR-10's pickled dicts of arrays; nothing else can be built."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]  # that function, under whichever name
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "_codecs", "encode":  # how Python 3 writes bytes in protocol 2
                return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}, which is refused")


def _flowers102(root: Path) -> dict[str, Source]:
    """Train on the official train and val sets (2,040), validate on the test set (6,149)."""
    from torchvision.datasets import Flowers102

    home = root if (root / "jpg").is_dir() else root / "flowers-102"
    site = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    hint = f"put its setid.mat and the unpacked jpg folder into {home}, or set dataset.root"
    if not (home / "jpg").is_dir():
        md5 = "52808999861908f626f3c1f4e79d11fa"
        download([f"{site}102flowers.tgz"], home / "jpg", md5=md5, member="jpg", hint=hint)

    def read(file: str, md5: str, keys: list[str]) -> list[np.ndarray]:
        from scipy.io import loadmat

        if not (path := home / file).exists():
            download([f"{site}{file}"], path, md5=md5, hint=hint)
        try:
            content = loadmat(path)
            return [content[key].ravel() for key in keys]
        except Exception as error:  # a damaged .mat can raise anything
            again = "delete it to download it again"
            raise ValueError(f"{path} is damaged ({error}); {again}") from None

    def labels(ids: np.ndarray) -> Labels:
        (of_all,) = read("imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", ["labels"])
        if ids.max() > len(of_all):
            raise ValueError(f"imagelabels.mat holds {len(of_all)}; there are {ids.max()} images")
        numbers = of_all[ids - 1].astype(int) - 1  # both count from 1
        return as_labels(numbers, len(ids), Flowers102.classes, "imagelabels.mat")

    keys = ["trnid", "valid", "tstid"]
    train, valid, test = read("setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", keys)
    sources = {}
    for split, ids in {"train": np.hstack([train, valid]), "validation": test}.items():
        ids = np.sort(ids)  # as the names of the files, which `open_folder` sorts
        source = open_folder(home / "jpg", [f"image_{i:05d}.jpg" for i in ids])
        sources[split] = source._replace(labels=partial(labels, ids))
    return sources


def _celebahq(root: Path) -> Source:
    """Open CelebA-HQ at 256x256; downloaded to `root`, unless something is there."""
    if not root.is_file() and not (root.is_dir() and any(root.iterdir())):
        try:
            import kagglehub

            folder = Path(kagglehub.dataset_download("badasstechie/celebahq-resized-256x256"))
        except Exception as error:  # it is missing, or whatever a network and a service can raise
            raise FileNotFoundError(
                f"no CelebA-HQ at {root} (dataset.root): put its 30,000 images there, as a folder "
                f"or a zip, or `pip install kagglehub` to download them ({error})"
            ) from None
        root.parent.mkdir(parents=True, exist_ok=True)
        if root.is_dir():
            root.rmdir()
        root.symlink_to(folder, target_is_directory=True)
    return open_files(root)


def _lsun(name: str, root: Path) -> Source:
    """Open LSUN as it is distributed, an lmdb of encoded images, or as anything `folder` takes."""
    known = {"lsun-church": "church_outdoor_train_lmdb", "lsun-bedroom": "bedroom_train_lmdb"}
    inside = known.get(name, "cat")
    for home in (root, root / inside):
        if (home / "data.mdb").is_file():
            return open_lmdb(home.resolve())
    if root.exists():
        return open_files(root)
    kind = "objects/cat" if inside == "cat" else f"scenes/{inside}"
    raise FileNotFoundError(
        f"{root} (dataset.root) does not exist; download http://dl.yf.io/lsun/{kind}.zip, "
        "unpack it, and give the folder that holds data.mdb, or a folder or archive of images"
    )
