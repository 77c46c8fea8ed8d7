"""The dialects of DDPM weights, as data: tensor names, and diffusers' configs.

Our names are those of the official weights in PyTorch. diffusers and TensorFlow name the same
layers otherwise. What our network or process cannot represent is refused by key and value.
"""

import json
import re
from typing import Any, NamedTuple, get_args

import numpy as np
from torch import Tensor

from config import Config, DiffusionConfig
from diffusion_utils import make_betas
from model import group_count

# ---- names

_SAME = [("", "", "")]
_CONV = [("conv", "conv", "conv")]
_BLOCK = [(name,) * 3 for name in ("norm1", "conv1", "norm2", "conv2")]
_BLOCK += [("temb_proj", "time_emb_proj", "temb_proj")]
_BLOCK += [("nin_shortcut", "conv_shortcut", "nin_shortcut")]
_ATTENTION = [("norm", "group_norm", "norm"), ("proj_out", "to_out.0", "proj_out")]
_ATTENTION += [(part, f"to_{part}", part) for part in "qkv"]
# The place of layers in our network, in diffusers' and in TensorFlow's, and the layers there. {i}
# counts levels from the finest, {j} from the coarsest; {b} counts blocks from 0, {b1} from 1.
_PLACES = [
    ("conv_in", "conv_in", "conv_in", _SAME),
    ("conv_out", "conv_out", "conv_out", _SAME),
    ("norm_out", "conv_norm_out", "norm_out", _SAME),
    ("temb.dense.{b}", "time_embedding.linear_{b1}", "temb/dense{b}", _SAME),
    ("down.{i}.block.{b}", "down_blocks.{i}.resnets.{b}", "down_{i}/block_{b}", _BLOCK),
    ("down.{i}.attn.{b}", "down_blocks.{i}.attentions.{b}", "down_{i}/attn_{b}", _ATTENTION),
    ("down.{i}.downsample", "down_blocks.{i}.downsamplers.0", "down_{i}/downsample", _CONV),
    ("mid.block_{b1}", "mid_block.resnets.{b}", "mid/block_{b1}", _BLOCK),
    ("mid.attn_{b1}", "mid_block.attentions.{b}", "mid/attn_{b1}", _ATTENTION),
    ("up.{i}.block.{b}", "up_blocks.{j}.resnets.{b}", "up_{i}/block_{b}", _BLOCK),
    ("up.{i}.attn.{b}", "up_blocks.{j}.attentions.{b}", "up_{i}/attn_{b}", _ATTENTION),
    ("up.{i}.upsample", "up_blocks.{j}.upsamplers.0", "up_{i}/upsample", _CONV),
]
OURS, DIFFUSERS, TENSORFLOW = range(3)
_SEPARATOR = {OURS: ".", DIFFUSERS: ".", TENSORFLOW: "/"}
_LAYERS = [
    tuple(_SEPARATOR[d].join(filter(None, (place[d], layer[d]))) for d in _SEPARATOR)
    for *place, layers in _PLACES
    for layer in layers
]
_PATTERNS = [
    [re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(name))) for name in layer]
    for layer in _LAYERS
]
_LEAVES = {"W": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename(name: str, levels: int, *, dialect: int, to: int) -> str:
    """Return a tensor's name in another dialect; one that no dialect knows stays as it is."""
    stem, _, leaf = name.rpartition(_SEPARATOR[dialect])
    for layer, patterns in zip(_LAYERS, _PATTERNS, strict=True):
        if match := patterns[dialect].fullmatch(stem):
            index = {key: int(value) for key, value in match.groupdict().items()}
            for one, other in (("i", "j"), ("j", "i")):
                if one in index:
                    index.setdefault(other, levels - 1 - index[one])
            index.setdefault("b", index.get("b1", 1) - 1)
            index.setdefault("b1", index["b"] + 1)
            return f"{layer[to].format(**index)}{_SEPARATOR[to]}{_LEAVES.get(leaf, leaf)}"
    return name


def to_our_names(state: dict) -> dict[str, Tensor]:
    """Return the tensors of any dialect under our names, in float32."""
    names = {name: str(name).removeprefix("module.").removeprefix("model/") for name in state}
    numbers = [re.match(r"(?:down|up)(?:_blocks)?[._](\d+)", name) for name in names.values()]
    levels = 1 + max((int(number[1]) for number in numbers if number), default=0)
    ours = {}
    for old, name in names.items():
        value, dialect = state[old], OURS
        if "/" in name:
            dialect = TENSORFLOW
            if name.endswith("/W") and getattr(value, "ndim", 0) > 1:
                value = value.movedim((-1, -2), (0, 1))  # [in, out] or [height, width, in, out]
        elif re.match("(down|up|mid)_block|time_embedding|conv_norm_out", name):
            dialect = DIFFUSERS
            layer = name.split(".")[-2] if "." in name else ""
            if ".attentions." in name and layer in _OLD_ATTENTION:
                name = name.replace(f".{layer}.", f".{_OLD_ATTENTION[layer]}.")
        if isinstance(value, Tensor):
            value = value.float()
        ours[rename(name, levels, dialect=dialect, to=OURS)] = value
    return ours


# ---- diffusers' configs

# UNet2DModel's values of keys that are absent
_UNET_ABSENT: dict[str, Any] = {
    "_class_name": "UNet2DModel", "sample_size": None, "in_channels": 3, "out_channels": 3,
    "center_input_sample": False, "time_embedding_type": "positional", "time_embedding_dim": None,
    "freq_shift": 0, "flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D",
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2,
    "mid_block_scale_factor": 1, "downsample_padding": 1, "downsample_type": "conv",
    "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8,
    "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None,
    "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip
_HINTS = {
    "sample_size": "the side of a square",
    "out_channels": "as many as in_channels (no learned variance)",
    "block_out_channels": "multiples of its first, which is 4 or more",
    "attention_head_dim": "null (one head)",
}
_SCHEDULERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
_VARIANCES = {f"fixed_{v}{log}": v for v in ("small", "large") for log in ("", "_log")}


class _Layout(NamedTuple):
    """A network's facts between the notations; `multipliers`, `attends` have one entry a level."""

    size: int
    channels: int
    base: int
    multipliers: list[int]
    attends: list[bool]
    blocks: int
    dropout: float

    def unet(self) -> dict[str, Any]:
        """Return diffusers' config.json."""
        attends = self.attends
        return _UNET_ABSENT | {
            "_diffusers_version": "0.30.0",
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "downsample_padding": 0,
            "norm_eps": 1e-6,
            "sample_size": self.size,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "block_out_channels": [self.base * multiplier for multiplier in self.multipliers],
            "layers_per_block": self.blocks,
            "attention_head_dim": None,
            "norm_num_groups": group_count(self.base),
            "dropout": self.dropout,
        }

    def sections(self) -> dict[str, dict]:
        """Return our config's sections dataset and model."""
        model = {
            "base_channels": self.base,
            "channel_multipliers": self.multipliers,
            "num_res_blocks": self.blocks,
            "attention_resolutions": [self.size // 2**i for i, a in enumerate(self.attends) if a],
            "dropout": float(self.dropout),
        }
        return {"dataset": {"image_size": self.size, "channels": self.channels}, "model": model}


def tree_of_diffusers(unet: dict, scheduler: dict | None) -> tuple[dict, list[str]]:
    """Return our config's sections dataset, model, diffusion, sampling, and what was assumed.

    Raises:
        ValueError: every key that our network or process cannot represent, with its value.
    """
    there = _UNET_ABSENT | unet
    widths, kinds = there["block_out_channels"], there["down_block_types"]
    base = max([4, *widths[:1]])
    attends = [kind == "AttnDownBlock2D" for kind in kinds[: len(widths)]]
    attends += [False] * (len(widths) - len(attends))
    size = there["sample_size"]
    if isinstance(size, list) and len({*size}) == 1:
        there["sample_size"] = size = size[0]
    attention_widths = {w for w, a in zip(widths, attends, strict=True) if a} | {*widths[-1:]}
    if attention_widths == {there["attention_head_dim"]}:
        there["attention_head_dim"] = None
    layout = _Layout(
        size if isinstance(size, int) else 0,
        there["in_channels"],
        base,
        [width // base for width in widths] or [1],
        attends,
        there["layers_per_block"],
        there["dropout"],
    )
    faults, needed = {}, layout.unet()
    for key, value in there.items():
        if value != needed.get(key) and (key[:1] != "_" or key == "_class_name"):
            how = "is" if key in unet else "is absent, which diffusers reads as"
            rule = json.dumps(needed[key]) if key in needed else "its absence"
            faults[key] = f"unet.{key} {how} {json.dumps(value)}; needed: {_HINTS.get(key, rule)}"
    if "down_block_types" in faults:
        faults.pop("up_block_types", None)  # they are to mirror each other
    process, sampling, wrong, notes = _process_of(scheduler)
    if wrong := [*faults.values(), *wrong]:
        raise ValueError("\n  ".join(["this network cannot represent it:", *wrong]))
    return layout.sections() | {"diffusion": process, "sampling": sampling}, notes


def _process_of(scheduler: dict | None) -> tuple[dict, dict, list[str], list[str]]:
    """Return our sections diffusion and sampling, what cannot be represented, and notes."""
    faults, notes = [], []
    if scheduler is None:
        notes.append("no scheduler_config.json: the paper's linear schedule of 1,000 steps")
        scheduler = {}

    def choice(key: str, absent: str, known: dict[str, str]) -> str:
        value = scheduler.get(key, absent)
        if value not in known:
            faults.append(f"scheduler.{key} is {value}; needed: one of {', '.join(known)}")
        return known.get(value, known[absent])

    sampler = choice("_class_name", "DDPMScheduler", _SCHEDULERS)
    process = {
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "beta_start": scheduler.get("beta_start", 1e-4),
        "beta_end": scheduler.get("beta_end", 0.02),
        "prediction": choice("prediction_type", "epsilon", _PREDICTIONS),
    }
    if (betas := scheduler.get("trained_betas")) is None:
        process["beta_schedule"] = choice("beta_schedule", "linear", _BETAS)
    else:
        names = get_args(DiffusionConfig.model_fields["beta_schedule"].annotation)
        trees = [process | {"beta_schedule": name} for name in names]
        process = next((tree for tree in trees if _same(betas_of(tree), betas)), process)
        if "beta_schedule" not in process:
            faults.append("scheduler.trained_betas holds another schedule; needed: one by name")
    if scheduler.get("rescale_betas_zero_snr", False):
        faults.append("scheduler.rescale_betas_zero_snr is true; needed: false")
    variance = "small"
    if sampler == "ddpm":
        variance = choice("variance_type", "fixed_small", _VARIANCES)
    for key, ours in (("clip_sample", True), ("clip_sample_range", 1.0), ("thresholding", False)):
        if sampler != "dpm++" and (value := scheduler.get(key, ours)) != ours:
            notes.append(
                f"scheduler.{key} is {json.dumps(value)}; here x0_hat is always clipped to -1 ... 1"
            )
    return process, {"sampler": sampler, "variance": variance}, faults, notes


def betas_of(process: dict) -> np.ndarray:
    """Return the betas of a section diffusion."""
    keys = ("beta_schedule", "timesteps", "beta_start", "beta_end")
    return make_betas(*(process[key] for key in keys))


def _same(one: np.ndarray, other: Any) -> bool:
    return len(one) == len(other) and np.allclose(one, other, rtol=1e-6, atol=0)


def same_process(one: dict, other: dict) -> bool:
    """Tell whether two sections diffusion mean the same: two names may mean one schedule."""
    return one["prediction"] == other["prediction"] and _same(betas_of(one), betas_of(other))


def to_diffusers(config: Config) -> tuple[dict, dict]:
    """Return the network's config.json and scheduler_config.json, as diffusers writes them.

    Raises:
        ValueError: the first multiplier is not 1; UNet2DModel's first convolution has its width.
    """
    model, data, process = config.model, config.dataset, config.diffusion
    multipliers = model.channel_multipliers
    if multipliers[0] != 1:
        raise ValueError(
            f"model.channel_multipliers is {multipliers}: diffusers' UNet2DModel can only "
            "represent networks whose first is 1"
        )
    sizes = [data.image_size // 2**level for level in range(len(multipliers))]
    layout = _Layout(
        data.image_size,
        data.channels,
        model.base_channels,
        multipliers,
        [size in model.attention_resolutions for size in sizes],
        model.num_res_blocks,
        model.dropout,
    )
    betas = {ours: theirs for theirs, ours in _BETAS.items()}.get(process.beta_schedule)
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": process.timesteps,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": betas or "linear",
        "trained_betas": None if betas else betas_of(process.model_dump()).tolist(),
        "variance_type": f"fixed_{config.sampling.variance}",
        "prediction_type": {o: theirs for theirs, o in _PREDICTIONS.items()}[process.prediction],
        "rescale_betas_zero_snr": False,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }
    return layout.unet(), scheduler


def infer_tree(state: dict[str, Tensor], image_size: int | None) -> tuple[dict, list[str]]:
    """Return sections as `tree_of_diffusers` does, from shapes of tensors under our names.

    Raises:
        ValueError: they are of another network, or do not show the size of its images.
    """
    shapes = {name: list(value.shape) for name, value in state.items() if hasattr(value, "shape")}
    try:
        base, channels = shapes["conv_in.weight"][:2]
        widths: list[int] = []
        while (key := f"down.{len(widths)}.block.0.conv1.weight") in shapes:
            widths.append(shapes[key][0])
        blocks = sum(f"down.0.block.{b}.conv1.weight" in shapes for b in range(len(shapes)))
        if not widths or any(width % base for width in widths):
            raise KeyError("widths that are multiples of the first")
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are not the weights of a DDPM network: no {error}") from None
    attends = [f"down.{level}.attn.0.q.weight" in shapes for level in range(len(widths))]
    if not image_size and True not in attends:
        raise ValueError("the weights do not show the size of the images: add dataset.image_size=")
    size = image_size or 16 * 2 ** attends.index(True)  # the paper has attention at 16x16
    variance = "large" if size < 256 else "small"
    multipliers = [width // base for width in widths]
    tree = _Layout(size, channels, base, multipliers, attends, blocks, 0.0).sections()
    tree |= {"diffusion": {}, "sampling": {"sampler": "ddpm", "variance": variance}}
    return tree, [f"images of {size}x{size}, the paper's linear schedule, variance {variance}"]
