"""From what a visitor chose to images, step by step, within limits."""

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset import fit_image
from diffusion_utils import to_uint8
from generation import Sampling, quick_settings
from generation.edit_options import EDITS, apply_edit, choose_sampler, which_edit
from generation.images import image_file, image_grid, write_png
from weights import Model

IMAGES, SECONDS = 64, 300  # of one request, at most
PIXELS, BYTES = 2**24, 10 * 2**20  # of an image from elsewhere, at most
AT_ONCE = 2**18  # pixels of a batch: what a laptop's memory holds


class Frame(NamedTuple):
    """A moment of drawing."""

    done: int  # network calls
    calls: int  # of all batches
    x: Tensor  # the batch on its way, [B, C, H, W]
    finished: list[Tensor]  # the batches before it, uint8 [B, C, H, W] each
    files: list[tuple[Path, str]]  # finished images, and what they are called

    def grid(self, columns: int | None) -> Tensor:
        """Return all images so far as one, uint8 [3, H', W']."""
        return image_grid(torch.cat([*self.finished, to_uint8(self.x).cpu()]), columns)


def make_plan(
    model: Model,
    sampling: dict[str, Any],
    *,
    source: str,
    precision: str,
    count: int,
    edit: dict[str, Any],
) -> Sampling:
    """Return the plan of `count` images of each label, as sample.py with the same options makes it.

    Args:
        sampling: as `Sampling` takes it. edit: the options in `EDITS` that are not None.

    Raises:
        ValueError: more than IMAGES, or as `Sampling` and `apply_edit` do.
    """
    asked = dict.fromkeys([*EDITS, *(name for names in EDITS.values() for name in names)]) | edit
    kind, own = which_edit(asked), model.config.sampling.sampler
    chosen = choose_sampler(kind, sampling, own)
    plan = Sampling(model, chosen, source=source, precision=precision)
    if not 0 < count * len(plan.labels) <= IMAGES:
        many = f"{len(plan.labels)} classes of " * (len(plan.labels) > 1)
        raise ValueError(f"{many}{count} images: at most {IMAGES} at a time")
    return apply_edit(plan, kind, asked, count, fit_image)[0]


@torch.inference_mode()
def draw(plan: Sampling, seeds: Sequence[int], folder: Path) -> Iterator[Frame]:
    """Yield after each network call; write images as sample.py does, byte for byte.

    `files` are complete when it ends.

    Raises:
        ValueError: it takes longer than SECONDS.
    """
    size = max(1, AT_ONCE // (plan.shape[1] * plan.shape[2]))
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    done, calls = 0, len(plan.steps) * len(batches) * len(plan.labels)
    files: list[tuple[Path, str]] = []
    finished: list[Tensor] = []
    end, where = time.monotonic() + SECONDS, dict(shape=plan.shape, device=plan.model.device)
    for number, label in enumerate(plan.labels):
        denoiser, recipe = plan.denoiser(label, batches=len(batches)), plan.recipe(label)
        for batch in batches:
            for _, x, _ in plan.walk(denoiser, plan.steps, batch, **where):
                done += 1
                yield Frame(done, calls, x, finished, files)
                if time.monotonic() > end:
                    raise ValueError(
                        f"stopped after {SECONDS} s, at step {done:,} of {calls:,}; take fewer "
                        "images or steps"
                    )
            finished.append(to_uint8(x).cpu())
            for seed, pixels in zip(batch, finished[-1], strict=True):
                path = image_file(folder / str(number), seed)
                path.parent.mkdir(exist_ok=True)
                write_png(path, pixels, recipe | {"seed": seed})
                files.append((path, f"{seed}: {label}" if label else f"seed {seed}"))


def draw_health(model: Model, source: str, path: Path) -> None:
    """Write the model's health figure, as `figures.py health` does."""
    from plotting import STUDIES, Study

    chosen: dict[str, Any] = quick_settings(model.diffusion)
    if model.config.dataset.classes:  # each image has the label that it has in the data
        chosen |= {"class_label": ["all"], "guidance_scale": 1.0}
    plan = Sampling(model, chosen, source=source, precision="float32")
    recipe = plan.recipe() | {"kind": "health", "seed": 0}
    STUDIES["health"](Study(plan, recipe, lambda items, **_: items), path)


def command_line(
    source: str, sampling: dict[str, Any], seeds: Sequence[int], edit: dict[str, Any]
) -> str:
    """Return the command that makes the same images."""
    said = [("seeds", f"{seeds[0]}-{seeds[-1]}")]
    said += [("class_label", label) for label in sampling.get("class_label", [])]
    said += [(name, value) for name, value in sampling.items() if name != "class_label"]
    said += [
        (name, name.upper() if isinstance(value, Path) else value) for name, value in edit.items()
    ]
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in said]
    return shlex.join(["python", "sample.py", source, *(part for pair in options for part in pair)])
