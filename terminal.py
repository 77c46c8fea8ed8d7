"""What every command says when something is wrong, and who says it.

It needs no package, so that it can speak of those that are missing.
"""

import difflib
import errno
import logging
import os
import sys
import threading
import warnings

from files import advice

EXPECTED = ValueError, OSError, FloatingPointError  # whose messages are written for users
WRONG_INPUT = ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError


def fail(error: BaseException) -> int:
    """Say what is wrong in one message; the exit code: 2 where the input is, else 1."""
    where = "" if is_main_process() else f" (rank {rank()})"
    print(f"error{where}: {describe(error)}", file=sys.stderr, flush=True)
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return 2 if isinstance(error, WRONG_INPUT) or too_long else 1


def describe(error: BaseException) -> str:
    """A message for users."""
    text = str(error)
    if "torchvision::nms" in text:
        return (
            "torch and torchvision do not fit together, which happens when they come from "
            "different places, or one is updated alone: "
            "pip install --force-reinstall torch torchvision"
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error.name} is not installed for {sys.executable}: "
            "pip install -r requirements.txt, or take the Python that has it (.venv/bin/python)"
        )
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        reason = text.splitlines()[0] if text else type(error).__name__
        return f"this does not fit into memory; try less of it ({reason})"
    if isinstance(error, OSError) and error.strerror:  # as the system gives it
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if n is not None]
        where = f"{' -> '.join(names)}: " if names else ""
        return f"{where}{error.strerror}; {advice(error.errno)}"
    return text if isinstance(error, EXPECTED) else f"{type(error).__name__}: {text}"


def did_you_mean(word: str, known) -> str:
    """'; did you mean X?' where something near is known, else the list."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are: {', '.join(known)}" if known else ""


def guard() -> None:
    """From here on an installation that cannot work ends in `describe`, not in a traceback.

    Ctrl-C ends with 130 also while packages are imported, and names in letters that the
    terminal lacks are printed as it can.
    """

    def hook(kind, error, trace) -> None:
        if isinstance(error, KeyboardInterrupt):
            os._exit(130)
        if isinstance(error, ImportError) or "torchvision::nms" in str(error):
            fail(error)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def plain_console(quiet: bool = False):
    """A console that prints names as they are, and that a reader may leave (`| head`)."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return Plain(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)


def quiet_libraries() -> None:
    """Lightning's tips and hardware lines are not about this run."""
    import pytorch_lightning  # noqa: F401  (it sets its level when it is imported)

    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # but that another rank has died is
    launcher = "lightning_fabric.strategies.launchers.subprocess_script"
    logging.getLogger(launcher).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")

    def hook(failed) -> None:
        # TensorBoard's thread, whose error is raised where the next number is logged
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            threading.__excepthook__(failed)

    threading.excepthook = hook


def rank() -> int:
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # torchrun, Lightning, srun
    numbers = (os.environ.get(name, "") for name in names)
    return next((int(number) for number in numbers if number.isdigit()), 0)


def is_main_process() -> bool:
    return rank() == 0
