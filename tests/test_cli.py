"""What the commands are to a terminal: words, completion, pipes, Ctrl-C, a broken installation."""

import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import PROJECT, run, start

from cli import describe, usable_device, which_model

SMOKE = PROJECT / "configs" / "smoke.yml"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell's conventions")
def test_a_shell_can_complete_options_keys_and_runs(tmp_path):
    (tmp_path / "lightning_logs/smoke/checkpoints").mkdir(parents=True)
    (tmp_path / "pretrained").symlink_to(PROJECT / "pretrained")

    def complete(line: str) -> list[str]:
        command = line.split()[0]
        asked = {f"_{command.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": line}
        asked["COMP_CWORD"] = str(len(line.split()) - 1)
        assert os.access(PROJECT / command, os.X_OK)
        return run([sys.executable, PROJECT / command], tmp_path, env=asked).split()

    assert complete("train.py --cont") == ["--continue-training"]
    assert complete("train.py configs/smoke.yml training.max_st") == ["training.max_steps="]
    assert complete("dataset.py configs/smoke.yml dataset.ro") == ["dataset.root="]
    assert complete("sample.py --run-name smo") == ["smoke"]
    assert complete("sample.py --run-name dig") == ["digits"]  # which ships


def test_a_model_that_ships_is_called_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pretrained").symlink_to(PROJECT / "pretrained")
    ships = Path("pretrained/digits.safetensors")
    assert which_model(None, "digits", None) == ships == which_model(ships, None, None)
    assert capsys.readouterr().out == f"no run digits in lightning_logs: {ships}, which ships\n"
    with pytest.raises(ValueError, match=f"--checkpoint best is of a run's folder, and {ships} is"):
        which_model(None, "digits", "best")
    for name in ("digits", "mine"):
        Path("lightning_logs", name, "checkpoints").mkdir(parents=True)
    assert which_model(None, "digits", None) == Path("lightning_logs/digits")  # a run wins
    for name, hint in {
        "zz": "there are: digits, emoji, mine",
        "emojis": "did you mean emoji",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"no run '{name}' in lightning_logs; {hint}"):
            which_model(None, name, None)
    assert not capsys.readouterr().out


COMMANDS = ("train", "sample", "evaluate", "figures", "convert", "dataset")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_package_is_named(command):
    without = [sys.executable, "-S", PROJECT / f"{command}.py", "--help"]
    said = run(without, PROJECT, code=1)
    assert re.fullmatch(r"error: \w+ is not installed for .*pip install -r .*\n", said)


def test_packages_that_do_not_fit_together_are_named(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for line in ("train.py configs/smoke.yml", "train.py configs/smoke.yml --dry-run"):
        folder = shlex.quote(f"logging.results_folder={tmp_path}")
        said = run(f"{line} {folder}", PROJECT, code=1)
        assert "error: torch and torchvision do not fit together" in said
        assert "pip install --force-reinstall torch torchvision" in said


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes and signals")
def test_a_reader_that_leaves_and_letters_that_a_terminal_lacks(tmp_path):
    """`| head -1` with an ASCII terminal: training goes on, brackets and accents are names."""
    train = [sys.executable, PROJECT / "train.py", SMOKE, "--run-name", "café"]
    train.append("logging.results_folder=logs[bold]")
    shell = ["sh", "-c", '{ "$@" 2>&1; echo $? > code; } | head -1', "sh"]
    said = run([*shell, *train], tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert said == "run folder: logs[bold]/caf\\xe9\n"
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "logs[bold]/café/checkpoints/step-00000006.ckpt").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_while_packages_are_imported(tmp_path):
    with start([sys.executable, PROJECT / "dataset.py", SMOKE], tmp_path) as process:
        if (maps := Path(f"/proc/{process.pid}/maps")).exists():
            process.wait_until(lambda: "libtorch" in maps.read_text(), "import of torch")
        else:
            time.sleep(1.5)
        process.send(signal.SIGINT)
        assert "Traceback" not in process.finish(130)


def test_devices_are_checked_without_a_context_on_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", None)  # nothing is put there
    assert [usable_device(d) for d in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda", "cuda", "cuda:1", "cpu",
    ]  # fmt: skip
    for wrong in ("cuda:2", "cuda:x", "tpu", "cuda:", ""):
        with pytest.raises(ValueError, match=r"there are: cuda:0 \.\.\. cuda:1, .*cpu"):
            usable_device(wrong)


def test_a_locale_that_cannot_write_a_name_is_said():
    with pytest.raises(UnicodeEncodeError) as caught:
        "l\udcc3uft".encode()
    assert describe(caught.value) == "this locale cannot write 'l\\udcc3uft'; set PYTHONUTF8=1"
