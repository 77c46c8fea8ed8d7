"""Dropout and attention, as fast as the device has them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v; [B, N, width] each."""
    if q.device.type == "cpu" and q.shape[1] <= 1024:  # the fused one's gradient is slower there
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        return torch.softmax(scores, -1, torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


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
