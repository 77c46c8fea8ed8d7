"""What is measured, by what and against what: opened, checked, and written down as a recipe."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from config import Config, load_config
from data import Data
from dataset import Files, Pictures, sides
from metrics import Statistics, load_extractor, load_statistics
from sample import prepare
from terminal import did_you_mean, is_main_process

METRICS = {"fid": "FID", "is": "IS", "kid": "KID", "pr": "precision, recall", "nll": "NLL"}
SAMPLING = "sampler", "timesteps", "eta", "spacing", "variance"
FEATURES = {"fid", "is", "kid", "pr"}
# Ho et al. 2020, Tables 1 and 3: L_simple, T = 1000, 50,000 pictures against the training set
PAPER = {
    ("cifar10", 32): {"FID": "3.17", "IS": "9.46 ± 0.11"},
    ("lsun-church", 256): {"FID": "7.89"},
    ("lsun-bedroom", 256): {"FID": "6.36; large 4.90"},
    ("lsun-cat", 256): {"FID": "19.75"},
}
PAPER_BITS = {
    "validation": {"NLL": "<= 3.75", "rate": "1.78", "distortion": "1.97"},
    "train": {"NLL": "<= 3.72"},
}


class Protocol:
    """What is measured, by what, against what. `recipe` says it all, as JSON.

    Args:
        asked: the options of `evaluate.py`, by their names.
        say: hears what a person should know.

    Raises:
        ValueError, OSError: for users.
    """

    def __init__(self, asked: SimpleNamespace, say: Callable[[str], None]):
        self.asked, self.say = asked, say
        self._open_source()
        self._choose_metrics()

    @cached_property
    def data(self) -> dict[str, Pictures]:
        """The pictures of the model's dataset."""
        return load_data(self.config)

    @cached_property
    def split(self) -> str:
        split = self.asked.split or ("validation" if len(self.data["validation"]) else "train")
        if not len(self.data[split]):
            raise ValueError(f"--split {split}: the dataset holds nothing out")
        return split

    @property
    def name(self) -> str:
        """Of the run, for its folder and its checkpoints, and of the step; else the source's."""
        source = self.asked.source.resolve()
        if source.parent.name == "checkpoints":
            source = source.parent.parent
        name = source.name if source.is_dir() else source.stem
        return f"{name}-step-{self.recipe['step']}" if self.recipe.get("step") else name

    def _open_source(self) -> None:
        """Pictures that are there, or a model that makes them."""
        asked, source = self.asked, self.asked.source
        given = {key: getattr(asked, key) for key in SAMPLING if getattr(asked, key) is not None}
        self.config = self.ddpm = self.pictures = None
        self.recipe = {"source": str(source)}
        if source.suffix in (".yml", ".yaml"):
            self.config = load_config(source)
            self.pictures = self.data[self.split]
            self.recipe["split"] = self.split
        elif holds_pictures(source):
            self.pictures = Files(source)
        else:
            self.ddpm, self.steps, self.of_picture = prepare(
                source, "cpu", asked.weights, None, given, asked.precision, asked.device
            )
            self.config = self.ddpm.config
            for note in self.ddpm.notes:
                self.say(f"assumed: {note}")
            self.recipe |= {k: v for k, v in self.of_picture.items() if k != "checkpoint"}
        if self.pictures is None:
            size = self.config.dataset.image_size
            self.shape, there = (self.config.dataset.channels, size, size), 50_000
        else:
            self.shape, there = self.pictures.shape, len(self.pictures)
            if given:
                raise ValueError(f"--{next(iter(given))} is of a model, and {source} is pictures")
            if (asked.num_images or 0) > there:
                raise ValueError(f"--num-images {asked.num_images}: {source} has {there}")
            self.recipe["digest"] = self.pictures.fingerprint()
        self.count = asked.num_images or there
        self.rows = spread(self.count, there)  # of pictures that are there
        self.recipe["pictures"] = self.count
        if self.ddpm:
            self.recipe["seeds"] = [asked.seed, asked.seed + self.count - 1]

    # ---- what is wanted, and what that needs

    def _choose_metrics(self) -> None:
        wanted = parse_metrics(self.asked.metrics)
        why_not = {}
        self.extractor = self.tally = self.reference = None
        if self.ddpm is None:
            why_not["nll"] = "only a model has a likelihood"
        if wanted & {"fid", "kid", "pr"}:
            why_not |= self._open_reference()
        if wanted & FEATURES:
            keep = bool({"kid", "pr"} & (wanted - why_not.keys()))
            why_not |= self._load_extractor(self.count if keep else 0)
        self.metrics = tuple(m for m in METRICS if m in wanted and m not in why_not)
        for metric in [m for m in METRICS if m in wanted and m in why_not]:
            if self.asked.metrics:
                raise ValueError(f"--metrics {metric}: {why_not[metric]}")
            self.say(f"without {METRICS[metric]}: {why_not[metric]}")
        if not self.metrics:
            raise ValueError(f"nothing of {self.asked.source} can be measured")
        self.recipe["metrics"] = list(self.metrics)
        if not FEATURES & set(self.metrics):
            self.tally = None
            sampled = "pictures", "seeds", "precision", *SAMPLING
            for key in sampled:
                self.recipe.pop(key, None)  # nothing is sampled
        if "nll" in self.metrics:
            self._prepare_nll()

    def _open_reference(self) -> dict[str, str]:
        """Opens it, or says what cannot be without one."""
        name, path = self.asked.reference, Path(self.asked.reference)
        if name in ("train", "validation"):
            if self.config is None:
                return dict.fromkeys(
                    ("fid", "kid", "pr"),
                    f"{self.asked.source} has no dataset: say --reference FOLDER, CONFIG or "
                    "FILE.npz",
                )
            self.reference = self.data[name]
        elif path.suffix == ".npz":
            self.reference = load_statistics(path)
        elif path.suffix in (".yml", ".yaml"):
            self.reference = load_data(load_config(path))["train"]
        else:
            fit = None if self.config is None else (self.shape[0], self.shape[1])
            self.reference = Files(path, fit)
        self.recipe["reference"] = {"name": name}
        of_numbers = isinstance(self.reference, Statistics)
        there = self.reference.count if of_numbers else len(self.reference)
        few = min(self.count, there or self.count)
        too_few = {
            m: f"{few} pictures are too few for it, {least} are needed"
            for m, least in {"fid": 2, "kid": 2, "pr": 4}.items()
            if few < least
        }
        if of_numbers:
            self.recipe["reference"]["digest"] = self.reference.digest()
            if self.reference.features is None:
                return too_few | dict.fromkeys(("kid", "pr"), f"{name} holds no features")
        elif not len(self.reference):
            raise ValueError(f"--reference {name}: the dataset holds nothing out")
        elif self.reference.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"--reference {name} is {sides(self.reference.shape)}, and what is measured is "
                f"{sides(self.shape)}: bring them to one size"
            )
        else:
            self.recipe["reference"]["digest"] = self.reference.fingerprint()
        return too_few

    def _load_extractor(self, keep: int) -> dict[str, str]:
        self.extractor = load_extractor(self.asked.extractor, self.asked.extractor_weights)
        self.tally = self.extractor.new_tally(self.count, self.shape, keep=keep)
        if isinstance(self.reference, Statistics) and len(self.reference.mu) != len(self.tally.sum):
            raise ValueError(
                f"--reference {self.asked.reference} is of {len(self.reference.mu)} features, and "
                f"{self.extractor.name} makes {len(self.tally.sum)}: another extractor made it"
            )
        self.recipe["extractor"] = {"name": self.extractor.name, "sha256": self.extractor.digest}
        if self.tally.classes:
            return {}
        return {"is": f"extractor {self.extractor.name} tells no classes"}

    def _prepare_nll(self) -> None:
        stride, T = self.asked.stride, self.ddpm.diffusion.timesteps
        if stride >= T - 1 > 0:
            raise ValueError(f"--stride {stride} leaves none of T = {T} but the first")
        there = len(self.data[self.split])
        if (self.asked.nll_images or 0) > there:
            raise ValueError(f"--nll-images {self.asked.nll_images}: {self.split} has {there}")
        self.nll_rows = spread(self.asked.nll_images or there, there)
        self.recipe["nll"] = {
            "split": self.split, "pictures": len(self.nll_rows), "stride": stride,
            "variance": self.config.sampling.variance, "first seed": self.asked.seed,
        }  # fmt: skip

    # ---- the paper's

    def papers(self) -> dict[str, str]:
        """{metric: the paper's number} for this dataset."""
        if self.config is None:
            return {}
        dataset = self.config.dataset
        numbers = dict(PAPER.get((dataset.name, dataset.image_size), {}))
        if numbers and "nll" in self.metrics and dataset.name == "cifar10":
            numbers |= PAPER_BITS[self.split]
        return numbers

    def departures(self) -> list[str]:
        """Where this is not how the paper measures, in words."""
        found = []
        if FEATURES & set(self.metrics):
            if self.count != 50_000:
                found.append(f"{self.count:,} pictures, not 50,000")
            if not self.extractor.is_literature:
                found.append(
                    f"features of {self.extractor.name}, not of the literature's Inception"
                )
            if self.reference is not None and self.asked.reference != "train":
                found.append(f"against {self.asked.reference}, not the training set")
        if self.ddpm is None:
            return found
        recipe, T = self.recipe, self.ddpm.diffusion.timesteps
        if FEATURES & set(self.metrics) and (recipe["sampler"], recipe["timesteps"]) != ("ddpm", T):
            found.append(f"{recipe['sampler']} of {recipe['timesteps']} steps, not ddpm of {T:,}")
        if recipe["weights"] != "ema":
            found.append("raw weights, not their average")
        return found


def parse_metrics(text: str | None) -> set[str]:
    """'fid,is' -> {'fid', 'is'}; all of them where nothing is said."""
    chosen = {part.strip() for part in text.split(",")} if text is not None else set(METRICS)
    for metric in sorted(chosen - set(METRICS)):
        raise ValueError(f"--metrics {metric!r} is unknown{did_you_mean(metric, METRICS)}")
    return chosen


def holds_pictures(path: Path) -> bool:
    """Whether a path is a folder, zip or tar of pictures, and not a run's or a model's."""
    if not path.is_dir():
        return path.suffix in (".zip", ".tar")
    marks = "checkpoints", "config.yml", "config.json", "model_index.json", "unet"
    return not any((path / mark).exists() for mark in marks)


def load_data(config: Config) -> dict[str, Pictures]:
    data = Data(config)
    if is_main_process():
        data.prepare_data()
    data.setup()
    return data.pictures


def spread(count: int, total: int) -> list[int]:
    """`count` of range(total), evenly spaced."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()
