"""Samplers: their step tables against closed forms and the papers, and the loop that walks them."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import process, steps_of

from generation.samplers import SAMPLERS, SPACINGS, Step, reverse, spaced_timesteps


def denoiser_of(d, eps_model, *, clip=False):
    """(x_t, t) -> x0_hat of a model of eps."""
    clamp = (lambda x: x.clamp(-1, 1)) if clip else (lambda x: x)
    return lambda x, t: clamp(d.predict_x_0(x, t, eps_model(x, t)))


# ---- step tables


def exact_variance(d, steps, v=0.25):
    """Of the output when the data is N(0, v): x0_hat is then linear in x_t; no noise, no luck."""
    cov = np.diag([1.0, 0, 0, 0])  # of the two newest states and estimates
    for step in steps:
        a = d.alpha_bar(step.t)
        look = np.eye(4)  # the newest estimate enters
        look[2:] = [[math.sqrt(a) * v / (a * v + 1 - a), 0, 0, 0], [0, 0, 1, 0]]
        row = [*step.x, *[0] * (2 - len(step.x)), *step.x0, *[0] * (2 - len(step.x0))]
        move = np.array([row, [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ look
        cov = move @ cov @ move.T
        cov[0, 0] += step.sigma**2
    return cov[0, 0]


@pytest.mark.parametrize(
    ("n", "large", "small", "ddim", "dpm"),
    [
        (1000, 0.2508, 0.2461, 0.2485, 0.2500),
        (50, 0.2619, 0.1972, 0.2222, 0.2506),
        (20, 0.2671, 0.1533, 0.1861, 0.2287),
    ],
)
def test_output_variance_is_the_closed_form(n, large, small, ddim, dpm):
    d = process()
    assert exact_variance(d, steps_of(d, variance="large", n=n)) == pytest.approx(large, abs=6e-5)
    assert exact_variance(d, steps_of(d, variance="small", n=n)) == pytest.approx(small, abs=6e-5)
    assert exact_variance(d, steps_of(d, "ddim", n=n)) == pytest.approx(ddim, abs=6e-5)
    assert exact_variance(d, steps_of(d, "dpm++", n=n)) == pytest.approx(dpm, abs=6e-5)


def test_the_loop_has_the_variance_of_the_table():
    """The reverse loop itself, run on many Gaussian pixels with the perfect eps model."""
    d = process()
    generator = torch.Generator().manual_seed(0)
    random = {"size": (1, 1, 256, 256), "generator": generator, "dtype": torch.float64}

    def eps_model(x, t):
        a = d.alpha_bar(t)
        x0 = math.sqrt(a) * 0.25 / (a * 0.25 + 1 - a) * x
        return (x - math.sqrt(a) * x0) / math.sqrt(1 - a)

    for sampler, kwargs in (("ddpm", {}), ("ddim", {"eta": 0.5}), ("dpm++", {}), ("heun", {})):
        steps = steps_of(d, sampler, n=20, **kwargs)
        denoiser, x_T = denoiser_of(d, eps_model), torch.randn(**random)
        chain = reverse(denoiser, x_T, steps, lambda _: torch.randn(**random))
        *_, (_, x, x0_hat) = chain
        assert torch.equal(x, x0_hat)
        assert x.var().item() == pytest.approx(exact_variance(d, steps), rel=0.02)


def test_ddpm_over_all_steps_is_algorithm_2():
    d = process(T=50)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    weight = draw()
    eps_model = lambda x, t: torch.tanh(weight * x + t / 50)
    x_T, z = draw(), [draw() for _ in range(50)]

    for variance in ("large", "small"):
        x = x_T
        for t in reversed(range(50)):
            eps = eps_model(x, t)
            alpha, a, a_prev = 1 - d.betas[t], d.alpha_bar(t), d.alpha_bar(t - 1)
            mean = (x - d.betas[t] / math.sqrt(1 - a) * eps) / math.sqrt(alpha)  # Eq. 11
            beta_tilde = (1 - a_prev) / (1 - a) * d.betas[t]
            sigma = math.sqrt(d.betas[t] if variance == "large" else beta_tilde)
            x = mean + (sigma * z[t] if t > 0 else 0)
        steps = steps_of(d, variance=variance)
        *_, (_, ours, _) = reverse(denoiser_of(d, eps_model), x_T, steps, lambda s: z[s.t])
        torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


def test_clipping_is_before_the_posterior_mean():
    d = process()
    steps = steps_of(d)
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    denoiser = denoiser_of(d, lambda x, t: torch.zeros_like(x), clip=True)
    chain = reverse(denoiser, x, steps[500:501], lambda _: 0.0)
    _, x_s, x0_hat = next(chain)
    a, a_prev, beta = d.alpha_bar(499), d.alpha_bar(498), d.betas[499]
    mean = beta * math.sqrt(a_prev) / (1 - a) * 1.0
    mean += (1 - a_prev) * math.sqrt(1 - beta) / (1 - a) * 3.0
    assert x0_hat.item() == 1.0
    assert x_s.item() == pytest.approx(mean, rel=1e-10)


def test_identities_between_samplers():
    d = process()
    small = steps_of(d, variance="small", n=37)
    for one, other in zip(steps_of(d, "ddim", eta=1.0, n=37), small, strict=True):
        assert one == other
    for step in small[:-1]:  # eta = 1 is the posterior of Eq. 7 between any two steps
        a_t, a_s = d.alpha_bar(step.t), d.alpha_bar(step.s)
        beta = 1 - a_t / a_s
        assert step.x0[0] == pytest.approx(math.sqrt(a_s) * beta / (1 - a_t), rel=1e-9)
        assert step.x[0] == pytest.approx(math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t), rel=1e-9)
        assert step.sigma**2 == pytest.approx(beta * (1 - a_s) / (1 - a_t), rel=1e-9)
    for step in steps_of(d, "ddim", n=50)[:-1]:  # eta = 0: the first-order exponential integrator
        a_t, a_s = d.alpha_bar(step.t), d.alpha_bar(step.s)
        h = 0.5 * math.log(a_s / (1 - a_s)) - 0.5 * math.log(a_t / (1 - a_t))
        assert step.x[0] == pytest.approx(math.sqrt((1 - a_s) / (1 - a_t)), rel=1e-12)
        assert step.x0[0] == pytest.approx(-math.sqrt(a_s) * math.expm1(-h), rel=1e-11)
        assert (len(step.x0), step.sigma) == (1, 0)
    large = steps_of(d)
    for step in large[:-1]:
        assert step.sigma**2 == pytest.approx(d.betas[step.t], rel=1e-9)


@pytest.mark.parametrize(
    "schedule", ["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"]
)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_table_is_sound(schedule, spacing, sampler):
    for T, n in ((1000, 1000), (1000, 50), (350, 7), (10, 10), (4, 2)):
        d = process(schedule, T)
        for variance, eta in (("large", 0.0), ("small", 1.0)):
            steps = steps_of(d, sampler, variance=variance, eta=eta, n=n, spacing=spacing)
            assert 1 <= len(steps) <= (2 * n - 1 if sampler == "heun" else n)
            assert all(np.isfinite([*step.x, *step.x0, step.sigma]).all() for step in steps)
            assert all(a.s == b.t and a.t >= a.s for a, b in itertools.pairwise(steps))
            _, s, *coefficients = steps[-1]
            assert s == -1
            assert coefficients == [(0,), (1,), 0, 1]
            assert steps[0].t < T


def test_spacings():
    d = process()
    assert spaced_timesteps(d, 10, "trailing") == list(range(999, 0, -100))
    assert spaced_timesteps(d, 10, "uniform") == list(range(900, -1, -100))
    ddim = [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]
    assert spaced_timesteps(d, 10, "quadratic") == ddim
    lengths = {n: len(spaced_timesteps(d, n, "quadratic")) for n in (50, 100, 1000)}
    assert lengths == {50: 49, 100: 96, 1000: 688}
    for spacing in ("trailing", "uniform"):
        assert spaced_timesteps(d, None, spacing) == list(range(999, -1, -1))
        assert len(spaced_timesteps(d, 300, spacing)) == 300
    log = spaced_timesteps(d, 20, "logsnr")
    snr = [math.log(d.alpha_bar(t) / (1 - d.alpha_bar(t))) for t in log]
    assert (log[0], log[-1]) == (999, 0)
    # near the data one t is a large stride: rounding shows there
    assert np.diff(snr)[:-3] == pytest.approx(np.full(16, (snr[-1] - snr[0]) / 19), rel=0.05)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"n": 1001}, "1001"),
        ({"n": 0}, "0 is outside"),
        ({"sampler": "dpm"}, "sampler 'dpm'"),
        ({"variance": "medium"}, "medium"),
        ({"eta": 1.5}, "eta 1.5"),
        ({"spacing": "even"}, "even"),
        ({"n": 1, "spacing": "uniform"}, "trailing"),
    ],
)
def test_wrong_samplers_are_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        steps_of(process(), **kwargs)


def test_heun_is_the_textbooks():
    """On N(0, 0.25), where the slope is known: Karras et al. 2022, Algorithm 1, written out."""
    d, v = process(), 0.25

    def x0_of(x, t):
        a = d.alpha_bar(t)
        return math.sqrt(a) * v / (a * v + 1 - a) * x

    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    times = [*spaced_timesteps(d, 12, "trailing"), -1]
    y = x_T / math.sqrt(d.alpha_bar(times[0]))  # x over the signal; r is noise over signal
    for t, s in itertools.pairwise(times):
        r_t, r_s = (math.sqrt(1 / d.alpha_bar(u) - 1) for u in (t, s))
        slope = (y - x0_of(y * math.sqrt(d.alpha_bar(t)), t)) / r_t
        euler = y + (r_s - r_t) * slope
        if s >= 0 and r_t < 80:  # sigma_max
            there = (euler - x0_of(euler * math.sqrt(d.alpha_bar(s)), s)) / r_s
            y = y + (r_s - r_t) * (slope + there) / 2
        else:
            y = euler
    steps = steps_of(d, "heun", n=12)
    assert len(steps) == 22
    *_, (_, x, _) = reverse(x0_of, x_T, steps, lambda _: 0.0)
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    for d in (process(), process("cosine")):  # r begins at 157, and at 20,000
        errors = [abs(exact_variance(d, steps_of(d, s, n=12)) - v) for s in ("ddim", "heun")]
        assert errors[1] < errors[0] / 2


def test_rows_may_go_up_and_ask_nothing():
    up = Step(10, 20, (0.9,), (), 0.5)
    down = Step(20, 10, (1.0, 0.5), (0.25,))
    asked = []
    denoiser = lambda x, t: asked.append(t) or x
    x = torch.ones(1, 1, 1, 1)
    (_, first, _), (_, second, _) = reverse(denoiser, x, [up, down], lambda _: x)
    assert (first.item(), asked) == (pytest.approx(1.4), [20])
    assert second.item() == pytest.approx(1.4 + 0.5 + 0.25 * 1.4)


def test_jsd_starts_where_x_t_holds_something():
    d = process("jsd")
    assert steps_of(d)[0].t == 998
