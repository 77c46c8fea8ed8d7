"""Runs that are killed, cut off, starved of disk or left alone by a rank; minutes long."""

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import PROJECT, ended, run, start

pytestmark = pytest.mark.slow

LONG = (
    "configs/smoke.yml model.base_channels=32 training.max_steps=3000 logging.save_every=15 "
    "logging.log_every=10 evaluation.validate_every=200 logging.preview_every=300 "
    "logging.preview_images=2 hardware.num_workers=1"
)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    return tmp_path


def final(place: Path, name: str) -> dict:
    path = place / "lightning_logs" / name / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


def assert_same_run(one: dict, other: dict) -> None:
    assert one["global_step"] == other["global_step"]
    for key, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][key]), key
    one, other = (c["optimizer_states"][0]["state"] for c in (one, other))
    for index, state in one.items():
        for key, value in state.items():
            assert torch.equal(value, other[index][key])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_killed_ten_times_it_is_the_same_run(place, precision):
    long = f"{LONG} hardware.precision={precision}"
    run(f"python train.py {long} --run-name calm", place, timeout=600)
    folder = place / "lightning_logs" / "killed" / "checkpoints"
    dice = random.Random(0)
    kills = in_the_write = 0
    arguments = f"{long} --run-name killed"
    while kills < 10:
        with start(f"python train.py {arguments}", place) as process:
            process.wait_for("data:")  # the last line before the first step
            arguments = f"{long} --run-name killed --continue-training"
            time.sleep(dice.uniform(0.1, 2.0))
            if kills % 2:  # wait for a write, and kill in it
                write = lambda: list(folder.glob(".step-*.tmp"))
                process.wait_until(write, "write", pause=0.0002)
                in_the_write += process.returncode is None
            assert process.returncode is None, "it came to its end before it was killed enough"
        kills += 1  # the block has killed it, with what it started
    leftovers = list(folder.glob(".*.tmp"))
    run(f"python train.py {arguments}", place, timeout=600)
    assert_same_run(final(place, "calm"), final(place, "killed"))
    assert not list(folder.glob(".*.tmp"))
    assert in_the_write >= 4
    print(f"{kills} kills, {in_the_write} while writing, {len(leftovers)} left a half file behind")


def test_a_full_disk_is_said(place):
    disk = place / "disk"
    disk.mkdir()
    with start(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], place) as mount:
        mount.finish(code=None)
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mount.output}")
    try:
        # one checkpoint is 5 MB, and up to 9 are asked for
        output = run(
            f"python train.py {LONG} logging.results_folder=disk logging.keep_checkpoints=9 "
            "--run-name full", place, code=1, timeout=300
        )  # fmt: skip
        assert "No space left" in output
        good = re.search(r"the last checkpoint: (\S+)", output)[1]
        torch.load(place / good, weights_only=True)
        assert not list((disk / "full" / "checkpoints").glob(".*.tmp"))
        output = run(f"python sample.py disk/full --num-images 1 --output-dir '{place}/s'", place)
        assert Path(good).name[5:13].lstrip("0") in output
    finally:
        run(["umount", "-l", disk], place)


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_when_one_rank_dies_the_others_end(place, victim):
    arguments = (
        f"{LONG} training.max_steps=100000 hardware.devices=2 hardware.accelerator=cpu "
        "hardware.num_workers=0"
    )
    with start(f"python train.py {arguments} --run-name two", place) as process:
        process.wait_for("step 20 of")
        rank_1 = int(run(["pgrep", "-P", str(process.pid), "-f", "train.py"], place).split()[0])
        os.kill(rank_1 if victim == "child" else process.pid, signal.SIGKILL)
        if victim == "child":
            output = process.finish(code=None)
            assert process.returncode not in (0, 2)
            assert "Traceback" not in output
            assert "error" in output
            assert "to continue:" in output
        else:
            process.finish(-signal.SIGKILL)
        ended(rank_1)


@pytest.mark.parametrize("to", ["parent", "group"])
def test_a_signal_stops_all_ranks_together(place, to):
    arguments = f"{LONG} training.max_steps=100000 hardware.devices=2 hardware.accelerator=cpu"
    with start(f"python train.py {arguments} --run-name two", place) as process:
        process.wait_for("step 20 of")
        if to == "parent":
            process.send(signal.SIGTERM)
        else:
            process.send_group(signal.SIGINT)
        output = process.finish(143 if to == "parent" else 130)
    assert "Traceback" not in output
    assert output.count("to continue:") == 1
    saved = re.search(r"saved (\S+)", output)[1]
    assert torch.load(place / saved, weights_only=True)["global_step"] >= 20


def test_a_second_ctrl_c_ends_at_once(place):
    with start(f"python train.py {LONG} training.max_steps=100000 --run-name x", place) as process:
        process.wait_for("step 100 of")
        process.send(signal.SIGINT)
        process.send(signal.SIGINT)
        process.finish(130, timeout=5)
    run(f"python train.py {LONG} training.max_steps=150 --run-name x --continue-training", place)


def test_torchrun_trains_the_same_run(place):
    common = (
        "configs/smoke.yml model.dropout=0.0 hardware.precision=32-true hardware.accelerator=cpu"
    )
    run(f"python train.py {common} --run-name one", place)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, PROJECT / "train.py", *common.split(), "hardware.devices=2"]
    run([*command, "--run-name", "two"], place, timeout=120)
    one, two = final(place, "one"), final(place, "two")
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-4, atol=1e-5)


def test_slurm_requeues_and_the_job_goes_on(place):
    stub = place / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@" >> requeued\n')
    stub.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
    }  # fmt: skip
    environment = {**slurm, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    short = f"{LONG} training.max_steps=200 evaluation.validate_every=100"
    arguments = f"{short} --run-name job"
    run(f"python train.py {short} --run-name calm", place, timeout=120)
    with start(f"python train.py {arguments}", place, env=environment) as process:
        process.wait_for("step 20 of")
        process.send_group(signal.SIGUSR1)  # loader workers get it, too
        process.finish(128 + signal.SIGUSR1)
    assert (place / "requeued").read_text() == "requeue 77\n"
    environment["SLURM_RESTART_COUNT"] = "1"
    assert "continuing from" in run(
        f"python train.py {arguments}", place, env=environment, timeout=120
    )
    assert_same_run(final(place, "calm"), final(place, "job"))
    assert not shutil.which("scontrol", path=str(place))


def test_two_nodes_in_two_network_namespaces(place):
    script = PROJECT / "tests" / "two_nodes.sh"
    common = (
        "configs/smoke.yml model.dropout=0.0 hardware.precision=32-true hardware.accelerator=cpu"
    )
    run(f"python train.py {common} --run-name one", place)
    command = [
        "bash", script, sys.executable, PROJECT / "train.py", *common.split(),
        "hardware.devices=1", "hardware.num_nodes=2", "--run-name", "two",
    ]  # fmt: skip
    with start(command, place) as process:
        output = process.finish(code=None, timeout=200)
    if process.returncode == 77:
        pytest.skip(f"network namespaces cannot be made here: {output.strip()}")
    assert process.returncode == 0, output
    one, two = final(place, "one"), final(place, "two")
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-4, atol=1e-5)
