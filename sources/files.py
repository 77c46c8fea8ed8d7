"""Open a folder, a zip, a tar, an lmdb, an array or a dataset of the Hub, each as a `Source`."""

import io
import os
import tarfile
import threading
import warnings
import zipfile
import zlib
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from sources.labels import NAMED, Labels, as_labels, labels_beside, labels_of_folders, no_labels

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
Progress = Callable[..., Any]  # wraps an iterable and knows `total=`
T = TypeVar("T")
# large images are no attack where people train on them; too large ones are still refused
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Source(NamedTuple):
    """Images as they are found, most still to be decoded."""

    identity: list  # JSON that changes when the images do; the cache goes by it
    names: list[str]
    open: Callable[[int], Image.Image]  # by row, in any thread; about in order is fastest
    pixels: np.ndarray | None = None  # uint8 [N, H, W, C], where they are in memory anyway
    labels: Callable[[], Labels] = no_labels  # read when wanted; ValueError: there are none


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
    return source._replace(labels=partial(labels_of_folders, source.names))


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


def join(parts: Sequence[Source]) -> Source:
    """Return the images of several sources, one after another; their classes are the same."""
    starts = np.cumsum([0, *(len(part.names) for part in parts)]).tolist()

    def read(row: int) -> Image.Image:
        i = bisect(starts, row) - 1
        return parts[i].open(row - starts[i])

    def labels() -> Labels:
        found = [part.labels() for part in parts]
        return Labels(np.concatenate([some.of for some in found]), found[0].names)

    pixels = [part.pixels for part in parts if part.pixels is not None]
    return Source(
        [part.identity for part in parts],
        [name for part in parts for name in part.names],
        read,
        np.concatenate(pixels) if pixels else None,
        labels,
    )


def of_array(
    pixels: np.ndarray,
    identity: list | None = None,
    scale: float = 1,
    shift: float = 0,
    labels: Callable[[], Labels] = no_labels,
) -> Source:
    """Return [N, H, W, C] as a source; `scale` and `shift` bring other values to 0 ... 255.

    Without an identity it is in memory.
    """

    def read(row: int) -> Image.Image:
        image = np.asarray(pixels[row])
        if image.dtype != np.uint8:
            image = (image * scale + shift).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)

    kept = None if identity else pixels
    return Source(identity or [], [f"image {i}" for i in range(len(pixels))], read, kept, labels)


def open_array(root: Path) -> Source:
    """Open the images of an .npy or .npz file: [N, H, W], [N, H, W, C] or [N, C, H, W]."""
    place = f"{root} (dataset.root)"
    if root.is_dir():
        files = sorted(p.name for p in root.glob("*.np[yz]") if not NAMED.search(p.stem))
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
            arrays = {key: pixels[key] for key in pixels.files}
            inside = {key: array for key, array in arrays.items() if 0 < array.ndim < 3}
            large = [array for array in arrays.values() if array.ndim >= 3]
            pixels = max(large, key=lambda array: array.size, default=np.empty(0))
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
    labels = partial(labels_beside, root, inside, len(pixels))
    return of_array(pixels, identity, *_byte_scale(pixels, root), labels)


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
    encoded = data.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))

    def labels() -> Labels:
        for key, kind in data.features.items():
            if isinstance(kind, datasets.ClassLabel):
                return as_labels(np.asarray(data[key][:]), len(data), kind.names, f"column {key}")
        raise ValueError(f"it has no column of ClassLabel: {list(data.features)}")

    def read(row: int) -> Image.Image:
        image = encoded[row][columns[0]]
        return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])

    return Source(identity, [f"image {i}" for i in range(len(data))], read, labels=labels)
