"""What the README and docs/ say can be done: every command and every snippet, run."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch
from processes import PROJECT, run
from scipy.io import savemat
from test_dataset import noise_image, write_cifar
from test_evaluate import Net
from typer.testing import CliRunner

from config import load_config
from convert import write_diffusers
from metrics import INCEPTION, INCEPTION_SHA256, Extractor
from pl_utils import DDPM

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
SHORT = {  # what cuts the long runs
    "train": "model.base_channels=8 training.max_steps=2 training.batch_size=2 "
    "training.num_workers=0 training.validate_every=0",
    "evaluate": "--num-images 20 --timesteps 5 --nll-images 2 --stride 100",
}
done: set[str] = set()  # pages may share a line


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    """The lines that begin with python, without it."""
    return re.findall(r"^python (.*?)(?:  #.*)?$", "\n".join(blocks(page, "sh")), re.M)


def invoke(command: str) -> None:
    """In this process; long runs are cut short."""
    script, *arguments = shlex.split(command)
    name = script.removesuffix(".py")
    if not re.search(r"configs/smoke|lightning_logs/smoke", command):
        arguments += SHORT.get(name, "").split()
    result = CliRunner().invoke(importlib.import_module(name).app, arguments)
    assert result.exit_code == 0, f"{command}\n{result.output}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The configs, pictures, weights where others must be downloaded, and two finished runs."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs", "pretrained"):
        (folder / name).symlink_to(PROJECT / name)
    write_cifar(folder / "data")
    for name, size in (("data/celeba-hq", 256), ("mine", 20)):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            noise_image(i, (size, size)).save(folder / name / f"{i}.png")
    write_fashion(folder / "fashion")
    for part in ("train", "test"):
        pixels = np.zeros((32, 32, 3, 4), np.uint8)
        savemat(folder / f"data/{part}_32x32.mat", {"X": pixels, "y": np.ones((4, 1))})
    ddpm = DDPM(load_config("configs/cifar10.yml", ["model.base_channels=8"]))
    write_diffusers(ddpm, folder / "google/ddpm-cifar10-32", "unknown")
    (folder / "google/ddpm-cifar10-32/ddpm.json").unlink()
    torch.save(ddpm.ema.state_dict(), folder / "ema_cifar10.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        invoke("train.py configs/smoke.yml training.save_every=2")
        invoke("train.py configs/digits.yml")
    return folder


def write_fashion(folder: Path) -> None:
    folder.mkdir()
    for part in ("train", "t10k"):
        header = np.array([0x803, 4, 28, 28], ">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(4 * 28 * 28))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_python_line(page, place, monkeypatch, request):
    """In their order."""
    monkeypatch.chdir(place)
    inception = lambda *_: Extractor(Net(), INCEPTION, INCEPTION_SHA256)
    for module in ("protocol", "evaluation"):
        monkeypatch.setattr(f"{module}.load_extractor", inception)  # it would be fetched
    assert len(commands(page)) == len(re.findall(r"^python ", page.read_text(), re.M))
    if changes := blocks(page, "diff"):
        request.getfixturevalue("copied")(changes)
    monkeypatch.setattr("dry_run.LONG", 0.1)  # seconds
    for line in commands(page):
        if line in done:
            continue
        done.add(line)
        if "devices=2" in line:  # starts itself again
            run(f"python {line}", place)
        else:
            invoke(line)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """`copied(changes)` puts a changed copy of the project in place of what is imported."""
    ours = {path.stem for path in PROJECT.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in ours & sys.modules.keys()}

    def change(changes: list[str]) -> None:
        for path in (*PROJECT.glob("*.py"), PROJECT / "norm_silu.cpp"):
            copy(path, tmp_path)
        for name, hunk in (pair for text in changes for pair in hunks(text)):
            content = (tmp_path / name).read_text()
            old, new = ("".join(f"{h[1:]}\n" for h in hunk if h[0] in s) for s in (" -", " +"))
            assert content.count(old) == 1, f"{name} has changed: {old}"
            (tmp_path / name).write_text(content.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)

    yield change
    for name in ours & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(before)


def hunks(diff: str):
    """(file, lines) of each part between `# FILE` and `@@`."""
    for name, body in re.findall(r"^# (\S+)\n((?:[ +@-].*\n|\n)*)", diff, re.M):
        for part in body.split("@@\n"):
            yield name, [line or " " for line in part.splitlines()]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")])
def test_every_snippet(page, place, monkeypatch):
    monkeypatch.chdir(place)
    for snippet in blocks(page, "python"):
        names = {"x_t": torch.zeros(1, 1, 8, 8), "t": torch.zeros(1, dtype=torch.long)}
        exec(snippet, names)
        assert names["ddpm"].trained_steps == 2


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), target
