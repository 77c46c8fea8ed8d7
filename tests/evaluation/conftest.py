"""Fixtures that the tests of evaluate.py share."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers import Net, invoke


@pytest.fixture
def run(place, monkeypatch):
    """`run(line)` is `python evaluate.py line` in this process: its output, and metrics.json."""
    monkeypatch.chdir(place)

    def run(line, code=0):
        device = "" if "--device" in line else "--device cpu"
        output = invoke(f"evaluate.py {line} {device}", place, monkeypatch, code)
        folder = re.search(r"^output: (.*)$", output, re.M)
        facts = Path(folder[1], "metrics.json") if folder else None
        return output, json.loads(facts.read_text()) if facts and code == 0 else None

    return run


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Draw 16 images after a validation, not 256."""
    monkeypatch.setattr("evaluation.callback.SAMPLED", 16)


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    """A feature extractor's file."""
    path = tmp_path_factory.mktemp("net") / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Net().eval()).save(path)
    return path
