"""Make every machine the same place for the tests, before anything is imported."""

import atexit
import locale
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress


def writable(folder: str) -> bool:
    """Try it: permissions say nothing to root, nor of a file system mounted read-only."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def same_everywhere() -> None:
    """Set what tests and the children they start would otherwise inherit."""
    os.umask(0o022)
    os.environ["TZ"] = "UTC"
    os.environ["LC_ALL"] = "C.UTF-8"
    with suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
    if os.name == "posix":
        time.tzset()
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:  # else exit codes are lost
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # a cluster's job, a launcher, a terminal, what others want of Python or of colours
    names = (
        "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "COLUMNS", "LINES", "TERMINAL_WIDTH", "NO_COLOR", "FORCE_COLOR", "PY_COLORS",
        "GITHUB_ACTIONS", "PYTHONIOENCODING", "PYTHONWARNINGS", "PYTHONOPTIMIZE",
    )  # fmt: skip
    for name in list(os.environ):
        if name in names or name.startswith(("SLURM_", "TORCHELASTIC_")):
            del os.environ[name]
    # threads that wait for others are not to take the cores from them
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # caches: of the compiled kernel, Matplotlib's fonts, the Hub; workers of xdist inherit it
    if not writable(os.path.expanduser("~")):
        os.environ["HOME"] = tempfile.mkdtemp(prefix="ddpm-home-")
        atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "HF_HOME", "TORCH_HOME"):
        if name in os.environ and not writable(os.environ[name]):
            del os.environ[name]
    # the networks here are so small that threads only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


same_everywhere()

import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
