"""Checkpoints: what is in them, and what happens where they are damaged, foreign or in the way."""

import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from helpers import Evil, assert_same, run, train

from config import load_config
from training.runs import InUse, find_start, lock
from weights import load_model, newest_checkpoint, read_checkpoint, write_checkpoint


def test_checkpoints_explain_themselves(tmp_path):
    ddpm, _ = train(tmp_path / "run", "logging.save_every=1", "logging.keep_checkpoints=2")
    folder = tmp_path / "run" / "checkpoints"
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["last.ckpt", "step-00000005.ckpt", "step-00000006.ckpt"]
    assert newest_checkpoint(tmp_path / "run")[0] == folder / "step-00000006.ckpt"
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == ddpm.config.model_dump(mode="json")
    for path in (folder / "last.ckpt", tmp_path / "run"):
        loaded = load_model(path)
        assert loaded.config == ddpm.config
        assert loaded.step == 6
        assert_same(dict(loaded.network.state_dict()), dict(ddpm.ema.state_dict()))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 5])
    with torch.no_grad():
        assert torch.equal(load_model(folder / "last.ckpt")(x, t), ddpm.ema(x, t))
        assert torch.equal(load_model(folder / "last.ckpt", "raw")(x, t), ddpm.unet.eval()(x, t))
        assert not torch.equal(ddpm.ema(x, t), ddpm.unet(x, t))


def test_no_checkpoint_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil(), "hyper_parameters": {}, "global_step": 0}, "evil.ckpt")
    for read in (read_checkpoint, load_model):
        with pytest.raises(ValueError, match=r"evil\.ckpt asks to run \w+\.system.*refused"):
            read("evil.ckpt")
    Path("old.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint("old.ckpt")
    assert not Path("stolen").exists()


def test_bad_checkpoints_are_named_and_passed_over(tmp_path, capsys):
    train(tmp_path, "logging.save_every=2")
    folder = tmp_path / "checkpoints"
    newest, middle = folder / "step-00000006.ckpt", folder / "step-00000004.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])  # cut short
    with zipfile.ZipFile(middle) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        at = largest.header_offset + len(largest.filename) + 200
    content = bytearray(middle.read_bytes())
    content[at] ^= 1  # one bit
    middle.write_bytes(content)
    assert newest_checkpoint(tmp_path)[0] == folder / "step-00000002.ckpt"
    said = capsys.readouterr().out
    assert "step-00000006.ckpt is damaged" in said
    assert "step-00000004.ckpt is damaged" in said


def test_a_failed_write_leaves_the_old(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint({"x": 1}, path)

    class Full(torch.Tensor):
        def __reduce_ex__(self, protocol):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.ckpt.*No space left"):
        write_checkpoint({"x": torch.zeros(3).as_subclass(Full)}, path)
    assert torch.load(path, weights_only=True) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_damage_anywhere_is_only_ever_a_value_error(tmp_path):
    path = tmp_path / "x.ckpt"
    write_checkpoint({"hyper_parameters": {}, "state_dict": {}, "global_step": 1}, path)
    whole = path.read_bytes()
    assert read_checkpoint(path)["global_step"] == 1
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert "x.ckpt" in str(error)
    torch.save({"hyper_parameters": 3, "state_dict": 3, "global_step": "x"}, path)
    with pytest.raises(ValueError, match="holds no config"):
        read_checkpoint(path)


def test_other_images_are_not_trained_on(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match="are not those"):
        last, _ = newest_checkpoint(tmp_path)
        train(tmp_path, "training.max_steps=9", "dataset.validation_fraction=0.2", resume=last)


def test_a_folder_is_one_runs(tmp_path):
    held = lock(tmp_path / "lightning_logs/digits")
    asked = dict(continue_training=False, checkpoint_path=None, is_main=True)
    config = load_config(
        "configs/digits.yml", [f"logging.results_folder={tmp_path}/lightning_logs"]
    )
    with pytest.raises(InUse, match="another process is training in"):
        find_start(config, "digits", chosen=True, **asked)
    # of two that start in the same second without a name the second takes another
    other = find_start(config, "digits", chosen=False, **asked)
    assert other.run.name == "digits-2"
    other.release(untouched=True)
    assert not other.run.exists()
    held.close()
    mine = find_start(config, "digits", chosen=True, **asked)
    mine.release(untouched=False)
    assert mine.run.is_dir()


def test_a_checkpoint_is_read_once_to_continue(tmp_path):
    """Counted where the system opens it, reading it whole."""
    overrides = "configs/smoke.yml training.max_steps=2 --run-name r"
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    run(f"python train.py {overrides}", tmp_path)
    script = tmp_path / "count.py"
    script.write_text(
        "import sys, torch, runpy\n"
        "load, seen = torch.load, []\n"
        "torch.load = lambda f, *a, **k: (seen.append(k.get('mmap')), load(f, *a, **k))[1]\n"
        f"sys.argv = [{str(Path('train.py').resolve())!r}, *sys.argv[1:]]\n"
        f"sys.path.insert(0, {str(Path.cwd())!r})\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('whole:', seen.count(None))\n"
    )
    more = overrides.replace("max_steps=2", "max_steps=4").split()
    said = run([sys.executable, script, *more, "--continue-training"], tmp_path)
    assert "trained 4 steps" in said
    assert "whole: 1\n" in said


def test_a_going_back_sets_the_later_aside(tmp_path):
    train(tmp_path, "logging.save_every=2")
    folder = tmp_path / "checkpoints"
    train(tmp_path, "training.max_steps=3", resume=folder / "step-00000002.ckpt")
    assert newest_checkpoint(tmp_path)[0].name == "step-00000003.ckpt"
    assert sorted(p.name for p in folder.glob("*.aside")) == [
        "step-00000004.ckpt.aside",
        "step-00000006.ckpt.aside",
    ]
    first = folder / "step-00000002.ckpt"
    options = "logging.save_every=1", "logging.keep_checkpoints=9"
    train(tmp_path, *options, resume=first)
    train(tmp_path, *options, "training.max_steps=3", resume=first)
    names = [p.name for p in folder.glob("step-00000006.ckpt.aside*")]
    assert sorted(names) == ["step-00000006.ckpt.aside", "step-00000006.ckpt.aside2"]


def test_a_last_checkpoint_that_stands_alone_stays(tmp_path):
    """It may be all that a person has kept, or newer than the steps beside it."""
    train(tmp_path / "run", "logging.save_every=3")
    folder = tmp_path / "run/checkpoints"
    last, older = folder / "last.ckpt", folder / "step-00000003.ckpt"
    content = last.read_bytes()
    (folder / "step-00000006.ckpt").unlink()

    class Look(pl.Callback):
        def on_train_batch_start(self, *_):
            assert last.read_bytes() == content

    train(tmp_path / "run", "training.max_steps=7", resume=last, callbacks=[Look()])
    for path in folder.iterdir():
        path.unlink()
    last.write_bytes(content)
    train(tmp_path / "run", "training.max_steps=7", resume=last, callbacks=[Look()])
    assert not older.exists()


def test_a_copy_of_a_persons_own_stays(tmp_path):
    train(tmp_path, "logging.save_every=2", "training.max_steps=2")
    folder = tmp_path / "checkpoints"
    own = folder / "step-00000002-best.ckpt"
    own.write_bytes((folder / "step-00000002.ckpt").read_bytes())
    options = "logging.save_every=1", "logging.keep_checkpoints=1"
    train(tmp_path, *options, resume=folder / "step-00000002.ckpt")
    assert sorted(p.name for p in folder.glob("*.ckpt")) == [
        "last.ckpt", "step-00000002-best.ckpt", "step-00000006.ckpt",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"PK", b"hello" * 100])
def test_what_is_no_checkpoint(content, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")
    torch.save({"model": {}}, tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match="holds no config"):
        read_checkpoint(tmp_path / "y.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_model(tmp_path / "z.ckpt")
