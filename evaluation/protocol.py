"""The plan of an evaluation: all that it needs, opened, checked, and written down as a recipe."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from config import Config, SamplingConfig, load_config
from dataset import FolderImages, Images, sides
from evaluation.classes import (
    Label,
    Labelled,
    as_matrix,
    assign_labels,
    count_labels,
    rows_by_label,
)
from evaluation.extractor import INCEPTION, Extractor, load_extractor
from evaluation.health import SAMPLED, both_weights, make_probes
from evaluation.likelihood import bound_times
from evaluation.metrics import KEPT, Statistics, Tally, load_statistics, spread
from evaluation.yardsticks import Probe
from files import did_you_mean
from generation import Sampling, quick_settings, resolve_precision
from generation.recipe import parse_labels
from training.datamodule import open_images
from weights import Model, load_model

METRICS = {"fid": "FID", "is": "IS", "kid": "KID", "pr": "precision, recall", "nll": "NLL"}
METRICS |= {"health": "health"}  # that is of no paper: only where it is asked for
GUIDED = "labels", "guidance_scale", "guidance_interval", "guide"  # in the recipe of samples
COMPARED = {"fid": 2, "kid": 2, "pr": 4}  # with a reference; how many images they need
# Ho et al. 2020, Tables 1 and 3: L_simple, T = 1000, 50,000 images against the training set
PAPER = {
    ("cifar10", (32, 32)): {"FID": "3.17", "IS": "9.46 ± 0.11"},
    ("lsun-church", (256, 256)): {"FID": "7.89"},
    ("lsun-bedroom", (256, 256)): {"FID": "6.36; large 4.90"},
    ("lsun-cat", (256, 256)): {"FID": "19.75"},
}
PAPER_BITS = {
    "validation": {"NLL": "<= 3.75", "rate": "1.78", "distortion": "1.97"},
    "train": {"NLL": "<= 3.72"},
}
YAML = ".yml", ".yaml"


@dataclass(frozen=True)
class Options:
    """The options of an evaluation; see `python evaluate.py --help`."""

    source: Path
    sampling: dict[str, Any]  # keys of the config's section that win over the model's own
    metrics: str | None
    num_images: int | None
    reference: str
    output: Path | None
    save_images: bool
    extractor: str | None  # None is the literature's; for health alone, the network itself
    extractor_weights: Path | None
    split: str | None
    nll_images: int | None
    stride: int
    seed: int
    weights: Literal["ema", "raw"]
    precision: str
    batch_size: int
    device: str  # cpu, cuda, cuda:1 or mps
    devices: int | None


class Plan:
    """An evaluation, ready to begin; ValueError or OSError, for users, where it cannot.

    Attributes:
        recipe: all that decides the numbers, as JSON.
        count, shape: how many images, of (C, H, W); rows: which of those that are there.
        by_label: {label: its images, from 0 to count - 1}, which are drawn one label at a time.
    """

    model: Model | None = None  # it is measured, or
    images: Images | FolderImages | None = None  # these are
    config: Config | None = None  # of the model's dataset, or the images'
    reference: Images | FolderImages | Statistics | None = None
    extractor: Extractor | None = None  # where features are wanted, and then there is
    tally: Tally
    guide: Model | None = None  # of the model's guidance
    # where the health is wanted: by weights; by split; some of the drawn images, uint8 [N, C, H, W]
    models: dict[str, Model]
    probes: dict[str, Probe]
    kept: Tensor
    labelled: Labelled | None = None  # where the classes of the images are known

    def __init__(self, options: Options, console: Console):
        self.options, self.console, self.models = options, console, {}
        self.recipe: dict[str, Any] = {"source": str(options.source)}
        asked = options.metrics
        self.wanted = METRICS.keys() - {"health"}
        if asked is not None:
            self.wanted = {part.strip() for part in asked.split(",")}
        for metric in sorted(self.wanted - METRICS.keys()):
            raise ValueError(f"--metrics {metric!r} is unknown{did_you_mean(metric, METRICS)}")
        self._open_source()
        self._choose_metrics()

    @cached_property
    def data(self) -> dict[str, Images]:
        """The images of the model's dataset."""
        assert self.config
        return self._load(self.config)

    def _load(self, config: Config) -> dict[str, Images]:
        bar = partial(track, description="Decoding images", console=self.console, transient=True)
        return open_images(config, bar if self.console.is_terminal else None)

    @cached_property
    def split(self) -> str:
        """The part of the dataset that a likelihood, or a config, is about."""
        split = self.options.split or ("validation" if len(self.data["validation"]) else "train")
        if not len(self.data[split]):
            raise ValueError(f"--split {split}: the dataset has no validation images")
        return split

    @property
    def name(self) -> str:
        """The run's name, also for its checkpoints, and the step; else the source's."""
        source, step = self.options.source.resolve(), self.recipe.get("step")
        if source.parent.name == "checkpoints":
            source = source.parent.parent
        name = source.name if source.is_dir() else source.stem
        return f"{name}-step-{step}" if step else name

    def _open_source(self) -> None:
        """Open images that are there, or load a model that makes them."""
        options, source, there = self.options, self.options.source, 50_000
        if source.suffix in YAML:
            self.config = load_config(source)
            self.images = self.data[self.split]
            self.recipe["split"] = self.split
        elif holds_images(source):
            self.images = FolderImages(source)
        else:
            self.model = load_model(source, options.weights)
            self.config, self.shape = self.model.config, self.model.shape
            device, weights = torch.device(options.device), self._weigh_labels(self.config)
            if guide := options.sampling.get("guide"):
                self.guide = load_model(guide, options.weights)
            drawn = {"class_label": labels} if (labels := [*filter(None, weights)]) else {}
            if "health" in self.wanted and self.wanted <= {"health", "nll"}:
                there = SAMPLED
                if not options.sampling.keys() & SamplingConfig.model_fields:
                    drawn |= quick_settings(self.model.diffusion)
            self.sampling = Sampling(
                self.model, options.sampling | drawn, source=str(source),
                precision=resolve_precision(self.config, device, options.precision),
                guide=self.guide,
            )  # fmt: skip
            self.steps, self.drawing = self.sampling.steps, self.sampling.recipe()
            for note in self.model.notes:
                self.console.print(f"assumed: {note}")
            self.recipe |= {k: v for k, v in self.drawing.items() if k != "checkpoint"}
        if self.images is not None:
            self.shape, there = self.images.shape, len(self.images)
            for key in options.sampling:
                option = key.replace("_", "-")
                raise ValueError(f"--{option} is of a model, and {source} is images")
            if (options.num_images or 0) > there:
                raise ValueError(f"--num-images {options.num_images}: {source} has {there}")
            self.recipe["digest"] = self.images.fingerprint()
        self.count = options.num_images or there
        self.rows = spread(self.count, there)
        self.recipe["images"] = self.count
        self.by_label = assign_labels(self.count, weights if self.model else {None: 1})
        if self.model:
            self.recipe["seeds"] = [options.seed, options.seed + self.count - 1]
            if classes := self.model.config.dataset.classes:
                named = {label or "no label": len(rows) for label, rows in self.by_label.items()}
                self.recipe["labels"] = named
                self.labelled = Labelled(classes, as_matrix(self.by_label, classes))
        elif isinstance(self.images, Images) and self.images.classes:
            matrix = as_matrix(rows_by_label(self.images, self.rows), self.images.classes)
            self.labelled = Labelled(self.images.classes, matrix)

    def _weigh_labels(self, config: Config) -> dict[Label, int]:
        """Return {label: how often it is drawn}: what is asked for, or as training saw them."""
        classes, asked = config.dataset.classes, self.options.sampling.get("class_label")
        if asked:
            return dict.fromkeys(parse_labels(asked, classes), 1)
        if not classes:
            return {None: 1}
        try:
            train = self.data["train"]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; or say --class-label all, which draws as many of each"
            ) from None
        return count_labels(train)

    # ---- what is wanted, and what that needs

    def _choose_metrics(self) -> None:
        asked, wanted = self.options.metrics, self.wanted
        of_models = {"nll": "a likelihood", "health": "a health"}
        why_not = {} if self.model else {m: f"only a model has {w}" for m, w in of_models.items()}
        if wanted & COMPARED.keys():
            why_not |= self._open_reference()
        if wanted - {"nll", "health"} or (wanted != {"nll"} and self.options.extractor):
            # of features FID needs those of each class alone
            of_each = {"kid", "pr", *(["fid"] if self.labelled else [])}
            keep = of_each & (wanted - why_not.keys())
            why_not |= self._load_extractor(self.count if keep else 0)
        self.metrics = [m for m in METRICS if m in wanted - why_not.keys()]
        for metric in [m for m in METRICS if m in wanted & why_not.keys()]:
            if asked:
                raise ValueError(f"--metrics {metric}: {why_not[metric]}")
            self.console.print(f"without {METRICS[metric]}: {why_not[metric]}")
        if not self.metrics:
            raise ValueError(f"nothing of {self.options.source} can be measured")
        self.recipe["metrics"] = self.metrics
        if self.metrics == ["nll"]:  # nothing is sampled
            for key in self.options.sampling.keys() & {"class_label", "guide"}:
                option = key.replace("_", "-")
                raise ValueError(f"--{option} is of samples; nll takes each image's own label")
            self.extractor = None
            for key in ("images", "seeds", "precision", *GUIDED, *SamplingConfig.model_fields):
                self.recipe.pop(key, None)
        if self.model and "nll" in self.metrics:
            self._prepare_likelihood(self.model)
        if self.model and "health" in self.metrics:
            self._prepare_health(self.model)

    def _open_reference(self) -> dict[str, str]:
        """Open it; return {metric: why it cannot be} of those that it does not allow."""
        name, path = self.options.reference, Path(self.options.reference)
        real: Images | FolderImages | Statistics
        if name in ("train", "validation"):
            if self.config is None:
                lacks = f"{self.options.source} has no dataset: say --reference"
                return dict.fromkeys(COMPARED, f"{lacks} FOLDER, CONFIG or FILE.npz")
            real = self.data[name]
        elif path.suffix == ".npz":
            real = load_statistics(path)
        elif path.suffix in YAML:
            real = self._load(load_config(path))["train"]
        else:
            real = FolderImages(path, self.shape if self.config else None)
        if isinstance(real, Statistics):
            there, digest = real.count or self.count, real.digest()
        elif not len(real):
            raise ValueError(f"--reference {name}: the dataset has no validation images")
        elif real.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"--reference {name} is {sides(real.shape)}, and what is measured is "
                f"{sides(self.shape)}: bring them to one size"
            )
        else:
            there, digest = len(real), real.fingerprint()
        self.reference = real
        self.recipe["reference"] = {"name": name, "digest": digest}
        if self.labelled and isinstance(real, Images) and real.classes == self.labelled.classes:
            self.labelled = self.labelled._replace(real=real.labels_of(spread(KEPT, len(real))))
        why_not = {
            metric: f"{few} images are too few for it, {least} are needed"
            for metric, least in COMPARED.items()
            if (few := min(self.count, there)) < least
        }
        if isinstance(real, Statistics) and real.features is None:
            why_not |= dict.fromkeys(("kid", "pr"), f"{name} holds no features")
        return why_not

    def _load_extractor(self, keep: int) -> dict[str, str]:
        """Load it; return {metric: why it cannot be} of those that it does not allow."""
        name = self.options.extractor or INCEPTION
        extractor = load_extractor(name, self.options.extractor_weights)
        self.extractor, real = extractor, self.reference
        self.tally = Tally.of(extractor, self.count, self.shape, keep=keep)
        if isinstance(real, Statistics) and len(real.mu) != len(self.tally.sum):
            raise ValueError(
                f"--reference {self.options.reference} is of {len(real.mu)} features, and "
                f"{extractor.name} makes {len(self.tally.sum)}: another extractor made it"
            )
        self.recipe["extractor"] = {"name": extractor.name, "sha256": extractor.digest}
        return {} if self.tally.classes else {"is": f"extractor {extractor.name} tells no classes"}

    def _prepare_likelihood(self, model: Model) -> None:
        stride, T = self.options.stride, model.diffusion.timesteps
        if stride >= T - 1 > 0:
            raise ValueError(f"--stride {stride} leaves none of T = {T} but the first")
        there = len(self.data[self.split])
        if (self.options.nll_images or 0) > there:
            raise ValueError(f"--nll-images {self.options.nll_images}: {self.split} has {there}")
        self.nll_rows = spread(self.options.nll_images or there, there)
        self.nll_times = bound_times(model.diffusion, stride)
        self.recipe["nll"] = {
            "split": self.split, "images": len(self.nll_rows), "stride": stride,
            "variance": model.config.sampling.variance, "first seed": self.options.seed,
        }  # fmt: skip
        if model.config.dataset.classes:
            self.recipe["nll"]["labels"] = "each image's own"

    def _prepare_health(self, model: Model) -> None:
        self.models = both_weights(self.options.source, model)
        flips = model.config.dataset.random_flip
        self.probes = make_probes(self.data, model.diffusion, flips)
        self.kept = torch.zeros(min(SAMPLED, self.count), *self.shape, dtype=torch.uint8)
        self.recipe["health"] = {
            "features": self.extractor.name if self.extractor else "the network's",
            "samples": len(self.kept),
            "data": {split: self.data[split].fingerprint() for split in self.probes},
        }

    # ---- beside the paper

    def papers(self) -> dict[str, str]:
        """Return {metric: the paper's number} for this dataset."""
        data = self.config.dataset if self.config else None
        numbers = PAPER.get((data.name, data.size), {}) if data else {}
        bits = "IS" in numbers and "nll" in self.metrics  # CIFAR-10
        return numbers | (PAPER_BITS[self.split] if bits else {})

    def departures(self) -> list[str]:
        """Return where this is not how the paper measures, in words."""
        found, extractor, reference = [], self.extractor, self.options.reference
        if extractor and self.count != 50_000:
            found.append(f"{self.count:,} images, not 50,000")
        if extractor and not extractor.is_literature:
            found.append(f"features of {extractor.name}, not of the literature's Inception")
        _, height, width = self.shape
        if extractor and extractor.resizes and height != width:
            found.append(f"{extractor.name} stretches images of {width}x{height} to a square")
        if extractor and self.reference is not None and reference != "train":
            found.append(f"against {reference}, not the training set")
        if self.config and self.config.dataset.split == "all":
            found.append("the training set is all splits together")
        if self.model:
            sampler, steps, T = (
                self.drawing["sampler"],
                len(self.steps),
                self.model.diffusion.timesteps,
            )
            if extractor and (sampler, steps) != ("ddpm", T):
                found.append(f"{sampler} of {steps} steps, not ddpm of {T:,}")
            if extractor and self.recipe.get("labels"):
                found.append("images of chosen classes, and the paper's model knows none")
            if extractor and (scale := self.recipe.get("guidance_scale")):
                found.append(f"guidance {scale:g}")
            if self.model.weights != "ema":
                found.append("raw weights, not the EMA")
        return found


def holds_images(path: Path) -> bool:
    """Tell whether a path is a folder, zip or tar of images, and not a run's or a model's."""
    if not path.is_dir():
        return path.suffix in (".zip", ".tar")
    marks = "checkpoints", "config.yml", "config.json", "model_index.json", "unet"
    return not any((path / mark).exists() for mark in marks)
