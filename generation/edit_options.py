"""The options of editing: which belong together, and the files they name, made into a plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from generation import edit
from generation.images import fit_mask
from generation.recipe import Sampling

EDITS = {  # and the options that belong to each
    "image": ("strength",),
    "inpaint": ("mask", "resample", "jump"),
    "encode": (),
    "between": (),
}
INVERTING = "encode", "between"


def which_edit(asked: dict[str, Any]) -> str | None:
    """Return the key of `EDITS` that options ask for; ValueError where they do not fit together."""
    kinds = [kind for kind in EDITS if asked[kind]]
    if len(kinds) > 1:
        raise ValueError(f"--{kinds[0]} and --{kinds[1]} are two ways of editing; choose one")
    for kind, options in EDITS.items():
        for option in options:
            if asked[option] is not None and kind not in kinds:
                raise ValueError(f"--{option} belongs to --{kind}")
    if kinds == ["inpaint"] and not asked["mask"]:
        raise ValueError("--inpaint needs a --mask, an image: what is white there is filled")
    return kinds[0] if kinds else None


def choose_sampler(edit: str | None, chosen: dict[str, Any], own: str) -> dict[str, Any]:
    """Return `chosen` with a sampler that can do an edit, where the model's own cannot.

    Raises:
        ValueError: one was chosen that cannot.
    """
    sampler = chosen.get("sampler")
    if edit in INVERTING:
        if sampler not in (None, "ddim") or chosen.get("eta"):
            raise ValueError(
                f"--{edit} needs the sampler that can be walked backwards, ddim with eta 0; "
                "leave --sampler and --eta out"
            )
        return chosen | {"sampler": "ddim", "eta": 0.0}
    if edit == "inpaint" and (sampler or chosen.get("fast") or own) not in ("ddpm", "ddim"):
        if sampler:
            raise ValueError(
                f"--inpaint changes the state after each step, and {sampler} looks further back; "
                "choose --sampler ddpm or ddim"
            )
        return {"variance": "small"} | chosen | {"sampler": "ddpm"}
    return chosen


def which_seeds(
    kind: str | None, seed: int, seeds: list[int] | None, count: int | None
) -> list[int]:
    """Return the seeds that are asked for; places in a row where an edit draws no noise."""
    if kind in INVERTING:
        if seed or seeds is not None:
            raise ValueError(f"--{kind} draws no noise, so that no seed matters; leave it out")
        if kind == "encode" and count not in (None, 1):
            raise ValueError("--encode makes one image of one; leave --num-images out")
        return list(range(1 if kind == "encode" else count or 8))
    return seeds if seeds is not None else list(range(seed, seed + (count or 8)))


def apply_edit(
    plan: Sampling,
    kind: str | None,
    asked: dict[str, Any],
    count: int,
    fit_image: Callable[..., np.ndarray],
) -> tuple[Sampling, list[Tensor]]:
    """Return a plan with an edit, and its images at the model's size, uint8 [C, H, W] each.

    Args:
        count: how many images are to be made. fit_image: as `dataset.fit_image`.

    Raises:
        ValueError: a file or a number that cannot be used.
    """
    if kind is None:
        return plan, []
    fit, (channels, height, width) = plan.model.config.dataset.fit, plan.shape
    files = asked[kind] if kind == "between" else [asked[kind]]
    opened, form = [open_image(file) for file in files], {"channels": channels, "fit": fit}
    arrays = [fit_image(image, image_size=(height, width), **form) for image in opened]
    images = [torch.tensor(array) for array in arrays]
    if kind == "image":
        return edit.from_image(
            plan, images[0], 0.6 if asked["strength"] is None else asked["strength"]
        ), images
    if kind in INVERTING:
        return edit.encode(plan, images, count), images
    mask = open_image(asked["mask"])
    if mask.size != opened[0].size:
        sizes = [f"{image.width}x{image.height}" for image in (mask, opened[0])]
        raise ValueError(f"--mask is {sizes[0]} and the image {sizes[1]}; they must be of one size")
    if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("--mask is transparent in parts; draw it black, and white what is filled")
    levels = fit_image(mask, image_size=mask.size[::-1], channels=1)
    fill = fit_mask(levels[0], (height, width), fit)
    how = {key: asked[key] or 10 for key in ("resample", "jump")}
    return edit.inpaint(plan, images[0], fill, **how), images


def open_image(file: Path) -> Image.Image:
    """Return an image, upright; ValueError where a file is none."""
    try:
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{file} is not an image") from None
    except Exception as error:  # a decoder can raise anything on a broken file
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{file} cannot be read: {error}") from None
