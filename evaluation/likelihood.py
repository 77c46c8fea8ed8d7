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


def ask(denoiser: Denoiser, x_t: Tensor, t: Tensor, variance: str) -> tuple[Tensor, Tensor]:
    """Return x0_hat, and v of the variance of p, see `GaussianDiffusion.log_variance`.

    At t = 0 fixedlarge takes the posterior's of t = 1, too, as the official code does.
    """
    if variance == "learned":
        return denoiser(x_t, t, True)
    large = (t > 0) & (variance == "large")
    return denoiser(x_t, t), torch.where(large, 1, -1).to(x_t).view(-1, 1, 1, 1)


def prior_term(diffusion: GaussianDiffusion, x_0: Tensor, t: int) -> Tensor:
    """Return L_T, KL(q(x_t | x_0) || N(0, I)) where sampling starts; x_0: [B, ...] -> [B]."""
    a = diffusion.alpha_bar(t)
    # KL of N(m, v) from N(0, 1) is (m^2 + v - 1 - log v) / 2, here with v = 1 - a
    nats = 0.5 * (a * x_0.double().square() - a - math.log1p(-a))
    return nats.flatten(1).mean(1) / math.log(2)


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
            of a network in float32. A learned variance asks it for v, too.
        x_0: uint8 [N, C, H, W], on the network's device.
        seeds: one an image; it alone decides the image's noise at each t.
        variance: of p, `large`, `small` or `learned`.
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
        t, target = some.repeat_interleave(len(x)), x.repeat(len(some), 1, 1, 1)
        x0_hat, v = ask(denoiser, x_t, t, variance)
        terms = diffusion.bound_term(target, x0_hat, t, diffusion.log_variance(t, v))
        errors = (target - x0_hat).square().flatten(1).mean(1)
        bits[rows, columns] = terms.view(len(some), -1).T.cpu()
        mse[rows, columns] = errors.view(len(some), -1).T.cpu()
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
