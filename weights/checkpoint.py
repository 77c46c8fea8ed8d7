"""Checkpoint files: plain data, written whole or not at all, read without running it."""

import errno
import math
import os
import pickle
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from files import atomic_write


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint, or raise OSError and change nothing."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)


def point_last_to(path: Path) -> None:
    """Make the last.ckpt beside `path` a second name of it; a copy where links cannot be made."""
    with atomic_write(path.with_name("last.ckpt"), unique=True) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def up_to_date(path: Path) -> Path:
    """Return `path`, or the newest whole checkpoint beside a last.ckpt that is missing or behind.

    A crash between two renames leaves it so. It is repaired where that can be done; a line says so.
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
    """Return a checkpoint of ours as plain data, checked byte for byte.

    ValueError where it is damaged, is not one of ours, or asks to run code, which is never done.
    """
    checkpoint = read_plain(path)
    if not is_checkpoint(checkpoint):
        raise ValueError(f"{path} is not a checkpoint of this project: it holds no config")
    return checkpoint


def is_checkpoint(data: Any) -> bool:
    """Tell whether plain data is a checkpoint of ours."""
    ours = {"hyper_parameters": dict, "state_dict": dict, "global_step": int}
    return isinstance(data, dict) and all(isinstance(data.get(k), kind) for k, kind in ours.items())


def read_plain(path: str | Path) -> Any:
    """Return what torch saved, if it is plain data. Raises as `read_checkpoint` does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    fault, archive, damaged = "is damaged or not a checkpoint", False, None
    try:
        archive = zipfile.is_zipfile(path)  # torch's format before 1.6 has no checksums
        if archive:
            with zipfile.ZipFile(path) as members:
                damaged = members.testzip()
        if not damaged:
            return torch.load(path, map_location="cpu", weights_only=True)
        fault = f"is damaged: {damaged} does not match its checksum"
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked or archive:
            what = f"asks to run {asked[1]}" if asked else "holds more than plain data"
            fault = f"{what} when loaded, which is refused"
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a damaged file may ask to seek anywhere
            error.filename = error.filename or str(path)
            raise
    except Exception:  # a damaged file can raise anything, with advice about torch
        pass
    raise ValueError(f"{path} {fault}")


def can_continue(path: Path) -> bool:
    """Tell whether training can go on from it: a checkpoint of ours with the optimizer inside."""
    return is_checkpoint(data := _peek(path)) and "optimizer_states" in data


def _peek(path: Path) -> Any:
    """Return plain data without reading its tensors; None where that cannot be done."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever reads it in earnest says what is wrong
        return None


def saved_steps(folder: Path, suffix: str = ".ckpt") -> list[Path]:
    """Return the files that training has saved, oldest first; other names are a person's."""
    found = folder.glob(f"step-*{suffix}")
    return sorted(p for p in found if re.fullmatch(r"step-\d{8,}", p.stem))


def newest_checkpoint(run: Path) -> tuple[Path, dict]:
    """Return the newest checkpoint of a run that can be read, with its content.

    It names those passed over, and repairs a last.ckpt that is behind. FileNotFoundError: none.
    """
    folder = run / "checkpoints"
    for path in [*reversed(saved_steps(folder)), folder / "last.ckpt", folder / "best.ckpt"]:
        try:
            checkpoint = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            print(f"passed over: {error}")
        else:
            up_to_date(folder / "last.ckpt")
            return path, checkpoint
    raise FileNotFoundError(f"{run} holds no checkpoint that can be read")
