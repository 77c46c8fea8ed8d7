"""Runs as folders: which one a command means, what it starts from, and who may work in it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from config import Config, check_config, differences
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
    """Another process trains in this folder."""


@dataclass
class Start:
    """What a run begins from.

    Attributes:
        run: its folder.
        checkpoint: the one that it continues from, already read.
        weights: what it is fine-tuned from.
        lock: holds the folder for this process as long as it is open.
    """

    run: Path
    checkpoint: tuple[Path, dict] | None = None
    weights: ModelFiles | None = None
    lock: IO | None = None

    @property
    def step(self) -> int:
        return self.checkpoint[1]["global_step"] if self.checkpoint else 0

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
    requeued: bool,
    is_main: bool,
) -> Start:
    """Return what the command line means.

    Args:
        name: the run's. chosen: by --run-name; else name-2, name-3, ... may be meant.
        requeued: SLURM runs the same command again, which then continues by itself.
        is_main: the one process of a run that holds its folder.

    Raises:
        FileNotFoundError: no such run, or no such checkpoint. ValueError: the folder is in use or
            holds a run, or the checkpoint is damaged.
    """
    results = Path(config.logging.results_folder)
    begun = runs_of(results, name, chosen) if requeued or continue_training else []
    saved = bool(begun) and has_checkpoint(begun[0])
    requeued = requeued and bool(begun)
    weights = None
    if requeued and saved:  # whatever it began from, it has gone on since
        checkpoint_path = None
    elif checkpoint_path and not holds_state(checkpoint_path):
        weights = None if saved else read_model(checkpoint_path)
        checkpoint_path = None
    if checkpoint_path:
        checkpoint = read_state(checkpoint_path)
        if requeued:  # before its first checkpoint
            return Start(begun[0], checkpoint, lock=lock(begun[0], is_main))
        home = checkpoint[0].parent.parent
        inside = checkpoint[0].parent.name == "checkpoints" and (home / "config.yml").is_file()
        if inside and (not chosen or home.resolve() == (results / name).resolve()):
            return Start(home, checkpoint, lock=lock(home, is_main))
        run, held = new_run(results, name, chosen, is_main)
        return Start(run, checkpoint, lock=held)
    if requeued or (continue_training and (begun or not weights)):
        if not begun:
            there = ", ".join(sorted(p.name for p in results.glob("*") if p.is_dir()))
            raise FileNotFoundError(
                f"no run {results / name} to continue"
                + (f"; there are: {there}" if there else "; leave out --continue-training")
            )
        held = lock(begun[0], is_main)
        return Start(begun[0], newest_checkpoint(begun[0]) if saved else None, weights, held)
    run, held = new_run(results, name, chosen, is_main)
    return Start(run, None, weights, held)


def holds_state(path: Path) -> bool:
    """Tell whether `path` holds a run's whole state, rather than weights alone."""
    return (path / "checkpoints").is_dir() or can_continue(up_to_date(path))


def read_state(path: Path) -> tuple[Path, dict]:
    """Return a checkpoint and its path; of a run's folder the newest good one."""
    if path.is_dir():
        return newest_checkpoint(path)
    path = up_to_date(path)
    return path, read_checkpoint(path)


def new_run(results: Path, name: str, chosen: bool, is_main: bool) -> tuple[Path, IO | None]:
    """Return a folder without a run, locked: `name`; unless chosen, or name-2, name-3, ..."""
    for number in count(1):
        run = results / (name if number == 1 else f"{name}-{number}")
        if (run / "config.yml").exists():
            if chosen and is_main:
                raise ValueError(
                    f"{run} holds a run: choose another --run-name, or continue it by "
                    "--continue-training without a path"
                )
            if not chosen:
                continue
        try:
            return run, lock(run, is_main)
        except InUse:  # another that started in the same second
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


def has_checkpoint(run: Path) -> bool:
    """Tell whether a run has saved anything."""
    return any(run.glob("checkpoints/*.ckpt"))


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


def check_name(name: str) -> str:
    """Return a run's name; ValueError where no folder can be called so."""
    if not name.strip() or name[0] in ".~" or set(name) & set("/\\*?[]\0"):
        raise ValueError(
            f"a run cannot be called {name!r}: give a --run-name without / \\ * ? [ ] that begins "
            "with neither . nor ~"
        )
    return name


def check_continuation(config: Config, path: Path, checkpoint: dict, say: Say) -> None:
    """Say what a continued run changes.

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
    for line in differences(old, config):
        rounding = line.startswith(("hardware.precision", "hardware.compile"))
        say(f"changed: {line}{' (from here on rounding differs)' if rounding else ''}")
    step = checkpoint["global_step"]
    if step >= config.training.max_steps:
        say(f"{path} has all {step:,} steps of training.max_steps; give a larger one to train on")
    else:
        say(f"continuing from {path} (step {step:,})")
