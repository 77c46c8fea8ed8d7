"""Runs whose length is given in epochs."""

import re

import yaml
from helpers import assert_same, invoke, noise_image, train
from processes import PROJECT

from config import load_config
from weights import newest_checkpoint, read_checkpoint

FEW = "dataset.validation_fraction=0.9"  # 1,797 digits, 180 to train on: 22.5 batches of 8


def test_one_epoch_and_another_are_two(tmp_path):
    straight, adam = train(tmp_path / "a", FEW, "training.max_epochs=2")
    train(tmp_path / "b", FEW, "training.max_epochs=1")
    last, checkpoint = newest_checkpoint(tmp_path / "b")
    assert checkpoint["global_step"] == 23
    assert checkpoint["hyper_parameters"]["training"]["max_epochs"] is None
    both, both_adam = train(tmp_path / "b", FEW, "training.max_epochs=2", resume=last)
    assert newest_checkpoint(tmp_path / "b")[1]["global_step"] == 45
    assert_same(dict(straight.state_dict()), dict(both.state_dict()))
    assert_same(adam, both_adam)


def test_the_command_says_both_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    line = f"train.py configs/smoke.yml {FEW} training.max_epochs=0.1 hardware.accelerator=cpu"
    output = invoke(line, tmp_path, monkeypatch)
    assert "training: 3 steps of 8 images: 0.133 epochs of 180\n" in output
    own = tmp_path / "lightning_logs/smoke/config.yml"
    keys = yaml.safe_load(own.read_text())["training"]
    assert (keys["max_steps"], keys["max_epochs"]) == (3, None)
    longer = f"train.py {own} --run-name smoke --continue-training training.max_epochs=0.3"
    output = invoke(longer, tmp_path, monkeypatch)
    assert "changed: training.max_steps: 3 -> 7" in output
    last = tmp_path / "lightning_logs/smoke/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 7
    assert "has all 7 steps" in invoke(longer, tmp_path, monkeypatch)


def test_images_are_those_that_train(tmp_path, monkeypatch):
    """Files that cannot be read do not count; without any there is one message."""
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    (tmp_path / "mine").mkdir()
    for i in range(20):
        noise_image(i).save(tmp_path / "mine" / f"{i:02d}.png")
    (tmp_path / "mine/bad.png").write_bytes(b"no")
    line = "train.py configs/smoke.yml dataset.name=folder dataset.root={} training.max_epochs=4"
    dry = f"{line} --dry-run hardware.accelerator=cpu"
    monkeypatch.setattr("training.dry_run.LONG", 0.1)
    said = invoke(dry.format("mine"), tmp_path, monkeypatch)
    assert re.search(r"run: .* for 9 steps", said)  # 18 of 20 train: 4 x 18 / 8
    said = invoke(dry.format("none"), tmp_path, monkeypatch, code=2)
    assert said.startswith("error: training.max_epochs counts the images: none (dataset.root)")
    assert "training.max_steps" in said and len(said.splitlines()) == 1
    said = invoke(f"dataset.py {line.format('mine')[9:]}", tmp_path, monkeypatch)
    assert "9 of 8 images: 4.0 epochs" in said
    assert load_config("configs/smoke.yml", ["training.max_epochs=4"]).training.max_steps is None
