"""One system call that fails, each in turn: one message, and the same command again mends it.

A command is traced once, which numbers its calls on the folder that it writes to; then it is run
once for each of them, with that call returning an error. Of each command CAP evenly spaced calls
are taken (FAULTS=1000 in the environment: all of them); minutes long.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import Net, noise_image
from processes import PROJECT

CAP = int(os.environ.get("FAULTS", "10"))
LIMIT = 240  # seconds a command
KINDS = "write,pwrite64,fsync,fdatasync,/^rename,/^link,/^unlink,/^open,/^mkdir"
TARGET = re.compile(r"\btarget\b")  # the folder that each command here writes to
SMALL = (
    "configs/smoke.yml hardware.accelerator=cpu hardware.num_workers=0 training.max_steps=4 "
    "logging.save_every=2 dataset.cache=target/cache"
)


def strace(*options: str) -> list[str]:
    return ["strace", "-f", "-y", "-qq", "-s", "0", "--seccomp-bpf", "-e", "signal=none", *options]


def can_trace() -> bool:
    try:
        traced = strace("-e", "inject=mkdir:error=EIO:when=1", "-o", os.devnull, "mkdir", "/")
        said = subprocess.run(traced, capture_output=True, text=True, timeout=30).stderr
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "Input/output error" in said


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace here"),
]


def execute(command: str, place: Path, tracer: tuple[str, ...] = ()) -> tuple[int, str]:
    """The exit code and all that was printed; what takes too long is killed, with its children."""
    script, *arguments = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*(strace(*tracer) if tracer else ()), sys.executable, PROJECT / script, *arguments],
        cwd=place, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{command} did not end in {LIMIT} s; so far:\n{output}")
    return process.returncode, output


class Call(NamedTuple):
    """The `number`-th system call of its name in its thread."""

    name: str
    number: int
    line: str


def calls(trace: Path) -> list[Call]:
    """Those of a trace that concern the folder."""
    counts, found = Counter(), []
    for line in trace.read_text(errors="replace").splitlines():
        if match := re.match(r"(\d+)\s+(\w+)\((.*)", line):
            thread, name, rest = match.groups()
            counts[thread, name] += 1
            if TARGET.search(rest):
                found.append(Call(name, counts[thread, name], line))
    return found


def some(found: list[Call]) -> list[tuple[Call, str]]:
    """CAP of them, as many of each kind, evenly spaced; each with an error that it can give."""
    kinds = [[c for c in found if c.name == name] for name in sorted({c.name for c in found})]
    shares = Counter()
    for kind in cycle(range(len(kinds))):
        if sum(shares.values()) == min(CAP, len(found)):
            break
        shares[kind] += shares[kind] < len(kinds[kind])
    errors, opening = cycle(("EIO", "ENOSPC", "EDQUOT")), cycle(("EMFILE", "EIO", "ENOSPC"))
    chosen = []
    for kind, share in shares.items():
        of_kind = kinds[kind]
        for i in range(share):
            call = of_kind[(2 * i + 1) * len(of_kind) // (2 * share)]
            chosen.append((call, next(opening if call.name.startswith("open") else errors)))
    return chosen


def disturb(command: str, new_place, result, to_continue: str = "") -> None:
    """Run `command` with each fault, then again without; `result` must be the undisturbed one.

    Args:
        to_continue: an option of the second time, where the first has left anything at all.
    """
    calm = new_place("calm")
    code, said = execute(command, calm)
    assert code == 0, said
    wanted = result(calm)
    traced = new_place("traced")
    code, said = execute(command, traced, ("-e", f"trace={KINDS}", "-o", str(traced / "trace")))
    assert code == 0, said
    assert result(traced) == wanted
    found = calls(traced / "trace")
    assert {call.name for call in found} >= {"write", "openat", "fsync", "rename"}

    def check(numbered) -> tuple[str, str | None]:
        """How it ended, and what is wrong with that."""
        index, (call, error) = numbered
        place = new_place(f"fault-{index}")
        inject = f"inject={call.name}:error={error}:when={call.number}"
        trace = place / "trace"
        options = ("-e", f"trace={call.name}", "-e", inject, "-o", str(trace))
        code, said = execute(command, place, options)
        hit = [line for line in trace.read_text().splitlines() if "(INJECTED)" in line]
        what = f"{error} by {call.line}\n{said}"
        if not any(TARGET.search(line) for line in hit):
            return "missed", None  # another call was the k-th of its thread this time
        messages = re.findall(r"^error: .*", said, re.M)
        if "Traceback" in said or code < 0:
            return "wrong", f"{what}\nended with {code}"
        if code and (
            len(messages) != 1
            or not TARGET.search(messages[0])
            or not re.search(r"again|give |allow ", messages[0])
        ):
            return "wrong", f"{what}\nthis is not one message with a file and what to do"
        if code:
            begun = any((place / "target").glob("*"))
            second, said_again = execute(f"{command} {to_continue if begun else ''}", place)
            if second or "Traceback" in said_again:
                return "wrong", f"{what}\nand again, with {second}:\n{said_again}"
        if result(place) != wanted:
            return "wrong", f"{what}\nthe result is another one (after an exit with {code})"
        if list(place.glob("target/**/.*.tmp*")):
            return "wrong", f"{what}\nleft over: {list(place.glob('target/**/.*.tmp*'))}"
        shutil.rmtree(place)
        return f"ended with {code}", None

    chosen = some(found)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(check, enumerate(chosen)))
    ended = Counter(outcome for outcome, _ in outcomes)
    print(f"{len(chosen)} of {len(found)} calls failed: {dict(ended)}")
    wrong = [text for _, text in outcomes if text]
    assert not wrong, "\n\n".join(wrong)
    assert ended["missed"] <= len(chosen) // 4, ended


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a trained model, pictures and an extractor of features."""

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "configs").symlink_to(PROJECT / "configs")
    code, said = execute(
        f"train.py {SMALL} training.ema_lengths=[0.1] logging.results_folder=runs", folder
    )
    assert code == 0, said
    (folder / "pictures").mkdir()
    for i in range(4):
        noise_image(i).save(folder / "pictures" / f"{i}.png")
    torch.jit.script(Net().eval()).save(folder / "net.pt")
    return folder


@pytest.fixture
def new_place(model, tmp_path):
    def new(name: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        for path in ("configs", "pictures", "net.pt", "runs"):
            (place / path).symlink_to(model / path)
        (place / "model.ckpt").symlink_to(model / "runs/smoke/checkpoints/last.ckpt")
        return place

    return new


def contents(place: Path) -> dict:
    """All files of the folder, without times and the order of safetensors' header."""
    found = {}
    for path in sorted((place / "target").rglob("*")):
        if path.is_file():
            found[str(path.relative_to(place))] = path.read_bytes()
            if path.name == "metrics.json":
                facts = json.loads(path.read_text())
                facts.pop("seconds")
                found[str(path.relative_to(place))] = facts
            if path.suffix == ".safetensors":
                data = path.read_bytes()
                end = 8 + int.from_bytes(data[:8], "little")
                found[str(path.relative_to(place))] = (json.loads(data[8:end]), data[end:])
    return found


def test_training(new_place):
    def result(place: Path) -> list[bytes]:
        last = place / "target/r/checkpoints/last.ckpt"
        data = torch.load(last, weights_only=True)
        state = data["optimizer_states"][0]["state"]
        tensors = [*data["state_dict"].values()]
        tensors += [value for i in sorted(state) for value in state[i].values()]
        snapshots = [p.read_bytes() for p in sorted(place.glob("target/r/ema/*.safetensors"))]
        tensors = [t.numpy().tobytes() for t in tensors]
        return [str(data["global_step"]).encode(), *tensors, *snapshots]

    command = (
        f"train.py {SMALL} training.ema_lengths=[0.1] logging.results_folder=target --run-name r"
    )
    disturb(command, new_place, result, to_continue="--continue-training")


@pytest.mark.parametrize(
    "command",
    [
        "sample.py model.ckpt --num-images 3 --timesteps 2 --output-dir target/s --format npz",
        "dataset.py configs/smoke.yml dataset.name=folder dataset.root=pictures "
        "dataset.cache=target/cache --contact-sheet target/sheet.png",
        "convert.py export model.ckpt target/exported",
        "convert.py export model.ckpt target/model.safetensors --format safetensors",
        "convert.py ema runs/smoke --length 0.08 --output target/ema.safetensors",
        "convert.py import pretrained.safetensors target/new.ckpt",
        "evaluate.py model.ckpt --metrics fid,nll --num-images 6 --nll-images 4 --stride 10 "
        "--sampler ddim --timesteps 2 --batch-size 4 --save-images --output target/e "
        "--extractor net.pt --device cpu",
    ],
    ids=["sample", "decode", "diffusers", "safetensors", "ema", "import", "evaluate"],
)
def test_other_commands(command, new_place):
    command = command.replace("pretrained", str(PROJECT / "pretrained/digits"))
    disturb(command, new_place, contents)
