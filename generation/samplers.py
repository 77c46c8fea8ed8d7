"""Samplers as step tables, and the one loop that walks them.

| symbol           | name here          | source                                      |
|------------------|--------------------|---------------------------------------------|
| p(x_s \\| x_t)    | `make_steps`       | Eq. 6, 7 and Algorithm 2; DDIM Eq. 12, 16;  |
|                  | and `reverse`      | DPM-Solver++ (Lu et al. 2022) Algorithm 2   |
| lambda           | `half_log_snr`     | Lu et al. 2022, after Eq. 4                 |

A sampler is a function from the times that it visits to rows of numbers. `t` is 0-based, and -1 is
the data. Equations are of Ho et al. 2020 unless named. Nothing here draws a random number.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_utils import Denoiser, GaussianDiffusion

FARTHEST = 80  # noise / signal, the sigma_max of Karras et al. 2022


class Step(NamedTuple):
    """One step of a sampler: x_s = sum x[i] state_i + sum x0[i] estimate_i + sigma z.

    Where the variance is learned, sigma spread^((v + 1) / 2) stands for sigma.

    state_0 is x_t, state_1 the state before it; estimate_0 is x0_hat(x_t, t), estimate_1 the one
    before. A step without `x0` asks no network. One with s > t goes back towards noise.
    """

    t: int
    s: int  # -1 is the data
    x: tuple[float, ...]
    x0: tuple[float, ...]
    sigma: float = 0.0
    spread: float = 1.0  # how much larger sigma may be

    def ask(self, denoiser: Denoiser, x_t: Tensor) -> tuple[Tensor, float | Tensor]:
        """Return x0_hat of x_t, and sigma, which a network that learns its variance says, too."""
        if self.spread == 1:
            return denoiser(x_t, self.t), self.sigma
        x0_hat, v = denoiser(x_t, self.t, True)
        return x0_hat, self.sigma * self.spread ** ((v + 1) / 2)


def make_steps(
    diffusion: GaussianDiffusion,
    *,
    sampler: str,
    variance: str,
    eta: float,
    timesteps: int | None,
    spacing: str,
) -> list[Step]:
    """Return a sampler's table, from t = T - 1 (or where the spacing starts) down to the data.

    Args:
        sampler: a key of `SAMPLERS`.
        variance: `ddpm` only: `large` (fixedlarge, beta; the paper's CIFAR-10) or `small`
            (fixedsmall, the posterior's; the paper's 256x256), or `learned` between the two.
        eta: `ddim` only: 0 is deterministic, 1 equals `ddpm` with small variance.
        timesteps: how many steps; None is all T. Rounding can merge a few: the length counts.
        spacing: see `spaced_timesteps`.

    Raises:
        ValueError: unknown names, or a number of steps that the spacing cannot have.
    """
    for name, value, known in (
        ("sampler", sampler, SAMPLERS),
        ("variance", variance, VARIANCES),
        ("spacing", spacing, SPACINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
    if variance == "learned" and not diffusion.learned_variance:
        raise ValueError("variance learned: this model has learned none; take large or small")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is outside 0 ... 1")
    times = [*spaced_timesteps(diffusion, timesteps, spacing), -1]
    return SAMPLERS[sampler](diffusion, times, variance=variance, eta=eta)


def ddpm_steps(
    diffusion: GaussianDiffusion, times: list[int], *, variance: str, **_: Any
) -> list[Step]:
    """Return Algorithm 2's table: DDIM's with eta 1 (Eq. 7), `large` with the variance of beta.

    `learned` lies between these two, which are those of the steps that are taken.
    """
    steps = []
    for step in ddim_steps(diffusion, times, eta=1.0):
        if variance != "small" and step.s >= 0:
            large = math.sqrt(1 - diffusion.alpha_bar(step.t) / diffusion.alpha_bar(step.s))
            sigma = step.sigma if variance == "learned" else large
            step = step._replace(sigma=sigma, spread=large / sigma)
        steps.append(step)
    return steps


def ddim_steps(
    diffusion: GaussianDiffusion, times: list[int], *, eta: float, **_: Any
) -> list[Step]:
    """Return DDIM's table (Song et al. 2020, Eq. 12 and 16)."""
    steps = []
    for t, s in itertools.pairwise(times):
        a_t, a_s = diffusion.alpha_bar(t), diffusion.alpha_bar(s)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        c_t = math.sqrt(max(0.0, 1 - a_s - sigma**2) / (1 - a_t))
        steps.append(Step(t, s, (c_t,), (math.sqrt(a_s) - c_t * math.sqrt(a_t),), sigma))
    return steps


def dpm_steps(diffusion: GaussianDiffusion, times: list[int], **_: Any) -> list[Step]:
    """Return DPM-Solver++(2M)'s table: second-order multistep, without noise."""
    return multistep(diffusion, ddim_steps(diffusion, times, eta=0.0), order=2)


def dpm3_steps(diffusion: GaussianDiffusion, times: list[int], **_: Any) -> list[Step]:
    """Return DPM-Solver++(3M)'s table: third-order multistep, without noise."""
    return multistep(diffusion, ddim_steps(diffusion, times, eta=0.0), order=3)


def sde_dpm_steps(diffusion: GaussianDiffusion, times: list[int], **_: Any) -> list[Step]:
    """Return SDE-DPM-Solver++(2M)'s table (Lu et al. 2022): with the noise of `ddpm`."""
    return multistep(diffusion, ddim_steps(diffusion, times, eta=1.0), order=2)


def multistep(diffusion: GaussianDiffusion, steps: list[Step], order: int) -> list[Step]:
    """Extrapolate x0_hat along each step from the last `order` estimates (Lu et al. 2022, Alg. 2).

    The first steps know fewer; the last takes the estimate as it is. Of fewer than 15 steps the one
    before it is of the second order at most, as in their code.
    """
    levels = [half_log_snr(diffusion.alpha_bar(step.t)) for step in steps]
    found = steps[:1]
    for i, step in enumerate(steps[1:-1], 1):
        most = order if len(steps) >= 15 else min(order, len(steps) - i)
        weights = quadrature(levels[i + 1] - levels[i], levels[i::-1][:most], levels[i])
        found.append(step._replace(x0=(*(step.x0[0] * weights / weights.sum()).tolist(),)))
    return found + steps[1:][-1:]


def quadrature(h: float, known: list[float], start: float) -> np.ndarray:
    """Return w: a step of h from `start` takes sum w[i] x0_hat(known[i]) / sqrt(alpha_bar(s)).

    It is the integral of exp(lambda - lambda_s) x0_hat over the step (Lu et al. 2022, Eq. 8), with
    the polynomial in lambda through `known` as x0_hat. Where they are two, the first moment is half
    of the zeroth, as in their Algorithm 2: the order is the same.
    """
    moments = [-math.expm1(-h)]
    for k in range(1, len(known)):
        moments.append(1 - k / h * moments[-1])
    if len(known) == 2:
        moments[1] = moments[0] / 2
    shares = (np.array(known) - start) / h
    return np.linalg.solve(np.vander(shares, increasing=True).T, moments)


def unipc_steps(diffusion: GaussianDiffusion, times: list[int], **_: Any) -> list[Step]:
    """Return UniPC-2's table with B_2(h) = e^h - 1 (Zhao et al. 2023).

    A step predicts x_s as `dpm++`; once the network has been asked there, the step is taken again
    with what it said. Both begin with the same multiple of x_t, so that the corrected state is the
    predicted one plus a sum of estimates, and correcting needs neither a row nor a call of its own.
    """
    predicted = dpm_steps(diffusion, times)
    levels = [half_log_snr(diffusion.alpha_bar(step.t)) for step in predicted]
    steps = predicted[:1]
    for i, (last, step) in enumerate(itertools.pairwise(predicted[:-1]), 1):
        known = levels[i::-1][: len(last.x0) + 1]
        weights = quadrature(levels[i] - levels[i - 1], known, levels[i - 1])
        better = math.sqrt(diffusion.alpha_bar(step.t)) * weights - np.array([0, *last.x0])
        own = np.pad(step.x0, (0, len(better) - 2))
        steps.append(step._replace(x0=(*(own + step.x[0] * better).tolist(),)))
    return steps + predicted[1:][-1:]


def heun_steps(diffusion: GaussianDiffusion, times: list[int], **_: Any) -> list[Step]:
    """Return Heun's table for the probability-flow ODE (Karras et al. 2022, Algorithm 1).

    In x / sqrt(alpha_bar) and r = noise / signal the slope is (x - x0_hat) / r: an Euler row (DDIM)
    goes to s, a second asks the network there and takes the mean of both slopes.
    """
    steps: list[Step] = []
    for euler in ddim_steps(diffusion, times, eta=0.0):
        steps.append(euler)
        a_t, a_s = diffusion.alpha_bar(euler.t), diffusion.alpha_bar(euler.s)
        r_t, r_s = (math.sqrt((1 - a) / a) for a in (a_t, a_s))
        if euler.s < 0 or r_t > FARTHEST:  # no slope at r = 0; nothing to see beyond
            continue
        h, signal = (r_s - r_t) / 2, math.sqrt(a_s)
        states = h / r_s, math.sqrt(a_s / a_t) * (1 + h / r_t)
        steps.append(Step(euler.s, euler.s, states, (-signal * h / r_s, -signal * h / r_t)))
    return steps


VARIANCES = "large", "small", "learned"
SAMPLERS: dict[str, Callable[..., list[Step]]] = {
    "ddpm": ddpm_steps,
    "ddim": ddim_steps,
    "dpm++": dpm_steps,
    "dpm++3": dpm3_steps,
    "sde-dpm++": sde_dpm_steps,
    "unipc": unipc_steps,
    "heun": heun_steps,
}


def half_log_snr(alpha_bar: float) -> float:
    """Return lambda, half the logarithm of the signal-to-noise ratio; -inf without signal."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar)) if alpha_bar else -math.inf


def spaced_timesteps(diffusion: GaussianDiffusion, count: int | None, spacing: str) -> list[int]:
    """Return the t that a sampler visits, falling.

    `trailing` ends the strides at T - 1; `uniform` begins them at 0 and `quadratic` squares them
    up to 0.8 T, as the DDIM paper and code. From T - 1 to 0, `logsnr` spaces the half log SNR
    evenly, and `karras` the seventh root of noise / signal (Karras et al. 2022, Eq. 5), whose
    second is as if the first were `FARTHEST` at most. Where alpha_bar is 0 (the last t of `jsd`)
    x_t holds nothing of x_0 and the step is left out.
    """
    T = diffusion.timesteps
    count = T if count is None else count
    if not 1 <= count <= T:
        raise ValueError(f"timesteps {count} is outside 1 ... {T}, the steps of this model")
    if count == 1 < T and spacing != "trailing":
        raise ValueError(f"spacing {spacing} with 1 step would not start in noise; use trailing")
    visible = diffusion.visible
    if spacing in ("logsnr", "karras"):
        known = np.array([half_log_snr(diffusion.alpha_bar(t)) for t in range(visible)])
        wanted = np.linspace(known[-1], known[0], count)
        if spacing == "karras":  # noise / signal is exp(-lambda)
            ends = np.exp(-np.maximum(known[[-1, 0]], -math.log(FARTHEST)) / 7)
            wanted = -7 * np.log(np.linspace(ends[0], ends[1], count))
        times = [visible - 1, *(int(np.abs(known - w).argmin()) for w in wanted[1:])]
    elif spacing == "trailing":
        times = [round(T - i * T / count) - 1 for i in range(count)]
    elif spacing == "uniform":
        times = [i * T // count for i in range(count)]
    else:
        times = [int(x) for x in np.linspace(0, math.sqrt(0.8 * T), count) ** 2]
    found = sorted({t for t in times if t < visible}, reverse=True)
    if not found:
        raise ValueError(f"timesteps {count} visits no t that holds some of x_0; try 2")
    return found


SPACINGS = "trailing", "uniform", "quadratic", "logsnr", "karras"


def reverse(
    denoiser: Denoiser, x_T: Tensor, steps: list[Step], noise: Callable[[Step], Tensor]
) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Walk a step table from x_T to the data (Algorithm 2 for `ddpm` over all T).

    Args:
        denoiser: (x_t [B, C, H, W], t: int) -> x0_hat [B, C, H, W], clipped or not; see `Step.ask`.
        x_T: [B, C, H, W], standard normal.
        noise: step -> z [B, C, H, W]; asked once for each step whose sigma is not 0, in order.

    Yields:
        (step, x_s, x0_hat) after each step; the last x_s is the last x0_hat.
    """
    states, estimates = [x_T], [x_T]  # newest first
    longest = max((len(c) for step in steps for c in (step.x, step.x0)), default=1)
    for step in steps:
        sigma: float | Tensor = step.sigma
        if step.x0:
            x0_hat, sigma = step.ask(denoiser, states[0])
            estimates = [x0_hat, *estimates][:longest]
        parts = [c * state for c, state in zip(step.x, states, strict=False)]
        parts += [c * estimate for c, estimate in zip(step.x0, estimates, strict=False)]
        if step.sigma:
            parts.append(sigma * noise(step))
        x = functools.reduce(torch.add, parts)
        states = [x, *states][:longest]
        yield step, x, estimates[0]
