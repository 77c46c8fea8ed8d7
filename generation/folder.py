"""A folder of numbered images, all of one recipe: what is missing is made, nothing is replaced."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from generation import images
from generation.generate import generate
from generation.images import image_file, read_images, write_png
from generation.recipe import Sampling, folder_names

ORIGINALS = "original.png", "original-2.png"  # of an edit
BESIDE = *ORIGINALS, "grid.png", "images.npz", "pictures.npz", "chain.gif", "enlarged"


class Job(NamedTuple):
    """Images of one label, and where they go."""

    label: str | None
    folder: Path
    missing: list[int]  # seeds


class OtherRecipe(ValueError):
    """An image in the way was made by another recipe."""


def find_jobs(
    plan: Sampling, seeds: Sequence[int], folder: Path | None, otherwise: str = "samples"
) -> tuple[Path, list[Job]]:
    """Return where the images go, and what is missing there; without a folder, `otherwise` is it.

    Raises as `missing_seeds`.
    """
    rows = folder_names(plan.labels)
    recipes = {name: plan.recipe(label) for name, label in rows.items()}
    if folder:
        missing = missing_images(folder, seeds, recipes)
    else:
        folder, missing = free_folder(otherwise, seeds, recipes)
    return folder, [Job(label, folder / name, missing[name]) for name, label in rows.items()]


def free_folder(
    name: str, seeds: Sequence[int], recipes: dict[str, dict]
) -> tuple[Path, dict[str, list[int]]]:
    """Return `name`, name-2, ...: the first without another recipe's images, and what it lacks."""
    for number in itertools.count(1):
        folder = Path(name if number == 1 else f"{name}-{number}")
        try:
            return folder, missing_images(folder, seeds, recipes)
        except OtherRecipe:
            pass
    raise AssertionError


def missing_images(
    folder: Path, seeds: Sequence[int], recipes: dict[str, dict]
) -> dict[str, list[int]]:
    """Return the seeds that lack a good image, by folder within `folder`; "" is itself.

    Raises as `missing_seeds`.
    """
    if "" not in recipes and folder.is_dir():  # it holds folders, a grid of them all, and no more
        ours = any((folder / name).is_dir() for name in recipes)
        stems = (path for path in folder.glob("*.png") if path.stem.isdigit())
        grid = [] if ours else [folder / "grid.png"]
        if foreign := next((path for path in [*stems, *grid] if path.exists()), None):
            raise OtherRecipe(f"{foreign} is in the way; choose another --output-dir, or delete it")
    return {name: missing_seeds(folder / name, seeds, recipe) for name, recipe in recipes.items()}


def missing_seeds(folder: Path, seeds: Sequence[int], recipe: dict) -> list[int]:
    """Return the seeds without a good image of this recipe.

    Raises:
        OtherRecipe: a folder is one recipe's, and nothing is overwritten.
        ValueError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and images go into a folder; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in seeds if not is_good(image_file(folder, seed), recipe)]
    there, asked = (p for p in folder.glob("*.png") if p.stem.isdigit()), set(seeds)
    another = next((p for p in there if int(p.stem) not in asked), None)
    ours = len(missing) < len(seeds) or (another and is_good(another, recipe))
    copies = [folder / name for name in BESIDE]
    copies += [image_file(folder, seed).with_suffix(".jpg") for seed in seeds]
    if not ours and (foreign := next((path for path in copies if path.exists()), None)):
        raise OtherRecipe(f"{foreign} is in the way; choose another --output-dir, or delete it")
    return missing


def is_good(path: Path, recipe: dict) -> bool:
    """Tell whether a whole image of this recipe is there; OtherRecipe where it is of another."""
    try:
        with Image.open(path) as image:
            image.load()
            other = json.loads(image.info.get("recipe", "{}"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        if path.read_bytes()[:4] in (b"", b"\x89PNG"):
            return False  # cut short
        raise OtherRecipe(f"{path} is not an image; choose another --output-dir") from None
    changed = [
        f"{key} {other.get(key)} -> {recipe.get(key)}"
        for key in dict.fromkeys([*recipe, *other])
        if key not in ("checkpoint", "seed") and other.get(key) != recipe.get(key)
    ]
    if changed:
        raise OtherRecipe(
            f"{path} was made by another recipe ({', '.join(changed)}); "
            "choose another --output-dir, or delete it"
        )
    return True


def fill(
    folder: Path,
    batches: Sequence[Sequence[int]],
    missing: set[int],
    recipe: dict,
    make: Callable[[list[int]], Tensor],
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (seeds, images) of each batch, as `generate` does; what is missing is made and written.

    Args:
        make: seeds -> uint8 [B, C, H, W].
    """
    for batch in batches:
        new = [seed for seed in batch if seed in missing]
        if new:
            for seed, pixels in zip(new, make(new), strict=True):
                write_png(image_file(folder, seed), pixels, recipe | {"seed": seed})
        yield list(batch), read_images(folder, batch)


def write_missing(
    plan: Sampling, jobs: Sequence[Job], batch_size: int, advance: Callable[[float], object]
) -> None:
    """Generate what is missing, and write NNNNNN.png of each; `advance` as in `generate`."""
    batches = sum(-(-len(job.missing) // batch_size) for job in jobs)
    for label, folder, missing in jobs:
        if not missing:
            continue
        denoiser, recipe = plan.denoiser(label, batches=batches), plan.recipe(label)
        for seeds, batch in generate(
            denoiser,
            plan.steps,
            missing,
            shape=plan.shape,
            device=plan.model.device,
            batch_size=batch_size,
            advance=advance,
            walk=plan.walk,
        ):
            for seed, pixels in zip(seeds, batch, strict=True):
                write_png(image_file(folder, seed), pixels, recipe | {"seed": seed})


class Copies(NamedTuple):
    """The copies to write beside the numbered images."""

    grid: bool = True
    upscale: int | None = None
    format: str = "png"
    gif: bool = False


def draw(
    plan: Sampling,
    jobs: Sequence[Job],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    copies: Copies | None = None,
    batch_size: int = 64,
    originals: Sequence[Tensor] = (),
) -> None:
    """Generate what is missing and write the copies; say what is drawn, how far it is, and where.

    Args:
        originals: what was edited, uint8 [C, H, W] each.
    """
    introduce(plan, console)
    columns = TextColumn("{task.completed:.0f}/{task.total} images"), BarColumn()
    hidden, lacking = not console.is_terminal, sum(len(job.missing) for job in jobs)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
        write_missing(plan, jobs, batch_size, partial(bar.advance, bar.add_task("", total=lacking)))
    kept = len(seeds) * len(jobs) - lacking
    there = f", {kept} were there already" if kept else ""
    console.print(f"{lacking} images written to {folder}{there}")
    for line in write_copies(plan, jobs, seeds, originals, folder, copies or Copies()):
        console.print(line)


def introduce(plan: Sampling, console: Console) -> None:
    """Say what is about to be drawn, and by what."""
    model, scale, what = plan.model, plan.guidance.scale, ""
    for note in model.notes:
        console.print(f"assumed: {note}")
    if plan.labels != [None]:
        shown = [str(label) for label in plan.labels]
        what = f", {', '.join(shown[:8])}{f' and {len(shown) - 8} more' * (len(shown) > 8)}"
    elif classes := model.config.dataset.classes:
        known = ", ".join(classes[:8]) + ", ..." * (len(classes) > 8)
        console.print(f"without labels; --class-label all, or one of: {known}")
    facts = plan.facts
    console.print(
        f"{facts['checkpoint']} (step {model.step:,}, {model.weights} weights){what}: "
        f"{facts['sampler']}, {len(plan.steps)} steps{f', guidance {scale:g}' * (scale != 1)}, "
        f"on {model.device} in {facts['precision']}"
    )
    if "filled" in facts:
        console.print(f"the mask is white, and filled, on {facts['filled']:.1%} of the image")


def write_copies(
    plan: Sampling,
    jobs: Sequence[Job],
    seeds: Sequence[int],
    originals: Sequence[Tensor],
    folder: Path,
    copies: Copies,
) -> Iterator[str]:
    """Write what is wanted of all images together, a grid in `folder`; yield what to say of it.

    Args:
        originals: what was edited, uint8 [C, H, W] each: they stand beside the images.
    """
    for name, original in zip(ORIGINALS, originals, strict=False):
        write_png(folder / name, original)
    if copies.grid:
        yield f"all together: {write_grid(jobs, seeds, originals, folder / 'grid.png')}"
    for label, place, _ in jobs:
        if not plan.clip:  # there and back
            pairs = zip(originals, read_images(place, [seeds[0], seeds[-1]]), strict=False)
            found = " and ".join(f"{images.psnr(one, other):.1f}" for one, other in pairs)
            yield f"reconstructed in {place}: PSNR {found} dB"
        if copies.upscale:
            there = read_images(place, seeds)
            yield f"also: {images.write_enlarged(place, seeds, there, copies.upscale)}"
        if copies.format != "png":
            write = {"jpg": images.write_jpgs, "npz": images.write_npz}[copies.format]
            yield f"also: {write(place, seeds, read_images(place, seeds))}"
        if copies.gif:
            where: dict[str, Any] = dict(shape=plan.shape, device=plan.model.device)
            states = plan.walk(plan.denoiser(label), plan.steps, seeds[:36], **where)
            yield f"also: {images.write_gif(states, len(plan.steps), place / 'chain.gif')}"


def write_grid(
    jobs: Sequence[Job], seeds: Sequence[int], originals: Sequence[Tensor], path: Path
) -> Path:
    """Write up to 400 images as one; several labels are rows, and so is a way from A to B."""
    width = 400 if len(jobs) == 1 else min(20, max(1, 400 // len(jobs)))
    first, last = ([image[None] for image in part] for part in (originals[:1], originals[1:]))
    rows = [torch.cat([*first, read_images(j.folder, seeds[:width]), *last]) for j in jobs]
    columns = len(rows[0]) if len(jobs) > 1 or last else None
    write_png(path, images.image_grid(torch.cat(rows), columns))
    return path


def draw_grid(plan: Sampling, count: int, path: Path) -> str:
    """Draw the seeds from 0, of each label a row, as one image of up to 400; say how."""
    several = len(plan.labels) > 1
    seeds = range(min(count, 20) if several else count)
    rows = dict(itertools.islice(folder_names(plan.labels).items(), max(1, 400 // len(seeds))))
    with TemporaryDirectory() as folder:
        jobs = [Job(label, Path(folder, name), [*seeds]) for name, label in rows.items()]
        write_missing(plan, jobs, 64, lambda images: None)
        write_grid(jobs, seeds, [], path)
    facts, scale = plan.facts, plan.guidance.scale
    guided = f", guidance {scale:g}" * (scale != 1)
    labels = f"; rows: {', '.join(map(str, rows.values()))}" * several
    return (
        f"Seeds 0 to {seeds[-1]}, nothing chosen, by {facts['sampler']} in {facts['timesteps']} "
        f"steps{guided}{labels}"
    )
