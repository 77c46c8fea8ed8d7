"""What `dataset.name` means: from a name and a folder to training and validation images.

What is at `root` is used as it is; only what is missing is downloaded.
"""

import gzip
import os
import pickle
import socket
import zlib
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError

import numpy as np

from files import remove_leftovers
from sources.files import Source, open_array, open_files, open_folder, open_huggingface, open_lmdb

LSUN = {"lsun-church": "church_outdoor_train_lmdb", "lsun-bedroom": "bedroom_train_lmdb"}
TIMEOUT = 60.0  # seconds without an answer


def find_images(name: str, root: Path) -> dict[str, np.ndarray | Source]:
    """Return {"train": ...} and, where the dataset has an official test set, "validation".

    An array is uint8 [N, H, W, C].

    Args:
        name: of `dataset.name`. root: of the files; `digits` needs none, and for `huggingface` it
            may be the name of a dataset on the Hub.

    Raises:
        FileNotFoundError: nothing at `root`, and it cannot be downloaded. ValueError: damaged.
    """
    if name == "digits":
        return {"train": _digits()}
    if name == "cifar10":
        return {"train": _cifar10(root, train=True), "validation": _cifar10(root, train=False)}
    if name in ("mnist", "fashion-mnist"):
        parts = {"train": "train", "validation": "t10k"}
        return {key: _mnist(name, root, part) for key, part in parts.items()}
    if name == "flowers102":
        return _flowers102(root)
    if name in ("npy", "npz"):
        return {"train": open_array(root)}
    if name == "huggingface":
        return {"train": open_huggingface(root)}
    if name == "celebahq":
        _download_celebahq(root)
    if name.startswith("lsun-"):
        return {"train": _lsun(name, root)}
    return {"train": open_files(root)}


def download(
    urls: list[str], path: Path, *, md5: str, hint: str, member: str | None = None
) -> None:
    """Download the first of `urls` that answers, or its `member`, to `path`: whole or not at all.

    Raises:
        FileNotFoundError: one message with the reasons and `hint`.
    """
    from torchvision.datasets.utils import download_url, extract_archive

    reasons, offline, timeout = [], True, socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, ".download-*.tmp")
        for url in urls:
            with TemporaryDirectory(prefix=".download-", suffix=".tmp", dir=path.parent) as place:
                file = Path(place, url.rsplit("/", 1)[-1])
                try:
                    print(f"downloading {url}")
                    download_url(url, place, md5=md5)
                except (OSError, HTTPException, RuntimeError) as error:
                    offline &= type(error) is URLError  # others are an answer
                    reason = getattr(error, "reason", "") if type(error) is URLError else error
                    if isinstance(error, RuntimeError):
                        reason = f"what came does not have the digest {md5}"
                    reasons.append(f"{url}: {reason}")
                    continue
                if member:
                    extract_archive(file, place)
                    file = Path(place, member)
                if not path.exists():  # another process may have been faster
                    os.replace(file, path)
                return
    except OSError as error:
        reasons, offline = [*reasons, str(error)], False
    finally:
        socket.setdefaulttimeout(timeout)
    network = "this machine seems to be offline; " if offline else ""
    raise FileNotFoundError(
        f"no {path}, and it cannot be downloaded ({network}{'; '.join(reasons)}); {hint}"
    )


# ---- datasets with a name


def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]


def _mnist(name: str, root: Path, part: str) -> np.ndarray:
    """Return uint8 [N, 28, 28, 1] of `part`, train or t10k, from idx files, packed or not."""
    from torchvision.datasets import MNIST, FashionMNIST

    known = {"mnist": MNIST, "fashion-mnist": FashionMNIST}[name]
    raw = root / known.__name__ / "raw"
    names = [f"{part}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    there = [p for folder in (root, root / "raw", raw) for n in names if (p := folder / n).exists()]
    path = there[0] if there else raw / names[1]
    if not there:
        download(
            [mirror + path.name for mirror in known.mirrors],
            path,
            md5=dict(known.resources)[path.name],
            hint=f"put its four .gz files into {raw}, or set dataset.root to their folder",
        )
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        if content[:4] != b"\0\0\x08\x03":  # bytes, in three dimensions
            raise ValueError("it does not begin as one")
        shape = np.frombuffer(content, ">u4", 3, offset=4)
        return np.frombuffer(content, np.uint8, offset=16).reshape(*shape.tolist(), 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or no idx file of images ({error}); delete it to download it again"
        ) from None


def _cifar10(root: Path, *, train: bool) -> np.ndarray:
    """Return uint8 [N, 32, 32, 3] from the python or the binary version."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    python, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    if not python.is_dir() and not binary.is_dir():
        from torchvision.datasets import CIFAR10

        hint = f"unpack cifar-10-python.tar.gz into {root}, or set dataset.root"
        download([CIFAR10.url], python, md5=CIFAR10.tgz_md5, member=python.name, hint=hint)
    rows = []
    for name in names:
        path = python / name if python.is_dir() else binary / f"{name}.bin"
        try:
            if python.is_dir():
                with path.open("rb") as file:
                    pixels = np.asarray(_ArraysOnly(file, encoding="bytes").load()[b"data"])
            else:
                pixels = np.fromfile(path, np.uint8).reshape(-1, 3073)[:, 1:]  # label, then pixels
            rows.append(pixels.astype(np.uint8, casting="safe").reshape(-1, 3, 32, 32))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is missing; delete {path.parent} to download it again"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is damaged or no CIFAR-10 batch: {error}") from None
    return np.concatenate(rows).transpose(0, 2, 3, 1)


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


def _flowers102(root: Path) -> dict[str, np.ndarray | Source]:
    """Train on the official train and val sets (2,040), validate on the test set (6,149)."""
    from scipy.io import loadmat

    home = root if (root / "jpg").is_dir() else root / "flowers-102"
    site = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    hint = f"put its setid.mat and the unpacked jpg folder into {home}, or set dataset.root"
    if not (home / "jpg").is_dir():
        md5 = "52808999861908f626f3c1f4e79d11fa"
        download([f"{site}102flowers.tgz"], home / "jpg", md5=md5, member="jpg", hint=hint)
    split = home / "setid.mat"
    if not split.exists():
        download([f"{site}setid.mat"], split, md5="a5357ecc9cb78c4bef273ce3793fc85c", hint=hint)
    try:
        ids = loadmat(split)
        train, test = np.hstack([ids["trnid"], ids["valid"]]), ids["tstid"]
        parts = {
            key: [f"image_{i:05d}.jpg" for i in sorted(ids.flatten().tolist())]
            for key, ids in (("train", train), ("validation", test))
        }
    except Exception as error:  # a damaged .mat can raise anything
        raise ValueError(f"{split} is damaged ({error}); delete it to download it again") from None
    return {key: open_folder(home / "jpg", names) for key, names in parts.items()}


def _download_celebahq(root: Path) -> None:
    """Download CelebA-HQ at 256x256 to `root`, unless something is there."""
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        return
    hint = f"put its 30,000 images, as a folder or a zip, at {root} (dataset.root)"
    try:
        import kagglehub
    except ImportError:
        raise FileNotFoundError(
            f"no CelebA-HQ at {root}: {hint}, or `pip install kagglehub` to download them"
        ) from None
    try:
        folder = Path(kagglehub.dataset_download("badasstechie/celebahq-resized-256x256"))
    except Exception as error:  # whatever a network and a service can raise
        raise FileNotFoundError(f"CelebA-HQ cannot be downloaded ({error}); {hint}") from None
    root.parent.mkdir(parents=True, exist_ok=True)
    if root.is_dir():
        root.rmdir()
    root.symlink_to(folder, target_is_directory=True)


def _lsun(name: str, root: Path) -> Source:
    """Open LSUN as it is distributed, an lmdb of encoded images, or as anything `folder` takes."""
    known = LSUN.get(name, name.removeprefix("lsun-"))
    homes = [p for p in (root, root / known) if (p / "data.mdb").is_file()]
    if homes:
        return open_lmdb(homes[0])
    if not root.exists():
        kind = "objects/cat" if known == "cat" else f"scenes/{known}"
        raise FileNotFoundError(
            f"{root} (dataset.root) does not exist; download http://dl.yf.io/lsun/{kind}.zip, "
            "unpack it, and give the folder that holds data.mdb, or a folder or archive of images"
        )
    return open_files(root)
