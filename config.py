"""The schema of a run: sections, defaults, rules, YAML in and out.

A config is data: frozen, checked once, the same in the YAML file, in the run's folder and in every
checkpoint. `model`, `diffusion`, `sampling` and `guidance` mirror one constructor each (`UNet`,
`GaussianDiffusion`, `make_steps`, `Guidance`). What a run is told is of four kinds: what is learned
(`training`), where it runs (`hardware`), what is written down (`logging`) and what is measured
(`evaluation`). Facts of the data are written once, under `dataset`. Defaults live here only.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from files import (
    divisors,
    explain,
    move_old_keys,
    read_yaml,
    set_value,
    split_override,
    yaml_value,
)


class Section(BaseModel):
    """Frozen, no unknown keys, no silent conversions but int -> float."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # they become the comments of `to_yaml`
    )


def free(default: Any = ..., **rules: Any) -> Any:
    """Return a field that may change when a run continues, as it changes nothing learned."""
    return Field(default, json_schema_extra={"free": True}, **rules)


Folder = Annotated[str, AfterValidator(os.path.expanduser)]  # a shell leaves key=~/x alone
if TYPE_CHECKING:
    Steps = int
else:
    Steps = int | None  # None until `Config.with_steps` has counted those of max_epochs
LENGTHS = ("max_steps", "max_epochs")  # of a run
WITH_TEST_SET = ("mnist", "fashion-mnist", "cifar10", "flowers102", "emoji")


class DatasetConfig(Section):
    """Images: their source, and the shape that they are brought to."""

    name: Literal[
        "digits", "mnist", "fashion-mnist", "cifar10", "flowers102", "celebahq",
        "lsun-church", "lsun-bedroom", "lsun-cat", "emoji",
        "folder", "zip", "tar", "npy", "npz", "huggingface",
    ]  # fmt: skip
    """which images; folder, zip, npy, ... are your own"""
    root: Folder = free("data")
    """where they are, or are downloaded to"""
    image_size: int | list[int]
    """in pixels: of a square, or [height, width]"""
    channels: int = Field(3, ge=1, le=4)
    """1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha"""
    fit: Literal["crop", "pad"] = "crop"
    """crop the centre, or pad with black"""
    split: Literal["train", "all"] = "train"
    """train, where an official test set validates; all trains on it, too"""
    random_flip: bool = True
    """mirror half of the training images"""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """share of images kept for validation, where no test set validates"""
    cache: Folder = free("data/cache")
    """folder of decoded images"""
    labels: bool = False
    """learn the classes of the images, too"""
    classes: list[str] = []
    """their names; read from the data"""

    @field_validator("image_size", mode="before")
    @classmethod
    def _squares_are_one_number(cls, size: Any) -> Any:
        sides = size if isinstance(size, list) and len(size) == 2 else [size]
        if not all(type(side) is int and 4 <= side <= 16_384 for side in sides):
            raise ValueError(f"{size} is neither a side of 4 ... 16384 pixels nor [height, width]")
        return sides[0] if sides[0] == sides[-1] else size

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, *self.size

    @model_validator(mode="after")
    def _keys_agree(self) -> "DatasetConfig":
        if self.classes and not self.labels:
            raise ValueError("classes are of labels: say dataset.labels=true, too")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes has one name twice")
        if self.split == "all" and self.name not in WITH_TEST_SET:
            raise ValueError(f"split=all adds a test set, and {self.name} has none: leave it out")
        if self.validation_fraction and self.split == "train" and self.name in WITH_TEST_SET:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; {self.name} validates on its "
                "own test set: leave it at 0, or train on that, too: dataset.split=all"
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
    """feature sizes with self-attention, of the shorter side"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """inside the residual blocks"""
    num_heads: int = Field(1, ge=1)
    """heads of attention; 1 is the paper's"""
    scale_shift_norm: bool = False
    """time scales and shifts each block's second norm, where the paper adds it before"""
    time_scale: float = Field(1.0, gt=0)
    """what t is multiplied by; 1 is the paper's, 1000 / T improved-diffusion's"""
    variant: Literal["ddpm", "improved"] = "ddpm"
    """other details: ddpm (the paper's), or improved for improved-diffusion's"""

    @field_validator("attention_resolutions")
    @classmethod
    def _finest_first(cls, sizes: list[int]) -> list[int]:
        return sorted(set(sizes), reverse=True)


class DiffusionConfig(Section):
    """The forward process q."""

    timesteps: int = Field(1000, ge=1, le=1_000_000)
    """T"""
    beta_schedule: Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"] = (
        "linear"
    )
    """linear (the paper's), quad, const, warmup10, warmup50, jsd, cosine"""
    beta_start: float = Field(1e-4, gt=0, le=1)
    """beta of the first step"""
    beta_end: float = Field(0.02, gt=0, le=1)
    """beta of the last step"""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """what the network predicts: eps (the paper's), x0 or v"""
    learned_variance: bool = False
    """the network predicts the variance, too; it samples with it unless told otherwise"""


class TrainingConfig(Section):
    """Learning: all that decides the weights."""

    seed: int = Field(0, ge=0, lt=2**63)
    """seed of initial weights, data order, t, noise, flips and dropout"""
    batch_size: int = Field(128, ge=1, le=1_000_000)
    """images a step, on all devices together"""
    max_steps: Steps = free(None, ge=1, le=10**9)
    """steps of the whole run; or give max_epochs"""
    max_epochs: float | None = free(None, gt=0)
    """passes over the training images, in place of max_steps"""
    optimizer: Literal["adam", "muon"] = "adam"
    """adam (the paper's) or muon"""
    learning_rate: float = Field(2e-4, gt=0)
    """its largest, after the warmup"""
    warmup_steps: int = Field(5000, ge=0)
    """steps over which the learning rate rises from 0"""
    learning_rate_decay: Literal["constant", "cosine", "linear", "inverse-sqrt"] = "constant"
    """then: constant (the paper's); cosine or linear to 0 at max_steps; inverse-sqrt of the step"""
    gradient_clip_norm: float | None = Field(1.0, gt=0)
    """largest norm of the global batch's gradient; null does not clip"""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """decay of the weights' moving average, which samples"""
    ema: Literal["constant", "warmup", "power"] = "constant"
    """constant (the paper's) at ema_decay; warmup up to it; power, of the first of ema_lengths"""
    ema_lengths: list[Annotated[float, Field(gt=0, lt=0.28)]] = []
    """relative lengths of power EMAs that are kept besides, for `convert.py ema`"""
    loss_weight: Literal["eps", "x0", "v", "min-snr", "soft-min-snr", "p2", "sigmoid"] = "eps"
    """weight of the eps error over t: eps (the paper's) is 1; docs/recipes.md has the others"""
    loss_weight_gamma: float | None = None
    """gamma of min-snr, soft-min-snr, p2, bias of sigmoid; null is 5, 5, 1, -1"""
    t_density: Literal["uniform", "normal"] = "uniform"
    """how t is drawn: uniform (the paper's), or normal in log SNR"""
    t_density_mean: float = 0.0
    """of normal: its mean"""
    t_density_width: float = Field(2.0, gt=0)
    """of normal: its standard deviation"""
    t_stratified: bool = False
    """one t from each of batch_size equal shares of the density, which varies less"""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """share of labels left out, which guidance needs"""
    keep_best: Literal["validation", "fid", "kid"] | None = free(None)
    """keep the best checkpoint, by the EMA's loss on validation images, or by fid or kid"""
    max_skipped_steps: int = free(20, ge=1)
    """steps in a row without a finite gradient that end the run"""

    @model_validator(mode="after")
    def _knobs_are_used(self) -> "TrainingConfig":
        if (self.max_steps is None) == (self.max_epochs is None):
            given = "none is" if self.max_steps is None else "both are"
            raise ValueError(f"give one of max_steps and max_epochs; {given} given")
        gamma, plain = self.loss_weight_gamma, self.loss_weight in ("eps", "x0", "v")
        if gamma is not None and (plain or (gamma <= 0 and self.loss_weight != "sigmoid")):
            raise ValueError(
                f"loss_weight_gamma {gamma} is above 0, of min-snr, soft-min-snr and p2, or "
                f"sigmoid's bias; loss_weight is {self.loss_weight}"
            )
        if self.learning_rate_decay == "inverse-sqrt" and not self.warmup_steps:
            raise ValueError(
                "learning_rate_decay=inverse-sqrt falls from warmup_steps on: give some"
            )
        if self.ema == "power" and not self.ema_lengths:
            raise ValueError("ema=power has no ema_lengths; try training.ema_lengths=[0.05,0.1]")
        for shorter, longer in itertools.pairwise(sorted(self.ema_lengths)):
            if longer < 1.05 * shorter:  # other lengths are made of their differences
                raise ValueError(f"ema_lengths {shorter} and {longer} are nearly the same")
        return self


class HardwareConfig(Section):
    """Devices, and how they are used."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = free("auto")
    """auto, cpu, gpu or mps"""
    devices: Annotated[int, Field(ge=1)] | Literal["auto"] = free("auto")
    """devices of each node; auto is all GPUs, or one CPU"""
    num_nodes: int = free(1, ge=1)
    """machines"""
    precision: Literal["auto", "32-true", "bf16-mixed"] = free("auto")
    """auto: bf16-mixed where the hardware multiplies bfloat16, else 32-true"""
    compile: bool | Literal["auto"] = free("auto")
    """torch.compile; auto: on CUDA, for 10,000 steps and more"""
    micro_batch_size: int | None = free(None, ge=1)
    """images at a time on a device; null is as many as fit"""
    activation_checkpointing: bool = free(False)
    """recompute activations: less memory, more time"""
    num_workers: int = free(0, ge=0, le=256)
    """processes that load images"""


class LoggingConfig(Section):
    """Records of a run, and how often they are made."""

    results_folder: Folder = free("lightning_logs")
    """folder of runs"""
    logger: list[Literal["tensorboard", "csv", "wandb"]] = free(["tensorboard"], min_length=1)
    """tensorboard, csv, wandb; one or several"""
    log_every: int = free(100, ge=1)
    """steps between numbers"""
    preview_every: int = free(5000, ge=0)
    """steps between previews; 0 is never"""
    preview_images: int = free(36, ge=1, le=10_000)
    """images of a preview"""
    save_every: int = free(5000, ge=0)
    """steps between checkpoints; 0 saves at the end only"""
    keep_checkpoints: int = free(3, ge=1)
    """how many of the newest checkpoints stay"""
    ema_snapshot_every: int | None = free(None, ge=0)
    """steps between snapshots of training.ema_lengths; null is 32 a run, 0 is never"""

    @field_validator("logger", mode="before")
    @classmethod
    def _one_logger(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class EvaluationConfig(Section):
    """Measurements while training."""

    validate_every: int = free(10_000, ge=0)
    """steps between validation losses; 0 is never"""
    evaluate_every: int = free(0, ge=0)
    """steps between FIDs; 0 is never"""
    evaluate_images: int = free(1000, ge=2)
    """images of each FID"""
    extractor: str = free("inception-v3-compat")
    """its features: torch-fidelity's name, or a TorchScript file"""


class SamplingConfig(Section):
    """The reverse process: what `sample.py` does unless told otherwise."""

    sampler: Literal["ddpm", "ddim", "dpm++", "dpm++3", "sde-dpm++", "unipc", "heun"] = free("ddpm")
    """ddpm (Algorithm 2), ddim, dpm++ (good at 20 steps), dpm++3, sde-dpm++, unipc or heun"""
    variance: Literal["large", "small", "learned"] = free("large")
    """ddpm's: large (the paper's CIFAR-10), small (its 256x256) or learned"""
    eta: float = free(0.0, ge=0, le=1)
    """ddim's noise: 0 none, 1 as ddpm small"""
    timesteps: int | None = free(None, ge=1)
    """sampling steps; null is all T"""
    spacing: Literal["trailing", "uniform", "quadratic", "logsnr", "karras"] = free("trailing")
    """which of the T steps, when fewer: trailing, uniform, quadratic, logsnr, karras"""


class GuidanceConfig(Section):
    """Guidance of sampling by labels."""

    scale: float = free(1.0, ge=0)
    """1 is the conditional model, 0 the unconditional one; more exaggerates"""
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = free(None)
    """noise levels between which it guides; null is all"""


class Config(Section):
    """One run, whole."""

    dataset: DatasetConfig
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig
    hardware: HardwareConfig = HardwareConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    guidance: GuidanceConfig = GuidanceConfig()

    @model_validator(mode="before")
    @classmethod
    def _what_is_learned_is_used(cls, tree: Any) -> Any:
        match tree:
            case {"diffusion": {"learned_variance": True}}:
                sampling = tree.get("sampling", {})
                if isinstance(sampling, dict):
                    return {**tree, "sampling": {"variance": "learned"} | sampling}
        return tree

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        model, levels = self.model, len(self.model.channel_multipliers)
        factor = 2 ** (levels - 1)
        for side in self.dataset.size:
            if side % factor:
                near = max(factor, round(side / factor) * factor)
                raise ValueError(
                    f"dataset.image_size {side} cannot be halved {levels - 1} times, as "
                    f"{levels} model.channel_multipliers ask; try {near}, or fewer multipliers"
                )
        resolutions = [min(self.dataset.size) // 2**level for level in range(levels)]
        for resolution in model.attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(
                    f"model.attention_resolutions has {resolution}; the feature sizes of "
                    f"this network are {resolutions}"
                )
        for resolution, multiplier in zip(resolutions, model.channel_multipliers, strict=True):
            width = model.base_channels * multiplier
            attends = resolution in (*model.attention_resolutions, resolutions[-1])
            if attends and width % model.num_heads:
                raise ValueError(
                    f"model.num_heads {model.num_heads} does not divide {width} channels"
                )
        batch_size, micro = self.training.batch_size, self.hardware.micro_batch_size
        if micro and batch_size % micro:
            raise ValueError(
                f"hardware.micro_batch_size {micro} does not divide training.batch_size "
                f"{batch_size}; these do: {divisors(batch_size)}"
            )
        best, last = self.training.keep_best, self.training.max_steps or 10**9
        key = "validate_every" if best == "validation" else "evaluate_every"
        if best and not 0 < getattr(self.evaluation, key) <= last:
            raise ValueError(f"training.keep_best={best} needs evaluation.{key} in 1 ... {last}")
        if self.sampling.variance == "learned" and not self.diffusion.learned_variance:
            raise ValueError("sampling.variance=learned needs diffusion.learned_variance=true")
        if self.diffusion.learned_variance and self.training.t_density != "uniform":
            raise ValueError(
                "diffusion.learned_variance learns by the bound, a mean over all t alike: it needs "
                "training.t_density=uniform"
            )
        steps, T = self.sampling.timesteps, self.diffusion.timesteps
        if steps is not None and steps > T:
            raise ValueError(f"sampling.timesteps {steps} is more than diffusion.timesteps {T}")
        return self

    def with_steps(self, images: int) -> "Config":
        """Return the config with max_steps in place of max_epochs over so many images."""
        if (epochs := self.training.max_epochs) is None:
            return self
        steps = math.ceil(epochs * images / self.training.batch_size)
        tree = self.model_dump()
        tree["training"] |= {"max_steps": steps, "max_epochs": None}
        return check_config(tree, source=f"training.max_epochs={epochs:g} of {images:,} images")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check everything.

    ValueError has one line a fault: where, value, rule and hint; OSError: it cannot be read.
    """
    tree = read_yaml(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return check_config(tree, source=str(path))


def apply_override(tree: dict, override: str) -> None:
    """Set `section.key=value` in plain data; ValueError where it is not of that form."""
    section, name, text = split_override(override)
    known = fields_of(section).get(name) if section in Config.model_fields else None
    # folders called 2024-02-03 or `my #1` stand as they are, unless quoted
    as_it_is = known and known.annotation is str and text[:1] not in "\"'"
    value = text if as_it_is else yaml_value(text, f"{section}.{name}")
    set_value(tree, section, name, value)
    if section == "training" and name in LENGTHS and value is not None:  # one for the other
        tree[section].pop(LENGTHS[1 - LENGTHS.index(name)], None)


def check_config(tree: dict, *, source: str) -> Config:
    """Return a checked config of plain data; `source` names it in messages."""
    if moved := move_old_keys(tree, Config):
        many = f"{len(moved)} keys of hardware, logging, evaluation"
        keys = many if len(moved) > 4 else ", ".join(moved)
        print(f"{source}: moved from training to {keys}", file=sys.stderr)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {explain(fault, Config)}" for fault in error.errors())
        raise ValueError(f"{source}:\n{faults}") from None


def fields_of(section: str) -> dict[str, Any]:
    """Return the fields of a section."""
    return Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
