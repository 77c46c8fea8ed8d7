"""What a checkpoint file is: plain data, written whole or not at all, read without running it."""

import math
import os
import pickle
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from files import atomic_write


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        OSError: it could not be written; nothing has changed.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)


def point_last_to(path: Path) -> None:
    """Make the last.ckpt beside `path` a second name of it; a copy where links cannot be made.

    Raises:
        OSError: it could not be written; nothing has changed.
    """
    with atomic_write(path.with_name("last.ckpt"), unique=True) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def up_to_date(path: Path) -> Path:
    """Return `path`, or the newest whole checkpoint beside a last.ckpt that is missing or behind.

    So it is left where the rename of last.ckpt failed. It is mended where the folder can be
    written, and said.
    """
    steps = saved_steps(path.parent) if path.name == "last.ckpt" else []
    with suppress(OSError):  # nothing is there
        if not steps or os.path.samefile(path, steps[-1]):
            return path
    last = _peek(path)
    # one that is damaged is not behind: whoever reads it says so
    there = last["global_step"] if is_checkpoint(last) else math.inf if path.exists() else -1
    del last  # Windows replaces no file that is mapped
    for newest in reversed([step for step in steps if int(step.stem[5:]) > there]):
        try:
            read_checkpoint(newest)
        except (ValueError, OSError):
            continue
        was = "was missing" if there < 0 else f"was left behind at step {there:,}"
        try:
            point_last_to(newest)
            print(f"{path} {was}; it is {newest.name} again")
        except OSError:
            print(f"{path} {was}; {newest} is taken instead")
        return newest
    return path


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
    data = _peek(path)
    return is_checkpoint(data) and "optimizer_states" in data


def _peek(path: Path):
    """Return plain data without reading its tensors; None where that cannot be done."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever reads it in earnest says what is wrong
        return None


def saved_steps(folder: Path) -> list[Path]:
    """What training has saved there, oldest first; other names are a person's own."""
    return sorted(p for p in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d{8,}", p.stem))


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run's folder that can be read; says which it passes over.

    A last.ckpt that is behind is mended.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = run / "checkpoints"
    for path in [*reversed(saved_steps(folder)), folder / "last.ckpt"]:
        try:
            read_checkpoint(path)
            up_to_date(folder / "last.ckpt")
            return path
        except ValueError as error:
            print(f"passed over: {error}")
        except FileNotFoundError:
            pass
    raise FileNotFoundError(f"{run} holds no checkpoint that can be read")
