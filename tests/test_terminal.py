"""What the commands are to a terminal: words, completion, pipes, Ctrl-C, a broken installation."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_commands import PROJECT, run, start

SMOKE = PROJECT / "configs" / "smoke.yml"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell's conventions")
def test_a_shell_can_complete_options_keys_and_runs(tmp_path):
    (tmp_path / "lightning_logs/smoke/checkpoints").mkdir(parents=True)

    def complete(line: str) -> list[str]:
        command = line.split()[0]
        asked = {f"_{command.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": line}
        asked["COMP_CWORD"] = str(len(line.split()) - 1)
        assert os.access(PROJECT / command, os.X_OK)
        ended = subprocess.run(
            [sys.executable, PROJECT / command],
            env=os.environ | asked, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert ended.stderr == ""
        return ended.stdout.split()

    assert complete("train.py --cont") == ["--continue-training"]
    assert complete("train.py configs/smoke.yml training.max_st") == ["training.max_steps="]
    assert complete("dataset.py configs/smoke.yml dataset.ro") == ["dataset.root="]
    assert complete("sample.py --run-name smo") == ["smoke"]


COMMANDS = ("train", "sample", "evaluate", "figures", "convert", "dataset")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_package_is_named(command):
    without = [sys.executable, "-S", PROJECT / f"{command}.py", "--help"]
    ended = subprocess.run(without, capture_output=True, text=True, cwd=PROJECT)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: \w+ is not installed for .*pip install -r .*\n", ended.stderr)


def test_packages_that_do_not_fit_together_are_named(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for line in ("train.py configs/smoke.yml", "train.py configs/smoke.yml --dry-run"):
        said = run(f"{line} training.results_folder={tmp_path}", PROJECT, code=1)
        assert "error: torch and torchvision do not fit together" in said
        assert "pip install --force-reinstall torch torchvision" in said


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes and signals")
def test_a_reader_that_leaves_and_letters_that_a_terminal_lacks(tmp_path):
    """`| head -1` with an ASCII terminal: training goes on, brackets and accents are names."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    line = f"train.py {SMOKE} --run-name café training.results_folder=logs[bold]"
    process = start(line, tmp_path, env=environment)
    assert process.stdout.readline() == "run folder: logs[bold]/caf\\xe9\n"
    process.stdout.close()
    assert process.wait(120) == 0
    assert (tmp_path / "logs[bold]/café/checkpoints/step-00000006.ckpt").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_while_packages_are_imported(tmp_path):
    process = start(f"dataset.py {SMOKE}", tmp_path)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
