"""The process in closed form, what the network predicts, and how pixels come in and out."""

import math

import numpy as np
import pytest
import torch
from helpers import process, steps_of

from config import DiffusionConfig, SamplingConfig, TrainingConfig
from diffusion_utils import (
    CELLS,
    LOSS_WEIGHTS,
    T_DENSITIES,
    TARGETS,
    cell_edges,
    from_uint8,
    make_betas,
    to_uint8,
)
from generation.samplers import SAMPLERS, SPACINGS, reverse

# ---- q


def test_linear_constants():
    d = process()
    for t, beta in {0: 1e-4, 1: 1.1991992e-4, 499: 0.01004004004, 999: 0.02}.items():
        assert d.betas[t] == pytest.approx(beta, rel=1e-7)
    expected = {
        0: 0.9999,
        1: 0.9997800920721,
        249: 0.5240853738254,
        499: 0.07858724288178,
        749: 0.003350550438937,
        999: 4.035829765376e-05,
    }
    for t, value in expected.items():
        assert d.alpha_bar(t) == pytest.approx(value, rel=1e-12)
    assert math.sqrt(d.alpha_bar(999)) == pytest.approx(0.006352818087570016, rel=1e-13)
    assert d.alpha_bar(-1) == 1.0
    assert isinstance(d.alpha_bar(5), float)
    both = d.alpha_bar(torch.tensor([[-1, 0], [1, 999]]))
    assert both.dtype == torch.float64
    assert both.tolist() == [[1.0, d.alpha_bar(0)], [d.alpha_bar(1), d.alpha_bar(999)]]


@pytest.mark.parametrize(
    ("schedule", "last"),
    [("quad", 7.3341e-4), ("const", 1.683e-9), ("warmup10", 4.614e-9), ("warmup50", 2.606e-7)],
)
def test_other_schedules(schedule, last):
    assert process(schedule).alpha_bar(999) == pytest.approx(last, rel=2e-4)


def test_jsd_and_cosine():
    jsd = process("jsd")
    # betas 1/T, 1/(T-1), ..., 1 telescope
    np.testing.assert_allclose(jsd.betas, [1 / (1000 - t) for t in range(1000)], rtol=1e-12)
    for t in (0, 500, 998, 999):
        assert jsd.alpha_bar(t) == pytest.approx((999 - t) / 1000, abs=1e-12)
    cosine = process("cosine")
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    for t in (0, 100, 500, 900):
        assert cosine.alpha_bar(t) == pytest.approx(f[t + 1] / f[0], rel=1e-10)
    assert cosine.betas.max() == 0.999


def test_endpoints_do_not_scale_with_T():
    d = process(T=4000)
    assert (d.betas[0], d.betas[-1]) == (1e-4, 0.02)


@pytest.mark.parametrize("t", [-2, 1000, torch.tensor([3, 1000])])
def test_t_outside_is_refused(t):
    with pytest.raises(ValueError, match="outside"):
        process().alpha_bar(t)


def test_bad_betas_are_refused():
    with pytest.raises(ValueError, match="leaves"):
        process(end=1.5)
    with pytest.raises(ValueError, match="unknown"):
        process("liner")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_q_sample_and_back(dtype):
    d = process()
    x, eps = torch.randn(2, 4, 3, 8, 8, dtype=dtype)
    t = torch.tensor([0, 1, 500, 999])
    x_t = d.q_sample(x, t, eps)
    for i, ti in enumerate(t.tolist()):
        a = d.alpha_bar(ti)
        expected = math.sqrt(a) * x[i] + math.sqrt(1 - a) * eps[i]
        torch.testing.assert_close(x_t[i], expected)
        torch.testing.assert_close(d.q_sample(x[i : i + 1], ti, eps[i : i + 1])[0], expected)
    precise = 1e-3 if dtype == torch.float32 else 1e-11  # 1/sqrt(alpha_bar) is 157 at the end
    torch.testing.assert_close(d.predict_x_0(x_t, t, eps), x, atol=precise, rtol=0)


def test_one_step_at_a_time_is_the_jump():
    """Eq. 2 composed T times has the variance and the mean of Eq. 4."""
    d = process()
    mean, var = 1.0, 0.0
    for t in range(1000):
        mean *= math.sqrt(1 - d.betas[t])
        var = (1 - d.betas[t]) * var + d.betas[t]
        assert mean == pytest.approx(math.sqrt(d.alpha_bar(t)), rel=1e-9)
        assert var == pytest.approx(1 - d.alpha_bar(t), rel=1e-9)


def test_loss_is_a_mean_per_image():
    d = process()
    x, eps, guess = torch.randn(3, 5, 2, 4, 4)
    t = torch.randint(1000, (5,))
    seen = {}

    def model(x_t, at):
        seen.update(x_t=x_t, t=at)
        return guess

    loss = d.loss(model, x, t, eps)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss, ((eps - guess) ** 2).flatten(1).mean(1))
    torch.testing.assert_close(seen["x_t"], d.q_sample(x, t, eps))
    assert seen["t"] is t
    assert d.loss(lambda *_: eps, x, t, eps).eq(0).all()


# ---- targets, weights, densities


def test_choices_of_the_config_are_the_tables():
    choices = lambda kind, key: set(kind.model_fields[key].annotation.__args__)
    assert choices(DiffusionConfig, "prediction") == set(TARGETS)
    assert choices(TrainingConfig, "loss_weight") == set(LOSS_WEIGHTS)
    assert choices(TrainingConfig, "t_density") == set(T_DENSITIES)
    assert choices(SamplingConfig, "sampler") == set(SAMPLERS)
    assert choices(SamplingConfig, "spacing") == set(SPACINGS)
    for schedule in choices(DiffusionConfig, "beta_schedule"):
        assert len(make_betas(schedule, 7, 1e-4, 0.02)) == 7


def test_targets_are_the_same_estimate():
    """One x0_hat, said as eps, x_0 or v, has one loss, one estimate and one chain."""
    x_0, eps, x0_hat = torch.randn(3, 6, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    weight = torch.rand(1000, dtype=torch.float64)
    results = []
    for name in TARGETS:
        d = process(prediction=name)
        a = d.alpha_bar(t).view(-1, 1, 1, 1)
        x_t = d.q_sample(x_0, t, eps)
        eps_hat = (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
        F = d.target(x0_hat, t, eps_hat)
        steps = steps_of(d, "ddim", n=20)
        chain = reverse(
            lambda x, t, d=d: d.predict_x_0(x, t, d.target(x.tanh(), t, (
                x - math.sqrt(d.alpha_bar(t)) * x.tanh()) / math.sqrt(1 - d.alpha_bar(t)))),
            x_0, steps, lambda _: 0.0,
        )  # fmt: skip
        *_, (_, sample, _) = chain
        loss = d.loss(lambda *_, F=F: F, x_0, t, eps, weight)
        results.append([loss, d.predict_x_0(x_t, t, F), d.predict_eps(x_t, t, F), sample])
        torch.testing.assert_close(results[-1][1], x0_hat, rtol=1e-9, atol=1e-9)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    plain = (eps - results[0][2]).square().mean(dim=(1, 2, 3)) * weight[t]
    torch.testing.assert_close(results[0][0], plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "jsd"])
def test_a_targets_own_weight_makes_the_loss_its_own_error(schedule, name):
    d = process(schedule, prediction=name)
    x_0, eps, F = torch.randn(3, 6, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 500, 900, 998])
    loss = d.loss(lambda *_: F, x_0, t, eps, d.column(LOSS_WEIGHTS[name]))
    plain = (F - d.target(x_0, t, eps)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_weights_are_as_published(schedule):
    """At all t, in the form in which each paper gives them: of the error of what it predicts."""
    for name in TARGETS:
        d = process(schedule, prediction=name)
        snr = np.array([d.alpha_bar(t) / (1 - d.alpha_bar(t)) for t in range(1000)])
        own = {"eps": snr**0, "x0": snr, "v": snr / (1 + snr)}[
            name
        ]  # what eps' error is of its own
        per = {"eps": snr, "x0": 1, "v": snr + 1}[name]  # Hang et al. 2023, section 3.4
        for gamma in (1.0, 5.0, 20.0):
            found = d.column(LOSS_WEIGHTS["min-snr"], gamma=gamma).numpy() * own
            np.testing.assert_allclose(found, np.minimum(snr, gamma) / per, rtol=1e-12)
            soft = d.column(LOSS_WEIGHTS["soft-min-snr"], gamma=gamma).numpy() * own
            np.testing.assert_allclose(soft, snr * gamma / (snr + gamma) / per, rtol=1e-12)
            assert d.column(LOSS_WEIGHTS["sigmoid"], gamma=-1000).isfinite().all()
            sigmoid = d.column(LOSS_WEIGHTS["sigmoid"], gamma=math.log(gamma)).numpy() * own
            np.testing.assert_allclose(sigmoid, soft, rtol=1e-12)  # two names of one curve
            p2 = d.column(LOSS_WEIGHTS["p2"], gamma=gamma).numpy() * own
            np.testing.assert_allclose(p2, (1 + snr) ** -gamma * own, rtol=1e-12)
    published = {"min-snr": 5, "soft-min-snr": 5, "p2": 1, "sigmoid": -1}
    for name, gamma in published.items():
        row = LOSS_WEIGHTS[name]
        assert torch.equal(d.column(row), d.column(row, gamma=gamma))


def test_vs_loss_is_that_of_karras_preconditioning():
    """The loss at sigma of a denoiser c_skip x + c_out F(c_in x), sigma_data 1 (EDM, section 5)."""
    d = process(prediction="v")
    x_0, eps, F = torch.randn(3, 6, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 500, 900, 999])
    sigma = (1 / d.alpha_bar(t) - 1).sqrt().view(-1, 1, 1, 1)
    c_skip, c_out = 1 / (1 + sigma**2), sigma / (1 + sigma**2).sqrt()
    aim = (x_0 - c_skip * (x_0 + sigma * eps)) / c_out
    weights = {"v": 1, "soft-min-snr": sigma**2 / (1 + sigma**2) ** 2}
    for name, weight in weights.items():
        gamma = {} if name == "v" else {"gamma": 1.0}
        ours = d.loss(lambda *_: -F, x_0, t, eps, d.column(LOSS_WEIGHTS[name], **gamma))
        theirs = (weight * (F - aim).square()).mean(dim=(1, 2, 3))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_losses_stay_finite_without_signal():
    for name in TARGETS:
        d = process("jsd", prediction=name)  # alpha_bar is 0 at the last t
        x = torch.randn(1, 1, 2, 2)
        loss = d.loss(lambda x_t, t: x_t, x, torch.tensor([999]), torch.randn_like(x))
        assert loss.isfinite().all()
        assert d.predict_eps(x, 999, x).isfinite().all()


def test_t_is_drawn_from_its_density():
    uniform = cell_edges(process().column(T_DENSITIES["uniform"]))
    assert uniform.tolist() == [CELLS * (t + 1) for t in range(1000)]
    cell = torch.arange(1000 * CELLS)
    assert torch.equal(torch.searchsorted(uniform, cell, right=True), cell // CELLS)
    density = torch.rand(1000, dtype=torch.float64) ** 4
    density[10:20] = 0
    t = torch.searchsorted(cell_edges(density), cell, right=True)
    share = torch.bincount(t, minlength=1000) / len(cell)
    torch.testing.assert_close(share.double(), density / density.sum(), rtol=0, atol=2e-6)
    assert share[10:20].eq(0).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_log_snr_can_be_drawn_from_a_normal_distribution(schedule):
    d = process(schedule)
    density = d.column(T_DENSITIES["normal"], mean=-1.0, width=1.5).numpy()
    log_snr = np.log([d.alpha_bar(t) / (1 - d.alpha_bar(t)) for t in range(1000)])
    share = density / density.sum()
    mean = share @ log_snr
    assert mean == pytest.approx(-1, abs=0.05)
    assert share @ (log_snr - mean) ** 2 == pytest.approx(1.5**2, rel=0.1)
    # every t has its turn, and something is drawn however far from all levels the mean is
    narrow = d.column(T_DENSITIES["normal"], mean=0, width=0.5)
    assert cell_edges(narrow).diff().min() >= CELLS // 200
    assert d.column(T_DENSITIES["normal"], mean=1000, width=0.1).sum() > 0


# ---- pixels


def test_all_256_values_survive():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(pixels)
    assert (x[0], x[255]) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_uint8(x + 0.49 / 127.5), pixels)  # to the nearest, not down
    assert torch.equal(to_uint8(x - 0.49 / 127.5), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
