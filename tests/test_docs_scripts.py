"""The scripts beside the pages: what they write is what the pages and the configs say."""

import numpy as np
import pytest
from processes import PROJECT

from config import load_config
from docs import costs, sprites
from training.datamodule import open_images


def test_sprites_are_those_of_the_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sprites.main()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("python train.py configs/sprites.yml dataset.labels=true")
    parts = open_images(load_config(PROJECT / "configs/sprites.yml", line.split()[3:]))
    assert parts["train"].shape == (3, 16, 16)
    assert len(parts["train"]) + len(parts["validation"]) == 1788
    assert parts["train"].classes == [kind.__name__ for kind in sprites.KINDS]
    batch = parts["train"][[0, 700, 1500]]
    for image, label, row in zip(*batch, parts["train"].rows[[0, 700, 1500]], strict=True):
        assert np.array_equal(
            image.permute(1, 2, 0), sprites.draw(row)
        )  # the same when drawn again
        assert label.argmax() == row % len(sprites.KINDS)
    whole = np.load(sprites.Path("data", sprites.IMAGES))
    assert len(np.unique(whole, axis=0)) == len(whole)
    assert (whole == 255).all(-1).any((1, 2)).all()  # on white
    with pytest.raises(SystemExit, match="is there already, and nothing is overwritten"):
        sprites.main()


def test_the_table_of_costs_is_arithmetic():
    """A row as it stands in docs/speed.md, and its 3.822 EFLOP by hand."""
    page = (PROJECT / "docs/speed.md").read_text()
    for name in ("cifar10", "digits"):
        assert costs.row(PROJECT / f"configs/{name}.yml") in page.splitlines()
    assert costs.cost(3.822e18, 312, 1.5) == "8.5 h, $13"
    for name in costs.GPUS:
        assert f" {name} |" in page
    assert len([line for line in page.splitlines() if line.startswith("| `")]) >= 10
