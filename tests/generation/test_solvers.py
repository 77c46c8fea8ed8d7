"""Solvers: their order on an exact ODE, diffusers' chains, and few calls by a word."""

import math

import numpy as np
import pytest
import torch
from helpers import process, steps_of, tiny, wake

from generation import Sampling, edit, quick_settings, reverse, spaced_timesteps
from generation.edit_options import choose_sampler
from generation.samplers import SAMPLERS, half_log_snr
from model import build_network
from weights import Model

# ---- the order, on data whose probability-flow ODE is known: in one dimension it keeps quantiles

MEANS, VARIANCES, SHARES = torch.tensor(
    [[-0.8, 0.1, 0.7], [0.08, 0.2, 0.12], [0.3, 0.4, 0.3]], dtype=torch.float64
)
T = 20_000  # so fine that any lambda is near a t


@pytest.fixture(scope="module")
def fine():
    return process(T=T, start=5e-6, end=1e-3)


def parts(d, x, t):
    """Return signal, variances and x less the means of the mixture's parts: scalar, [3], [N, 3]."""
    a = d.alpha_bar(t)
    return math.sqrt(a), a * VARIANCES + 1 - a, x[..., None] - math.sqrt(a) * MEANS


def x0_of(d, x, t):
    signal, variance, off = parts(d, x, t)
    shares = (SHARES.log() - variance.log() / 2 - off**2 / (2 * variance)).softmax(-1)
    return (shares * (MEANS + signal * VARIANCES / variance * off)).sum(-1)


def quantile(d, x, t):
    _, variance, off = parts(d, x, t)
    return (SHARES * (1 + torch.erf(off / (2 * variance).sqrt())) / 2).sum(-1)


def errors(d, sampler, counts):
    """Return how far each number of calls is off at lambda = 3, in quantiles."""
    a = d.alpha_bar(torch.arange(T)).numpy()
    levels = np.log(a / (1 - a)) / 2
    x_T = torch.linspace(-2, 2, 41, dtype=torch.float64).view(1, 1, 1, -1)
    found = []
    for count in counts:
        times = [np.abs(levels - level).argmin() for level in np.linspace(levels[-1], 3, count + 1)]
        *steps, _ = SAMPLERS[sampler](d, [*map(int, times), -1], eta=0.0)
        *_, (step, x, _) = reverse(lambda x, t: x0_of(d, x, t), x_T, steps, lambda _: 0.0)
        found.append((quantile(d, x, step.s) - quantile(d, x_T, T - 1)).abs().max().item())
    return found


@pytest.mark.parametrize(
    ("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm++", 2), ("dpm++3", 3), ("unipc", 3)]
)
def test_the_order_of_convergence(fine, sampler, order):
    counts = [20, 40, 80, 160]
    slope, _ = np.polyfit(np.log(counts), np.log(errors(fine, sampler, counts)), 1)
    assert -slope > order - 0.2


def test_a_corrector_is_worth_an_order(fine):
    ddim, two, three, unipc = (
        errors(fine, sampler, [40])[0] for sampler in ("ddim", "dpm++", "dpm++3", "unipc")
    )
    assert ddim > 5 * two > 10 * unipc and two > 5 * three


# ---- diffusers' schedulers on the same noise


def flattened(d, steps):
    """Return dpm++3's rows with half of the parabola's curvature, as the published code has it."""
    levels = [half_log_snr(d.alpha_bar(step.t)) for step in steps]
    found = list(steps)
    for i, step in enumerate(steps):
        if len(step.x0) == 3:
            h, h_0, h_1 = (levels[i + 1 - k] - levels[i - k] for k in range(3))
            slopes = np.array([1 / h_0, -1 / h_0 - 1 / h_1, 1 / h_1]) / (h_0 + h_1)
            more = (math.expm1(-h) + h - h**2 / 2) * slopes
            x0 = np.array(step.x0) + math.sqrt(d.alpha_bar(step.s)) * more
            found[i] = step._replace(x0=tuple(x0))
    return found


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize("sampler", ["dpm++", "dpm++3", "sde-dpm++", "unipc", "unip-3"])
def test_the_same_chain_as_diffusers(sampler, n, prediction):
    diffusers = pytest.importorskip("diffusers")
    d, common = process(), {"prediction_type": prediction, "timestep_spacing": "trailing"}
    if sampler == "unipc":
        theirs = diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **common)
    elif sampler == "unip-3":  # their predictor alone is a dpm++3 that always ends lower
        theirs = diffusers.UniPCMultistepScheduler(
            solver_order=3, disable_corrector=range(n), **common
        )
    else:
        kind = {"sde-dpm++": "sde-dpmsolver++"}.get(sampler, "dpmsolver++")
        theirs = diffusers.DPMSolverMultistepScheduler(
            solver_order=3 if sampler == "dpm++3" else 2, algorithm_type=kind, **common
        )
    theirs.alphas_cumprod = torch.from_numpy(np.cumprod(1 - d.betas))  # theirs is float32
    theirs.set_timesteps(n)
    steps = steps_of(d, "dpm++3" if sampler == "unip-3" else sampler, n=n)
    assert theirs.timesteps.tolist() == [step.t for step in steps]
    levels = [half_log_snr(d.alpha_bar(step.t)) for step in steps]
    theirs.sigmas = torch.tensor([*np.exp(np.negative(levels)), 0.0], dtype=torch.float64)
    steps = flattened(d, steps) if sampler == "dpm++3" else steps
    if sampler == "unip-3" and n == 40:
        steps[-2] = steps_of(d, "dpm++", n=n)[-2]

    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    weight, x = draw(), draw()
    denoiser = lambda x, t: torch.tanh(x + 0.3 * weight + t / 1000)
    noise = {step.t: draw() for step in steps}
    *_, (_, ours, _) = reverse(denoiser, x, steps, lambda step: noise[step.t])
    for t in map(int, theirs.timesteps):
        answer, a = denoiser(x, t), d.alpha_bar(t)
        if prediction == "epsilon":
            answer = (x - math.sqrt(a) * answer) / math.sqrt(1 - a)
        how = {"variance_noise": noise[t]} if sampler == "sde-dpm++" else {}
        x = theirs.step(answer, t, x, **how).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5, check_dtype=False)


# ---- where a table begins


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_table_cut_off_asks_for_no_estimate_that_is_missing(sampler):
    steps = steps_of(process(), sampler, n=12)
    part = edit.steps_from(steps, 600)
    tail = steps[-len(part) :]
    for i, (step, whole) in enumerate(zip(part, tail, strict=True)):
        assert len(step.x0) <= i + 1
        assert sum(step.x0) == pytest.approx(sum(whole.x0), abs=1e-12)
        assert step == whole or i < 2


@pytest.mark.parametrize("schedule", ["linear", "cosine", "jsd", "const"])
def test_karras_spaces_the_seventh_root_of_noise(schedule):
    d = process(schedule)
    times = spaced_timesteps(d, 12, "karras")
    levels = np.exp([-half_log_snr(d.alpha_bar(t)) for t in times])
    assert times[0] == (998 if schedule == "jsd" else 999)
    assert times[-1] == 0
    roots = np.minimum(levels, 80) ** (1 / 7)
    far = levels[1:-1] > 1  # nearer to the data one t is a large stride
    wanted = np.linspace(roots[0], roots[-1], 12)[1:-1][: far.sum()]
    assert roots[1:-1][far] == pytest.approx(wanted, rel=0.02)


# ---- few calls by a word


def plan_of(*overrides, **chosen):
    config = tiny("diffusion.timesteps=50", *overrides)
    model = Model(wake(build_network(config)).eval(), config, weights="ema", step=0, notes=[])
    return Sampling(model, chosen, source="", precision="float32")


def test_fast_is_the_quick_settings_and_what_is_said_wins():
    plan = plan_of("sampling.sampler=heun", "sampling.spacing=uniform", fast=True)
    quick = quick_settings(plan.model.diffusion)
    assert {key: plan.facts[key] for key in quick} == quick
    assert "fast" not in plan.recipe()
    said = {"sampler": "ddim", "eta": 0.5, "timesteps": 7, "spacing": "logsnr"}
    plan = plan_of(fast=True, **said)
    assert {key: plan.facts[key] for key in said} == said
    assert choose_sampler("inpaint", {"fast": True}, "ddpm")["sampler"] == "ddpm"
    assert choose_sampler("inpaint", {"fast": True, "sampler": "ddim"}, "ddpm")["sampler"] == "ddim"
