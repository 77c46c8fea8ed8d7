"""Weights & Biases: a real run of theirs, offline, read from its file."""

import json
import socket
import struct
from contextlib import closing

import pytest
from helpers import invoke
from processes import PROJECT

LINE = (
    "train.py configs/smoke.yml hardware.accelerator=cpu logging.logger=[tensorboard,wandb] "
    "logging.preview_every=2 logging.preview_images=2 --run-name w "
)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    return tmp_path


def records(path):
    """Yield what is in a .wandb file: after 7 bytes LevelDB's log, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def curves(path):
    """Return {name: {step: value}} and the ids and the config that a .wandb file holds."""
    found, ids, config = {}, set(), {}
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        row = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for name in row.keys() - {"trainer/global_step"}:
            found.setdefault(name, {})[row.get("trainer/global_step")] = row[name]
    return found, ids, config


@pytest.mark.slow
def test_a_run_and_its_continuation_are_one_page(place, monkeypatch):
    wandb = pytest.importorskip("wandb")
    ids = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.setblocking(False)
        nowhere = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, nowhere)
        monkeypatch.setenv("WANDB_MODE", "offline")
        for steps, options in ((4, ""), (6, "--continue-training")):
            said = invoke(f"{LINE} training.max_steps={steps} {options}", place, monkeypatch)
            wandb.finish()
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
    assert "step 4" in said
    runs = sorted((place / "lightning_logs/w/wandb").glob("offline-run-*"))
    for folder, logged in zip(runs, ([2, 4], [6]), strict=True):
        (file,) = folder.glob("*.wandb")
        found, (page,), config = curves(file)
        ids.append(page)
        losses = found["train/loss"]
        assert list(losses) == logged and all(0.5 < loss < 2 for loss in losses.values())
        assert list(found["samples/ema/_type"]) == logged
        assert config["model"]["base_channels"] == 8
        pictures = list(folder.glob("files/media/images/samples/ema_*.png"))
        assert pictures and pictures[0].read_bytes()[:4] == b"\x89PNG"
        if (text := folder / "files/output.log").exists():  # they may have only the records
            assert "44,969 parameters" in text.read_text()
    assert ids[0] == ids[1] == f"w-{(place / 'lightning_logs/w/.id').read_text()}"
    assert list((place / "lightning_logs/w").glob("events.out.tfevents.*"))


def test_without_wandb_there_is_one_message(place, monkeypatch):
    monkeypatch.setattr("training.trainer.find_spec", lambda name: None)
    said = invoke(LINE, place, monkeypatch, code=2)
    assert "wandb needs `pip install wandb`, or all of requirements-extras.txt" in said
