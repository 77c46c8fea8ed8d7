#!/usr/bin/env python3
"""Generate images with a trained model."""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cli import (
    Device,
    Precision,
    Seed,
    Weights,
    fail,
    parse_seeds,
    parse_size,
    plain_console,
    run_names,
    sampling_options,
    usable_device,
    which_model,
)

if TYPE_CHECKING:
    from generation import Sampling

HELP = """
Generate images with a trained model.

CKPT is a checkpoint, a run's folder, a safetensors file, a diffusers folder, or official weights;
what is not said here is as in its config. The image of seed 7 is 000007.png whatever else is made
beside it. The same command again makes only what is missing; images of another recipe go into a
folder of their own.

Examples:

\b
  python sample.py pretrained/digits.safetensors --num-images 64
  python sample.py --run-name digits --seeds 0-7,100 --upscale 8
  python sample.py lightning_logs/digits/checkpoints/last.ckpt \\
      --sampler dpm++ --timesteps 20 --output-dir quick
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
@sampling_options
def sample(
    sampling: dict[str, Any],
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CKPT", help="A trained model.")
    ] = None,
    run_name: Annotated[
        str | None,
        typer.Option(
            help="Instead of CKPT: a run of lightning_logs, its newest checkpoint.",
            autocompletion=run_names,
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, max=10_000_000, help="Number of images.")] = 8,
    device: Device = "auto",
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW", help="Another size than in training, 64 or 96x64: at your own risk."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder. Default: samples, or samples-2, ... for another recipe."),
    ] = None,
    seed: Seed = 0,
    seeds: Annotated[
        str | None,
        typer.Option(help="Instead of --seed and --num-images: the seeds, such as 0-63,100."),
    ] = None,
    weights: Weights = "ema",
    precision: Precision = "auto",
    grid: Annotated[bool, typer.Option(help="Write grid.png of up to 400 of them, too.")] = True,
    upscale: Annotated[
        int | None, typer.Option(min=2, max=64, help="Write copies enlarged this many times.")
    ] = None,
    format: Annotated[
        Literal["png", "jpg", "npz"], typer.Option(help="Write copies of another kind, too.")
    ] = "png",
    gif: Annotated[
        bool, typer.Option("--gif", help="Write chain.gif: how up to 36 emerge.")
    ] = False,
) -> None:
    console, folder = plain_console(), output_dir
    try:
        chosen = list(range(seed, seed + num_images)) if seeds is None else parse_seeds(seeds)
        size = parse_size(image_size) if image_size else None
        source = which_model(checkpoint, run_name)
        device = usable_device(device)
        import torch

        from generation import Sampling, resolve_precision
        from generation.folder import free_folder, missing_images
        from generation.recipe import folder_name
        from weights import load_model

        model = load_model(source, weights).to(device)
        guide = sampling.get("guide")
        numbers = resolve_precision(model.config, torch.device(device), precision)
        plan = Sampling(
            model,
            sampling,
            source=str(source),
            precision=numbers,
            size=size,
            guide=load_model(guide, weights).to(device) if guide else None,
        )
        if format == "jpg" and model.shape[0] in (2, 4):
            raise ValueError("--format jpg knows no transparency, which these images have; png")
        several = len(plan.labels) > 1
        rows = {folder_name(str(label)) if several else "": label for label in plan.labels}
        recipes = {name: plan.recipe(label) for name, label in rows.items()}
        if folder:
            missing = missing_images(folder, chosen, recipes)
        else:
            folder, missing = free_folder("samples", chosen, recipes)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        raise typer.Exit(fail(error)) from None
    for note in model.notes:
        console.print(f"assumed: {note}")
    what = ""
    if plan.labels != [None]:
        shown = [str(label) for label in plan.labels]
        what = f", {', '.join(shown[:8])}{f' and {len(shown) - 8} more' * (len(shown) > 8)}"
    elif classes := model.config.dataset.classes:
        known = ", ".join(classes[:8]) + ", ..." * (len(classes) > 8)
        console.print(f"without labels; --class-label all, or one of: {known}")
    scale = plan.guidance.scale
    console.print(
        f"{source} (step {model.step:,}, {model.weights} weights){what}: {plan.facts['sampler']}, "
        f"{len(plan.steps)} steps{f', guidance {scale:g}' * (scale != 1)}, on {device} in {numbers}"
    )
    copies = Copies(grid, upscale, format, gif)
    jobs = [Job(label, folder / name, missing[name]) for name, label in rows.items()]
    try:
        write_images(plan, jobs, chosen, batch_size, folder, copies, console)
    except KeyboardInterrupt:
        console.print(f"stopped; what is finished is in {folder}, the same command continues")
        raise typer.Exit(130) from None
    except Exception as error:
        fail(error)
        raise typer.Exit(1) from None


class Job(NamedTuple):
    """Images of one label, and where they go."""

    label: str | None
    folder: Path
    missing: list[int]  # seeds


class Copies(NamedTuple):
    """What is written beside the numbered images."""

    grid: bool
    upscale: int | None
    format: str
    gif: bool


def write_images(
    plan: "Sampling",
    jobs: list[Job],
    chosen: list[int],
    batch_size: int,
    folder: Path,
    copies: Copies,
    console: Console,
) -> None:
    """Generate the missing images, write NNNNNN.png of each, and the copies of all."""
    import torch

    from generation import chain, generate, images

    where: dict[str, Any] = dict(shape=plan.shape, device=plan.model.device)
    columns = TextColumn("{task.completed:.0f}/{task.total} images"), BarColumn()
    hidden, lacking = not console.is_terminal, sum(len(job.missing) for job in jobs)
    batches = sum(-(-len(job.missing) // batch_size) for job in jobs)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
        advance = partial(bar.advance, bar.add_task("", total=lacking))
        for label, place, missing in jobs:
            how: dict[str, Any] = where | {"batch_size": batch_size, "advance": advance}
            denoiser = plan.denoiser(label, batches=batches) if missing else None
            for seeds, batch in generate(denoiser, plan.steps, missing, **how) if denoiser else ():
                for seed, pixels in zip(seeds, batch, strict=True):
                    recipe = plan.recipe(label) | {"seed": seed}
                    images.write_png(images.image_file(place, seed), pixels, recipe)
    kept = len(chosen) * len(jobs) - lacking
    console.print(
        f"{lacking} images written to {folder}" + (f", {kept} were there already" if kept else "")
    )
    if copies.grid:
        width = 400 if len(jobs) == 1 else min(20, max(1, 400 // len(jobs)))
        shown = torch.cat([images.read_images(job.folder, chosen[:width]) for job in jobs])
        row = None if len(jobs) == 1 else min(width, len(chosen))
        images.write_png(folder / "grid.png", images.image_grid(shown, row))
        console.print(f"all together: {folder / 'grid.png'}")
    for label, place, _ in jobs:
        if copies.upscale:
            there = images.read_images(place, chosen)
            path = images.write_enlarged(place, chosen, there, copies.upscale)
            console.print(f"also: {path}")
        if copies.format != "png":
            write = {"jpg": images.write_jpgs, "npz": images.write_npz}[copies.format]
            console.print(f"also: {write(place, chosen, images.read_images(place, chosen))}")
        if copies.gif:
            states = chain(plan.denoiser(label), plan.steps, chosen[:36], **where)
            path = images.write_gif(states, len(plan.steps), place / "chain.gif")
            console.print(f"also: {path}")


if __name__ == "__main__":
    app()
