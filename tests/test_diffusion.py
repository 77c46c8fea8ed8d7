import itertools
import math

import numpy as np
import pytest
import torch

from diffusion_utils import (
    GaussianDiffusion,
    from_uint8,
    make_steps,
    reverse,
    spaced_timesteps,
    to_uint8,
)


def process(schedule="linear", T=1000, start=1e-4, end=0.02):
    return GaussianDiffusion(timesteps=T, beta_schedule=schedule, beta_start=start, beta_end=end)


def steps_of(diffusion, sampler="ddpm", *, variance="large", eta=0.0, n=None, spacing="trailing"):
    return make_steps(
        diffusion, sampler=sampler, variance=variance, eta=eta, timesteps=n, spacing=spacing
    )


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


def test_loss_is_a_mean_per_picture():
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


# ---- step tables


def exact_variance(d, steps, v=0.25):
    """Of the output when the data is N(0, v): x0_hat is then linear in x_t; no noise, no luck."""
    cov = np.array([[1.0, 0.0], [0.0, 0.0]])  # of (x, previous x0_hat)
    for step in steps:
        a = d.alpha_bar(step.t)
        gain = math.sqrt(a) * v / (a * v + 1 - a)
        move = np.array([[step.c_t + step.c_0 * gain, step.c_1], [gain, 0.0]])
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

    for sampler, kwargs in (("ddpm", {}), ("ddim", {"eta": 0.5}), ("dpm++", {})):
        steps = steps_of(d, sampler, n=20, **kwargs)
        chain = reverse(
            d, eps_model, torch.randn(**random), steps, lambda _: torch.randn(**random), clip=False
        )
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
        *_, (_, ours, _) = reverse(d, eps_model, x_T, steps, lambda s: z[s.t], clip=False)
        torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


def test_clipping_is_before_the_posterior_mean():
    d = process()
    steps = steps_of(d)
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    chain = reverse(d, lambda x, t: torch.zeros_like(x), x, steps[500:501], lambda _: 0.0)
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
        assert step.c_0 == pytest.approx(math.sqrt(a_s) * beta / (1 - a_t), rel=1e-9)
        assert step.c_t == pytest.approx(math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t), rel=1e-9)
        assert step.sigma**2 == pytest.approx(beta * (1 - a_s) / (1 - a_t), rel=1e-9)
    for step in steps_of(d, "ddim", n=50)[:-1]:  # eta = 0: the first-order exponential integrator
        a_t, a_s = d.alpha_bar(step.t), d.alpha_bar(step.s)
        h = 0.5 * math.log(a_s / (1 - a_s)) - 0.5 * math.log(a_t / (1 - a_t))
        assert step.c_t == pytest.approx(math.sqrt((1 - a_s) / (1 - a_t)), rel=1e-12)
        assert step.c_0 == pytest.approx(-math.sqrt(a_s) * math.expm1(-h), rel=1e-11)
        assert (step.c_1, step.sigma) == (0, 0)
    large = steps_of(d)
    for step in large[:-1]:
        assert step.sigma**2 == pytest.approx(d.betas[step.t], rel=1e-9)


@pytest.mark.parametrize(
    "schedule", ["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"]
)
@pytest.mark.parametrize("spacing", ["trailing", "uniform", "quadratic", "logsnr"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_every_table_is_sound(schedule, spacing, sampler):
    for T, n in ((1000, 1000), (1000, 50), (350, 7), (10, 10), (4, 2)):
        d = process(schedule, T)
        for variance, eta in (("large", 0.0), ("small", 1.0)):
            steps = steps_of(d, sampler, variance=variance, eta=eta, n=n, spacing=spacing)
            assert 1 <= len(steps) <= n
            assert np.isfinite(np.array(steps)).all()
            assert all(a.s == b.t and a.t > a.s for a, b in itertools.pairwise(steps))
            _, s, *coefficients = steps[-1]
            assert s == -1
            assert coefficients == [0, 1, 0, 0]
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


def test_jsd_starts_where_x_t_holds_something():
    d = process("jsd")
    assert steps_of(d)[0].t == 998


# ---- pixels


def test_all_256_values_survive():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(pixels)
    assert (x[0], x[255]) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_uint8(x + 0.49 / 127.5), pixels)  # to the nearest, not down
    assert torch.equal(to_uint8(x - 0.49 / 127.5), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
