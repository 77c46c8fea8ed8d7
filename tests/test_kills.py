"""Runs that are killed, cut off, starved of disk or left alone by a rank; minutes long."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_commands import PROJECT, run, start

pytestmark = pytest.mark.slow

LONG = (
    "configs/smoke.yml model.base_channels=32 training.max_steps=3000 training.save_every=15 "
    "training.log_every=10 training.validate_every=200 training.preview_every=300 "
    "training.preview_images=2 training.num_workers=1"
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


def kill_tree(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_twenty_times_it_is_the_same_run(place):
    run(f"python train.py {LONG} --run-name calm", place)
    folder = place / "lightning_logs" / "killed" / "checkpoints"
    dice = random.Random(0)
    kills = in_the_write = 0
    arguments = f"{LONG} --run-name killed"
    while kills < 20:
        process = start(f"python train.py {arguments}", place, start_new_session=True)
        while "data:" not in process.stdout.readline():  # the last line before the first step
            assert process.poll() is None, process.stdout.read()
        arguments = f"{LONG} --run-name killed --continue-training"
        time.sleep(dice.uniform(0.1, 2.0))
        if kills % 2:  # wait for a write, and kill in it
            while process.poll() is None and not list(folder.glob(".step-*.tmp")):
                time.sleep(0.0002)
            in_the_write += process.poll() is None
        assert process.poll() is None, "it came to its end before it was killed often enough"
        kill_tree(process)
        kills += 1
    leftovers = list(folder.glob(".*.tmp"))
    run(f"python train.py {arguments}", place)
    assert_same_run(final(place, "calm"), final(place, "killed"))
    assert not list(folder.glob(".*.tmp"))
    assert in_the_write >= 8
    print(f"{kills} kills, {in_the_write} while writing, {len(leftovers)} left a half file behind")


def test_a_full_disk_is_said(place):
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        # one checkpoint is 5 MB, and up to 9 are asked for
        output = run(
            f"python train.py {LONG} training.results_folder=disk training.keep_checkpoints=9 "
            "--run-name full", place, code=1
        )  # fmt: skip
        assert "No space left" in output
        good = re.search(r"the last checkpoint: (\S+)", output)[1]
        torch.load(place / good, weights_only=True)
        assert not list((disk / "full" / "checkpoints").glob(".*.tmp"))
        output = run(f"python sample.py disk/full --num-images 1 --output-dir {place}/s", place)
        assert Path(good).name[5:13].lstrip("0") in output
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_when_one_rank_dies_the_others_end(place, victim):
    arguments = (
        f"{LONG} training.max_steps=100000 training.devices=2 training.accelerator=cpu "
        "training.num_workers=0"
    )
    process = start(f"python train.py {arguments} --run-name two", place, start_new_session=True)
    while "step 20 of" not in process.stdout.readline():
        assert process.poll() is None
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True
    ).stdout.split()
    rank_1 = int(children[0])
    os.kill(rank_1 if victim == "child" else process.pid, signal.SIGKILL)
    began = time.time()
    if victim == "child":
        output, _ = process.communicate(timeout=60)
        assert process.returncode not in (0, 2)
        assert "Traceback" not in output
        assert "error" in output
        assert "to go on:" in output
    else:
        process.wait()
    while Path(f"/proc/{rank_1}").exists() and "zombie" not in (
        Path(f"/proc/{rank_1}/status").read_text()
    ):
        assert time.time() - began < 60
        time.sleep(0.2)


@pytest.mark.parametrize("to", ["parent", "group"])
def test_a_signal_stops_all_ranks_together(place, to):
    arguments = f"{LONG} training.max_steps=100000 training.devices=2 training.accelerator=cpu"
    process = start(f"python train.py {arguments} --run-name two", place, start_new_session=True)
    while "step 20 of" not in process.stdout.readline():
        assert process.poll() is None
    if to == "parent":
        process.send_signal(signal.SIGTERM)
    else:  # as Ctrl-C in a terminal
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (143 if to == "parent" else 130), output
    assert "Traceback" not in output
    assert output.count("to go on:") == 1
    saved = re.search(r"saved (\S+)", output)[1]
    assert torch.load(place / saved, weights_only=True)["global_step"] >= 20


def test_a_second_ctrl_c_ends_at_once(place):
    process = start(f"python train.py {LONG} training.max_steps=100000 --run-name x", place)
    while "step 100 of" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    began = time.time()
    assert process.wait(20) == 130
    assert time.time() - began < 5
    run(f"python train.py {LONG} training.max_steps=150 --run-name x --continue-training", place)


def test_torchrun_trains_the_same_run(place):
    common = "configs/smoke.yml model.dropout=0.0 training.accelerator=cpu"
    run(f"python train.py {common} --run-name one", place)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(PROJECT / "train.py"), *common.split(), "training.devices=2"]
    subprocess.run([*command, "--run-name", "two"], cwd=place, check=True, timeout=120)
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
    environment = {**os.environ, **slurm, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    arguments = f"{LONG} training.max_steps=400 --run-name job"
    run(f"python train.py {LONG} training.max_steps=400 --run-name calm", place)
    process = start(f"python train.py {arguments}", place, env=environment, start_new_session=True)
    while "step 20 of" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGUSR1)  # loader workers get it, too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert (place / "requeued").read_text() == "requeue 77\n"
    environment["SLURM_RESTART_COUNT"] = "1"
    process = start(f"python train.py {arguments}", place, env=environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "continuing from" in output
    assert_same_run(final(place, "calm"), final(place, "job"))
    assert not shutil.which("scontrol", path=str(place))


def test_two_nodes_in_two_network_namespaces(place):
    script = PROJECT / "tests" / "two_nodes.sh"
    common = "configs/smoke.yml model.dropout=0.0 training.accelerator=cpu"
    run(f"python train.py {common} --run-name one", place)
    result = subprocess.run(
        ["bash", script, sys.executable, str(PROJECT / "train.py"), *common.split(),
         "training.devices=1", "training.num_nodes=2", "--run-name", "two"],
        cwd=place, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    if result.returncode == 77:
        pytest.skip(f"network namespaces cannot be made here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    one, two = final(place, "one"), final(place, "two")
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-4, atol=1e-5)
