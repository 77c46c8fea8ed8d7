"""The shape of the house: who imports whom, how large it is, and what the README names."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from processes import PROJECT

COMMANDS = {"train", "sample", "evaluate", "figures", "convert", "app"}
CORE = {"config", "files", "model", "diffusion_utils", "dataset", "pl_utils", "cli"}
ROOMS = {
    "generation",
    "sources",
    "training",
    "weights",
    "evaluation",
    "plotting",
    "kernels",
    "optim",
    "page",
}
BELOW_TRAINING = {
    "config",
    "files",
    "model",
    "diffusion_utils",
    "sources",
    "dataset",
    "generation",
    "optim",
}
MAY = {
    "files": set(),
    "kernels": set(),
    "optim": set(),
    "diffusion_utils": set(),
    "config": {"files"},
    "cli": {"config", "files"},
    "model": {"kernels"},
    "sources": {"config", "files", "cli"},  # cli: its command alone
    "dataset": {"sources", "config", "files"},
    "generation": {"model", "diffusion_utils", "config", "files"},
    "pl_utils": {"config", "model", "diffusion_utils", "generation", "dataset", "files", "optim"},
    "weights": {"config", "model", "diffusion_utils", "files", "optim"},
    "training": BELOW_TRAINING | {"pl_utils", "weights"},
    "page": {"generation", "dataset", "diffusion_utils", "weights", "plotting"},
    "evaluation": BELOW_TRAINING | {"pl_utils", "weights", "training"},
    "plotting": BELOW_TRAINING | {"pl_utils", "weights", "training", "evaluation"},
} | dict.fromkeys(COMMANDS, CORE | ROOMS)


def files_of(name: str) -> list[Path]:
    path = PROJECT / f"{name}.py"
    return [path] if path.exists() else sorted((PROJECT / name).glob("*.py"))


@cache
def imports(path: Path, *, lazy: bool = True) -> frozenset[str]:
    """Return what a file imports, but for types and where it is the command itself."""
    found = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and re.search("TYPE_CHECKING|__name__", ast.unparse(node.test)):
            return
        if isinstance(node, ast.FunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return frozenset(found)


def arrows(name: str) -> set[str]:
    """Return the other rooms that a room imports."""
    return set().union(*(imports(path) for path in files_of(name))) & MAY.keys() - {name}


def test_the_house_is_what_the_table_says():
    at_root = {path.stem for path in PROJECT.glob("*.py")}
    assert at_root == COMMANDS | CORE
    assert len(at_root) <= 13
    packages = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
    assert packages == ROOMS


@pytest.mark.parametrize("name", sorted(MAY))
def test_rooms_import_what_they_may(name):
    assert arrows(name) <= MAY[name]
    assert not arrows(name) & COMMANDS  # nothing imports a command


def test_there_are_few_arrows_and_no_long_files():
    assert sum(len(arrows(name)) for name in MAY) <= 77
    for name in MAY:
        for path in files_of(name):
            limit = 450 if name == "config" else 400  # the schema is one list of keys
            assert len(path.read_text().splitlines()) <= limit, path


def test_from_yaml_to_a_png_is_short():
    """What a reader passes to know how a config becomes a model and a model an image."""
    paths = [PROJECT / f"{name}.py" for name in ("config", "model", "diffusion_utils", "dataset")]
    paths += [PROJECT / "pl_utils.py", PROJECT / "sample.py", PROJECT / "weights/model.py"]
    paths += [
        PROJECT / f"generation/{name}.py" for name in ("generate", "images", "recipe", "samplers")
    ]
    assert len(paths) <= 12
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 3200


def test_lightning_is_only_the_driver():
    for name in MAY:
        for path in files_of(name):
            if name not in ("pl_utils", "training", "evaluation", "cli"):
                assert "pytorch_lightning" not in imports(path), path
    assert not imports(PROJECT / "config.py") & {"torch", "torchvision", "pytorch_lightning"}


@pytest.mark.parametrize("command", [*sorted(COMMANDS), "dataset"])
def test_help_needs_nothing_heavy(command):
    """To print help nothing heavy is imported, so that it is there at once."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}.py', '--help']\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchvision', 'pytorch_lightning', 'matplotlib', 'scipy'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert "HEAVY []" in done.stdout, done.stdout[-300:] + done.stderr


def test_requirements_are_what_is_imported():
    pip_names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    listed = {re.split(r"[<>=~; ]", line)[0] for line in lines if line and line[0] not in "#-"}
    optional = {"datasets", "huggingface_hub", "kagglehub", "lmdb", "matplotlib"}
    optional |= {"gradio", "fastapi", "uvicorn", "onnxruntime", "onnxscript", "torch_fidelity"}
    used = set().union(*(imports(path) for name in MAY for path in files_of(name)))
    used = used - MAY.keys() - optional - sys.stdlib_module_names
    assert {pip_names.get(n, n).replace("_", "-") for n in used} <= listed
    assert "requirements.txt" in (PROJECT / "environment.yml").read_text()


def test_make_commands_of_the_readme_exist():
    commands = set(re.findall(r"^make ([\w-]+)", (PROJECT / "README.md").read_text(), re.M))
    assert commands >= {"demo", "test"}
    assert commands <= set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.M))
