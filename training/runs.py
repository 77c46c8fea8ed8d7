"""Runs as folders: which one a command means, what it starts from, and who may work in it."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from config import Config, check_config
from files import differences
from weights import (
    ModelFiles,
    can_continue,
    newest_checkpoint,
    read_checkpoint,
    read_model,
    up_to_date,
)

Say = Callable[[str], object]


class InUse(ValueError):
    """The folder is another run's."""


@dataclass
class Start:
    """The beginning of a run: its folder, and a checkpoint or weights."""

    run: Path  # its folder
    checkpoint: tuple[Path, dict] | None  # the one that it continues from, already read
    weights: ModelFiles | None  # what it is fine-tuned from
    lock: IO | None  # holds the folder for this process as long as it is open

    def release(self, *, untouched: bool) -> None:
        """Let the folder go; an `untouched` one, made for a run that could not begin, goes too."""
        if self.lock:
            self.lock.close()
            if untouched and [p.name for p in self.run.iterdir()] == [".lock"]:
                (self.run / ".lock").unlink()
                with suppress(OSError):
                    self.run.rmdir()


def find_start(
    config: Config,
    name: str,
    *,
    chosen: bool,
    continue_training: bool,
    checkpoint_path: Path | None,
    is_main: bool,
) -> Start:
    """Return what the command line means.

    Args:
        chosen: `name` is that of --run-name; else name-2, name-3, ... may be meant.
        is_main: the one process of a run that holds its folder.

    Raises:
        FileNotFoundError: no such run, or no such checkpoint. ValueError: the folder is in use or
            holds a run, the checkpoint is damaged, or no folder can be called so.
    """
    if not name.strip() or name[0] in ".~" or set(name) & set("/\\*?[]\0"):
        raise ValueError(
            f"a run cannot be called {name!r}: give a --run-name without / \\ * ? [ ] that begins "
            "with neither . nor ~"
        )
    results = Path(config.logging.results_folder)
    # SLURM runs the same command again, which then continues by itself
    again = os.environ.get("SLURM_RESTART_COUNT", "0").strip("0").isdigit()
    begun = runs_of(results, name, chosen) if again or continue_training else []
    saved = bool(begun) and any(begun[0].glob("checkpoints/*.ckpt"))
    requeued = again and bool(begun)
    path, checkpoint, weights = checkpoint_path, None, None
    if path and requeued and saved:  # whatever it began from, it has gone on since
        path = None
    elif path and not (path / "checkpoints").is_dir() and not can_continue(up_to_date(path)):
        weights = None if saved else read_model(path)
        path = None
    run = begun[0] if begun and (requeued or not path) else None
    if path:
        path = up_to_date(path)
        checkpoint = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
        home = checkpoint[0].parent.parent
        inside = checkpoint[0].parent.name == "checkpoints" and (home / "config.yml").is_file()
        if not run and inside and (not chosen or home.resolve() == (results / name).resolve()):
            run = home
    elif continue_training and not begun and not weights:
        there = ", ".join(sorted(p.name for p in results.glob("*") if p.is_dir()))
        hint = f"there are: {there}" if there else "leave out --continue-training"
        raise FileNotFoundError(f"no run {results / name} to continue; {hint}")
    run, held = (run, lock(run, is_main)) if run else new_run(results, name, chosen, is_main)
    if saved and not checkpoint:
        checkpoint = newest_checkpoint(run)
    return Start(run, checkpoint, weights, held)


def new_run(results: Path, name: str, chosen: bool, is_main: bool) -> tuple[Path, IO | None]:
    """Return a folder without a run, locked: `name`; unless chosen, or name-2, name-3, ..."""
    for number in count(1):
        run = results / (name if number == 1 else f"{name}-{number}")
        try:
            if (run / "config.yml").exists() and (is_main or not chosen):
                raise InUse(
                    f"{run} holds a run: choose another --run-name, or continue it by "
                    "--continue-training without a path"
                )
            return run, lock(run, is_main)
        except InUse:  # by an earlier run, or by another that started in the same second
            if chosen:
                raise
    raise AssertionError


def runs_of(results: Path, name: str, chosen: bool) -> list[Path]:
    """Return the folders that --continue-training can mean, the one last worked on first."""
    runs = [results / name]
    if not chosen:
        numbered = (p for p in results.glob(f"{name}-*") if p.name[len(name) + 1 :].isdigit())
        runs = sorted([*runs, *numbered], key=last_change, reverse=True)
    return [run for run in runs if run.is_dir()]  # one without marks failed at its first write


def last_change(run: Path) -> float:
    """Return when a run was last worked on; 0 where it never began."""
    marks = [*run.glob("checkpoints/*.ckpt"), *run.glob("config.yml")]
    return max((p.stat().st_mtime for p in marks), default=0.0)


def lock(run: Path, is_main: bool = True) -> IO | None:
    """Hold a run's folder for this process as long as the returned file is open.

    Raises:
        InUse: another process trains there.
    """
    if not is_main:
        return None
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        file.close()
        raise InUse(f"another process is training in {run}; choose another --run-name") from None
    return file


def check_continuation(config: Config, path: Path, checkpoint: dict, say: Say) -> bool:
    """Say what a continued run changes; return whether it has steps left.

    Raises:
        ValueError: `config` would make another run of it.
    """
    old = check_config(checkpoint["hyper_parameters"], source=str(path))
    if changed := differences(old, config, learned=True):
        lines = "\n".join(f"  {line}" for line in changed)
        raise ValueError(
            f"this config is not that of {path}:\n{lines}\n"
            "Continue with the same values (overrides too), or start another run. To begin it with "
            "these weights: `python convert.py export CKPT w.safetensors --format safetensors`, "
            "then --checkpoint-path w.safetensors."
        )
    notes = dict.fromkeys(
        ("hardware.precision", "hardware.compile"), "from here on rounding differs"
    )
    if (decay := config.training.learning_rate_decay) in ("cosine", "linear"):
        notes["training.max_steps"] = f"the {decay} decay of the learning rate ends there"
    for line in differences(old, config):
        note = notes.get(line.partition(":")[0])
        say(f"changed: {line}{f' ({note})' if note else ''}")
    step = checkpoint["global_step"]
    left = step < config.training.max_steps
    done = f"{path} has all {step:,} steps of training.max_steps; give a larger one to train on"
    say(f"continuing from {path} (step {step:,})" if left else done)
    return left
