"""The schema of a run: sections, defaults, rules, YAML in and out.

A config is data: frozen, checked once, the same in the YAML file, in the run's folder and in every
checkpoint. Each section mirrors one constructor (`model` is `UNet`, `diffusion` is
`GaussianDiffusion`, `sampling` is `make_steps`), and defaults live here only. Facts of the data,
`image_size` and `channels`, are written once, under `dataset`.
"""

import json
import os
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from terminal import did_you_mean


class Section(BaseModel):
    """Frozen, no unknown keys, no silent conversions but int -> float."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # they become the comments of `to_yaml`
    )


Folder = Annotated[str, AfterValidator(os.path.expanduser)]  # a shell leaves key=~/x alone
WITH_TEST_SET = ("mnist", "fashion-mnist", "cifar10", "flowers102")


class DatasetConfig(Section):
    """Where pictures come from and what they are cut to."""

    name: Literal[
        "digits", "mnist", "fashion-mnist", "cifar10", "flowers102", "celebahq",
        "lsun-church", "lsun-bedroom", "lsun-cat",
        "folder", "zip", "tar", "npy", "npz", "huggingface",
    ]  # fmt: skip
    """which pictures; folder, zip, npy, ... are your own"""
    root: Folder = "data"
    """where they are, or are fetched to"""
    image_size: int = Field(ge=4, le=16_384)
    """height and width, in pixels"""
    channels: int = Field(3, ge=1, le=4)
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha"""
    fit: Literal["crop", "pad"] = "crop"
    """crop the centre, or pad with black"""
    random_flip: bool = True
    """mirror half of the training pictures"""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """held out, where the set has no test set of its own"""
    cache: Folder = "data/cache"
    """folder of decoded pictures"""

    @model_validator(mode="after")
    def _test_sets_are_held_out(self):
        if self.validation_fraction and self.name in WITH_TEST_SET:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; {self.name} holds out its own "
                "test set: leave it at 0"
            )
        return self


class ModelConfig(Section):
    """The attention U-Net (Ho et al. 2020, appendix B)."""

    base_channels: int = Field(128, ge=4, le=16_384)
    """width before the multipliers"""
    channel_multipliers: list[Annotated[int, Field(ge=1)]] = Field([1, 2, 2, 2], min_length=1)
    """width of each level, finest first"""
    num_res_blocks: int = Field(2, ge=1)
    """residual blocks a level"""
    attention_resolutions: list[int] = [16]
    """feature sizes with self-attention"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """inside the residual blocks"""

    @field_validator("attention_resolutions")
    @classmethod
    def _finest_first(cls, sizes):
        return sorted(set(sizes), reverse=True)


class DiffusionConfig(Section):
    """The forward process q."""

    timesteps: int = Field(1000, ge=1, le=1_000_000)
    """T"""
    beta_schedule: Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"] = (
        "linear"
    )
    """linear is the paper's; quad, const, warmup10, warmup50, jsd, cosine"""
    beta_start: float = Field(1e-4, gt=0, le=1)
    """beta of the first step"""
    beta_end: float = Field(0.02, gt=0, le=1)
    """beta of the last step"""


class TrainingConfig(Section):
    """Optimisation, hardware, and how often to do what. `batch_size` is that of all devices."""

    seed: int = Field(0, ge=0, lt=2**63)
    """of everything random"""
    batch_size: int = Field(128, ge=1, le=1_000_000)
    """of all devices together"""
    micro_batch_size: int | None = Field(None, ge=1)
    """pictures at a time on a device; null is as many as fit"""
    max_steps: int = Field(ge=1, le=10**9)
    """updates, then it ends"""
    learning_rate: float = Field(2e-4, gt=0)
    """of Adam, after the warm-up"""
    warmup_steps: int = Field(5000, ge=0)
    """linear from 0"""
    gradient_clip_norm: float | None = Field(1.0, gt=0)
    """of the global batch's gradient; null is none"""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """of the average that samples, each step"""
    max_skipped_steps: int = Field(20, ge=1)
    """in a row without a finite gradient, then the run stops"""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed where the hardware multiplies it, else 32-true"""
    compile: bool | Literal["auto"] = "auto"
    """auto: on CUDA, for 10,000 steps and more"""
    activation_checkpointing: bool = False
    """less memory, more time"""
    num_workers: int = Field(0, ge=0, le=256)
    """processes that load pictures"""
    log_every: int = Field(100, ge=1)
    """steps"""
    validate_every: int = Field(10_000, ge=0)
    """steps; 0 is never"""
    preview_every: int = Field(5000, ge=0)
    """steps; 0 is never"""
    preview_images: int = Field(36, ge=1, le=10_000)
    """in the grid"""
    evaluate_every: int = Field(0, ge=0)
    """steps; 0 is never"""
    evaluate_images: int = Field(1000, ge=2)
    """for each evaluation"""
    extractor: str = "inception-v3-compat"
    """of features: torch-fidelity's name, or a TorchScript file"""
    save_every: int = Field(5000, ge=0)
    """steps; 0 is at the end only"""
    keep_checkpoints: int = Field(3, ge=1)
    """the newest so many"""
    logger: list[Literal["tensorboard", "csv", "wandb"]] = Field(["tensorboard"], min_length=1)
    """tensorboard, csv, wandb; one or several"""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """auto, cpu, gpu or mps"""
    devices: int | Literal["auto"] = "auto"
    """of each node; auto is all GPUs"""
    num_nodes: int = Field(1, ge=1)
    """machines"""
    results_folder: Folder = "lightning_logs"
    """where runs go"""

    @field_validator("logger", mode="before")
    @classmethod
    def _one_logger(cls, value):
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _micro_batch_divides(self):
        micro = self.micro_batch_size
        if micro and self.batch_size % micro:
            raise ValueError(
                f"micro_batch_size {micro} does not divide batch_size {self.batch_size}; "
                f"these do: {divisors(self.batch_size)}"
            )
        if self.devices != "auto" and self.devices < 1:
            raise ValueError(f"devices is {self.devices}; give 1 or more, or auto")
        return self


class SamplingConfig(Section):
    """The reverse process: what `sample.py` does unless told otherwise."""

    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    """ddpm, ddim or dpm++"""
    variance: Literal["large", "small"] = "large"
    """of ddpm: large (the paper's CIFAR-10) or small (its 256x256)"""
    eta: float = Field(0.0, ge=0, le=1)
    """of ddim: 0 no noise, 1 as ddpm small"""
    timesteps: int | None = Field(None, ge=1)
    """steps of a chain; null is all T"""
    spacing: Literal["trailing", "uniform", "quadratic", "logsnr"] = "trailing"
    """which of the T steps, when fewer: trailing, uniform, quadratic, logsnr"""


class Config(Section):
    """One run, whole."""

    dataset: DatasetConfig
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _sections_agree(self):
        size, model = self.dataset.image_size, self.model
        levels = len(model.channel_multipliers)
        factor = 2 ** (levels - 1)
        if size % factor:
            near = max(factor, round(size / factor) * factor)
            raise ValueError(
                f"dataset.image_size {size} cannot be halved {levels - 1} times, as "
                f"{levels} model.channel_multipliers ask; try {near}, or fewer multipliers"
            )
        resolutions = [size // 2**level for level in range(levels)]
        for resolution in model.attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(
                    f"model.attention_resolutions has {resolution}; the feature sizes of "
                    f"this network are {resolutions}"
                )
        steps = self.sampling.timesteps
        if steps is not None and steps > self.diffusion.timesteps:
            raise ValueError(
                f"sampling.timesteps {steps} is more than diffusion.timesteps "
                f"{self.diffusion.timesteps}"
            )
        return self


def divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-4 as a string; this reads it as YAML 1.2 and every person does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"
    ),
    list("-+0123456789."),
)


def _no_duplicate_keys(loader, node, deep=False):
    merge = "tag:yaml.org,2002:merge"
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != merge]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {key!r} stands twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.construct_mapping = _no_duplicate_keys


def parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # safe: _Loader is yaml.SafeLoader with better floats


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check everything.

    Raises:
        ValueError: one line a fault: where, value, rule and mend. OSError where it can't be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; a config is a YAML file")
    if not path.exists():
        there = sorted(str(p) for p in Path("configs").glob("*.yml"))
        raise FileNotFoundError(f"no config at {path}{did_you_mean(str(path), there)}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except Exception as error:  # its constructors raise anything
        where = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {where}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no sections (dataset:, model:, training:, ...)")
    for override in overrides:
        apply_override(tree, override)
    return check_config(tree, source=str(path))


def apply_override(tree: dict, override: str) -> None:
    """`section.key=value` into plain data; ValueError where it is not of that form."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name and "." not in name):
        raise ValueError(f"{override!r} is not an override; write section.key=value")
    try:
        value = text if is_text(section, name, text) else parse_yaml(text)
    except Exception:  # its constructors raise anything
        raise ValueError(f"{section}.{name}: {reprlib.repr(text)} is not a YAML value") from None
    values = tree.setdefault(section, {})
    if values is None:
        values = tree[section] = {}
    if not isinstance(values, dict):
        raise ValueError(f"{override!r}: {section} is not a section")
    values[name] = value


def is_text(section: str, name: str, text: str) -> bool:
    """Whether a key takes text as it stands: folders called 2024-02-03 or `my #1`, not quoted."""
    field = Config.model_fields.get(section)
    key = field and field.annotation.model_fields.get(name)
    return bool(key) and key.annotation is str and text[:1] not in "\"'"


def check_config(tree: dict, *, source: str) -> Config:
    """A checked config from plain data; `source` names it in messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ValueError(f"{source}:\n{faults}") from None


def _explain(fault: dict) -> str:
    where = ".".join(str(part) for part in fault["loc"] if part not in ("int", "literal['auto']"))
    if fault["type"] == "extra_forbidden":
        section = fault["loc"][0]
        known = Config.model_fields
        if len(fault["loc"]) > 1:
            known = known[section].annotation.model_fields
        return f"{where}: no such key{did_you_mean(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{where}: missing; give it a value"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {reprlib.repr(fault['input'])}: {message[0].lower()}{message[1:]}"


def keys_like(incomplete: str) -> list[str]:
    """`section.key=` of those that begin so: for a shell to complete."""
    sections = Config.model_fields.items()
    keys = [f"{name}.{key}=" for name, field in sections for key in field.annotation.model_fields]
    return [key for key in keys if key.startswith(incomplete)]


def to_yaml(config: Config) -> str:
    """The resolved config, every default written out, with what each key means."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        fields = Config.model_fields[section].annotation.model_fields
        lines.append(f"{section}:")
        for key, value in values.items():
            text = yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]
            lines.append(f"  {f'{key}: {text}':<34}  # {fields[key].description}")
    return "\n".join(lines) + "\n"


# What may change between two parts of one run without changing what it computes
# (precision and compile: up to rounding).
MAY_CHANGE = {"dataset.root", "dataset.cache", "sampling"} | {
    f"training.{key}"
    for key in TrainingConfig.model_fields
    if key
    not in (
        "seed",
        "batch_size",
        "learning_rate",
        "warmup_steps",
        "gradient_clip_norm",
        "ema_decay",
    )
}


def differences(old: Config, new: Config, *, ignore: set[str] = frozenset()) -> list[str]:
    """'section.key: old -> new' for each value that differs and is not in `ignore`."""
    lines = []
    new_tree = new.model_dump(mode="json")
    for section, values in old.model_dump(mode="json").items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if value != new_tree[section][key] and not ignore & {section, name}:
                lines.append(f"{name}: {json.dumps(value)} -> {json.dumps(new_tree[section][key])}")
    return lines
