"""notebooks/start.ipynb: its commands exist, its outputs are whole and small, and it runs."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
from base64 import b64decode

import pytest
import typer
from processes import PROJECT

from config import load_config

NOTEBOOK = PROJECT / "notebooks/start.ipynb"
SHORT = {"STEPS, MORE_STEPS": "4, 8", "OWN_STEPS": "4"}  # what cuts the long cells
FIGURES = (  # a word that only the cell of each image has
    "/digits.png", "EventAccumulator", "eight of each", "guidance-{scale}/grid", "few/grid",
    "progressive", "own.png", "own/grid", "load_model",
)  # fmt: skip


@pytest.fixture(scope="module")
def cells():
    """Return the cells of code, with their source in one piece."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found if c["cell_type"] == "code"]


def printed(cells):
    outputs = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "stream"]
    return "".join("".join(out["text"]) for out in outputs)


def assert_whole(cells):
    """Hold each cell to have run in its order, without an error, and to show its image."""
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert not re.search("^error|Traceback|No such file", printed(cells), re.M | re.I)
    for word in FIGURES:
        cell = next(cell for cell in cells if word in cell["source"])
        images = [out["data"]["image/png"] for out in cell["outputs"] if "data" in out]
        assert [b64decode(image)[:4] for image in images] == [b"\x89PNG"], word


def test_each_command_exists_with_its_options_and_keys(cells):
    source = "\n".join(cell["source"] for cell in cells).replace("\\\n", " ")
    lines = re.findall(r"^\s*!\{python\} (\w+)\.py (.*)$", source, re.M)
    assert {name for name, _ in lines} == {"dataset", "train", "sample", "figures", "evaluate"}
    for name, line in lines:
        module = importlib.import_module("sources.command" if name == "dataset" else name)
        command = typer.main.get_command(module.app)
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r" (--[\w-]+)", line)) <= known, line
    said = " ".join(re.findall(r'^(?:here|tiny) \+?= f?"(.*?)"(?:  #.*)?$', source, re.M))
    values = said.replace("{str(labels).lower()}", "true").split()
    assert len(values) > 10
    load_config(PROJECT / "configs/folder.yml", values)
    values = [word for name, line in lines for word in shlex.split(line) if "=" in word]
    values = [re.sub(r"\{\w+\}", "7", value) for value in values]
    load_config(PROJECT / "configs/digits.yml", values)


def test_its_outputs_are_whole_and_small(cells):
    assert_whole(cells)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert not re.findall(r"(?<![\w.:/])/\w+/\S*", printed(cells))  # paths of one machine
    assert not set("\r\x1b") & set(printed(cells))  # colours, moving bars
    assert not any("execution" in cell["metadata"] for cell in cells)  # times
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3"
    assert "best linear denoiser" in printed(c for c in cells if "--metrics" in c["source"])


def test_it_is_a_valid_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.slow
def test_it_runs_and_runs_again(tmp_path, monkeypatch):
    """Run all cells in a copy of the project, offline: opened at its root, then in notebooks/."""
    nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    for number, where in enumerate((".", "notebooks"), 1):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        for names, value in SHORT.items():
            pattern = rf"^{names} = [\d, ]+"
            parameters.source, count = re.subn(
                pattern, f"{names} = {value}  ", parameters.source, flags=re.M
            )
            assert count == 1, names
        folder = {"metadata": {"path": str(tmp_path / where)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert_whole(cells)
        assert re.findall(r"trained (\d+) steps", printed(cells)) == ["4", "8", "4"]
        assert (tmp_path / f"notebooks/work/{number}/runs/own").is_dir()
    assert {path.name for path in (tmp_path / "notebooks").iterdir()} == {"start.ipynb", "work"}
    assert not (tmp_path / "lightning_logs").exists() and not (tmp_path / "samples").exists()
