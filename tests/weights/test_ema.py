"""EMAs by their decays and lengths; and those that are made after training, beside tracked ones."""

import math
import shutil
import sys
from typing import get_args

import mpmath
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import assert_same, invoke, start, tiny, train
from processes import PROJECT
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import TrainingConfig
from optim import DECAYS, exponent, initial_share
from pl_utils import compared_weights
from weights import load_model, newest_checkpoint, read_checkpoint
from weights.ema import rebuild, solve

STEPS, LENGTHS = 150, [0.05, 0.1]
POWER = "training.ema=power", f"training.ema_lengths={LENGTHS}"


class History(pl.Callback):
    """Notes the weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append([p.detach().clone() for p in module.unet.parameters()])

    def average(self, length: float, step: int) -> torch.Tensor:
        """Return the EMA of a length, flat, by its definition (Karras et al. 2024, Eq. 121)."""
        share = np.diff((np.arange(step + 1) / step) ** (exponent(length) + 1))
        return sum(w * flat(weights) for w, weights in zip(share, self.weights, strict=False))


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A run with snapshots of two lengths: its folder, module, and weights at each step."""
    folder, watch = tmp_path_factory.mktemp("runs") / "run", History()
    every = "logging.ema_snapshot_every=10", "logging.log_every=1000"
    ddpm, _ = train(folder, *POWER, f"training.max_steps={STEPS}", *every, callbacks=[watch])
    return folder, ddpm, watch


# ---- decays


def test_every_choice_has_a_decay():
    assert DECAYS.keys() == {*get_args(TrainingConfig.model_fields["ema"].annotation)}


@pytest.mark.parametrize("length", [0.001, 0.05, 0.1, 0.2, 0.279])
def test_a_power_ema_is_as_long_as_it_says(length):
    gamma = exponent(length)
    assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(length, rel=1e-12)
    training = tiny("training.ema=power", f"training.ema_lengths=[{length}]").training
    weights = np.zeros(1)
    for n in range(1, 301):
        decay = DECAYS["power"](training, n)
        weights = np.append(weights * decay, 1 - decay)
    t = np.arange(301) / 300
    np.testing.assert_allclose(weights[1:], np.diff(t ** (gamma + 1)), rtol=1e-9, atol=1e-300)
    assert weights[0] == 0  # of initial weights


@pytest.mark.parametrize("decay", [0, 0.5, 0.9, 0.998])
@pytest.mark.parametrize("ema", DECAYS)
def test_the_share_of_initial_weights_is_the_product_of_decays(ema, decay):
    training = tiny(*POWER, f"training.ema={ema}", f"training.ema_decay={decay}").training
    for step in (0, 1, 2, 9, 50, 3000):
        product = math.prod(DECAYS[ema](training, n) for n in range(1, step + 1))
        assert initial_share(training, step) == pytest.approx(product, rel=1e-9, abs=1e-300)
    assert initial_share(tiny().training, 7) == 0.995**7
    assert compared_weights(tiny(f"training.ema={ema}", *POWER[1:]), 40) == (
        ("ema", "raw") if ema == "constant" else ("ema",)
    )


@pytest.mark.parametrize("ema", ["constant", "warmup"])
def test_other_emas_are_what_they_were(tmp_path, ema):
    watch = History()
    ddpm, adam = train(tmp_path / "a", f"training.ema={ema}", callbacks=[watch])
    theirs, updates = [p.clone() for p in type(ddpm)(ddpm.config).ema.parameters()], []
    for n, weights in enumerate(watch.weights):
        updates.append(0.995 if ema == "constant" else (1 + n) / (10 + n))
        get_ema_multi_avg_fn(updates[-1])(theirs, weights, None)
    assert all(torch.equal(a, b) for a, b in zip(ddpm.ema.parameters(), theirs, strict=True))
    # lengths kept besides change nothing
    other, other_adam = train(tmp_path / "b", f"training.ema={ema}", POWER[1])
    assert_same([dict(ddpm.state_dict()), adam], [dict(other.state_dict()), other_adam])
    assert not (tmp_path / "a/ema").exists()
    assert "Averages" not in newest_checkpoint(tmp_path / "a")[1]["callbacks"]


# ---- after training


def test_shares_are_the_authors():
    """Their integrals, by quadrature in 40 digits, and the solution of their equations."""
    steps, lengths, step, length = [3, 10, 21, 30, 40], LENGTHS, 40, 0.08
    t, sizes = np.repeat(steps, 2), np.tile(lengths, 5)
    with mpmath.workdps(40):

        def gamma(x):
            return mpmath.findroot(
                lambda g: (g + 1) / (g + 2) ** 2 / (g + 3) - mpmath.mpf(x) ** 2, 1 / x
            )

        def profile(end, size):
            g = gamma(size)
            return lambda tau: (g + 1) * (tau / end) ** g / end

        known = [(int(n), profile(int(n), float(x))) for n, x in zip(t, sizes, strict=True)]

        def product(one, other):
            return mpmath.quad(lambda tau: one[1](tau) * other[1](tau), [0, min(one[0], other[0])])

        wanted = step, profile(step, length)
        A = mpmath.matrix([[product(a, b) for b in known] for a in known])
        b = mpmath.matrix([product(a, wanted) for a in known])
        x = mpmath.lu_solve(A, b)
        error = mpmath.sqrt(1 - (x.T * b)[0] / product(wanted, wanted))
        x = [float(value / mpmath.fsum(x)) for value in x]
    shares, found = solve(t, sizes, step, length)
    np.testing.assert_allclose(shares, x, rtol=1e-10, atol=1e-10)
    assert found == pytest.approx(float(error), rel=1e-5)
    shares, found = solve(t, sizes, 30, 0.1)  # one of them
    np.testing.assert_allclose(shares, (t == 30) * (sizes == 0.1), atol=1e-10)
    assert found < 1e-6


def test_tracked_emas_are_the_averages_of_history(history):
    folder, ddpm, watch = history
    tracked = read_checkpoint(folder / "checkpoints/last.ckpt")["callbacks"]["Averages"]["averages"]
    assert [*tracked] == LENGTHS
    torch.testing.assert_close(flat(ddpm.ema.parameters()), flat(tracked[0.05].values()))
    for length, values in tracked.items():
        wanted = watch.average(length, STEPS)
        assert (flat(values.values()) - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.15, 0.2])
@pytest.mark.parametrize("step", [STEPS, 120])
def test_an_ema_made_after_training_is_the_tracked_one(history, tmp_path, length, step):
    folder, _, watch = history
    path = tmp_path / "e.safetensors"
    about, _ = rebuild(folder, length, None if step == STEPS else step, path)
    assert f"length {length} at step {step} from {step // 10} snapshots; its profile is" in about
    model = load_model(path)
    assert model.config.training.ema_lengths == [length] and model.step == step
    wanted = watch.average(length, step)
    error = (flat(model.parameters()) - wanted).norm()
    nearest = min((watch.average(known, step) - wanted).norm() for known in LENGTHS)
    assert error < 0.002 * wanted.norm()
    assert error < 0.3 * nearest or length in LENGTHS


def test_what_is_made_samples(history, tmp_path, monkeypatch):
    folder, *_ = history
    shutil.copytree(folder, tmp_path / "run")
    said = invoke("convert.py ema run --length 0.08", tmp_path, monkeypatch)
    made = f"run/ema/length-0.08-step-{STEPS:08d}.safetensors"
    assert f"to sample: python sample.py {made}" in said
    options = "--num-images 1 --timesteps 2 --output-dir o"
    assert "o" in invoke(f"sample.py {made} {options}", tmp_path, monkeypatch)
    invoke(f"convert.py export {made} folder", tmp_path, monkeypatch)
    assert (
        "the EMA of the weights, relative length 0.08"
        in (tmp_path / "folder/README.md").read_text()
    )


def test_what_cannot_be_made_is_one_message(history, tmp_path, monkeypatch):
    folder, *_ = history
    shutil.copytree(folder, tmp_path / "one", ignore=lambda *_: ["checkpoints"])
    for path in sorted((tmp_path / "one/ema").iterdir())[1:]:
        path.unlink()
    (tmp_path / "none").mkdir()
    cases = {
        "none --length 0.1": "none/ema holds no snapshots; train with training.ema_lengths",
        f"'{folder}' --length 0.28": "--length 0.28 is not between 0 and 0.28; try 0.1",
        f"'{folder}' --length nan": "--length nan is not between",
        f"'{folder}' --length 0.1 --step 17": "has no snapshot of step 17; the nearest is 20",
        "one --length 0.1": "is the only snapshot up to step 10, and two are needed: give a later",
        f"'{folder}' --length 0.1 --output x.ckpt": "x.ckpt does not end in .safetensors",
    }
    for arguments, message in cases.items():
        assert message in invoke(f"convert.py ema {arguments}", tmp_path, monkeypatch, 2), arguments
    said = invoke(f"sample.py '{folder}/ema/step-00000100.safetensors'", tmp_path, monkeypatch, 2)
    assert "this is a snapshot: make an EMA of a run's by `python convert.py ema RUN`" in said
    last = f"'{folder}/checkpoints/last.ckpt' --length 0.1 --output of_last.safetensors"
    invoke(f"convert.py ema {last}", tmp_path, monkeypatch)  # the run that it is of
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut/ema/step-00000100.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    said = invoke("convert.py ema cut --length 0.1", tmp_path, monkeypatch, 2)
    assert "step-00000100.safetensors is damaged" in said
    invoke("convert.py ema cut --length 0.1 --step 90", tmp_path, monkeypatch)
    said = invoke("convert.py ema cut --length 0.1 --step 90", tmp_path, monkeypatch, 2)
    assert "length-0.1-step-00000090.safetensors exists; give another --output" in said


def test_lengths_have_bounds():
    with pytest.raises(ValueError, match=r"ema=power has no ema_lengths; try training"):
        tiny("training.ema=power")
    with pytest.raises(ValueError, match=r"ema_lengths.1: 0.3: input should be less than 0.28"):
        tiny("training.ema_lengths=[0.1,0.3]")


# ---- stops


def contents(run) -> dict:
    return {path.name: path.read_bytes() for path in (run / "ema").glob("*.safetensors")}


def test_a_stop_leaves_no_trace(tmp_path, capsys):
    options = *POWER, "logging.ema_snapshot_every=2"
    train(tmp_path / "a", *options, "training.max_steps=7")
    for steps in (1, 4, 7):
        last = newest_checkpoint(tmp_path / "b")[0] if steps > 1 else None
        train(tmp_path / "b", *options, f"training.max_steps={steps}", resume=last)
    (_, one), (path, other) = (newest_checkpoint(tmp_path / name) for name in "ab")
    assert_same(one["state_dict"], other["state_dict"])
    assert_same(one["callbacks"]["Averages"], other["callbacks"]["Averages"])
    wanted = contents(tmp_path / "a")
    assert sorted(wanted) == [f"step-0000000{n}.safetensors" for n in (2, 4, 6, 7)]
    assert contents(tmp_path / "b").items() >= wanted.items()
    # from an earlier step the same are written again; until then the later ones are not there
    back = path.with_name("step-00000004.ckpt")
    train(tmp_path / "b", *options, "training.max_steps=5", resume=back)
    assert "step-00000006.safetensors.aside" in capsys.readouterr().out
    assert [*sorted(contents(tmp_path / "b"))][-1] == "step-00000005.safetensors"
    train(tmp_path / "b", *options, "training.max_steps=7", resume=back)
    assert contents(tmp_path / "b").items() >= wanted.items()


def test_a_snapshot_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    import weights.ema

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.ema, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*ema/step-00000003.safetensors: No space"):
        train(tmp_path, *POWER, "logging.ema_snapshot_every=3")
    assert not [*(tmp_path / "ema").iterdir()]


@pytest.mark.slow
def test_two_processes_keep_the_same(tmp_path):
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    found = []
    for devices in "1", "2":
        line = f"configs/smoke.yml model.dropout=0.0 hardware.precision=32-true {' '.join(POWER)}"
        line = line.replace(", ", ",") + f" hardware.accelerator=cpu hardware.devices={devices}"
        with start(
            [sys.executable, PROJECT / "train.py", *line.split(), "--run-name", devices], tmp_path
        ) as it:
            assert "snapshots: 6 x" in it.finish(timeout=300)
        run = tmp_path / "lightning_logs" / devices
        found.append(read_checkpoint(run / "checkpoints/last.ckpt"))
        assert len(contents(run)) == 6
    for length in LENGTHS:
        one, other = (f["callbacks"]["Averages"]["averages"][length] for f in found)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
