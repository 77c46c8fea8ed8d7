"""Start the project's commands as a person's shell would, wait for them with a limit, end them all.

A child has the default answer to every signal and none blocked, whatever pytest was started by
(`nohup`, `&`, cron), a session of its own, and no standard input. When the `with` block ends,
the child and everything that it started are killed.
"""

import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
MARK = "DDPM_TEST_PROCESS"  # in the environment of a child, inherited by what it starts

# What an ignored or blocked signal was survives exec; Python code after a fork could deadlock.
LAUNCH = """
import ctypes, os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: pytest may be killed itself
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Process:
    """A running child whose output is read all the time; made by `start`."""

    def __init__(self, command: Sequence[str], popen: subprocess.Popen, output: int):
        self.command, self.pid = shlex.join(command), popen.pid
        self._popen, self._fd, self._seen = popen, output, bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # a terminal that nobody writes to any more is an error
            while chunk := os.read(self._fd, 2**16):
                self._seen += chunk

    @property
    def output(self) -> str:
        """Return what was printed so far, on both streams."""
        return self._seen.decode(errors="replace")

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def fail(self, reason: str) -> None:
        __tracebackhide__ = True  # the line of the test is what counts
        pytest.fail(f"{self.command}\n{reason}; printed so far:\n{self.output}")

    def wait_until(
        self, condition: Callable[[], bool], what: str, timeout: float = 60, pause: float = 0.01
    ) -> None:
        """Wait for a condition; fail when the time is up or the child ends before it holds."""
        __tracebackhide__ = True
        limit = time.monotonic() + timeout
        while not condition():
            if self.returncode is not None:
                self._reader.join(1)
                if not condition():
                    self.fail(f"it ended with {self.returncode} before {what}")
                return
            if time.monotonic() > limit:
                self.fail(f"no {what} in {timeout:g} s")
            time.sleep(pause)

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Wait until the output so far contains `text`."""
        __tracebackhide__ = True
        self.wait_until(lambda: text in self.output, repr(text), timeout)

    def send(self, signum: int) -> None:
        """Send a signal to the child alone."""
        self._popen.send_signal(signum)

    def send_group(self, signum: int) -> None:
        """Send a signal to the child and what it started, as Ctrl-C in a terminal does."""
        os.killpg(self.pid, signum)

    def finish(self, code: int | None = 0, timeout: float = 60) -> str:
        """Wait for the child, and for whoever else holds its output, to end.

        Args:
            code: the exit code that is wanted, -N for signal N; None accepts any.
            timeout: seconds.

        Returns:
            All that was printed.
        """
        __tracebackhide__ = True
        limit = time.monotonic() + timeout
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)
        if (found := self.returncode) is None:
            self.fail(f"it did not end in {timeout:g} s")
        self._reader.join(max(1, limit - time.monotonic()))
        if self._reader.is_alive():
            self.fail(f"it ended with {found}, and what it started did not in {timeout:g} s")
        if code is not None and found != code:
            self.fail(f"it ended with {found} and not {code}")
        return self.output


@contextmanager
def start(
    command: str | Sequence[str | Path],
    cwd: Path,
    *,
    env: dict[str, str] | None = None,
    terminal: bool = False,
) -> Iterator[Process]:
    """Start a child that ends with the block at the latest.

    Args:
        command: "python SCRIPT ARGUMENTS" is one of the project's commands; a list is any program.
        cwd: the folder it runs in.
        env: what is added to the environment.
        terminal: its output is a terminal and not a pipe.
    """
    if isinstance(command, str):
        script, *arguments = shlex.split(command.removeprefix("python "))
        command = [sys.executable, PROJECT / script, *arguments]
    command = [str(word) for word in command]
    mark = uuid.uuid4().hex
    marks = f"{os.environ.get(MARK, '')} {mark}"  # of a child in a child, both
    reading, writing = pty.openpty() if terminal else os.pipe()
    try:
        popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCH, *command],
            cwd=cwd, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing,
            env={**os.environ, **(env or {}), MARK: marks}, start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    process = Process(command, popen, reading)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait(10)
        kill_marked(mark.encode())
        process._reader.join(10)
        if not process._reader.is_alive():
            os.close(reading)


def kill_marked(mark: bytes) -> None:
    """Kill what a child has started in other sessions (torchrun does), where /proc tells."""
    limit = time.monotonic() + 10
    while pids := marked(mark):
        assert time.monotonic() < limit, f"processes that cannot be killed: {pids}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def marked(mark: bytes) -> list[int]:
    """Return the living processes that have `mark` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or one that has just ended
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def ended(pid: int, timeout: float = 60) -> None:
    """Wait for a process that is not a child of pytest to end."""
    limit = time.monotonic() + timeout
    while (status := Path(f"/proc/{pid}/status")).exists():
        with suppress(FileNotFoundError, ProcessLookupError):
            if "zombie" in status.read_text():
                return
        assert time.monotonic() < limit, f"process {pid} is still there after {timeout:g} s"
        time.sleep(0.05)


def run(
    command: str | Sequence[str | Path], cwd: Path, code: int = 0, timeout: float = 60, **kwargs
) -> str:
    """Run a command to its end and return what it printed."""
    with start(command, cwd, **kwargs) as process:
        output = process.finish(code, timeout)
    assert "Traceback" not in output, output
    return output
