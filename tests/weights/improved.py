"""The network of improved-diffusion, written anew from its description: names, shapes, arithmetic.

Tensors have the released checkpoints' names: blocks are counted through all levels, and a block is
a list whose first is the residual one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.GroupNorm):
    def __init__(self, width):
        super().__init__(32, width)  # PyTorch's eps, 1e-5


def waves(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines; frequency i is 10000^(-i / half)."""
    half = width // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = t.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class Residual(nn.Module):
    def __init__(self, wide, c_in, c_out, scales):
        super().__init__()
        self.scales = scales
        self.in_layers = nn.Sequential(Norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        out = 2 * c_out if scales else c_out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(wide, out))
        rest = nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.Sequential(Norm(c_out), *rest)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):
        h, more = self.in_layers(x), self.emb_layers(time)[:, :, None, None]
        if self.scales:
            scale, shift = more.split(h.shape[1], dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + more)
        return self.skip_connection(x) + h


class Heads(nn.Module):
    """Attention; in `qkv` each head has its queries, keys and values side by side."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x, _):
        flat = x.flatten(2)
        found = []
        for head in self.qkv(self.norm(flat)).chunk(self.heads, dim=1):
            q, k, v = head.chunk(3, dim=1)  # [B, c, N]
            scores = torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(q.shape[1])
            found.append(torch.einsum("bnm,bcm->bcn", scores.softmax(-1), v))
        return (flat + self.proj_out(torch.cat(found, dim=1))).view(x.shape)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, _):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, _):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    def forward(self, x, _):
        return super().forward(x)


class Improved(nn.Module):
    """(x_t, t, class numbers) -> eps, and v behind it."""

    def __init__(self, *, size, base, multipliers, blocks, attends, heads, scales, outputs, classes,
                 scale_t=1.0):  # fmt: skip
        super().__init__()
        self.base, self.scale_t, wide = base, scale_t, 4 * base
        self.time_embed = nn.Sequential(nn.Linear(base, wide), nn.SiLU(), nn.Linear(wide, wide))
        if classes:
            self.label_emb = nn.Embedding(classes, wide)
        c, widths = base, [base]
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(3, base, 3, padding=1)])])
        for level, multiplier in enumerate(multipliers):
            there = size // 2**level in attends
            for _ in range(blocks):
                block = nn.ModuleList([Residual(wide, c, base * multiplier, scales)])
                c = base * multiplier
                block.extend([Heads(c, heads)] * there)
                self.input_blocks.append(block)
                widths.append(c)
            if level < len(multipliers) - 1:
                self.input_blocks.append(nn.ModuleList([Down(c)]))
                widths.append(c)
        middle = Residual(wide, c, c, scales), Heads(c, heads), Residual(wide, c, c, scales)
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed([*enumerate(multipliers)]):
            there = size // 2**level in attends
            for i in range(blocks + 1):
                c_in, c = c + widths.pop(), base * multiplier
                block = nn.ModuleList([Residual(wide, c_in, c, scales)])
                block.extend([Heads(c, heads)] * there)
                if level and i == blocks:
                    block.append(Up(c))
                self.output_blocks.append(block)
        self.out = nn.Sequential(Norm(c), nn.SiLU(), nn.Conv2d(c, outputs, 3, padding=1))

    def forward(self, x, t, y=None):
        time = self.time_embed(waves(t * self.scale_t, self.base))
        if y is not None:
            time = time + self.label_emb(y)
        seen = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, time)
            seen.append(x)
        for layer in self.middle_block:
            x = layer(x, time)
        for block in self.output_blocks:
            x = torch.cat([x, seen.pop()], dim=1)
            for layer in block:
                x = layer(x, time)
        return self.out(x)
