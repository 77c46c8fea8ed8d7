"""How likely images are to a model: the variational bound (Eq. 5), in bits per dimension."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_utils import Denoiser, GaussianDiffusion, from_uint8, spaced_timesteps
from evaluation.metrics import Score
from generation import SeedNoise

# ---- the terms, as functions of the process


def posterior(diffusion: GaussianDiffusion, t: int) -> tuple[float, float, float]:
    """Return c_t, c_0 and the variance of q(x_{t-1} | x_t, x_0), whose mean is c_t x_t + c_0 x_0.

    Eq. 6 and 7.
    """
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
    progress: Callable[..., Any] | None = None,
) -> Bound:
    """Return every term of the bound, each from one draw of noise, as in the official evaluation.

    Where alpha_bar is 0 (the last t of `jsd`) x_t holds nothing of x_0: bound and sampler start
    below.

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
        raise ValueError(
            f"x_0 is {x_0.dtype} {list(x_0.shape)} with {len(seeds)} seeds; "
            "uint8 [N, C, H, W] and N seeds are needed"
        )
    if stride < 1:
        raise ValueError(f"stride {stride} is less than 1")
    times = spaced_timesteps(diffusion, None, "trailing")[::-1]  # 0, 1, 2, ...
    if len(times) < 2:
        raise ValueError("a model of a single step has no variance for its decoder")
    groups = [slice(i, i + batch_size) for i in range(0, len(x_0), batch_size)]
    widths = [max(1, batch_size // len(x_0[rows])) for rows in groups]  # t in one network call
    kept = times[::stride]

    def batches() -> Iterator[tuple[slice, list[tuple[int, Tensor]]]]:
        for rows, width in zip(groups, widths, strict=True):
            noise = SeedNoise(seeds[rows], tuple(x_0.shape[1:]), x_0.device)
            every = ((t, noise()) for t in times)  # also those that `stride` leaves out
            draws = itertools.islice(every, 0, None, stride)
            while batch := list(itertools.islice(draws, width)):
                yield rows, batch

    def terms(x: Tensor, batch: list[tuple[int, Tensor]]) -> Tensor:
        """Return bits and squared errors, [2, B, K] on the CPU, of x [B, C, H, W] at K (t, eps)."""
        x = x.to("cpu" if x.device.type == "mps" else x.device).double()  # mps has no float64
        x_t = torch.cat([diffusion.q_sample(x, t, eps.to(x)) for t, eps in batch])
        t = torch.tensor([t for t, _ in batch], device=x.device).repeat_interleave(len(x))
        found = []
        for (at, _), x0_hat in zip(batch, denoiser(x_t, t).split(len(x)), strict=True):
            bits = bound_term(diffusion, x, x0_hat, at, variance)
            found.append(torch.stack([bits, (x - x0_hat).square().flatten(1).mean(1)]))
        return torch.stack(found, dim=-1).cpu()

    todo: Any = batches()
    if progress:
        todo = progress(todo, total=sum(math.ceil(len(kept) / width) for width in widths))
    bits, mse = torch.empty(2, len(x_0), len(kept), dtype=torch.float64)
    for rows, batch in todo:
        columns = slice(kept.index(batch[0][0]), kept.index(batch[-1][0]) + 1)
        bits[rows, columns], mse[rows, columns] = terms(from_uint8(x_0[rows]), batch)
    prior = prior_term(diffusion, from_uint8(x_0.cpu()), times[-1])
    return Bound(torch.tensor(kept), bits, mse, prior)


def likelihood_scores(bound: Bound, *, stride: int, timesteps: int) -> dict[str, Score]:
    """Return the bits/dim of a bound: the sum, and the rate and distortion that it is made of.

    Where t were left out, the terms between are interpolated, and the names say so.
    """
    t = bound.t.numpy()
    every = np.arange(1, min(timesteps - 1, t[-1] + stride - 1) + 1)
    # how many t each kept t > 0 stands for: 1 where none is left out
    share = np.stack([np.interp(every, t[1:], unit) for unit in np.eye(len(t) - 1)]).sum(axis=1)
    rate = bound.prior + bound.bits[:, 1:] @ torch.from_numpy(share)
    distortion = bound.bits[:, 0]
    mark = "" if stride == 1 else f"-estimate (stride {stride})"
    parts = {
        f"nll{mark}" if mark else "NLL": rate + distortion,
        f"rate{mark}": rate,
        "distortion": distortion,
        "prior": bound.prior,
    }
    count = len(bound.prior)
    error_is = f"standard error over {count} images"
    error = lambda bits: (bits.std() / count**0.5).item() if count > 1 else None
    return {name: Score(bits.mean().item(), error(bits), error_is) for name, bits in parts.items()}
