"""training.keep_best: which checkpoint is kept, whatever stops the run."""

import os
import signal

import pytest
from helpers import PROJECT, assert_same, best_of, curves, invoke, tiny, train, watched
from rich.console import Console

from evaluation.callback import Evaluation, HealthCheck, draw_together
from training import Checkpoints, Interrupted
from weights import load_model, newest_checkpoint, read_checkpoint

EVERY = "evaluation.validate_every=2"


@pytest.fixture
def place(tmp_path):
    for name in ("configs", "pretrained"):
        (tmp_path / name).symlink_to(PROJECT / name)
    return tmp_path


@pytest.mark.parametrize("kind", ["validation", pytest.param("kid", marks=pytest.mark.slow)])
def test_stops_do_not_change_which_checkpoint_is_best(tmp_path, kind, net):
    wanted = [
        EVERY, f"training.keep_best={kind}", "training.learning_rate=0.05", "training.max_steps=8",
        "evaluation.evaluate_every=2", "evaluation.evaluate_images=9", "logging.save_every=1",
        f"evaluation.extractor={net}", f"dataset.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    fid = lambda: [Evaluation(tiny(*wanted), Console(quiet=True))]
    train(tmp_path / "a", *wanted, callbacks=fid())
    for steps in (2, 3, 4, 6, 8):  # some stop where it is measured, and are killed before it is
        last = newest_checkpoint(tmp_path / "b")[0] if steps > 2 else None
        train(tmp_path / "b", *wanted, f"training.max_steps={steps}", callbacks=fid(), resume=last)
    (step, best, state), (other, other_best, other_state) = map(
        best_of, (tmp_path / "a", tmp_path / "b")
    )
    assert step == other
    assert best == other_best
    assert best[kind][1] == step
    assert_same(dict(state), dict(other_state))
    values = dict(curves(tmp_path / "a")["val/loss"])
    if kind == "validation":
        assert step == min(values, key=values.get)


def test_what_a_stop_left_out_is_measured_when_the_run_goes_on(tmp_path, monkeypatch):
    """A checkpoint of step 4 is written before step 4 is validated; then the process dies."""
    wanted = [EVERY, "logging.save_every=4", "training.keep_best=validation"]
    watched(tmp_path / "a", *wanted)
    record = Checkpoints.record

    def die(self, trainer, *measured):
        if trainer.global_step == 4:
            raise KeyboardInterrupt
        record(self, trainer, *measured)

    monkeypatch.setattr(Checkpoints, "record", die)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        watched(tmp_path / "b", *wanted)
    monkeypatch.setattr(Checkpoints, "record", record)
    last, checkpoint = newest_checkpoint(tmp_path / "b")
    assert checkpoint["global_step"] == 4
    assert checkpoint["callbacks"]["Checkpoints"]["measured"] == {"validation": 2}
    watched(tmp_path / "b", *wanted, resume=last)
    one, two = (curves(tmp_path / name)["val/loss"] for name in "ab")
    assert dict(one) == dict(two)
    assert best_of(tmp_path / "a")[:2] == best_of(tmp_path / "b")[:2]
    # and going on from the best itself measures nothing twice
    best = tmp_path / "b/checkpoints/best.ckpt"
    steps = [step for step, _ in curves(tmp_path / "b")["val/loss"]]
    assert sorted({*steps}) == [2, 4, 6]
    ddpm, _ = watched(tmp_path / "c", *wanted, resume=best)
    last = read_checkpoint(tmp_path / "a/checkpoints/last.ckpt")
    assert_same(dict(ddpm.state_dict()), dict(last["state_dict"]))


def test_a_run_with_nothing_but_its_best_goes_on_from_it(tmp_path):
    """Killed before the first checkpoint that was due."""
    wanted = EVERY, "training.keep_best=validation", f"dataset.cache={tmp_path / 'cache'}"
    train(tmp_path / "run", *wanted)
    for path in (tmp_path / "run/checkpoints").iterdir():
        if path.name != "best.ckpt":
            path.unlink()
    best, checkpoint = newest_checkpoint(tmp_path / "run")
    assert best.name == "best.ckpt"
    assert load_model(tmp_path / "run").step == checkpoint["global_step"]
    again, _ = train(tmp_path / "run", *wanted, "training.max_steps=7", resume=best)
    two, _ = train(tmp_path / "two", "training.max_steps=7")
    assert_same(dict(again.state_dict()), dict(two.state_dict()))


@pytest.mark.parametrize("kind", ["evaluation", "validation"])
def test_a_signal_while_images_are_drawn_ends_at_this_step(tmp_path, kind, net, monkeypatch):
    wanted = [
        f"dataset.cache={tmp_path / 'cache'}", f"evaluation.extractor={net}",
        "evaluation.evaluate_images=9",
        "evaluation.evaluate_every=2" if kind == "evaluation" else EVERY,
    ]  # fmt: skip
    make = Evaluation if kind == "evaluation" else HealthCheck
    watch = lambda: [make(tiny(*wanted), Console(quiet=True))]
    train(tmp_path / "a", *wanted, callbacks=watch())

    def interrupted(trainer, module, ranks, rows):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw_together(trainer, module, ranks, rows)

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.callback.draw_together", interrupted)
        with pytest.raises(Interrupted):
            train(tmp_path / "b", *wanted, callbacks=watch())
    last, checkpoint = newest_checkpoint(tmp_path / "b")
    assert checkpoint["global_step"] == 4
    train(tmp_path / "b", *wanted, callbacks=watch(), resume=last)
    states = [read_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in "ab"]
    assert_same(dict(states[0]["state_dict"]), dict(states[1]["state_dict"]))
    assert len({str(state["callbacks"]["Checkpoints"]) for state in states}) == 1


def test_best_needs_what_it_is_judged_by(place, monkeypatch):
    with pytest.raises(ValueError, match=r"=fid needs evaluation.evaluate_every in 1 \.\.\. 6"):
        tiny("training.keep_best=fid")
    said = invoke(
        "train.py configs/smoke.yml evaluation.validate_every=2 training.keep_best=validation "
        "dataset.validation_fraction=0", place, monkeypatch, 2,
    )  # fmt: skip
    assert "there are no validation images; set dataset.validation_fraction=0.1" in said


def test_the_best_checkpoint_is_drawn_from(place, monkeypatch):
    train(place / "run", EVERY, "training.keep_best=validation", f"dataset.cache={place / 'cache'}")
    run = lambda line, code=0: invoke(line, place, monkeypatch, code)
    assert "best.ckpt" in run("sample.py run --checkpoint best --num-images 2 --device cpu")
    assert "step-00000006.ckpt" in run("sample.py run --checkpoint 6 --num-images 2 --device cpu")
    said = run("sample.py run --checkpoint 5 --num-images 2", 2)
    assert "no --checkpoint 5 in run/checkpoints, there are: best, last, step-00000006" in said
    run("figures.py schedule run --checkpoint best")
    assert "training.keep_best" in run("figures.py schedule pretrained --checkpoint best", 2)
