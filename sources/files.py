"""Open a folder, a zip, a tar, an lmdb, an array or a dataset of the Hub, each as a `Source`."""

import io
import os
import re
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
Progress = Callable[..., Any]  # wraps an iterable and knows `total=`
T = TypeVar("T")
# large images are no attack where people train on them; too large ones are still refused
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Source(NamedTuple):
    """Images as they are found, most still to be decoded, and their labels."""

    identity: list  # JSON that changes when the images do; the cache goes by it
    names: list[str]
    open: Callable[[int], Image.Image]  # by row, in any thread; about in order is fastest
    pixels: np.ndarray | None = None  # uint8 [N, H, W, C], where they are in memory anyway
    labels: np.ndarray | None = None  # [N], the number of a class, or uint8 [N, classes]
    classes: Sequence[str] = ()  # their names, where there are any
    why_unlabelled: str = "this set has none"  # what people could do


def in_threads(function: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield function(0), function(1), ... in order, several of them computed at a time."""
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd but readable files
        for start in range(0, count, 4096):
            yield from pool.map(function, range(start, min(start + 4096, count)))


def why_unusable(error: Exception) -> str:
    """Say in a few words why a file cannot be used."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    told = isinstance(error, ValueError) and str(error)
    return told or f"{type(error).__name__}: {error}"


def is_image(name: str) -> bool:
    """Tell whether a path inside a folder or an archive is an image's, and not hidden."""
    parts = name.split("/")
    hidden = any(part.strip(".") and part.startswith((".", "__MACOSX")) for part in parts)
    return name.lower().endswith(EXTENSIONS) and not hidden


def open_files(root: Path) -> Source:
    """Open all images of a folder and the folders below it, of a zip or of a tar."""
    place = f"{root} (dataset.root)"
    if root.is_dir():
        names = (path.relative_to(root).as_posix() for path in files_under(root))
        source = open_folder(root, [n for n in names if is_image(n) and (root / n).is_file()])
    elif not root.exists():
        raise FileNotFoundError(f"{place} does not exist; give a folder, a zip or a tar")
    elif root.is_file() and zipfile.is_zipfile(root):
        source = open_zip(root)
    elif root.is_file() and tarfile.is_tarfile(root):
        source = open_tar(root)
    else:
        raise ValueError(f"{place} is neither a folder nor a file (zip or tar), or is damaged")
    if not source.names:
        raise FileNotFoundError(f"{place} holds no images ({', '.join(EXTENSIONS)})")
    return with_folders(source)


def with_folders(source: Source) -> Source:
    """Return a source whose classes are the folders that its files lie in, the outermost ones."""
    folders = [name.removeprefix("./").partition("/") for name in source.names]
    shared = {first for first, _, _ in folders}
    if len(shared) == 1 and all(slash for _, slash, _ in folders):  # an archive of one folder
        folders = [rest.partition("/") for _, _, rest in folders]
    loose = next((n for n, f in zip(source.names, folders, strict=True) if not f[1]), None)
    if loose is not None:
        why = f"{loose} is in no sub-folder; a class is a sub-folder"
        return source._replace(why_unlabelled=why)
    classes = sorted({first for first, _, _ in folders})
    labels = np.searchsorted(classes, [first for first, _, _ in folders])
    return source._replace(labels=labels, classes=classes)


def files_under(root: Path) -> Iterator[Path]:
    """Yield the files below `root`, through links to folders too, each folder once."""
    seen = set()
    for folder, below, files in os.walk(root, followlinks=True):
        below.sort()  # so that a folder has the same name on every machine
        if (here := os.path.realpath(folder)) in seen:
            below.clear()  # `os.walk` looks here for where to go on
        else:
            yield from (Path(folder, file) for file in files)
        seen.add(here)


def open_folder(root: Path, names: list[str]) -> Source:
    """Open the files `names` of a folder."""
    names = sorted(names)
    try:
        stats = [(root / name).stat() for name in names]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing from {root}") from None
    entries = [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]
    return Source([str(root.resolve()), entries], names, lambda row: Image.open(root / names[row]))


def open_zip(root: Path) -> Source:
    """Open the images of a zip in the order of their names."""
    archive = zipfile.ZipFile(root)
    entries = sorted((i.filename, i.file_size, i.CRC) for i in archive.infolist())
    entries = [entry for entry in entries if is_image(entry[0])]
    names = [name for name, *_ in entries]
    read = lambda row: Image.open(io.BytesIO(archive.read(names[row])))
    return Source([str(root.resolve()), entries], names, read)


def open_tar(root: Path) -> Source:
    """Open the images of a tar in its own order: a compressed one is read from front to back."""
    try:
        archive = tarfile.open(root)  # noqa: SIM115 (it stays open)
        members = [m for m in archive if m.isfile() and is_image(m.name)]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{root} (dataset.root) is damaged: {error}") from None
    lock, position = threading.Lock(), 0
    ahead: dict[int, bytes] = {}  # threads ask slightly out of order
    content = lambda row: archive.extractfile(members[row]).read()  # type: ignore[union-attr]

    def read(row: int) -> Image.Image:
        nonlocal position
        with lock:
            while position <= row < position + 1024:
                ahead[position] = content(position)
                position += 1
            return Image.open(io.BytesIO(ahead.pop(row) if row in ahead else content(row)))

    entries = [(m.name, m.size, m.mtime) for m in members]
    return Source([str(root.resolve()), entries], [m.name for m in members], read)


@cache  # a process can open one only once
def open_lmdb(home: Path) -> Source:
    """Open an lmdb, by its resolved path, whose values are encoded images."""
    try:
        import lmdb
    except ImportError:
        raise ValueError(f"{home} is an lmdb: `pip install lmdb` to read it") from None
    try:
        environment: Any = lmdb.open(str(home), readonly=True, lock=False, readahead=False)
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise ValueError(f"{home} is damaged or no lmdb: {error}") from None

    def read(row: int) -> Image.Image:
        with environment.begin() as transaction:
            return Image.open(io.BytesIO(transaction.get(keys[row])))

    stat = (home / "data.mdb").stat()
    identity = [str(home), stat.st_size, stat.st_mtime_ns]
    return Source(identity, [key.decode("latin-1") for key in keys], read)


def of_array(
    pixels: np.ndarray,
    identity: list | None = None,
    scale: float = 1,
    shift: float = 0,
    **more: Any,
) -> Source:
    """Return [N, H, W, C] as a source; `scale` and `shift` bring other values to 0 ... 255.

    Without an identity it is in memory. `more`: labels, classes.
    """

    def read(row: int) -> Image.Image:
        image = np.asarray(pixels[row])
        if image.dtype != np.uint8:
            image = (image * scale + shift).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)

    kept = None if identity else pixels
    return Source(identity or [], [f"image {i}" for i in range(len(pixels))], read, kept, **more)


def open_array(root: Path) -> Source:
    """Open the images of an .npy or .npz file: [N, H, W], [N, H, W, C] or [N, C, H, W].

    Labels are [N] or [N, classes], another array of the .npz or a file beside it that is called
    labels, or as it with _labels (images_labels.npy).
    """
    place = f"{root} (dataset.root)"
    if root.is_dir():
        files = sorted(p.name for p in root.glob("*.np[yz]") if not LABELS.search(p.stem))
        if len(files) != 1:
            holds = f"{place} holds {len(files)} .npy or .npz files"
            raise FileNotFoundError(f"{holds}; give one of them: {', '.join(files[:5])}")
        root = root / files[0]
    if not root.exists():
        raise FileNotFoundError(f"{place} does not exist; give an .npy or .npz file")
    inside: dict[str, np.ndarray] = {}
    try:
        pixels = np.load(root, mmap_mode="r", allow_pickle=False)
        if isinstance(pixels, np.lib.npyio.NpzFile):
            inside = {key: pixels[key] for key in pixels.files}
            arrays = [array for array in inside.values() if array.ndim >= 3]
            pixels = max(arrays, key=lambda array: array.size, default=np.empty(0))
    except Exception as error:  # zip, header, pickle: many kinds
        objects = "pickle" in str(error) or "Python objects" in str(error)
        reason = "it holds pickled objects, which are never loaded" if objects else error
        raise ValueError(f"{root} (dataset.root) cannot be read as an array: {reason}") from None
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim == 4 and pixels.shape[3] > 4 >= pixels.shape[1]:
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or not 1 <= pixels.shape[3] <= 4 or 0 in pixels.shape:
        forms = "images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 to 4"
        raise ValueError(f"{root} (dataset.root) holds {pixels.shape}; {forms}")
    stat = root.stat()
    identity = [str(root.resolve()), stat.st_size, stat.st_mtime_ns]
    source = of_array(pixels, identity, *_byte_scale(pixels, root))
    return source._replace(**_labels_beside(root, inside, len(pixels)))


LABELS = re.compile(r"(^|[-_.])labels?$", re.IGNORECASE)


def _labels_beside(root: Path, inside: dict[str, np.ndarray], count: int) -> dict[str, Any]:
    """Return a source's `labels`, of the file itself or of one beside it, or `why_unlabelled`."""
    found = {f"{root}:{key}": a for key, a in inside.items() if LABELS.search(key) or key == "y"}
    beside = [p for p in sorted(root.parent.glob("*.np[yz]")) if LABELS.search(p.stem)]
    own = [path for path in beside if path.stem.startswith(root.stem)] or beside
    try:
        for path in own if not found else ():
            loaded = np.load(path, allow_pickle=False)
            zipped = isinstance(loaded, np.lib.npyio.NpzFile)
            found[str(path)] = loaded[loaded.files[0]] if zipped else loaded
    except Exception as error:  # zip, header, pickle: many kinds
        return {"why_unlabelled": f"{path} cannot be read as an array: {error}"}
    if not found:
        return {"why_unlabelled": f"put them beside it, as {root.stem}_labels.npy"}
    if len(found) > 1:
        return {"why_unlabelled": f"there are several: {', '.join(found)}"}
    ((name, labels),) = found.items()
    return labels_or_why(name, labels, count)


def labels_or_why(
    name: str, labels: np.ndarray, count: int, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a source's `labels` and `classes`, or `why_unlabelled`."""
    try:
        return {"labels": as_labels(labels, count), "classes": classes}
    except ValueError as error:
        return {"why_unlabelled": f"{name} {error}"}


def as_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the labels of `count` images as [N] int64, or [N, classes] uint8 of 0 and 1.

    Raises:
        ValueError: they are of another number of images, or neither of the two.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise ValueError(f"holds {labels.shape}; {count} images need ({count},) or ({count}, K)")
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and (labels % 1 == 0).all())
    if not whole or labels.size == 0 or labels.min() < 0:
        raise ValueError("does not hold the numbers of classes, from 0 on")
    if labels.ndim == 1:
        return labels.astype(np.int64)
    if labels.max() > 1:
        raise ValueError(f"holds {labels.shape} with {labels.max():g}; a row is of 0 and 1")
    return labels.astype(np.uint8)


def _byte_scale(pixels: np.ndarray, root: Path) -> tuple[float, float]:
    """Return (scale, shift) to 0 ... 255 from values in 0..1, -1..1 or 0..255; they tell which."""
    if pixels.dtype == np.uint8:  # they need not be read
        return 1, 0
    kind, low, high = pixels.dtype.kind, np.nan, np.nan
    if kind in "iufb":
        low, high = float(pixels.min()), float(pixels.max())
    if kind in "fb" and low >= -1.001 and high <= 1.001:  # what rounding adds
        return (255, 0) if low >= 0 else (127.5, 127.5)
    if low >= 0 and high <= 255:
        return 1, 0
    holds = f"{root} (dataset.root) holds {pixels.dtype} from {low:g} to {high:g}"
    raise ValueError(f"{holds}; give uint8, or floats in 0..1, -1..1 or 0..255")


def open_huggingface(root: Path) -> Source:
    """Open the train split of a dataset of the Hub, or of one in a local folder."""
    try:
        import datasets
    except ImportError:
        raise ValueError("dataset.name huggingface needs `pip install datasets`") from None
    saved = (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists()
    try:
        data = datasets.load_from_disk(str(root)) if saved else datasets.load_dataset(str(root))
    except Exception as error:  # whatever a network, a service and a file can raise
        place, reason = f"{root} (dataset.root)", " ".join(str(error).split())
        message = f"{place} is no dataset of the Hub (owner/name) or in a folder: {reason}"
        raise FileNotFoundError(message) from None
    if isinstance(data, datasets.DatasetDict):
        data = data["train" if "train" in data else next(iter(data))]
    columns = [key for key, kind in data.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise ValueError(f"{root} (dataset.root) has no column of images: {list(data.features)}")
    identity = [str(root), data._fingerprint]
    kinds = {k: kind for k, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    more: dict[str, Any] = {"why_unlabelled": "it has no ClassLabel"}
    for key, kind in list(kinds.items())[:1]:
        more = labels_or_why(key, np.asarray(data[key]), len(data), kind.names)
    data = data.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))

    def read(row: int) -> Image.Image:
        image = data[row][columns[0]]
        return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])

    return Source(identity, [f"image {row}" for row in range(len(data))], read, **more)
