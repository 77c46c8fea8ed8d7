"""What the tests of evaluate.py share."""

import json
import re
from pathlib import Path

import pytest
from helpers import invoke


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
