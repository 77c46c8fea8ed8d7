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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    damaged = checkpoint = None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if not damaged:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks to run {asked[1]}" if asked else "holds more than plain data"
        raise ValueError(f"{path} {what} when loaded, which is refused") from None
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from None
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} does not match its checksum")
    ours = {"hyper_parameters": dict, "state_dict": dict, "global_step": int}
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), kind) for key, kind in ours.items()
    ):
        raise ValueError(f"{path} is not a checkpoint of this project: it holds no config")
    return checkpoint


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run's folder that can be read; says which it passes over.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = run / "checkpoints"
    for path in [*sorted(folder.glob("step-*.ckpt"), reverse=True), folder / "last.ckpt"]:
        try:
            read_checkpoint(path)
            return path
        except ValueError as error:
            print(f"passed over: {error}")
        except FileNotFoundError:
            pass
    raise FileNotFoundError(f"{run} holds no checkpoint that can be read")
