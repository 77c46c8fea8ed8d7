"""The dialects of DDPM weights, as data: tensor names, and diffusers' configs.

Our names are those of the official weights in PyTorch. diffusers and TensorFlow name the same
layers otherwise. What our network or process cannot represent is refused by key and value.
"""

import json
import re
from typing import Any, get_args

import numpy as np
from torch import Tensor

from config import Config, DiffusionConfig, ModelConfig
from diffusion_utils import make_betas
from model import group_count
from weights.improved import facts_of_improved, names_of_improved

# ---- names

LABELS = "temb.label.weight"  # a row for each class; one more, the last, for no label
# The place of layers in our network and in diffusers'. {i} counts levels from the finest, {j} from
# the coarsest; {b} counts blocks from 0, {b1} from 1. conv_in and conv_out are the same.
_PLACES = [
    ("norm_out", "conv_norm_out"),
    ("temb.dense.{b}", "time_embedding.linear_{b1}"),
    ("temb.label", "class_embedding"),
    ("down.{i}.block.{b}", "down_blocks.{i}.resnets.{b}"),
    ("down.{i}.attn.{b}", "down_blocks.{i}.attentions.{b}"),
    ("down.{i}.downsample", "down_blocks.{i}.downsamplers.0"),
    ("mid.block_{b1}", "mid_block.resnets.{b}"),
    ("mid.attn_{b1}", "mid_block.attentions.{b}"),
    ("up.{i}.block.{b}", "up_blocks.{j}.resnets.{b}"),
    ("up.{i}.attn.{b}", "up_blocks.{j}.attentions.{b}"),
    ("up.{i}.upsample", "up_blocks.{j}.upsamplers.0"),
]
_LAYERS = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut", "norm": "group_norm"}
_LAYERS |= {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_LAYERS = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_OUR_LAYERS = {theirs: ours for ours, theirs in _LAYERS.items()} | _OLD_LAYERS
_TENSORFLOW_LEAVES = {"W": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}


def rename(name: str, levels: int, *, to_ours: bool) -> str:
    """Return our name of diffusers' tensor, or theirs of ours; an unknown one stays as it is."""
    layers = _OUR_LAYERS if to_ours else _LAYERS
    for pair in _PLACES:
        place, other = reversed(pair) if to_ours else pair
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(f"{place}."))
        if match := re.match(pattern, name):
            index = {key: int(value) for key, value in match.groupdict().items()}
            i = index.get("i", levels - 1 - index.get("j", 0))
            b = index.get("b", index.get("b1", 1) - 1)
            layer, dot, leaf = name[match.end() :].rpartition(".")
            place = other.format(i=i, j=levels - 1 - i, b=b, b1=b + 1)
            return f"{place}.{layers.get(layer, layer)}{dot}{leaf}"
    return name


def to_our_names(state: dict) -> dict[str, Tensor]:
    """Return the tensors of any dialect under our names, in float32."""
    names = {old: str(old).removeprefix("module.").removeprefix("model/") for old in state}
    if any(name.startswith(("input_blocks.", "label_emb.")) for name in names.values()):
        improved = names_of_improved(names.values())
        names = {old: improved[name] for old, name in names.items()}
    numbers = re.findall(r"(?m)^(?:down|up)_blocks\.(\d+)", "\n".join(names.values()))
    levels = 1 + max(map(int, numbers), default=0)
    ours = {}
    for old, name in names.items():
        value = state[old]
        if "/" in name:  # TensorFlow's: down_0/block_1/conv1/W, mid/attn_1/q/b, temb/dense0/b
            stem, _, leaf = name.rpartition("/")
            if leaf == "W" and getattr(value, "ndim", 0) > 1:
                value = value.movedim((-1, -2), (0, 1))  # [in, out] or [height, width, in, out]
            stem = re.sub(r"(?<!mid/)(down|up|block|attn|dense)_?(\d)", r"\1.\2", stem)
            name = f"{stem.replace('/', '.')}.{_TENSORFLOW_LEAVES.get(leaf, leaf)}"
        value = value.float() if isinstance(value, Tensor) else value
        ours[rename(name, levels, to_ours=True)] = value
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
_UNET_OURS = _UNET_ABSENT | {
    "_diffusers_version": "0.30.0", "freq_shift": 1, "flip_sin_to_cos": False,
    "downsample_padding": 0, "norm_eps": 1e-6, "attention_head_dim": None,
}  # fmt: skip
_HINTS = {
    "sample_size": "the side of a square, or [height, width]",
    "num_class_embeds": "a number of classes, or null",
    "out_channels": "as many as in_channels, or twice where the variance is learned",
    "block_out_channels": "multiples of its first, which is 4 or more",
    "attention_head_dim": "null (one head)",
}
_SCHEDULERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
_SCHEDULERS |= {"DPMSolverMultistepScheduler": "dpm++"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
_VARIANCES = {f"fixed_{v}{log}": v for v in ("small", "large") for log in ("", "_log")}
_VARIANCES |= {"learned_range": "learned"}


def _unet_of(tree: dict) -> dict[str, Any]:
    """Return diffusers' config.json of our sections dataset, model, diffusion and training."""
    data, model = tree["dataset"], tree["model"]
    size, multipliers = data["image_size"], model["channel_multipliers"]
    shorter, labels = _shorter(size), len(data["classes"])
    attends = [shorter // 2**i in model["attention_resolutions"] for i in range(len(multipliers))]
    return _UNET_OURS | {
        "sample_size": size,
        "in_channels": data["channels"],
        "out_channels": data["channels"] * (1 + tree["diffusion"]["learned_variance"]),
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": [model["base_channels"] * m for m in multipliers],
        "layers_per_block": model["num_res_blocks"],
        "norm_num_groups": group_count(model["base_channels"]),
        "dropout": model["dropout"],
        "num_class_embeds": labels + (tree["training"]["label_dropout"] > 0) if labels else None,
    }


def _shorter(size: Any) -> int:
    """Return the shorter side of an `image_size`; 0 where it is none."""
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    return min(sides) if {*map(type, sides)} == {int} else 0


def _sections(
    size: Any,
    channels: int,
    base: int,
    widths: list[int],
    attends: list[bool],
    blocks: int,
    labels: int,
    outputs: int,
) -> dict[str, dict]:
    """Return our config's sections dataset, model, diffusion and training.

    `widths`, `attends` have an entry a level; `labels` are rows of a table, each taken for a class;
    `outputs` are channels of the network's output.
    """
    model = ModelConfig().model_dump() | {
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths] or [1],
        "num_res_blocks": blocks,
        "attention_resolutions": [_shorter(size) // 2**i for i, a in enumerate(attends) if a],
        "dropout": 0.0,
    }
    data = {"image_size": size, "channels": channels, "classes": [str(i) for i in range(labels)]}
    training = {"label_dropout": 0.0} if labels else {}
    process = {"learned_variance": outputs == 2 * channels}
    data |= {"labels": labels > 0}
    return {"dataset": data, "model": model, "diffusion": process, "training": training}


def tree_of_diffusers(unet: dict, scheduler: dict) -> tuple[dict, list[str]]:
    """Return our config's sections but those of the run, and what was assumed.

    ValueError names every key that our network or process cannot represent, with its value.
    """
    there = _UNET_ABSENT | unet
    widths, kinds = there["block_out_channels"], there["down_block_types"]
    base, size = max([4, *widths[:1]]), there["sample_size"]
    attends = ["AttnDownBlock2D" in kinds[i : i + 1] for i in range(len(widths))]
    attention_widths = {w for w, a in zip(widths, attends, strict=True) if a} | {*widths[-1:]}
    if attention_widths == {there["attention_head_dim"]}:
        there["attention_head_dim"] = None
    size = size if _shorter(size) else 2 ** len(widths)
    channels, blocks = there["in_channels"], there["layers_per_block"]
    labels = there["num_class_embeds"]
    labels = labels if type(labels) is int and 0 < labels < 100_000 else 0
    outputs = there["out_channels"]
    tree = _sections(size, channels, base, widths, attends, blocks, labels, outputs)
    tree["model"]["dropout"] = float(there["dropout"])
    faults, needed = {}, _unet_of(tree)
    for key, value in there.items():
        if value != needed.get(key) and (key[:1] != "_" or key == "_class_name"):
            how = "is" if key in unet else "is absent, which diffusers reads as"
            rule = json.dumps(needed[key]) if key in needed else "its absence"
            faults[key] = f"unet.{key} {how} {json.dumps(value)}; needed: {_HINTS.get(key, rule)}"
    if "down_block_types" in faults:
        faults.pop("up_block_types", None)  # they are to mirror each other
    process, sampling, wrong, notes = _process_of(scheduler)
    process |= tree["diffusion"]
    if process["learned_variance"]:  # their schedulers can do nothing else with it
        sampling["variance"] = "learned"
    elif sampling["variance"] == "learned":
        wrong.append("scheduler.variance_type is learned_range; needed: out_channels for it")
    if wrong := [*faults.values(), *wrong]:
        raise ValueError("\n  ".join(["this network cannot represent it:", *wrong]))
    return tree | {"diffusion": process, "sampling": sampling}, notes


def _process_of(scheduler: dict) -> tuple[dict, dict, list[str], list[str]]:
    """Return our sections diffusion and sampling, what cannot be represented, and notes."""
    faults: list[str] = []
    missing = "no scheduler_config.json: the paper's linear schedule of 1,000 steps"
    notes = [] if scheduler else [missing]

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
        process = next((tree for tree in trees if _same(betas_of(tree), betas)), {})
        if not process:
            faults.append("scheduler.trained_betas holds another schedule; needed: one by name")
    if scheduler.get("rescale_betas_zero_snr", False):
        faults.append("scheduler.rescale_betas_zero_snr is true; needed: false")
    ddpm = sampler == "ddpm"
    variance = choice("variance_type", "fixed_small", _VARIANCES) if ddpm else "small"
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
    same = all(one[key] == other[key] for key in ("prediction", "learned_variance"))
    return same and _same(betas_of(one), betas_of(other))


def to_diffusers(config: Config) -> tuple[dict, dict]:
    """Return the network's config.json and scheduler_config.json, as diffusers writes them."""
    multipliers, process = config.model.channel_multipliers, config.diffusion
    theirs = ("num_heads", "scale_shift_norm", "time_scale", "variant")
    if options := config.model.model_dump(include={*theirs}, exclude_defaults=True):
        raise ValueError(f"not for diffusers: a network with {json.dumps(options)}")
    if multipliers[0] != 1:  # UNet2DModel's first convolution has the width of the first level
        raise ValueError(
            f"model.channel_multipliers is {multipliers}: the first of diffusers' UNet2DModel is 1"
        )
    betas = {ours: theirs for theirs, ours in _BETAS.items()}.get(process.beta_schedule)
    # their scheduler takes a learned variance wherever there is one
    learned = process.learned_variance
    variance = "learned_range" if learned else f"fixed_{config.sampling.variance}"
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": process.timesteps,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": betas or "linear",
        "trained_betas": None if betas else betas_of(process.model_dump()).tolist(),
        "variance_type": variance,
        "prediction_type": {o: theirs for theirs, o in _PREDICTIONS.items()}[process.prediction],
        "rescale_betas_zero_snr": False,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }
    return _unet_of(config.model_dump()), scheduler


def infer_tree(
    state: dict[str, Tensor], image_size: Any, timesteps: int | None = None
) -> tuple[dict, list[str]]:
    """Return what `tree_of_diffusers` does, from shapes of tensors under our names.

    `image_size` and `timesteps` are those that were asked for, and None where none were.
    ValueError where they are of another network, or do not show the size of its images.
    """
    shapes = {name: list(value.shape) for name, value in state.items() if hasattr(value, "shape")}
    try:
        base, channels = shapes["conv_in.weight"][:2]
        firsts = (f"down.{level}.block.0.conv1.weight" for level in range(len(shapes)))
        widths = [shapes[name][0] for name in firsts if name in shapes]
        outputs = shapes["conv_out.weight"][0]
        blocks = sum(f"down.0.block.{b}.conv1.weight" in shapes for b in range(len(shapes)))
        if not widths or any(width % base for width in widths):
            raise KeyError("widths that are multiples of the first")
    except (KeyError, ValueError) as error:
        hint = ""
        if any(re.fullmatch(r"0\.\d+\.conv_in\.weight", name) for name in shapes):
            hint = "; this is a snapshot: make an EMA of a run's by `python convert.py ema RUN`"
        wrong = f"these are not the weights of a DDPM network: no {error}{hint}"
        raise ValueError(wrong) from None
    attends = [f"down.{level}.attn.0.norm.weight" in shapes for level in range(len(widths))]
    if not _shorter(image_size) and True not in attends:
        raise ValueError("the weights do not show the size of the images: add dataset.image_size=")
    size = image_size
    if not _shorter(size):
        size = 16 * 2 ** attends.index(True)  # the paper has attention at 16x16
    variance = "large" if _shorter(size) < 256 else "small"
    labels = next(iter(shapes.get(LABELS, [])), 0)
    tree = _sections(size, channels, base, widths, attends, blocks, labels, outputs)
    variance = "learned" if tree["diffusion"]["learned_variance"] else variance
    tree |= {"sampling": {"sampler": "ddpm", "variance": variance}}
    told, process = "x".join(map(str, size if isinstance(size, list) else [size, size])), ""
    if "mid.attn_1.qkv.weight" in shapes:
        model, diffusion, process = facts_of_improved(shapes, timesteps)
        tree["model"] |= model
        tree["diffusion"] |= diffusion
    process = process or "the paper's linear schedule"
    return tree, [f"images of {told}, {process}, variance {variance}"]
