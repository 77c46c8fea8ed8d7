"""What starts the commands of other tests: signals arrive, waits end, nothing stays behind."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from processes import PROJECT, ended, marked, run, start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
SLEEP = "import time; print('ready', flush=True); time.sleep(60)"

PARENT = f"""
import os, signal, sys
sys.path.insert(0, {str(PROJECT / "tests")!r})
from processes import start
number = int(sys.argv[1])
assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
quiet = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL);" * (number == 2)
with start([sys.executable, "-c", quiet + {SLEEP!r}], ".") as child:
    child.wait_for("ready")
    child.send(number)
    child.finish(-number)
print("received")
"""


@pytest.mark.parametrize("closed", ["</dev/null", "<&-"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_children_receive_what_their_parent_ignores_or_blocks(tmp_path, number, closed):
    ignoring = f'trap "" INT HUP; exec "$@" {closed}'
    parent = [sys.executable, "-c", PARENT, str(int(number))]
    assert run(["sh", "-c", ignoring, "sh", *parent], tmp_path) == "received\n"


def test_waits_end_and_say_what_was_printed(tmp_path):
    sleeper = [sys.executable, "-c", SLEEP]
    with start(sleeper, tmp_path) as process:
        process.wait_for("ready")
        with pytest.raises(pytest.fail.Exception, match=r"(?s)no 'never' in 0.1 s.*ready"):
            process.wait_for("never", timeout=0.1)
        with pytest.raises(pytest.fail.Exception, match=r"(?s)did not end in 0.1 s.*ready"):
            process.finish(timeout=0.1)
    with start([sys.executable, "-c", "print('here'); exit(3)"], tmp_path) as process:
        with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with 3 before 'never'.*here"):
            process.wait_for("never")
        with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with 3 and not 0.*here"):
            process.finish()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_no_process_stays_behind(tmp_path):
    """Also one that has a session of its own, and when Ctrl-C ends the test."""
    detached = (
        "import subprocess, sys;"
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True);" + SLEEP
    )
    mark = str(tmp_path)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with start([sys.executable, "-c", detached], tmp_path, env={"TEST": mark}) as process:
            process.wait_until(lambda: len(marked(mark.encode())) == 2, "two processes")
            raise KeyboardInterrupt
    assert not marked(mark.encode())


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_children_die_with_pytest(tmp_path):
    parent = (
        f"import sys, time; sys.path.insert(0, {str(PROJECT / 'tests')!r})\n"
        "from processes import start\n"
        f"with start([sys.executable, '-c', {SLEEP!r}], '.') as child:\n"
        "    child.wait_for('ready'); print(child.pid, flush=True); time.sleep(60)"
    )
    with start([sys.executable, "-c", parent], tmp_path) as process:
        process.wait_for("\n")
        child = int(process.output)
        process.send(signal.SIGKILL)
        process.finish(-signal.SIGKILL)
        ended(child)


def test_every_part_of_everywhere_runs_and_a_failure_is_kept(tmp_path):
    """`make test-everywhere` with a pytest that fails on one CPU, and names files that exist."""
    python = tmp_path / "python"
    fails = 'test "$ATEN_CPU_CAPABILITY" != default'
    python.write_text(f"#!/bin/sh\necho \"$@\" >> '{tmp_path}/calls'\n{fails}\n")
    python.chmod(0o755)
    said = run(["bash", PROJECT / "tests" / "everywhere.sh", python], tmp_path, code=1)
    results = re.findall(r"^== (.+?): .*: (passed|FAILED)$", said, re.M)
    assert results == [
        ("DDPM_BF16=0 OMP_NUM_THREADS=1", "passed"),
        ("DDPM_BF16=1 OMP_NUM_THREADS=1", "passed"),
        ("ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1", "FAILED"),
        ("ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1", "passed"),
        ("OMP_NUM_THREADS=2", "passed"),
        ("OMP_NUM_THREADS=4", "passed"),
    ]
    files = set(re.findall(r"tests/\S+\.py", (tmp_path / "calls").read_text()))
    assert len(files) >= 10 and all((PROJECT / file).exists() for file in files)
