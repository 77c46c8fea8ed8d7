"""What `dataset.name` means: a name and a place -> what is trained on, and what is held out.

What is at `root` is used as it is; only what is missing is fetched.
"""

import gzip
import pickle
import shutil
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from tempfile import mkdtemp
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
from rich.progress import wrap_file

from sources import Source, open_array, open_files, open_folder, open_huggingface, open_lmdb
from terminal import plain_console

LSUN = {"lsun-church": "church_outdoor_train_lmdb", "lsun-bedroom": "bedroom_train_lmdb"}


def find_pictures(name: str, root: Path) -> dict[str, np.ndarray | Source]:
    """{"train": ..., and where the set has an official test set, "validation": that}.

    An array is uint8 [N, H, W, C].

    Args:
        name: of `dataset.name`. root: of the files; `digits` needs none, and for `huggingface` it
            may be the name of a set on the hub.

    Raises:
        FileNotFoundError: nothing at `root`, nor could it be fetched. ValueError: damaged.
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
        _fetch_celebahq(root)
    if name.startswith("lsun-"):
        return {"train": _lsun(name, root)}
    return {"train": open_files(root)}


def fetch(urls: list[str], path: Path, *, md5: str, mend: str, member: str | None = None) -> None:
    """What the first of `urls` that answers holds, or its `member`, as `path`: whole or not at all.

    Raises:
        FileNotFoundError: it cannot be had; says why, and `mend`.
    """
    from torchvision.datasets.utils import check_integrity, extract_archive

    reasons, place = [], None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(".fetching-*"):  # of a process that was killed
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                shutil.rmtree(leftover, ignore_errors=True)
        place = Path(mkdtemp(prefix=".fetching-", dir=path.parent))
        for url in urls:
            file = place / url.rsplit("/", 1)[-1]
            try:
                _download(url, file)
            except (OSError, HTTPException) as error:
                reasons.append(f"{url}: {error.reason if type(error) is URLError else error}")
                continue
            if not check_integrity(file, md5):
                reasons.append(f"{url}: what came does not have the digest {md5}")
                continue
            if member:
                extract_archive(file, place)
                file = place / member
            if not path.exists():  # another process may have been faster
                file.replace(path)
            return
    except OSError as error:
        reasons.append(str(error))
    finally:
        if place:
            shutil.rmtree(place, ignore_errors=True)
    raise FileNotFoundError(f"no {path}, and it cannot be fetched ({'; '.join(reasons)}); {mend}")


def _download(url: str, file: Path) -> None:
    request = Request(url, headers={"User-Agent": "Mozilla/5.0"})
    with urlopen(request, timeout=60) as answer, file.open("wb") as copy:
        console = plain_console()
        console.print(f"fetching {url}")
        with wrap_file(
            answer,
            total=int(answer.headers.get("Content-Length", 0)),
            description="Downloading",
            console=console,
            disable=not console.is_terminal,
            transient=True,
        ) as stream:
            shutil.copyfileobj(stream, copy, 2**20)


# ---- sets with a name


def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]


def _mnist(name: str, root: Path, part: str) -> np.ndarray:
    """uint8 [N, 28, 28, 1] of `part`, train or t10k, from idx files, packed or not."""
    from torchvision.datasets import MNIST, FashionMNIST

    known = {"mnist": MNIST, "fashion-mnist": FashionMNIST}[name]
    raw = root / known.__name__ / "raw"
    names = [f"{part}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    there = [p for folder in (root, root / "raw", raw) for n in names if (p := folder / n).exists()]
    path = there[0] if there else raw / names[1]
    if not there:
        fetch(
            [mirror + path.name for mirror in known.mirrors],
            path,
            md5=dict(known.resources)[path.name],
            mend=f"put its four .gz files into {raw}, or set dataset.root to their folder",
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
            f"{path} is damaged or no idx file of pictures ({error}); delete it to have it fetched"
        ) from None


def _cifar10(root: Path, *, train: bool) -> np.ndarray:
    """uint8 [N, 32, 32, 3] from the python or the binary version."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    python, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    if not python.is_dir() and not binary.is_dir():
        from torchvision.datasets import CIFAR10

        mend = f"unpack cifar-10-python.tar.gz into {root}, or set dataset.root"
        fetch([CIFAR10.url], python, md5=CIFAR10.tgz_md5, member=python.name, mend=mend)
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
            mend = f"delete {path.parent} to have it fetched"
            raise FileNotFoundError(f"{path} is missing; {mend}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is damaged or no CIFAR-10 batch: {error}") from None
    return np.concatenate(rows).transpose(0, 2, 3, 1)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR-10 comes as pickled dicts of arrays; this reads those and can build nothing else."""

    def find_class(self, module: str, name: str):
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
    """The official train and val sets (2,040) to train on, the test set (6,149) held out."""
    from scipy.io import loadmat

    home = root if (root / "jpg").is_dir() else root / "flowers-102"
    site = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    mend = f"put its setid.mat and the unpacked jpg folder into {home}, or set dataset.root"
    if not (home / "jpg").is_dir():
        md5 = "52808999861908f626f3c1f4e79d11fa"
        fetch([f"{site}102flowers.tgz"], home / "jpg", md5=md5, member="jpg", mend=mend)
    split = home / "setid.mat"
    if not split.exists():
        fetch([f"{site}setid.mat"], split, md5="a5357ecc9cb78c4bef273ce3793fc85c", mend=mend)
    try:
        ids = loadmat(split)
        train, test = np.hstack([ids["trnid"], ids["valid"]]), ids["tstid"]
        parts = {
            key: [f"image_{i:05d}.jpg" for i in sorted(ids.flatten().tolist())]
            for key, ids in (("train", train), ("validation", test))
        }
    except Exception as error:  # a damaged .mat can raise anything
        raise ValueError(f"{split} is damaged ({error}); delete it to have it fetched") from None
    return {key: open_folder(home / "jpg", names) for key, names in parts.items()}


def _fetch_celebahq(root: Path) -> None:
    """CelebA-HQ at 256x256 into `root`, unless something is there."""
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        return
    mend = f"put its 30,000 pictures, as a folder or a zip, at {root} (dataset.root)"
    try:
        import kagglehub
    except ImportError:
        raise FileNotFoundError(
            f"no CelebA-HQ at {root}: {mend}, or `pip install kagglehub` to have them fetched"
        ) from None
    try:
        fetched = Path(kagglehub.dataset_download("badasstechie/celebahq-resized-256x256"))
    except Exception as error:  # whatever a network and a service can raise
        raise FileNotFoundError(f"CelebA-HQ cannot be fetched ({error}); {mend}") from None
    root.parent.mkdir(parents=True, exist_ok=True)
    if root.is_dir():
        root.rmdir()
    root.symlink_to(fetched, target_is_directory=True)


def _lsun(name: str, root: Path) -> Source:
    """LSUN as it is distributed, an lmdb of encoded pictures, or as anything `folder` takes."""
    known = LSUN.get(name, name.removeprefix("lsun-"))
    homes = [p for p in (root, root / known) if (p / "data.mdb").is_file()]
    if homes:
        return open_lmdb(homes[0])
    if not root.exists():
        kind = "objects/cat" if known == "cat" else f"scenes/{known}"
        raise FileNotFoundError(
            f"{root} (dataset.root) does not exist; fetch http://dl.yf.io/lsun/{kind}.zip, unpack "
            f"it, and give the folder that holds data.mdb, or a folder or archive of pictures"
        )
    return open_files(root)
