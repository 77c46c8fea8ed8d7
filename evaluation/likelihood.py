"""The variational bound (Eq. 5) of images under a model, in bits per dimension."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_utils import Denoiser, GaussianDiffusion, from_uint8
from evaluation.metrics import Score
from generation import SeedNoise, spaced_timesteps

# ---- the terms, as functions of the process


def posterior(diffusion: GaussianDiffusion, t: int) -> tuple[float, float, float]:
    """Return c_t, c_0, variance of q(x_{t-1} | x_t, x_0), of mean c_t x_t + c_0 x_0 (Eq. 6, 7)."""
    a_t, a_s, beta = diffusion.alpha_bar(t), diffusion.alpha_bar(t - 1), float(diffusion.betas[t])
    c_t = (1 - a_s) * math.sqrt(1 - beta) / (1 - a_t)
    return c_t, beta * math.sqrt(a_s) / (1 - a_t), beta * (1 - a_s) / (1 - a_t)


def model_variance(diffusion: GaussianDiffusion, t: int, variance: str) -> float:
    """Return the variance of p(x_{t-1} | x_t): beta_t for `large`, the posterior's for `small`.

    The posterior has none at t = 0; both take that of t = 1 there, as the official code does.
    """
    if t == 0 or variance == "small":
        return posterior(diffusion, max(t, 1))[2]
    return float(diffusion.betas[t])


def prior_term(diffusion: GaussianDiffusion, x_0: Tensor, t: int) -> Tensor:
    """Return L_T, KL(q(x_t | x_0) || N(0, I)) where sampling starts; x_0: [B, ...] -> [B]."""
    a = diffusion.alpha_bar(t)
    # KL of N(m, v) from N(0, 1) is (m^2 + v - 1 - log v) / 2, here with v = 1 - a
    nats = 0.5 * (a * x_0.double().square() - a - math.log1p(-a))
    return nats.flatten(1).mean(1) / math.log(2)


def bound_term(
    diffusion: GaussianDiffusion, x_0: Tensor, x0_hat: Tensor, t: int, variance: str
) -> Tensor:
    """Return one term of Eq. 5: KL(q || p) of x_{t-1} given x_t; at t = 0 the decoder's L_0.

    Args:
        x_0: [B, ...], of 256 levels in [-1, 1]. x0_hat: the model's estimate of it from x_t.
        variance: of p: `large` (fixedlarge) or `small` (fixedsmall).

    Returns:
        [B] float64.
    """
    x_0, x0_hat = x_0.double(), x0_hat.double()
    v_p = model_variance(diffusion, t, variance)
    if t == 0:
        nats = -log_discretised_gaussian(x_0, x0_hat, math.sqrt(v_p))
    else:  # both means hold the same c_t x_t, Eq. 8
        _, c_0, v_q = posterior(diffusion, t)
        spread = 0.5 * (v_q / v_p - 1 - math.log(v_q / v_p))
        nats = spread + 0.5 * c_0**2 / v_p * (x_0 - x0_hat).square()
    return nats.flatten(1).mean(1) / math.log(2)


def log_discretised_gaussian(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Return log p(x), Eq. 13: a Gaussian's mass in x's bin of 2 / 255, in nats, of x's shape.

    As in the official code: the CDF by its tanh approximation, never less than 1e-12, the bins of
    -1 and 1 open to the outside.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) / std))
    lower = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) / std))
    return torch.log(torch.clamp(upper - lower, min=1e-12))


# ---- the bound


class Bound(NamedTuple):
    """The bound's terms for N images at K times, in bits per dimension.

    With all t, `prior + bits.sum(1)` is an image's bits/dim; `bits[:, 0]`, where t is 0, is the
    distortion L_0, and the rest is the rate.
    """

    t: Tensor  # [K], rising from 0
    bits: Tensor  # [N, K] float64
    mse: Tensor  # [N, K] float64, of x0_hat, in [-1, 1]
    prior: Tensor  # [N] float64, L_T


def bound_times(diffusion: GaussianDiffusion, stride: int = 1) -> list[int]:
    """Return every stride-th t of the bound, from 0 on.

    Where alpha_bar is 0 (the last t of `jsd`) x_t holds nothing of x_0: bound and sampler start
    below.
    """
    return spaced_timesteps(diffusion, None, "trailing")[::-1][::stride]


@torch.inference_mode()
def bits_per_dim(
    denoiser: Denoiser,
    diffusion: GaussianDiffusion,
    x_0: Tensor,
    seeds: Sequence[int],
    *,
    variance: str,
    batch_size: int,
    stride: int = 1,
    progress: Callable[..., Iterable[Any]] = lambda work, total: work,
) -> Bound:
    """Return every term of the bound, each from one draw of noise, as in the official evaluation.

    Args:
        denoiser: (x_t [B, C, H, W] float64, t [B]) -> x0_hat, clipped to [-1, 1]: `make_denoiser`
            of a network in float32.
        x_0: uint8 [N, C, H, W], on the network's device.
        seeds: one an image; it alone decides the image's noise at each t.
        variance: of p, `large` or `small`.
        batch_size: rows of one network call: several images, several t of each.
        stride: more than 1 leaves out all but each stride-th t, for an estimate.
        progress: wraps an iterable and knows `total=`.

    Raises:
        ValueError: shapes that do not fit, a stride below 1, or a model of a single step.
    """
    if x_0.dtype != torch.uint8 or x_0.ndim != 4 or len(seeds) != len(x_0):
        given = f"{x_0.dtype} {list(x_0.shape)} with {len(seeds)} seeds"
        raise ValueError(f"x_0 is {given}; uint8 [N, C, H, W] and N seeds are needed")
    if stride < 1:
        raise ValueError(f"stride {stride} is less than 1")
    times, kept = bound_times(diffusion), bound_times(diffusion, stride)
    if len(times) < 2:
        raise ValueError("a model of a single step has no variance for its decoder")
    work = []  # (images, t) of each network call, as slices
    for start in range(0, len(x_0), batch_size):
        rows = slice(start, start + batch_size)
        width = max(1, batch_size // len(x_0[rows]))
        work += [(rows, slice(i, i + width)) for i in range(0, len(kept), width)]
    bits, mse = torch.empty(2, len(x_0), len(kept), dtype=torch.float64)
    device = "cpu" if x_0.device.type == "mps" else x_0.device  # mps has no float64
    for rows, columns in progress(work, total=len(work)):
        if columns.start == 0:
            draw = SeedNoise(seeds[rows], tuple(x_0.shape[1:]), x_0.device)
            # also for those t that `stride` leaves out
            noise = islice((draw().to(device).double() for _ in times), 0, None, stride)
            x = from_uint8(x_0[rows]).to(device).double()
        some = torch.tensor(kept[columns], device=device)
        x_t = torch.cat([diffusion.q_sample(x, t, next(noise)) for t in kept[columns]])
        estimates = denoiser(x_t, some.repeat_interleave(len(x))).split(len(x))
        pairs = list(zip(kept[columns], estimates, strict=True))
        terms = [bound_term(diffusion, x, x0_hat, t, variance) for t, x0_hat in pairs]
        errors = [(x - x0_hat).square().flatten(1).mean(1) for _, x0_hat in pairs]
        bits[rows, columns] = torch.stack(terms, dim=1).cpu()
        mse[rows, columns] = torch.stack(errors, dim=1).cpu()
    prior = prior_term(diffusion, from_uint8(x_0.cpu()), times[-1])
    return Bound(torch.tensor(kept), bits, mse, prior)


def likelihood_scores(bound: Bound, *, stride: int, timesteps: int) -> dict[str, Score]:
    """Return the bits/dim of a bound, the rate and distortion that it is made of, and the prior.

    Where t were left out, the terms between are interpolated, and the names say so.
    """
    t = bound.t.numpy()
    every = np.arange(1, min(timesteps - 1, t[-1] + stride - 1) + 1)
    # how many t each kept t > 0 stands for: 1 where none is left out
    share = np.stack([np.interp(every, t[1:], unit) for unit in np.eye(len(t) - 1)]).sum(axis=1)
    rate = bound.prior + bound.bits[:, 1:] @ torch.from_numpy(share)
    distortion = bound.bits[:, 0]
    mark = "" if stride == 1 else f"-estimate (stride {stride})"
    parts = {f"nll{mark}" if mark else "NLL": rate + distortion, f"rate{mark}": rate}
    parts |= {"distortion": distortion, "prior": bound.prior}
    count = len(bound.prior)
    error = lambda bits: (bits.std() / count**0.5).item() if count > 1 else None
    return {
        name: Score(bits.mean().item(), error(bits), f"standard error over {count} images")
        for name, bits in parts.items()
    }
