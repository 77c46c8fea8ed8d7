"""The dialect of improved-diffusion (Nichol & Dhariwal 2021): its names, and what they show."""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_PLACES = {
    "time_embed.0": "temb.dense.0", "time_embed.2": "temb.dense.1", "label_emb": "temb.label",
    "input_blocks.0.0": "conv_in", "out.0": "norm_out", "out.2": "conv_out",
    "middle_block.0": "mid.block_1", "middle_block.1": "mid.attn_1",
    "middle_block.2": "mid.block_2",
}  # fmt: skip
_LAYERS = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "temb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "nin_shortcut",
    "op": "conv",
}  # fmt: skip
# a place in the network, a layer there if it has several, and weight or bias
_NAME = (
    r"((?:in|out)put_blocks\.\d+\.\d|(?:middle_block|time_embed|out)\.\d|label_emb)\.?(.*)\.(\w+)"
)
_GUIDED = (
    "these are the weights of guided-diffusion's U-Net: its residual blocks change the size, and "
    "its heads are of one width; improved-diffusion's would do"
)


def names_of_improved(names: Iterable[str]) -> dict[str, str]:
    """Return {their name: ours}; q, k and v are still one tensor, called `qkv`.

    Their blocks are counted through all levels. Each level has its residual blocks, with attention
    or without, and but for the last a block that changes the size. ValueError: guided-diffusion's.
    """
    names = list(names)
    text = "\n".join(names)
    if re.search(r"(?m)^output_blocks\.\d+\.[12]\.in_layers", text):
        raise ValueError(_GUIDED)
    blocks = len({*re.findall(r"(?m)^output_blocks\.(\d+)\.", text)})
    levels = 1 + len(re.findall(r"(?m)^input_blocks\.\d+\.0\.op\.weight", text))
    per_level = max(1, blocks // levels)  # residual blocks in the decoder, one more than before

    def place_of(place: str, layer: str) -> str:
        found = re.fullmatch(r"(in|out)put_blocks\.(\d+)\.(\d)", place)
        if place in _PLACES or not found:
            return _PLACES.get(place, place)
        down, n, k = found[1] == "in", int(found[2]), int(found[3])
        level, b = divmod(n - 1 if down else n, per_level)
        side = f"down.{level}" if down else f"up.{levels - 1 - level}"
        if layer in ("op", "conv"):
            return f"{side}.{'down' if down else 'up'}sample"
        return f"{side}.{'attn' if k else 'block'}.{b}"

    ours = {}
    for name in names:
        if match := re.fullmatch(_NAME, name):
            place, layer, leaf = match.groups()
            parts = place_of(place, layer), _LAYERS.get(layer, layer), leaf
            ours[name] = ".".join(filter(None, parts))
    return {name: ours.get(name, name) for name in names}


def facts_of_improved(
    shapes: dict[str, list[int]], timesteps: int | None
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return our keys of the sections model and diffusion, and what was assumed.

    Time that scales and shifts shows in the tensors, and tells the published models apart: with it
    they have 4 heads and the cosine schedule of 4,000 steps, and without 1 head and the linear one.
    """
    first = "down.0.block.0"
    scales = shapes[f"{first}.temb_proj.weight"][0] == 2 * shapes[f"{first}.conv1.weight"][0]
    T = timesteps or (4000 if scales else 1000)
    labels = "temb.label.weight" in shapes
    model: dict[str, Any] = {
        "num_heads": 4 if scales else 1,
        "scale_shift_norm": scales,
        "time_scale": 1.0 if labels else 1000 / T,  # their --rescale_timesteps
        "variant": "improved",
    }
    process: dict[str, Any] = {
        "timesteps": T,
        "beta_schedule": "cosine" if scales else "linear",
        "beta_start": 0.1 / T,  # of linear, as is the end
        "beta_end": 20 / T,
    }
    said = ", ".join(f"{key} {model[key]:g}" for key in ("num_heads", "time_scale"))
    told = f"improved-diffusion's network: {said}; T = {T}, {process['beta_schedule']} schedule"
    return model, process, told


def split_heads(state: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Return the tensors with q, k and v apart, which theirs has in turn for each head."""
    found = {}
    for name, value in state.items():
        if ".qkv." not in name:
            found[name] = value
            continue
        if len(value) % (3 * heads):
            raise ValueError(f"model.num_heads {heads} does not divide {len(value) // 3} channels")
        parts = value.unflatten(0, (heads, 3, -1)).unbind(1)
        for letter, part in zip("qkv", parts, strict=True):
            found[name.replace("qkv", letter)] = part.flatten(0, 1)
    # of convolutions in one dimension
    flat = {name: value[..., 0] for name, value in found.items() if getattr(value, "ndim", 0) == 3}
    return found | flat
