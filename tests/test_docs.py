"""What the README and docs/ say can be done: every command and every snippet, run."""

import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import copy

import helpers
import numpy as np
import pytest
import torch
from helpers import PROJECT, noise_image, run, write_cifar
from scipy.io import savemat
from torch import Tensor, nn

from config import load_config
from files import parse_yaml
from model import build_network

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
SHORT = {  # what cuts the long runs
    "train": "model.base_channels=8 training.max_steps=2 training.batch_size=2 "
    "hardware.num_workers=0 evaluation.validate_every=0",
    "evaluate": "--num-images 20 --timesteps 5 --nll-images 2 --stride 100",
    "sample": "--timesteps 20",
}
done: set[str] = set()  # pages may share a line


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text: str) -> list[str]:
    """Return the lines that begin with python, without it."""
    return re.findall(r"^python (.*?)(?:  #.*)?$", "\n".join(blocks(text, "sh")), re.M)


def sections(page: Path) -> list[str]:
    return re.split(r"^(?=## )", page.read_text(), flags=re.M)


def invoke(command: str, place: Path, monkeypatch) -> None:
    """Run a command in this process; long runs are cut short."""
    if not re.search(r"configs/smoke|lightning_logs/smoke", command):
        command += " " + SHORT.get(shlex.split(command)[0].removesuffix(".py"), "")
    helpers.invoke(command, place, monkeypatch, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Configs, images, weights where others must be downloaded, and three finished runs."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs", "pretrained"):
        (folder / name).symlink_to(PROJECT / name)
    write_cifar(folder / "data")
    for name, size in (("data/celeba-hq", 256), ("mine", 20)):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            noise_image(i, (size, size)).save(folder / name / f"{i}.png")
    for i, name in enumerate(("photo", "other", "hole")):
        noise_image(i, (24, 16)).save(folder / f"{name}.png")
    write_fashion(folder / "fashion")
    for part in ("train", "test"):
        pixels = np.zeros((32, 32, 3, 4), np.uint8)
        savemat(folder / f"data/{part}_32x32.mat", {"X": pixels, "y": np.ones((4, 1))})
    write_official_weights(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("smoke", "digits", "cifar10"):
            done.add(f"train.py configs/{name}.yml")
            invoke(f"train.py configs/{name}.yml", folder, patch)
    return folder


class Pooled(nn.Module):
    """uint8 [B, 3, H, W] -> features [B, 12], logits [B, 5]."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return features, features[:, :5] / 100


def write_fashion(folder: Path) -> None:
    folder.mkdir()
    for part in ("train", "t10k"):
        header = np.array([0x803, 4, 28, 28], ">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(4 * 28 * 28))


def write_official_weights(folder: Path) -> None:
    from weights import Model
    from weights.export import write_diffusers

    config = load_config(PROJECT / "configs/cifar10.yml", ["model.base_channels=8"])
    model = Model(build_network(config), config, weights="ema", step=0, notes=[])
    write_diffusers(model, folder / "google/ddpm-cifar10-32", "unknown")
    (folder / "google/ddpm-cifar10-32/ddpm.json").unlink()
    torch.save(model.network.state_dict(), folder / "ema_cifar10.ckpt")
    improved = runpy.run_path(str(PROJECT / "tests/weights/improved.py"))["Improved"]
    theirs = improved(size=32, base=32, multipliers=[1, 2], blocks=1, attends=[16], heads=4,
                      scales=True, outputs=6, classes=0)  # fmt: skip
    for name in ("cifar10_uncond_50M_500K", "mine"):
        torch.save(theirs.state_dict(), folder / f"{name}.pt")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_python_line(page, place, monkeypatch, request):
    """Run them in their order; a section's changes to the code are made before its commands."""
    from evaluation.extractor import INCEPTION, INCEPTION_SHA256, Extractor

    inception = lambda *_: Extractor(Pooled(), INCEPTION, INCEPTION_SHA256)
    for module in ("protocol", "callback"):
        monkeypatch.setattr(f"evaluation.{module}.load_extractor", inception)  # not downloaded
    monkeypatch.setattr("training.dry_run.LONG", 0.1)  # seconds
    if find_spec("gradio"):
        monkeypatch.setattr("page.serve", lambda *_: None)  # it would serve for ever
    assert len(commands(page.read_text())) == len(re.findall(r"^python ", page.read_text(), re.M))
    for section in sections(page):
        if changes := blocks(section, "diff"):
            request.getfixturevalue("changed")(changes)
        for line in commands(section):
            if line in done or ("onnx" in line and not find_spec("onnxruntime")):
                continue
            done.add(line)
            if "devices=2" in line:  # starts itself again
                run(f"python {line}", place)
            else:
                invoke(line, place, monkeypatch)


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """`changed(diffs)` puts a copy of the house, changed, in place of what is imported."""
    rooms = [path.parent for path in PROJECT.glob("*/__init__.py")]
    ours = {path.stem for path in PROJECT.glob("*.py")} | {room.name for room in rooms}
    for path in (*PROJECT.glob("*.py"), *(p for room in rooms for p in room.glob("*.[pc]*"))):
        if path.is_file():
            target = tmp_path / path.relative_to(PROJECT)
            target.parent.mkdir(exist_ok=True)
            copy(path, target)

    def forget() -> dict:
        names = [name for name in sys.modules if name.split(".")[0] in ours]
        return {name: sys.modules.pop(name) for name in names}

    def change(diffs: list[str]) -> None:
        for name, hunk in (pair for text in diffs for pair in hunks(text)):
            content = (tmp_path / name).read_text()
            old, new = ("".join(f"{h[1:]}\n" for h in hunk if h[0] in s) for s in (" -", " +"))
            assert content.count(old) == 1, f"{name} has changed: {old}"
            (tmp_path / name).write_text(content.replace(old, new))
        forget()

    before = forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield change
    forget()
    sys.modules.update(before)


def hunks(diff: str):
    """Yield (file, lines) of each part between `# FILE` and `@@`."""
    for name, body in re.findall(r"^# (\S+)\n((?:[ +@-].*\n|\n)*)", diff, re.M):
        for part in body.split("@@\n"):
            yield name, [line or " " for line in part.splitlines()]


def test_an_extension_takes_what_its_title_promises():
    promises = 0
    for section in sections(PROJECT / "docs/extending.md"):
        if promised := re.match(r"## (.*): (\d+) files?, (\d+) lines?\n", section):
            added = [
                (name, line)
                for diff in blocks(section, "diff")
                for name, lines in hunks(diff)
                for line in lines
                if line[0] == "+"
            ]
            found = len({name for name, _ in added}), len(added)
            assert found == (int(promised[2]), int(promised[3])), promised[1]
            promises += 1
    assert promises >= 5  # a schedule, a target, a sampler, a dataset, a network


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "python")])
def test_every_snippet(page, place, monkeypatch):
    from weights import Model

    monkeypatch.chdir(place)
    for snippet in blocks(page.read_text(), "python"):
        names = {"x_t": torch.zeros(1, 1, 8, 8), "t": torch.zeros(1, dtype=torch.long)}
        exec(snippet, names)
        assert isinstance(names["model"], Model)


def test_links_lead_somewhere():
    for page in (*PAGES, PROJECT / "CONTRIBUTING.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (PROJECT / "docs/README.md").read_text())
    assert {"README.md", *linked} == {path.name for path in (PROJECT / "docs").glob("*.md")}


def test_the_citation_is_of_this_version():
    cited = parse_yaml((PROJECT / "CITATION.cff").read_text())
    versions = re.findall(r"^## (\d\S*)", (PROJECT / "CHANGELOG.md").read_text(), re.M)
    assert cited["version"] == versions[0] and cited["cff-version"] == "1.2.0"
    assert cited["title"] == re.match(r"# (.*)", (PROJECT / "README.md").read_text())[1]
    assert {"message", "authors"} <= cited.keys()  # which the format needs
    assert (PROJECT / "LICENSE").read_text().startswith(cited["license"])
