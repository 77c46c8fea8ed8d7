"""Pictures from anywhere -> uint8 [N, C, H, W], and the order in which training sees them.

Small sets live in memory. Files are decoded once, cut to size, and kept as one memory-mapped array
under `cache`, so that a bad file is found before the first step and never in hour three.
"""

import hashlib
import io
import itertools
import json
import os
import pickle
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Pictures(Dataset):
    """uint8 pictures, indexed by a list of rows so that a batch is one gather.

    Args:
        source: uint8 [N, C, H, W], or the .npy file that holds it (opened lazily, in each process).
        rows: which of the N, in order; None is all.
    """

    def __init__(self, source: np.ndarray | Path, rows: np.ndarray | None = None):
        self._source = source
        self.rows = np.arange(len(self.array)) if rows is None else rows

    @property
    def array(self) -> np.ndarray:
        if isinstance(self._source, Path):
            return _open(self._source, os.getpid())
        return self._source

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of how many there are and of 64 evenly spaced ones."""
        some = np.linspace(0, len(self) - 1, min(64, len(self))).astype(int)
        content = self[some].numpy().tobytes() if len(self) else b""
        return hashlib.sha256(f"{len(self)} {self.shape}".encode() + content).hexdigest()[:16]

    def __getitem__(self, indices: list[int]) -> Tensor:
        """The pictures at `indices`, uint8 [len(indices), C, H, W]."""
        return torch.from_numpy(np.asarray(self.array[self.rows[indices]]))


@lru_cache
def _open(path: Path, pid: int) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


class StepSampler(Sampler[list[int]]):
    """The rows of each step's batch, forever: a function of (seed, step) alone.

    Step k takes positions k B ... (k + 1) B - 1 of an endless stream of permutations, the e-th
    drawn from (seed, e). Rank r of W takes the r-th of W equal parts. It has no length on purpose.

    Args:
        count: pictures. batch_size: B, of all ranks together; W divides it.
        start_step: where iteration begins.
    """

    def __init__(
        self,
        *,
        count: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start_step = start_step
        share = batch_size // world_size
        self.part = slice(rank * share, (rank + 1) * share)
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def rows(self, step: int) -> list[int]:
        """This rank's rows of the batch of `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
        return [int(self._permutation(int(p) // self.count)[p % self.count]) for p in positions]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.rows, itertools.count(self.start_step))


def load_pictures(
    *,
    name: str,
    root: str,
    image_size: int,
    channels: int,
    validation_fraction: float,
    cache: str,
    progress: Callable | None = None,
) -> dict[str, Pictures]:
    """The training and the held-out pictures: {"train": ..., "validation": ...}.

    `validation` may be empty. CIFAR-10 holds out its test set; elsewhere a fixed random
    `validation_fraction` is held out, the same for every seed.

    Args:
        root: of the files; `digits` needs none.
        cache: a folder for decoded files.
        progress: wraps an iterable and knows `total=`, to show what a long decoding does.

    Raises:
        FileNotFoundError: nothing at `root`. ValueError: too many unreadable files.
    """
    fit = dict(image_size=image_size, channels=channels)
    if name == "cifar10":
        if validation_fraction:
            raise ValueError(
                f"dataset.validation_fraction {validation_fraction}: cifar10 holds out its own "
                "test set; leave it at 0"
            )
        read = lambda train: Pictures(_fit_array(_read_cifar10(Path(root), train), **fit))
        return {"train": read(True), "validation": read(False)}
    if name == "digits":
        pictures = Pictures(_fit_array(_read_digits(), **fit))
    else:
        if name == "celebahq":
            _fetch_celebahq(Path(root))
        pictures = _decode_files(Path(root), Path(cache), progress, **fit)
    order = np.random.default_rng(0).permutation(len(pictures))
    held_out = round(validation_fraction * len(order))
    if held_out >= len(order):
        raise ValueError(
            f"dataset.validation_fraction {validation_fraction} of {len(order)} pictures leaves "
            "none to train on"
        )
    parts = {"train": np.sort(order[held_out:]), "validation": np.sort(order[:held_out])}
    return {key: Pictures(pictures._source, pictures.rows[part]) for key, part in parts.items()}


def fit_picture(image: Image.Image, *, image_size: int, channels: int) -> np.ndarray:
    """One picture as uint8 [C, S, S]: upright, whole range, centre-cropped, antialiased.

    Transparency is laid on white, unless `channels` has a place for it. 16-bit grey becomes 8-bit.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I"):
            pixels = pixels / 257  # 0 ... 65535 -> 0 ... 255
        image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data and channels not in (2, 4):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels])
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(image_size, image_size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _fit_array(images: np.ndarray, *, image_size: int, channels: int) -> np.ndarray:
    """uint8 [N, H, W, C] -> [N, channels, image_size, image_size]."""
    if images.shape[1:] == (image_size, image_size, channels):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    pictures = (Image.fromarray(image.squeeze()) for image in images)
    return np.stack([fit_picture(p, image_size=image_size, channels=channels) for p in pictures])


def _read_digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]


def _read_cifar10(root: Path, train: bool) -> np.ndarray:
    """uint8 [N, 32, 32, 3] from the python or the binary version, fetched if neither is there."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    python, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    if not python.is_dir() and not binary.is_dir():
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import download_and_extract_archive

        try:
            download_and_extract_archive(
                CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5
            )
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"no CIFAR-10 at {python}, and {CIFAR10.url} cannot be fetched ({error}); "
                f"unpack cifar-10-python.tar.gz into {root}, or set dataset.root"
            ) from None
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


def _list_files(root: Path) -> tuple[list[tuple[str, int, int]], Callable[[str], io.IOBase]]:
    """[(name, size, time)] of the pictures in a folder or zip, sorted, and how to open one."""
    if zipfile.is_zipfile(root):
        archive = zipfile.ZipFile(root)
        found = [(i.filename, i.file_size, i.CRC) for i in archive.infolist() if not i.is_dir()]
        opener = lambda name: io.BytesIO(archive.read(name))
    elif root.is_dir():
        paths = (
            Path(folder, file)
            for folder, folders, files in os.walk(root, followlinks=True)
            for file in files
        )
        found = [
            (p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns)
            for p in paths
            if p.exists()
        ]
        opener = lambda name: (root / name).open("rb")
    elif root.exists():
        raise ValueError(f"{root} (dataset.root) is neither a folder nor a zip")
    else:
        raise FileNotFoundError(f"{root} (dataset.root) does not exist; give a folder or a zip")

    def is_picture(name: str) -> bool:
        parts = name.split("/")
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        return name.lower().endswith(EXTENSIONS) and not hidden

    pictures = sorted(entry for entry in found if is_picture(entry[0]))
    if not pictures:
        kinds = ", ".join(extension[1:] for extension in EXTENSIONS)
        raise FileNotFoundError(f"{root} (dataset.root) holds no pictures ({kinds})")
    return pictures, opener


def _decode_files(root: Path, cache: Path, progress, *, image_size: int, channels: int) -> Pictures:
    """All pictures below `root`, decoded once into `cache` and memory-mapped."""
    files, opener = _list_files(root)
    recipe = ["1: fit_picture", str(root.resolve()), files, image_size, channels]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    array_file = cache / f"{digest}-{image_size}x{image_size}x{channels}.npy"
    skipped_file = array_file.with_suffix(".json")  # written last: where it is, all is
    if not skipped_file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        shape = (len(files), channels, image_size, image_size)
        temporary = array_file.with_suffix(f".{uuid.uuid4().hex}.tmp")
        for leftover in cache.glob("*.tmp"):  # of a run that was killed
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                leftover.unlink()
        try:
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is said now, not by a dead process
                with temporary.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)

            def decode(row: int) -> tuple[str, str] | None:
                try:
                    with opener(files[row][0]) as stream, Image.open(stream) as image:
                        array[row] = fit_picture(image, image_size=image_size, channels=channels)
                except Exception as error:  # a decoder can raise anything on a broken file
                    return files[row][0], f"{type(error).__name__}: {error}"

            with ThreadPoolExecutor() as pool:
                outcomes = pool.map(decode, range(len(files)))
                if progress:
                    outcomes = progress(outcomes, total=len(files))
                skipped = dict(outcome for outcome in outcomes if outcome)
            array.flush()
            temporary.replace(array_file)
        finally:
            temporary.unlink(missing_ok=True)
        temporary.write_text(json.dumps(skipped))
        temporary.replace(skipped_file)

    skipped = json.loads(skipped_file.read_text())
    if skipped:
        shown = "\n".join(f"  {name}: {why}" for name, why in itertools.islice(skipped.items(), 10))
        more = f"\n  and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        message = f"{len(skipped)} of {len(files)} files in {root} are unreadable:\n{shown}{more}"
        if len(skipped) > max(10, len(files) // 100) or len(skipped) == len(files):
            raise ValueError(f"{message}\nMend or remove them.")
        print(f"{message}\n  They are left out.")
    rows = [row for row, (name, *_) in enumerate(files) if name not in skipped]
    return Pictures(array_file, np.array(rows))


class Files:
    """Pictures of a folder or a zip, in the order of their names; read as they are asked for.

    Args:
        fit: (channels, size) to bring them to, as those of a dataset are; None takes them as they
            are, in colour and without alpha, and wants all of one size.

    Raises:
        FileNotFoundError, ValueError: no folder or zip of pictures.
    """

    def __init__(self, root: Path, fit: tuple[int, int] | None = None):
        self.root, self.fit, self.shape = root, fit, None
        self.files, self._open = _list_files(root)
        self.shape = tuple(self[[0]].shape[1:])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: list[int]) -> Tensor:
        """uint8 [B, C, H, W]. ValueError: one cannot be read, or is of another size."""
        with ThreadPoolExecutor() as pool:
            return torch.from_numpy(np.stack(list(pool.map(self._read, rows))))

    def _read(self, row: int) -> np.ndarray:
        name = self.files[row][0]
        try:
            with self._open(name) as stream, Image.open(stream) as image:
                if self.fit:
                    channels, size = self.fit
                    return fit_picture(image, image_size=size, channels=channels)
                pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except Exception as error:  # a decoder can raise anything on a broken file
            raise ValueError(f"{name} in {self.root} cannot be read: {error}") from None
        if self.shape and pixels.shape != self.shape:
            raise ValueError(
                f"{name} in {self.root} is {sides(pixels.shape)} and the first picture is "
                f"{sides(self.shape)}; they must be of one size"
            )
        return pixels

    def fingerprint(self) -> str:
        recipe = [str(self.root.resolve()), self.files, self.fit]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def sides(shape: tuple[int, int, int]) -> str:
    """'32x32' of (C, H, W)."""
    return f"{shape[2]}x{shape[1]}"
