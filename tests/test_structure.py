"""The shape of the project: who imports whom, and that the README tells the truth."""

import ast
import re
import sys
from pathlib import Path

import pytest

OURS = {p.stem for p in Path().glob("*.py")}
ALLOWED = {
    "config": {"terminal"},
    "norm_silu": set(),
    "files": set(),
    "terminal": {"files"},
    "model": {"norm_silu"},
    "diffusion_utils": set(),
    "sources": set(),
    "named_sets": {"sources", "terminal"},
    "check": {"config", "files", "sources"},
    "dataset": {"terminal", "check", "config", "files", "named_sets", "sources"},
    "checkpoint": {"files"},
    "hardware": set(),
    "callbacks": {"checkpoint", "config", "diffusion_utils", "files"},
    "dialects": {"config", "diffusion_utils", "model"},
    "weights": {"checkpoint", "config", "dialects"},
    "data": {"config", "dataset"},
    "pl_utils": {"config", "diffusion_utils", "model", "weights"},
    "trainer": {"callbacks", "checkpoint", "config", "evaluation", "files"},
    "dry_run": {
        "callbacks",
        "checkpoint",
        "config",
        "data",
        "dataset",
        "diffusion_utils",
        "hardware",
        "model",
        "pl_utils",
        "trainer",
    },
    "train": {
        "terminal",
        "data",
        "callbacks",
        "checkpoint",
        "config",
        "dry_run",
        "pl_utils",
        "trainer",
        "weights",
    },
    "likelihood": {"diffusion_utils", "pl_utils"},
    "drawing": {"files"},
    "plates": {
        "data",
        "dataset",
        "diffusion_utils",
        "drawing",
        "likelihood",
        "metrics",
        "pl_utils",
    },
    "figures": {"terminal", "plates", "sample"},
    "copies": {"callbacks", "diffusion_utils", "files"},
    "sample": {"terminal", "callbacks", "config", "copies", "diffusion_utils", "pl_utils"},
    "convert": {"terminal", "checkpoint", "config", "dialects", "files", "pl_utils", "weights"},
    "metrics": {"files"},
    "evaluation": {"callbacks", "config", "diffusion_utils", "likelihood", "metrics"},
    "protocol": {"terminal", "config", "data", "dataset", "metrics", "sample"},
    "evaluate": {
        "terminal",
        "diffusion_utils",
        "evaluation",
        "files",
        "metrics",
        "protocol",
        "sample",
    },
}


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(Path(f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", sorted(OURS))
def test_imports_form_the_plan(name):
    assert imports(name) & OURS <= ALLOWED[name]
    if name not in ("data", "pl_utils", "callbacks", "evaluation", "terminal", "trainer"):
        assert "pytorch_lightning" not in imports(name)


def test_config_knows_no_torch():
    assert not imports("config") & {"torch", "torchvision", "pytorch_lightning"}


def test_requirements_are_what_is_imported():
    pip_names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    lines = Path("requirements.txt").read_text().splitlines()
    listed = {re.split(r"[<>=~; ]", line)[0] for line in lines if line and line[0] not in "#-"}
    optional = {"datasets", "huggingface_hub", "imageio_ffmpeg", "kagglehub", "lmdb", "matplotlib"}
    optional |= {"onnxruntime", "onnxscript", "torch_fidelity"}
    used = set().union(*(imports(name) for name in OURS)) - OURS - optional
    used = {pip_names.get(n, n).replace("_", "-") for n in used - sys.stdlib_module_names}
    assert used <= listed
    assert "requirements.txt" in Path("environment.yml").read_text()


def test_make_commands_of_the_readme_exist():
    commands = set(re.findall(r"^make (\w+)", Path("README.md").read_text(), re.M))
    assert commands >= {"demo", "test"}
    assert commands <= set(re.findall(r"^(\w+):", Path("Makefile").read_text(), re.M))
