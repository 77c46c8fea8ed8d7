"""Files are written whole or not at all; a last.ckpt that was left behind is mended."""

import errno
import io
import os
import re
from pathlib import Path

import pytest
from helpers import assert_same, failing, train
from typer.testing import CliRunner

import files
from cli import describe
from files import advice, atomic_write
from weights import load_model, newest_checkpoint, read_checkpoint, saved_steps, up_to_date

# ---- one way to write


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_names_the_file_and_what_to_do(call, code, tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    monkeypatch.setattr(files.os, call, failing(getattr(os, call), code))
    for before, intact in (("", ""), ("old", "; what was there before is intact")):
        if before:
            path.write_text(before)
        with pytest.raises(OSError) as caught, atomic_write(path) as temporary:
            temporary.write_text("new")
        told = f"cannot write {path}: {os.strerror(code)}; {advice(code)}{intact}"
        assert str(caught.value) == describe(caught.value) == told
        assert "give the same command again" in told
        assert caught.value.errno == code
        assert [p.read_text() for p in tmp_path.iterdir()] == [before] * bool(before)


def test_the_kind_of_an_error_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", failing(os.replace, errno.EACCES))
    denied = pytest.raises(PermissionError, match=r"cannot write .*x: Permission denied; allow it")
    with denied, atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
    (tmp_path / "file").touch()
    there = pytest.raises(FileExistsError, match=r"x: File exists \(.*file\); give another path")
    with there, atomic_write(tmp_path / "file" / "x"):
        pass


def test_an_error_of_a_writer_is_its_own(tmp_path):
    for error in (ValueError("no"), KeyboardInterrupt(), RuntimeError("no")):
        with pytest.raises(type(error)), atomic_write(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise error
        assert not list(tmp_path.iterdir())
    # Pillow's have no errno, and torch hides the system's
    told = pytest.raises(OSError, match=r"cannot write .*x: encoder error -2; .*again$")
    with told, atomic_write(tmp_path / "x"):
        raise OSError("encoder error -2")
    told = pytest.raises(OSError, match=r"cannot write .*x: No space left on device; free some")
    with told, atomic_write(tmp_path / "x"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")


def test_folders_and_leftovers(tmp_path):
    out = tmp_path / "deep" / "out.txt"
    out.parent.mkdir()
    (out.parent / ".out.tmp.txt").mkdir()  # of a process that was killed
    (out.parent / ".out.tmp.txt" / "old").touch()
    with atomic_write(out, keep_suffix=True) as temporary:
        assert temporary.name == ".out.tmp.txt"
        temporary.mkdir()
        (temporary / "new").write_text("1")
    assert [p.name for p in out.iterdir()] == ["new"]
    with atomic_write(tmp_path / "a", unique=True) as one:
        with atomic_write(tmp_path / "a", unique=True) as two:
            two.write_text("2")
        one.write_text("1")
    assert (tmp_path / "a").read_text() == "1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "deep"]


def test_what_the_system_says_of_other_calls():
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "some/file")
    assert describe(error) == f"some/file: Too many open files; {advice(errno.EMFILE)}"
    assert describe(FileNotFoundError("no run x; there are: y")) == "no run x; there are: y"


# ---- a run


@pytest.fixture
def left_behind(tmp_path):
    """A run whose last.ckpt could not be renamed at its last step."""
    train(tmp_path, "logging.save_every=4")
    folder = tmp_path / "checkpoints"
    os.unlink(folder / "last.ckpt")
    os.link(folder / "step-00000004.ckpt", folder / "last.ckpt")
    return folder


def test_a_failed_rename_of_last_is_said(tmp_path, monkeypatch):
    saves = lambda _, to: Path(to).name == "last.ckpt" and saved_steps(Path(to).parent)[1:]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing(os.replace, errno.EIO, saves))
        with pytest.raises(OSError, match=r"cannot write .*last\.ckpt: Input/output error; see"):
            train(tmp_path, "logging.save_every=4")
    folder = tmp_path / "checkpoints"
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 4
    assert newest_checkpoint(tmp_path)[0] == folder / "step-00000006.ckpt"
    assert os.path.samefile(folder / "last.ckpt", folder / "step-00000006.ckpt")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("missing", [False, True])
def test_whoever_reads_it_mends_it(left_behind, missing, capsys):
    last, newest = left_behind / "last.ckpt", left_behind / "step-00000006.ckpt"
    if missing:
        last.unlink()
    assert load_model(last).step == 6
    was = "was missing" if missing else "was left behind at step 4"
    assert capsys.readouterr().out == f"{last} {was}; it is step-00000006.ckpt again\n"
    assert os.path.samefile(last, newest)
    assert up_to_date(last) == last
    assert capsys.readouterr().out == ""


def test_where_it_cannot_be_mended_the_newest_is_taken(left_behind, monkeypatch, capsys):
    last, newest = left_behind / "last.ckpt", left_behind / "step-00000006.ckpt"
    monkeypatch.setattr(files.os, "replace", failing(os.replace, errno.EROFS))
    assert load_model(last).step == load_model(left_behind.parent).step == 6
    assert f"was left behind at step 4; {newest} is taken instead\n" in capsys.readouterr().out
    assert read_checkpoint(last)["global_step"] == 4


def test_a_last_that_is_not_behind_stays(left_behind, capsys):
    last, newest = left_behind / "last.ckpt", left_behind / "step-00000006.ckpt"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1000])  # the newest whole one is of the same step
    assert up_to_date(last) == last
    newest.write_bytes(content)
    last.unlink()
    last.write_bytes(content)  # a copy, on a file system without links
    assert up_to_date(last) == last
    last.write_bytes(content[:-1000])  # damaged is not behind
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        load_model(last)
    assert capsys.readouterr().out == ""


def train_in(place: Path, monkeypatch, line: str) -> tuple[int, str]:
    import train

    monkeypatch.chdir(place)
    (place / "configs").exists() or (place / "configs").symlink_to(
        Path(__file__).parents[1] / "configs"
    )
    arguments = f"configs/smoke.yml hardware.accelerator=cpu logging.logger=csv {line}"
    result = CliRunner().invoke(train.app, arguments.split())
    return result.exit_code, result.output


def state(place: Path, name: str) -> dict:
    return read_checkpoint(place / "lightning_logs" / name / "checkpoints/last.ckpt")["state_dict"]


@pytest.mark.parametrize("name", ["config.yml", "step-00000006.ckpt", "last.ckpt"])
def test_after_a_failed_write_it_goes_on(name, tmp_path, monkeypatch):
    """The first write of all, of the first checkpoint, and of last.ckpt at the last step."""
    assert train_in(tmp_path, monkeypatch, "--run-name calm")[0] == 0
    with monkeypatch.context() as patch:
        wrong = lambda _, to: Path(to).name == name
        patch.setattr(files.os, "replace", failing(os.replace, errno.ENOSPC, wrong))
        code, said = train_in(tmp_path, monkeypatch, "--run-name r")
    assert code in (1, 2)
    assert said.count("error: ") == 1
    assert f"{name}: No space left on device; free some and give the same command again" in said
    code, said = train_in(tmp_path, monkeypatch, "--run-name r --continue-training")
    assert code == 0, said
    assert ("has all 6 steps" in said) == ("was missing" in said) == (name == "last.ckpt")
    assert_same(state(tmp_path, "calm"), state(tmp_path, "r"))


@pytest.mark.parametrize("mode", ["w", "a"])  # TensorBoard's first write, a later one
def test_a_log_that_cannot_be_written_is_named(mode, tmp_path, monkeypatch, capfd):
    events = lambda path, how="r", *_: "events.out" in str(path) and mode in how
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", failing(io.open, errno.EMFILE, events))
        code, said = train_in(tmp_path, monkeypatch, "logging.logger=tensorboard --run-name r")
    said += capfd.readouterr().err
    assert code in (1, 2)
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    assert re.search(r"error: .*lightning_logs/r: Too many open files; allow more .*again", said)


def test_fine_tuning_that_failed_at_its_first_write_is_fine_tuning(tmp_path, monkeypatch):
    weights = Path(__file__).parents[1] / "pretrained" / "digits.safetensors"
    line = f"--checkpoint-path {weights} --continue-training --run-name r"
    (tmp_path / "lightning_logs" / "r").mkdir(parents=True)
    _, said = train_in(tmp_path, monkeypatch, line)  # it took them, rather than begin without
    assert "digits.safetensors: the weights do not fit" in said
