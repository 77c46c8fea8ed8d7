"""What a checkpoint file is: plain data, written whole or not at all, read without running it."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import torch


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Beside its place, forced to disk, then renamed: a name never holds half a file.

    Raises:
        OSError: it could not be written; nothing has changed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch hides a full disk behind an error of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise OSError(f"cannot write {path}: {reason}; checkpoints before it are intact") from None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of ours as plain data, checked byte for byte.

    Raises:
        FileNotFoundError: nothing there. ValueError: damaged, not one of ours, or a file that
            asks to run code, which is never done.
    """
    checkpoint = read_plain(path)
    if not is_checkpoint(checkpoint):
        raise ValueError(f"{path} is not a checkpoint of this project: it holds no config")
    return checkpoint


def is_checkpoint(data) -> bool:
    """Whether plain data is a checkpoint of ours."""
    ours = {"hyper_parameters": dict, "state_dict": dict, "global_step": int}
    return isinstance(data, dict) and all(isinstance(data.get(k), kind) for k, kind in ours.items())


def read_plain(path: str | Path):
    """What torch saved, if it is plain data. Errors as of `read_checkpoint`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    damaged = data = None
    try:
        if zipfile.is_zipfile(path):  # else torch's format before 1.6, which has no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        if not damaged:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not asked and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is damaged or not a checkpoint") from None
        what = f"asks to run {asked[1]}" if asked else "holds more than plain data"
        raise ValueError(f"{path} {what} when loaded, which is refused") from None
    except OSError:
        raise
    except Exception:  # a damaged file can raise anything, with advice about torch
        raise ValueError(f"{path} is damaged or not a checkpoint") from None
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} does not match its checksum")
    return data


def can_continue(path: Path) -> bool:
    """Whether training can go on from it: a checkpoint of ours with the optimizer inside."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever reads it in earnest says what is wrong
        return False
    return is_checkpoint(data) and "optimizer_states" in data


def saved_steps(folder: Path) -> list[Path]:
    """What training has saved there, oldest first; other names are a person's own."""
    return sorted(p for p in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d{8,}", p.stem))


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run's folder that can be read; says which it passes over.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = run / "checkpoints"
    for path in [*reversed(saved_steps(folder)), folder / "last.ckpt"]:
        try:
            read_checkpoint(path)
            return path
        except ValueError as error:
            print(f"passed over: {error}")
        except FileNotFoundError:
            pass
    raise FileNotFoundError(f"{run} holds no checkpoint that can be read")
