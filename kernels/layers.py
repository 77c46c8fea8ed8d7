"""Layers without weights: attention, dropout, and the embedding of t."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(c)) v of each head of c = width / heads; [B, N, width] each."""
    # [B, N, width] -> [B, heads, N, c]
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.shape[2] <= 1024:  # the fused one's gradient is slower there
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        found = torch.softmax(scores, -1, torch.float32).to(v.dtype) @ v
    else:
        found = F.scaled_dot_product_attention(q, k, v)
    return found.transpose(1, 2).flatten(2)


class Dropout(nn.Dropout):
    """Dropout; on the CPU four 16-bit numbers come from each draw, which costs half as much."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type != "cpu" or torch.compiler.is_compiling()  # it cannot trace `random_`
        if plain or not (self.training and self.p):
            return super().forward(x)
        draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        numbers = draws.view(torch.int16)[: x.numel()].as_strided(x.shape, x.stride())
        kept = numbers >= min(round(self.p * 2**16), 2**16 - 1) - 2**15
        return x * kept.to(x.dtype) * (1 / (1 - self.p))  # in bfloat16 the mask cannot hold 1.11


def timestep_embedding(t: Tensor, width: int, *, improved: bool = False) -> Tensor:
    """Return all sines, then all cosines, of t at `width // 2` frequencies from 1 down to 1e-4.

    Args:
        t: [B].
        improved: as in improved-diffusion, cosines first, and the last frequency not quite 1e-4.

    Returns:
        [B, width] float32; an odd width ends in a zero.
    """
    half = width // 2
    last = half if improved else half - 1  # half - 1 as in the official code
    rates = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10_000) / last)
    )
    angles = t.float()[:, None] * rates  # [B, half]
    waves = [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves[::-1] if improved else waves, dim=1), (0, width % 2))
