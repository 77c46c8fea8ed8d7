"""The dialects of DDPM weights, as data: tensor names, and diffusers' configs.

Our names are those of the official weights in PyTorch. diffusers and TensorFlow name the same
layers otherwise. What our network or process cannot represent is refused by key and value.
"""

import json
import re
from typing import get_args

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
# Where layers are in our network, in diffusers' and in TensorFlow's, and what is there. {i} counts
# levels from the finest, {j} from the coarsest; {b} counts blocks from 0, {b1} from 1.
_PLACES = [
    ("conv_in", "conv_in", "conv_in", _SAME),
    ("conv_out", "conv_out", "conv_out", _SAME),
    ("norm_out", "conv_norm_out", "norm_out", _SAME),
    ("temb.dense.{b}", "time_embedding.linear_{b1}", "temb/dense{b}", _SAME),
    ("down.{i}.block.{b}", "down_blocks.{i}.resnets.{b}", "down_{i}/block_{b}", _BLOCK),
    ("down.{i}.attn.{b}", "down_blocks.{i}.attentions.{b}", "down_{i}/attn_{b}", _ATTENTION),
    (
        "down.{i}.downsample",
        "down_blocks.{i}.downsamplers.0",
        "down_{i}/downsample",
        [("conv",) * 3],
    ),
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
    for place in _PLACES
    for layer in place[3]
]
_PATTERNS = [
    [re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(name))) for name in layer]
    for layer in _LAYERS
]
_LEAVES = {"W": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename(name: str, levels: int, *, dialect: int, to: int) -> str:
    """A tensor's name in another dialect; one that none knows stays as it is."""
    stem, _, leaf = name.rpartition(_SEPARATOR[dialect])
    for layer, patterns in zip(_LAYERS, _PATTERNS, strict=True):
        if match := patterns[dialect].fullmatch(stem):
            index = {key: int(value) for key, value in match.groupdict().items()}
            if "j" in index or "i" in index:
                other = levels - 1 - index.get("i", index.get("j"))
                index |= {"j": other} if "i" in index else {"i": other}
            index |= {"b": index["b1"] - 1} if "b1" in index else {"b1": index.get("b", 0) + 1}
            return f"{layer[to].format(**index)}{_SEPARATOR[to]}{_LEAVES.get(leaf, leaf)}"
    return name


def to_our_names(state: dict) -> dict[str, Tensor]:
    """Any dialect's tensors under our names, float32."""
    names = {name: str(name).removeprefix("module.").removeprefix("model/") for name in state}
    numbers = [re.match(r"(?:down|up)(?:_blocks)?[._](\d+)", name) for name in names.values()]
    levels = 1 + max((int(number[1]) for number in numbers if number), default=0)
    ours = {}
    for old, name in names.items():
        value = state[old]
        dialect = OURS
        if "/" in name:
            dialect = TENSORFLOW
            if (
                name.endswith("/W") and getattr(value, "ndim", 0) > 1
            ):  # [in, out] or [height, width, in, out]
                value = value.movedim((-1, -2), (0, 1))
        elif re.match("(down|up|mid)_block|time_embedding|conv_norm_out", name):
            dialect = DIFFUSERS
            stem, _, leaf = name.rpartition(".")
            place, _, layer = stem.rpartition(".")
            if ".attentions." in name and layer in _OLD_ATTENTION:
                name = f"{place}.{_OLD_ATTENTION[layer]}.{leaf}"
        if isinstance(value, Tensor):
            value = value.float()
        ours[rename(name, levels, dialect=dialect, to=OURS)] = value
    return ours


# ---- diffusers' configs

# key: (what diffusers takes where it is absent, what our network is)
_UNET_KEYS = {
    "_class_name": ("UNet2DModel", "UNet2DModel"),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (1, 0),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "norm_eps": (1e-5, 1e-6),
    "attn_norm_num_groups": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
    "num_train_timesteps": (None, None),
}
# keys that become keys of ours
_UNET_SIZES = {"sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types"}
_UNET_SIZES |= {"block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups"}
_UNET_SIZES |= {"dropout"}
_SCHEDULERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
}
_SCHEDULER_KEYS = {
    "prediction_type": ("epsilon", "epsilon"),
    "rescale_betas_zero_snr": (False, False),
}
_BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
}


def _unfit(section: str, there: dict, table: dict) -> list[str]:
    faults = []
    for key, (default, needed) in table.items():
        value = there.get(key, default)
        if value != needed:
            how = "is" if key in there else "is absent, which diffusers reads as"
            faults.append(
                f"{section}.{key} {how} {json.dumps(value)}; needed: {json.dumps(needed)}"
            )
    return faults


def tree_of_diffusers(unet: dict, scheduler: dict | None) -> tuple[dict, list[str]]:
    """Our config's sections `dataset`, `model`, `diffusion`, `sampling`, and what was assumed.

    Raises:
        ValueError: every key that our network or process cannot represent, with its value.
    """
    faults = _unfit("unet", unet, _UNET_KEYS)
    for key in unet.keys() - _UNET_KEYS.keys() - _UNET_SIZES:
        if not key.startswith("_") and unet[key] is not None:
            faults.append(f"unet.{key} is {json.dumps(unet[key])}; needed: its absence")

    widths = unet.get("block_out_channels", [224, 448, 672, 896])
    base, levels = widths[0], len(widths)
    if any(width % base for width in widths) or base < 4:
        faults.append(f"unet.block_out_channels is {widths}; needed: multiples of its first")
    channels, out = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if channels != out:
        faults.append(
            f"unet.out_channels is {out}; needed: in_channels, {channels} (no learned variance)"
        )
    down = list(unet.get("down_block_types", ["DownBlock2D"] + ["AttnDownBlock2D"] * 3))
    up = list(unet.get("up_block_types", ["AttnUpBlock2D"] * 3 + ["UpBlock2D"]))
    attends = [kind == "AttnDownBlock2D" for kind in down]
    if {*down} - {"DownBlock2D", "AttnDownBlock2D"} or len(down) != levels:
        faults.append(f"unet.down_block_types is {down}; needed: {levels} of (Attn)DownBlock2D")
    elif up != ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]:
        faults.append(f"unet.up_block_types is {up}; needed: the mirror of down_block_types")
    attention_widths = {w for w, a in zip(widths, attends, strict=False) if a} | {widths[-1]}
    head = unet.get("attention_head_dim", 8)
    if head is not None and attention_widths != {head}:
        how = "is" if "attention_head_dim" in unet else "is absent, which diffusers reads as"
        faults.append(f"unet.attention_head_dim {how} {head}; needed: null (one head)")
    groups = unet.get("norm_num_groups", 32)
    if base >= 4 and groups != group_count(base):
        faults.append(f"unet.norm_num_groups is {groups}; needed: {group_count(base)}")
    size = unet.get("sample_size")
    if isinstance(size, list) and len({*size}) == 1:
        size = size[0]
    if not isinstance(size, int):
        faults.append(f"unet.sample_size is {json.dumps(size)}; needed: the side of a square")

    notes = []
    if scheduler is None:
        notes.append("no scheduler_config.json: the paper's linear schedule of 1,000 steps")
        scheduler = {}
    process, sampling = _process_of(scheduler, faults, notes)
    if faults:
        raise ValueError("\n  ".join(["this network cannot represent it:", *faults]))
    tree = {
        "dataset": {"image_size": size, "channels": channels},
        "model": {
            "base_channels": base,
            "channel_multipliers": [width // base for width in widths],
            "num_res_blocks": unet.get("layers_per_block", 2),
            "attention_resolutions": [size // 2**i for i, a in enumerate(attends) if a],
            "dropout": float(unet.get("dropout", 0.0)),
        },
        "diffusion": process,
        "sampling": sampling,
    }
    return tree, notes


def _process_of(scheduler: dict, faults: list[str], notes: list[str]) -> tuple[dict, dict]:
    """Our sections `diffusion` and `sampling`; adds to `faults` and `notes`."""
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in _SCHEDULERS:
        faults.append(f"scheduler._class_name is {kind}; needed: one of {', '.join(_SCHEDULERS)}")
    faults += _unfit("scheduler", scheduler, _SCHEDULER_KEYS)
    process = {
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "beta_schedule": "linear",
        "beta_start": scheduler.get("beta_start", 1e-4),
        "beta_end": scheduler.get("beta_end", 0.02),
    }
    name = scheduler.get("beta_schedule", "linear")
    if (betas := scheduler.get("trained_betas")) is not None:
        if found := _schedule_of(process, betas):
            process["beta_schedule"] = found
        else:
            faults.append("scheduler.trained_betas holds another schedule; needed: one by name")
    elif name in _BETAS:
        process["beta_schedule"] = _BETAS[name]
    else:
        faults.append(f"scheduler.beta_schedule is {name}; needed: one of {', '.join(_BETAS)}")
    variance = scheduler.get("variance_type", "fixed_small")
    if kind == "DDPMScheduler" and variance not in _VARIANCES:
        faults.append(f"scheduler.variance_type is {variance}; needed: fixed_small or fixed_large")
    for key, ours in (("clip_sample", True), ("clip_sample_range", 1.0), ("thresholding", False)):
        if kind != "DPMSolverMultistepScheduler" and (value := scheduler.get(key, ours)) != ours:
            notes.append(
                f"scheduler.{key} is {json.dumps(value)}; here x0_hat is always clipped to -1 ... 1"
            )
    sampling = {
        "sampler": _SCHEDULERS.get(kind, "ddpm"),
        "variance": _VARIANCES.get(variance, "small"),
    }
    return process, sampling


def _schedule_of(process: dict, betas: list[float]) -> str | None:
    if len(betas) == process["timesteps"]:
        for name in get_args(DiffusionConfig.model_fields["beta_schedule"].annotation):
            ours = make_betas(name, len(betas), process["beta_start"], process["beta_end"])
            if np.allclose(ours, betas, rtol=1e-6, atol=0):
                return name
    return None


def same_betas(one: dict, other: dict) -> bool:
    """Whether two sections `diffusion` mean the same betas."""
    one, other = (
        make_betas(d["beta_schedule"], d["timesteps"], d["beta_start"], d["beta_end"])
        for d in (one, other)
    )
    return len(one) == len(other) and np.allclose(one, other, rtol=1e-6, atol=0)


def to_diffusers(config: Config) -> tuple[dict, dict]:
    """config.json of the network and scheduler_config.json, as diffusers writes them.

    Raises:
        ValueError: the first multiplier is not 1; UNet2DModel's first convolution has its width.
    """
    model, size = config.model, config.dataset.image_size
    multipliers = model.channel_multipliers
    if multipliers[0] != 1:
        raise ValueError(
            f"model.channel_multipliers is {multipliers}: diffusers' UNet2DModel can only "
            "represent networks whose first is 1"
        )
    attends = [size // 2**i in model.attention_resolutions for i in range(len(multipliers))]
    groups = group_count(model.base_channels)
    unet = {key: ours for key, (_, ours) in _UNET_KEYS.items()} | {
        "_diffusers_version": "0.30.0",
        "sample_size": size,
        "in_channels": config.dataset.channels,
        "out_channels": config.dataset.channels,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": [model.base_channels * m for m in multipliers],
        "layers_per_block": model.num_res_blocks,
        "attention_head_dim": None,
        "norm_num_groups": groups,
        "dropout": model.dropout,
    }
    process = config.diffusion
    betas = {ours: theirs for theirs, ours in _BETAS.items()}.get(process.beta_schedule)
    trained = None
    if betas is None:
        trained = make_betas(
            process.beta_schedule, process.timesteps, process.beta_start, process.beta_end
        ).tolist()
    scheduler = {key: ours for key, (_, ours) in _SCHEDULER_KEYS.items()} | {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": process.timesteps,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": betas or "linear",
        "trained_betas": trained,
        "variance_type": f"fixed_{config.sampling.variance}",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }
    return unet, scheduler


def infer_tree(state: dict[str, Tensor], image_size: int | None) -> tuple[dict, list[str]]:
    """Sections as of `tree_of_diffusers` from the shapes of tensors under our names.

    Raises:
        ValueError: no DDPM network, or its image size does not show.
    """
    shapes = {name: list(value.shape) for name, value in state.items() if hasattr(value, "shape")}
    try:
        base, channels = shapes["conv_in.weight"][:2]
        widths = []
        while (key := f"down.{len(widths)}.block.0.conv1.weight") in shapes:
            widths.append(shapes[key][0])
        blocks = sum(f"down.0.block.{b}.conv1.weight" in shapes for b in range(len(shapes)))
        multipliers = [width // base for width in widths]
        if not widths or [base * m for m in multipliers] != widths:
            raise KeyError("widths that are multiples of the first")
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are not the weights of a DDPM network: no {error}") from None
    levels = [i for i in range(len(widths)) if f"down.{i}.attn.0.q.weight" in shapes]
    if not image_size and not levels:
        raise ValueError("the weights do not show how large pictures are: add dataset.image_size=")
    size = image_size or 16 * 2 ** levels[0]  # the paper has attention at 16x16
    variance = "large" if size < 256 else "small"
    tree = {
        "dataset": {"image_size": size, "channels": channels},
        "model": {
            "base_channels": base,
            "channel_multipliers": multipliers,
            "num_res_blocks": blocks,
            "attention_resolutions": [size // 2**i for i in levels],
            "dropout": 0.0,
        },
        "diffusion": {},
        "sampling": {"sampler": "ddpm", "variance": variance},
    }
    return tree, [f"pictures of {size}x{size}, the paper's linear schedule, variance {variance}"]
