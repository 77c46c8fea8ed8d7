"""What a training step can be told beside the paper: rates, optimizers, draws of t."""

import math

import pytest
import torch
from helpers import assert_same, tiny, train

from optim.muon import RMS, Muon, orthogonal
from pl_utils import DDPM, TRAIN, VALIDATE
from training.runs import check_continuation
from weights import newest_checkpoint

ALL = (
    "diffusion.prediction=v",
    "training.loss_weight=min-snr",
    "training.loss_weight_gamma=3",
    "training.t_density=normal",
    "training.t_stratified=true",
    "training.learning_rate_decay=cosine",
)


MUON = *ALL, "training.optimizer=muon"


@pytest.mark.parametrize("knobs", [ALL, MUON])
def test_with_every_knob_a_stop_leaves_no_trace(tmp_path, knobs):
    straight, adam = train(
        tmp_path / "a", *knobs, "logging.save_every=1", "logging.keep_checkpoints=9"
    )
    for step in (1, 3):
        start = tmp_path / f"a/checkpoints/step-{step:08d}.ckpt"
        resumed, resumed_adam = train(tmp_path / f"b{step}", *knobs, resume=start)
        assert_same(dict(straight.state_dict()), dict(resumed.state_dict()))
        assert_same(adam, resumed_adam)


def test_a_longer_run_hears_where_its_decay_ends(tmp_path):
    said = []
    train(tmp_path, "training.max_steps=1", "training.learning_rate_decay=linear")
    path, checkpoint = newest_checkpoint(tmp_path)
    longer = tiny("training.max_steps=9", "training.learning_rate_decay=linear")
    assert check_continuation(longer, path, checkpoint, said.append)
    assert (
        "training.max_steps: 1 -> 9 (the linear decay of the learning rate ends there)" in said[0]
    )


def test_rates():
    """Warm, then as the decay says, to nothing in the step after the last."""
    how = "training.max_steps=1000", "training.warmup_steps=100", "training.learning_rate=1e-3"
    wanted = {  # at 550, halfway from warm to the end
        "constant": (1, 1),
        "cosine": (0.5, 0),
        "linear": (0.5, 0),
        "inverse-sqrt": (math.sqrt(100 / 550), math.sqrt(100 / 1000)),
    }
    for name, (half, end) in wanted.items():
        ddpm = DDPM(tiny(*how, f"training.learning_rate_decay={name}"))
        rates = [ddpm.learning_rate(step) / 1e-3 for step in (0, 50, 100, 550, 1000)]
        assert rates == pytest.approx([0, 0.5, 1, half, end]), name
    for name in wanted:  # nothing divides by no warm-up, nor by no steps after it
        if name != "inverse-sqrt":
            none = DDPM(tiny("training.warmup_steps=0", f"training.learning_rate_decay={name}"))
            assert none.learning_rate(0) == 1e-3
        all_of_it = "training.warmup_steps=6", f"training.learning_rate_decay={name}"
        assert DDPM(tiny("training.max_steps=6", *all_of_it)).learning_rate(6) <= 1e-3


def test_stratified_draws_are_one_in_each_share():
    ddpm, plain = DDPM(tiny("training.t_stratified=true")), DDPM(tiny())
    narrow = DDPM(tiny("training.t_density=normal", "training.t_density_width=0.5"))
    assert_same(list(narrow.draw(VALIDATE, 0, 64)), list(plain.draw(VALIDATE, 0, 64)))
    T = ddpm.diffusion.timesteps
    for step in range(3):
        t = ddpm.draw(TRAIN, step, 4 * T).t
        assert torch.equal(t, torch.arange(T).repeat_interleave(4))  # four shares to each t
        few = ddpm.draw(TRAIN, step, 5).t
        assert torch.equal(few * 5 // T, torch.arange(5))
    drawn = torch.stack([ddpm.draw(TRAIN, step, 5).t for step in range(200)])
    assert len(drawn.unique()) == T  # every t has its turn
    assert_same(list(ddpm.draw(VALIDATE, 0, 64)), list(plain.draw(VALIDATE, 0, 64)))
    rest, as_before = ddpm.draw(TRAIN, 0, 64), plain.draw(TRAIN, 0, 64)
    assert_same(list(rest[1:]), list(as_before[1:]))


def test_muons_updates_are_orthogonal():
    """In the singular vectors of the momentum, and of the size that Adam's have."""
    wide, tall = torch.randn(3, 20, 90), torch.randn(2, 90, 20)
    for matrices in (wide, tall, 1e-4 * wide, wide * torch.logspace(0, -1, 20)[:, None]):
        found = orthogonal(matrices)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ found @ v.mT
        assert (inner.diagonal(dim1=1, dim2=2) - 1).abs().max() < 0.4
        assert (inner - inner.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-3
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 32, 3, 3), (64,))]
    optimizer = Muon(weights, lr=0.01, fused=True)
    for w in weights:
        w.grad = torch.randn_like(w)
    optimizer.step()
    assert weights[0].detach().square().mean().sqrt() == pytest.approx(0.01 * RMS, rel=0.2)
    assert weights[1].detach().abs().max() == pytest.approx(0.01, rel=1e-3)  # Adam's first step


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.loss_weight_gamma=3"], "loss_weight is eps"),
        (["training.loss_weight=p2", "training.loss_weight_gamma=-1"], "gamma -1.0 is above 0"),
        (["training.loss_weight=minsnr"], "min-snr"),
        (["training.ema_lengths=[0.1,0.1001]"], "0.1 and 0.1001 are nearly the same"),
        (
            ["training.warmup_steps=0", "training.learning_rate_decay=inverse-sqrt"],
            "inverse-sqrt falls from warmup_steps on",
        ),
        (["diffusion.learned_variance=true", "training.t_density=normal"], "t_density=uniform"),
        (["training.t_density_width=0"], "greater than 0"),
    ],
)
def test_knobs_that_do_nothing_are_refused(overrides, says):
    with pytest.raises(ValueError, match=says):
        tiny(*overrides)
