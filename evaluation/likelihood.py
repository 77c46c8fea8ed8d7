"""How likely pictures are to a model: the variational bound (Eq. 5), in bits per dimension."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_utils import from_uint8, spaced_timesteps
from pl_utils import DDPM, SeedNoise


class Bound(NamedTuple):
    """The bound's terms for N pictures at K times, in bits per dimension.

    With all t, `prior + bits.sum(1)` is a picture's bits/dim; `bits[:, 0]`, where t is 0, is the
    distortion L_0, and the rest is the rate.
    """

    t: Tensor  # [K], rising from 0
    bits: Tensor  # [N, K] float64
    mse: Tensor  # [N, K] float64, of x0_hat, in [-1, 1]
    prior: Tensor  # [N] float64, L_T


@torch.inference_mode()
def bits_per_dim(
    ddpm: DDPM,
    x_0: Tensor,
    seeds: list[int],
    *,
    batch_size: int,
    stride: int = 1,
    progress: Callable | None = None,
) -> Bound:
    """Every term of the bound, each from one draw of noise, as in the official evaluation.

    x0_hat is clipped to [-1, 1]; p has the variance of the config's `sampling.variance`. Where
    alpha_bar is 0 (the last t of `jsd`) x_t holds nothing of x_0: bound and sampler start below.

    Args:
        x_0: uint8 [N, C, H, W].
        seeds: one a picture; it alone decides the picture's noise at each t.
        batch_size: rows of one network call: several pictures, several t of each.
        stride: more than 1 leaves out all but each stride-th t, for an estimate.
        progress: wraps an iterable and knows `total=`.

    Raises:
        ValueError: shapes that do not fit, a stride below 1, or a model of a single step.
    """
    shape = x_0.shape[1:]
    if x_0.dtype != torch.uint8 or x_0.ndim != 4 or len(seeds) != len(x_0):
        raise ValueError(
            f"x_0 is {x_0.dtype} {list(x_0.shape)} with {len(seeds)} seeds; "
            "uint8 [N, C, H, W] and N seeds are needed"
        )
    if stride < 1:
        raise ValueError(f"stride {stride} is less than 1")
    times = spaced_timesteps(ddpm.diffusion, None, "trailing")[::-1]  # 0, 1, 2, ...
    if len(times) < 2:
        raise ValueError("a model of a single step has no variance for its decoder")
    groups = [slice(i, i + batch_size) for i in range(0, len(x_0), batch_size)]
    widths = [max(1, batch_size // len(x_0[rows])) for rows in groups]  # t in one network call
    kept = times[::stride]

    def batches() -> Iterator[tuple[slice, list[tuple[int, Tensor]]]]:
        for rows, width in zip(groups, widths, strict=True):
            noise = SeedNoise(seeds[rows], shape, ddpm.device)
            draws = ((t, noise()) for t in times)  # those that `stride` leaves out as well
            draws = itertools.islice(draws, 0, None, stride)
            while batch := list(itertools.islice(draws, width)):
                yield rows, batch

    todo = batches()
    if progress:
        todo = progress(todo, total=sum(math.ceil(len(kept) / width) for width in widths))
    bits, mse = torch.empty(2, len(x_0), len(kept), dtype=torch.float64)
    for rows, batch in todo:
        columns = slice(kept.index(batch[0][0]), kept.index(batch[-1][0]) + 1)
        bits[rows, columns], mse[rows, columns] = _terms(ddpm, from_uint8(x_0[rows]), batch)
    priors = [ddpm.diffusion.prior_term(from_uint8(x_0[rows]), times[-1]) for rows in groups]
    return Bound(torch.tensor(kept), bits, mse, torch.cat(priors))


def _terms(ddpm: DDPM, x_0: Tensor, batch: list[tuple[int, Tensor]]) -> Tensor:
    """Bits and squared errors, [2, B, K] on the CPU, of x_0 [B, C, H, W] at K pairs (t, eps)."""
    exact = torch.device("cpu") if ddpm.device.type == "mps" else ddpm.device  # mps has no float64
    x_0 = x_0.to(exact).double()
    x_t = [ddpm.diffusion.q_sample(x_0, t, eps.to(exact).double()) for t, eps in batch]
    t = torch.tensor([t for t, _ in batch], device=ddpm.device).repeat_interleave(len(x_0))
    eps_hat = ddpm(torch.cat(x_t).float().to(ddpm.device), t).to(exact).double()

    terms = []
    for (t, _), x, eps in zip(batch, x_t, eps_hat.split(len(x_0)), strict=True):
        x0_hat = ddpm.diffusion.predict_x_0(x, t, eps).clamp(-1, 1)
        bits = ddpm.diffusion.bound_term(x_0, x0_hat, t, ddpm.config.sampling.variance)
        terms.append(torch.stack([bits, (x_0 - x0_hat).square().flatten(1).mean(1)]))
    return torch.stack(terms, dim=-1).cpu()
