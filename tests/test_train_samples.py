"""`train.py --sample N` draws as `sample.py RUN` does, when training has ended."""

import pytest
from helpers import invoke
from processes import PROJECT, run

SMOKE = (
    "train.py configs/smoke.yml hardware.accelerator=cpu training.max_steps=2 sampling.timesteps=3"
)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    return tmp_path


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_the_same_bytes_as_sample_py(place, monkeypatch):
    output = invoke(f"{SMOKE} --sample 3", place, monkeypatch)
    drawn = place / "lightning_logs/smoke/samples"
    assert "3 images written to lightning_logs/smoke/samples\n" in output
    assert "all together: lightning_logs/smoke/samples/grid.png" in output
    invoke("sample.py lightning_logs/smoke --num-images 3", place, monkeypatch)
    assert files(drawn) == files(place / "samples")
    assert len(files(drawn)) == 4
    # no steps are left, and images are: as of the same recipe, only what is missing
    output = invoke(f"{SMOKE} --continue-training --sample 5", place, monkeypatch)
    assert "has all 2 steps" in output
    assert "2 images written to lightning_logs/smoke/samples, 3 were there already" in output
    more = f"{SMOKE} training.max_steps=3 --continue-training --sample 2"  # other weights
    assert "written to lightning_logs/smoke/samples-2\n" in invoke(more, place, monkeypatch)


def test_as_many_of_each_class(place, monkeypatch):
    output = invoke(f"{SMOKE} dataset.labels=true --sample 11", place, monkeypatch)
    assert "20 images written" in output
    line = "sample.py lightning_logs/smoke --class-label all --num-images 2"
    invoke(line, place, monkeypatch)
    drawn = files(place / "lightning_logs/smoke/samples")
    assert drawn == files(place / "samples")
    assert len(drawn) == 21


def test_ctrl_c_while_drawing_leaves_the_run_whole(place, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("generation.folder.write_missing", interrupted)
    output = invoke(f"{SMOKE} --sample 3", place, monkeypatch, code=130)
    assert "stopped; the run is whole" in output
    assert (place / "lightning_logs/smoke/checkpoints/last.ckpt").exists()
    monkeypatch.undo()
    go_on = f"{SMOKE} --continue-training --sample 3"
    assert "3 images written to lightning_logs/smoke/samples\n" in invoke(go_on, place, monkeypatch)


def test_what_cannot_be_drawn_costs_no_run(place, monkeypatch):
    for number in (0, -1):
        assert "--sample" in invoke(f"{SMOKE} --sample {number}", place, monkeypatch, code=2)
    assert "give no other" in invoke(f"{SMOKE} --sample 2 --dry-run", place, monkeypatch, code=2)
    assert not (place / "lightning_logs").exists()
    invoke(SMOKE, place, monkeypatch)
    (place / "lightning_logs/smoke/samples").write_bytes(b"mine")
    output = invoke(f"{SMOKE} --continue-training --sample 2", place, monkeypatch, code=1)
    assert "the run is whole" in output


@pytest.mark.slow
def test_the_main_process_draws_alone(place):
    output = run(f"python {SMOKE} hardware.devices=2 --sample 3", place)
    assert output.count("images written to") == 1
    run("python sample.py lightning_logs/smoke --num-images 3", place)
    assert files(place / "lightning_logs/smoke/samples") == files(place / "samples")
