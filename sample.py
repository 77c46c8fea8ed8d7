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
    plain_console,
    run_names,
    sampling_options,
    usable_device,
    which_model,
)

if TYPE_CHECKING:
    from diffusion_utils import Step
    from weights import Model

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
        int | None, typer.Option(min=1, help="Another size than in training: at your own risk.")
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
        source = which_model(checkpoint, run_name)
        device = usable_device(device)
        import torch

        from generation import resolve_precision, sampling_recipe
        from generation.folder import free_folder, missing_seeds
        from weights import load_model

        model = load_model(source, weights).to(device)
        numbers = resolve_precision(model.config, torch.device(device), precision)
        steps, recipe = sampling_recipe(
            model, sampling, source=str(source), precision=numbers, image_size=image_size
        )
        if format == "jpg" and model.shape[0] in (2, 4):
            raise ValueError("--format jpg knows no transparency, which these images have; png")
        if folder:
            missing = missing_seeds(folder, chosen, recipe)
        else:
            folder, missing = free_folder("samples", chosen, recipe)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        raise typer.Exit(fail(error)) from None
    for note in model.notes:
        console.print(f"assumed: {note}")
    console.print(
        f"{source} (step {model.step:,}, {model.weights} weights): {recipe['sampler']}, "
        f"{len(steps)} steps, on {device} in {numbers}"
    )
    copies = Copies(grid, upscale, format, gif)
    try:
        write_images(model, steps, chosen, missing, batch_size, folder, recipe, copies, console)
    except KeyboardInterrupt:
        console.print(f"stopped; what is finished is in {folder}, the same command continues")
        raise typer.Exit(130) from None
    except Exception as error:
        fail(error)
        raise typer.Exit(1) from None


class Copies(NamedTuple):
    """What is written beside the numbered images."""

    grid: bool
    upscale: int | None
    format: str
    gif: bool


def write_images(
    model: "Model",
    steps: "list[Step]",
    chosen: list[int],
    missing: list[int],
    batch_size: int,
    folder: Path,
    recipe: dict[str, Any],
    copies: Copies,
    console: Console,
) -> None:
    """Generate the missing images, write NNNNNN.png of each, and the copies of all."""
    from generation import chain, generate, images, make_denoiser, pays_to_compile
    from model import at_precision

    calls = -(-len(missing) // batch_size) * len(steps)
    denoiser = make_denoiser(
        at_precision(model.network, recipe["precision"]),
        model.diffusion,
        times=[step.t for step in steps],
        compiled=pays_to_compile(model.config, model.device, calls),
    )
    size = recipe["image_size"]
    where: dict[str, Any] = dict(shape=(model.shape[0], size, size), device=model.device)
    columns = TextColumn("{task.completed:.0f}/{task.total} images"), BarColumn()
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
        where["advance"] = partial(bar.advance, bar.add_task("", total=len(missing)))
        for seeds, batch in generate(denoiser, steps, missing, batch_size=batch_size, **where):
            for seed, pixels in zip(seeds, batch, strict=True):
                images.write_png(images.image_file(folder, seed), pixels, recipe | {"seed": seed})
    kept = len(chosen) - len(missing)
    console.print(
        f"{len(missing)} images written to {folder}"
        + (f", {kept} were there already" if kept else "")
    )
    if copies.grid:
        grid = images.image_grid(images.read_images(folder, chosen[:400]))
        images.write_png(folder / "grid.png", grid)
        console.print(f"all together: {folder / 'grid.png'}")
    if copies.upscale:
        there = images.read_images(folder, chosen)
        path = images.write_enlarged(folder, chosen, there, copies.upscale)
        console.print(f"also: {path}")
    if copies.format != "png":
        write = {"jpg": images.write_jpgs, "npz": images.write_npz}[copies.format]
        console.print(f"also: {write(folder, chosen, images.read_images(folder, chosen))}")
    if copies.gif:
        del where["advance"]
        states = chain(denoiser, steps, chosen[:36], **where)
        console.print(f"also: {images.write_gif(states, len(steps), folder / 'chain.gif')}")


if __name__ == "__main__":
    app()
