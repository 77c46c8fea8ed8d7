"""The attention U-Net of Ho et al. 2020 (appendix B): (x_t, t, labels) -> F, eps_hat in the paper.

Layer names and shapes are those of the official code, so that its weights fit as they are:
`down.i.block.b.conv1` here is `down_i/block_b/conv1` there. `i` is the level, 0 the finest, also
in `up`.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import Dropout, GroupNorm, attend
from kernels import exact_float32 as exact_float32
from kernels import has_bf16 as has_bf16
from kernels import timestep_embedding as timestep_embedding

if TYPE_CHECKING:
    from config import Config


class Network(nn.Module):
    """The interface of every network: (x_t, t, labels) -> F, in two parts.

    `embed` does not depend on x, so that sampling runs it once for all its steps.

    Attributes:
        size_multiple: sides of images are multiples of it.
        recompute: activations in the backward pass, instead of keeping them.
    """

    size_multiple = 1
    recompute = False

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the conditioning [B, any] of t [B] or [1], 0-based, and labels [B or 1, classes].

        A row of labels has a 1 for each class of an image; zeros, and None, say nothing about it.
        """
        raise NotImplementedError

    def predict(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return F [B, C, H, W] in float32; embedding: [B, any], or [any] for all of B.

        Where the variance is learned F has 2C channels, see `GaussianDiffusion`.
        """
        raise NotImplementedError

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """Return [B, D], what the network knows of each image; for nearest neighbours."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return F [B, C, H, W], the prediction; x: x_t, [B, C, H, W]; t, labels as in `embed`."""
        return self.predict(x, self.embed(t, labels))


def build_network(config: "Config", device: str = "cpu") -> Network:
    """Return the network of a run's config; on device "meta" without numbers.

    Every part of the code builds networks here.
    """
    data = config.dataset
    with torch.device(device):
        return UNet(
            image_size=min(data.size),
            channels=data.channels,
            out_channels=data.channels * (1 + config.diffusion.learned_variance),
            classes=len(data.classes),
            null_label=config.training.label_dropout > 0,
            **config.model.model_dump(),
        )


class UNet(Network):
    """The attention U-Net.

    Args:
        image_size: the images' shorter side; halved once for each multiplier but the first.
        channels: of the images, 1 to 4. out_channels: of F, as many, or twice with a variance.
        classes: how many labels choose from; 0 is the paper's network, without.
        null_label: learn what no label means, too.
        base_channels: width before the multipliers, and of the sinusoidal time embedding.
        channel_multipliers: width of each level, finest first, in units of `base_channels`.
        num_res_blocks: residual blocks at each level of the encoder; the decoder has one more.
        attention_resolutions: feature sizes with attention after each block. The middle always
            has it.
        dropout: probability, inside the residual blocks.
        num_heads: of attention, which share its width.
        scale_shift_norm: time scales and shifts the second norm of a block, where the paper adds it
            before that norm (Nichol & Dhariwal 2021, section 6).
        time_scale: what t is multiplied by.
        variant: `ddpm`, or `improved` for what else their network has otherwise: cosines before
            sines, at other frequencies; padding on every side; PyTorch's eps in the norms.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        out_channels: int,
        classes: int,
        null_label: bool,
        base_channels: int,
        channel_multipliers: list[int],
        num_res_blocks: int,
        attention_resolutions: list[int],
        dropout: float,
        num_heads: int,
        scale_shift_norm: bool,
        time_scale: float,
        variant: str,
    ):
        super().__init__()
        levels = len(channel_multipliers)
        self.size_multiple = 2 ** (levels - 1)
        sizes = [image_size // 2**level for level in range(levels)]  # the config has checked them
        self.channels, self.classes, self.null_label = channels, classes, null_label
        self.base_channels, self.time_scale = base_channels, time_scale
        self.improved = improved = variant == "improved"
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        temb_width = 4 * base_channels
        norm = partial(GroupNorm, group_count(base_channels), eps=1e-5 if improved else 1e-6)

        def block(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, temb_width, norm, dropout, scale_shift_norm)

        def attention(level: int, width: int, count: int) -> nn.ModuleList:
            count = count if sizes[level] in attention_resolutions else 0
            return nn.ModuleList(Attention(width, norm, num_heads) for _ in range(count))

        self.temb: Any = nn.Module()
        self.temb.dense = nn.ModuleList(
            [nn.Linear(base_channels, temb_width), nn.Linear(temb_width, temb_width)]
        )
        self.conv_in = nn.Conv2d(channels, base_channels, 3, padding=1)

        width = base_channels
        skips = [width]  # widths of what the decoder will pop, last first
        self.down: Any = nn.ModuleList()
        for level, level_width in enumerate(widths):
            down = nn.Module()
            down.block = nn.ModuleList()
            for _ in range(num_res_blocks):
                down.block.append(block(width, level_width))
                width = level_width
                skips.append(width)
            down.attn = attention(level, width, num_res_blocks)
            if level < levels - 1:
                down.downsample = Downsample(width, (1, 1, 1, 1) if improved else (0, 1, 0, 1))
                skips.append(width)
            self.down.append(down)

        self.mid: Any = nn.Module()
        self.mid.block_1 = block(width, width)
        self.mid.attn_1 = Attention(width, norm, num_heads)
        self.mid.block_2 = block(width, width)

        self.up: Any = nn.ModuleList()
        for level in reversed(range(levels)):
            up = nn.Module()
            up.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                up.block.append(block(width + skips.pop(), widths[level]))
                width = widths[level]
            up.attn = attention(level, width, num_res_blocks + 1)
            if level > 0:
                up.upsample = Upsample(width)
            self.up.insert(0, up)

        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()
        if classes:  # last, so that the rest begins as it does without
            self.temb.label = nn.Embedding(classes + null_label, temb_width)

    def _initialise(self) -> None:
        """Set Xavier uniform weights, zero biases; gain 1e-5 where the official code has scale 0.

        Done here for the whole tree, since a parent that initialised after its child would undo
        the near-zero layers: with them each residual branch starts silent and eps_hat near 0.
        """
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                silent = name.endswith(("conv2", "proj_out", "conv_out"))
                nn.init.xavier_uniform_(layer.weight, gain=1e-5 if silent else 1.0)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return [B, 4 base_channels], after the swish that every block would apply.

        The label joins before it, as in diffusers and the code of Nichol & Dhariwal 2021.
        """
        first, second = self.temb.dense
        temb = timestep_embedding(t * self.time_scale, self.base_channels, improved=self.improved)
        temb = temb.to(first.weight.dtype)
        temb = second(F.silu(first(temb)))
        return F.silu(temb + self._embed_labels(labels, temb) if self.classes else temb)

    def _embed_labels(self, labels: Tensor | None, like: Tensor) -> Tensor:
        if labels is None:
            labels = like.new_zeros(1, self.classes)
        if labels.ndim != 2 or labels.shape[1] != self.classes:
            raise ValueError(f"labels are {list(labels.shape)}; here they are [B, {self.classes}]")
        none = 1 - labels.amax(1, keepdim=True)
        if self.null_label:
            labels = torch.cat([labels, none], dim=1)
        return labels.to(like) @ self.temb.label.weight

    def predict(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return F [B, C, H, W], in float32 also under autocast.

        Args:
            x: x_t, [B, C, H, W]; H and W multiples of 2^(levels - 1).
            embedding: what `embed` made, [B, width]; or one row for all, [width], which is cheaper.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x is {list(x.shape)}; the network takes [B, {self.channels}, H, W]")
        if x.shape[2] % self.size_multiple or x.shape[3] % self.size_multiple:
            raise ValueError(
                f"images of {x.shape[2]}x{x.shape[3]}: sides must be multiples of "
                f"{self.size_multiple}"
            )
        dtype = self.conv_in.weight.dtype
        temb, run = embedding.to(dtype), self._run
        h = self.conv_in(x.to(dtype))
        skips = [h]
        for down in self.down:
            for block, attention in zip_longest(down.block, down.attn):
                h = run(block, h, temb)
                h = run(attention, h) if attention else h
                skips.append(h)  # after the attention
            if down is not self.down[-1]:
                h = down.downsample(h)
                skips.append(h)

        h = run(self.mid.block_1, h, temb)
        h = run(self.mid.attn_1, h)
        h = run(self.mid.block_2, h, temb)

        for up in reversed(self.up):
            for block, attention in zip_longest(up.block, up.attn):
                h = run(block, torch.cat([h, skips.pop()], dim=1), temb)
                h = run(attention, h) if attention else h
            if up is not self.up[0]:
                h = up.upsample(h)

        return self.conv_out(self.norm_out(h)).float()

    def _run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """Return [B, D] float32: the middle's output, averaged over positions."""
        found: list[Tensor] = []
        hook = self.mid.block_2.register_forward_hook(lambda *args: found.append(args[-1]))
        try:
            self(x, t)
        finally:
            hook.remove()
        return found[0].float().mean(dim=(2, 3))


class ResBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv, + shortcut.

    With scale_shift: norm, swish, conv, norm, scale and shift by time, swish, and so on.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        temb_width: int,
        norm: Callable[..., GroupNorm],
        dropout: float,
        scale_shift: bool,
    ):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(temb_width, c_out * (1 + scale_shift))
        self.scale_shift = scale_shift
        self.norm2 = norm(c_out, silu=not scale_shift)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.widens = c_in != c_out
        if self.widens:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Return [B, c_out, H, W]; x: [B, c_in, H, W]; temb: [B, temb_width] or [temb_width]."""
        h, time = self.norm1(x), self.temb_proj(temb)
        if self.scale_shift:
            scale, shift = time[..., None, None].chunk(2, dim=-3)
            h = F.silu(self.norm2(self.conv1(h)) * (1 + scale) + shift)
        elif time.ndim == 1:  # the same for all: a part of the bias, and one pass over h less
            h = self.norm2(F.conv2d(h, self.conv1.weight, self.conv1.bias + time, padding=1))
        else:
            h = self.norm2(self.conv1(h) + time[:, :, None, None])
        h = self.conv2(self.dropout(h))
        return h + (self.nin_shortcut(x) if self.widens else x)


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual."""

    def __init__(self, width: int, norm: Callable[..., GroupNorm], heads: int):
        super().__init__()
        self.heads = heads
        self.norm = norm(width, silu=False)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W], of x's shape."""
        h = self.norm(x)
        # [B, C, H, W] -> [B, H * W, C]
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v, self.heads).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the size: a strided convolution; TensorFlow pads (0, 1, 0, 1), bottom and right."""

    def __init__(self, width: int, padding: tuple[int, int, int, int]):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_count(base_channels: int) -> int:
    """Return GroupNorm's number of groups, one for the whole network.

    32 as in the paper where 32 divides `base_channels`; else the most groups that leave each at
    least 4 channels (every width is a multiple of `base_channels`, so they always divide).
    """
    if base_channels % 32 == 0:
        return 32
    return max(g for g in range(1, base_channels // 4 + 1) if base_channels % g == 0 and g <= 32)


# ---- precision


class InBfloat16(Network):
    """A copy of a network that multiplies in bfloat16; its embedding stays in float32."""

    def __init__(self, network: Network):
        super().__init__()
        self.size_multiple = network.size_multiple
        self.exact = network
        self.rounded = copy.deepcopy(network).eval().to(torch.bfloat16)
        self.rounded._compiled_call_impl = None  # of training

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.exact.embed(t, labels)

    def predict(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.rounded.predict(x, embedding)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        return self.exact.features(x, t)


def at_precision(network: Network, precision: str) -> Network:
    """Return the network itself for "float32", and a copy of it for "bfloat16"."""
    exact = precision != "bfloat16" or isinstance(network, InBfloat16)
    return network if exact else InBfloat16(network)
