"""A recipe: all that decides an image but its seed. It is written into the image."""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_utils import Denoiser
from files import did_you_mean
from generation.generate import (
    Guidance,
    Walk,
    chain,
    make_denoiser,
    pays_to_compile,
    quick_settings,
)
from generation.samplers import make_steps
from model import at_precision

if TYPE_CHECKING:
    from weights import Model


class Sampling:
    """A model and what was chosen: its step table, its recipe, and a denoiser for each label.

    Attributes:
        labels: what to draw, each a class or several joined by +; [None] draws without.
        shape: (C, H, W) of the images.
        steps: the table.
        walk, clip: how a batch goes through it, and whether x0_hat is clipped; see `edit`.

    Args:
        chosen: keys of the config's section `sampling`, and of `guidance` as guidance_scale, ...,
            that win over the model's own; `fast`: those of `quick_settings` instead of the model's;
            `class_label`: what to draw, see `parse_labels`.
        source: where the model is from, for people.
        precision: "float32" or "bfloat16".
        size: (height, width), other than the model's.
        guide: the worse model of guidance.

    Raises:
        ValueError: an option that says nothing about this sampler or model, or one that it cannot.
    """

    def __init__(
        self,
        model: "Model",
        chosen: dict[str, Any],
        *,
        source: str,
        precision: str,
        size: tuple[int, int] | None = None,
        guide: "Model | None" = None,
    ):
        self.model, self.guide, config = model, guide, model.config
        self.network = at_precision(model.network, precision)
        self.guide_network = at_precision(guide.network, precision) if guide else None
        own = config.sampling.model_dump()
        own |= quick_settings(model.diffusion) if chosen.get("fast") else {}
        settings = {k: chosen.get(k, v) for k, v in own.items()}
        for option, only in (("eta", "ddim"), ("variance", "ddpm")):
            if option in chosen and settings["sampler"] != only:
                raise ValueError(
                    f"--{option} belongs to --sampler {only}, and this is {settings['sampler']}"
                )
        self.steps = make_steps(model.diffusion, **settings)
        self.walk: Walk = chain
        self.clip = True
        height, width = size or config.dataset.size
        for side in (height, width):
            if side % (multiple := model.network.size_multiple):
                near = max(1, round(side / multiple)) * multiple
                raise ValueError(
                    f"--image-size {side} is not a multiple of {multiple}, as this network needs; "
                    f"try {near}"
                )
        self.shape = model.shape[0], height, width
        self.labels: list[str | None] = [None]
        if texts := chosen.get("class_label"):
            self.labels = [*parse_labels(texts, config.dataset.classes)]
        self.guidance = self._choose_guidance(chosen)
        facts: dict[str, Any] = {
            "checkpoint": source,
            "weights": model.weights,
            "digest": model.digest(),
            "step": model.step,
            "image_size": height if height == width else [height, width],
            **settings,
        }
        self.facts = facts | {"timesteps": len(self.steps), "precision": precision}
        if self.guidance.scale != 1:
            self.facts["guidance_scale"] = self.guidance.scale
            if interval := self.guidance.interval:
                self.facts["guidance_interval"] = list(interval)
            if guide:
                self.facts["guide"] = guide.digest()

    def _choose_guidance(self, chosen: dict[str, Any]) -> Guidance:
        model, guide, drawn = self.model, self.guide, self.labels != [None]
        own = model.config.guidance.model_dump() if drawn else {}
        asked = {k: chosen[f"guidance_{k}"] for k in Guidance._fields if f"guidance_{k}" in chosen}
        guidance = Guidance(**own | asked)
        if not math.isfinite(guidance.scale):
            raise ValueError(f"--guidance-scale {guidance.scale} is not finite; try 1.5")
        if "interval" in asked and guidance.scale == 1:
            raise ValueError("--guidance-interval does nothing at --guidance-scale 1; try 2")
        if asked and not (drawn or guide):
            raise ValueError("guidance leads to a --class-label, or away from a --guide; give one")
        if guidance.interval and not 0 <= guidance.interval[0] < guidance.interval[1]:
            raise ValueError(f"--guidance-interval {guidance.interval}: LO,HI with 0 <= LO < HI")
        has_null = knows_no_label(model)
        if not has_null and not drawn:
            raise ValueError(
                "this model was trained with a label on every image (training.label_dropout=0); "
                "say --class-label, or --class-label all"
            )
        if guide:
            self._check_guide(guide, guidance)
        elif guidance.scale != 1 and not has_null:
            raise ValueError(
                f"--guidance-scale {guidance.scale:g} needs the model without labels, which "
                "training.label_dropout=0 has left out; give a --guide"
            )
        return guidance

    def _check_guide(self, guide: "Model", guidance: Guidance) -> None:
        if guidance.scale == 1:
            raise ValueError("--guide does nothing at --guidance-scale 1; try 2")
        for what, ours, theirs in (
            ("images of", self.model.shape, guide.shape),
            ("T of", self.model.diffusion.timesteps, guide.diffusion.timesteps),
            ("classes", self.model.config.dataset.classes, guide.config.dataset.classes),
        ):
            if ours != theirs and (theirs or what != "classes"):
                raise ValueError(f"--guide has {what} {theirs}, and the model {ours}")
        if self.labels == [None] and not knows_no_label(guide):
            raise ValueError("--guide knows images with a label alone; say --class-label")
        if (self.model.diffusion.betas != guide.diffusion.betas).any():
            raise ValueError("--guide has another noise schedule than the model")

    def recipe(self, label: str | None = None) -> dict[str, Any]:
        """Return all that decides the images of a label, as JSON."""
        return self.facts | ({} if label is None else {"class_label": label})

    def denoiser(self, label: str | None = None, *, batches: int = 0) -> Denoiser:
        """Return the denoiser of a label, of which so many batches are to be drawn."""
        vector = label_vector(label, self.model.config.dataset.classes) if label else None
        calls = batches * len(self.steps)
        how: dict[str, Any] = {
            "times": [step.t for step in self.steps],
            "compiled": pays_to_compile(self.model.config, self.model.device, calls),
        }
        worse = None
        if self.guide and (network := self.guide_network):
            theirs = vector if self.guide.config.dataset.classes else None
            worse = make_denoiser(network, self.guide.diffusion, clip=False, label=theirs, **how)
        how |= {"label": vector, "guidance": self.guidance, "guide": worse, "clip": self.clip}
        return make_denoiser(self.network, self.model.diffusion, **how)


def parse_labels(texts: Iterable[str], classes: list[str]) -> list[str]:
    """Return labels under the names of their classes.

    Args:
        texts: each `all`, or a class by name or by its place from 0, or several of them (2,5), or
            several for one image (hat+cape).

    Raises:
        ValueError: there is no such class.
    """
    if not classes:
        raise ValueError("--class-label: this model knows no classes (dataset.labels)")
    found: list[str] = []
    for text in texts:
        parts = [text] if text in classes else [part.strip() for part in text.split(",")]
        for part in parts:
            all_of_them = part == "all" and part not in classes
            found += classes if all_of_them else [_parse_label(part, classes)]
    return list(dict.fromkeys(found))


def _parse_label(text: str, classes: list[str]) -> str:
    if text in classes:
        return text
    names = []
    for part in text.split("+"):
        if part not in classes:
            if not (part.isdecimal() and int(part) < len(classes)):
                shown = classes if len(classes) <= 20 else [*classes[:20], "..."]
                raise ValueError(f"--class-label {part!r} is no class{did_you_mean(part, shown)}")
            part = classes[int(part)]
        names.append(part)
    return "+".join(name for name in classes if name in names)


def label_vector(label: str, classes: list[str]) -> Tensor:
    """Return [classes], with a 1 for each class of a label that `parse_labels` returned."""
    vector = torch.zeros(len(classes))
    vector[
        [classes.index(name) for name in ([label] if label in classes else label.split("+"))]
    ] = 1
    return vector


def folder_names(labels: Iterable[str | None]) -> dict[str, str | None]:
    """Return {what the folder of a label's images is called: label}; one label has none."""
    labels, found, taken = list(labels), dict[str, str | None](), set[str]()
    for i, label in enumerate(labels):
        name = re.sub(r"[^\w.+-]+", "-", label or "no label").strip("-.") or "label"
        while name.casefold() in taken:  # some disks tell a from A no more than we do
            name = f"{name}-{i}"
        taken.add(name.casefold())
        found[name] = label
    return found if len(labels) > 1 else {"": labels[0]}


def knows_no_label(model: "Model") -> bool:
    """Tell whether a model has seen images without a label."""
    config = model.config
    return not config.dataset.classes or config.training.label_dropout > 0
