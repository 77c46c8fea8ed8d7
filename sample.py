#!/usr/bin/env python3
"""Generate images with a trained model."""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli import (
    CheckpointName,
    Device,
    Precision,
    RunName,
    Seed,
    TrainedModel,
    Weights,
    fail,
    parse_seeds,
    parse_size,
    plain_console,
    sampling_options,
    usable_device,
    which_model,
)

HELP = """
Generate images with a trained model, or edit images with it.

CKPT is a checkpoint, a run's folder, a safetensors file, a diffusers folder or its id on the Hub,
or official weights; what is not said here is as in its config. The image of seed 7 is 000007.png
whatever else is made beside it. The same command again makes only what is missing; images of
another recipe go into a folder of their own.

Examples:

\b
  python sample.py pretrained/digits.safetensors --num-images 64
  python sample.py --run-name digits --seeds 0-7,100 --upscale 8
  python sample.py lightning_logs/digits/checkpoints/last.ckpt \\
      --sampler dpm++ --timesteps 20 --output-dir quick
  python sample.py CKPT --image photo.png --strength 0.6
  python sample.py CKPT --inpaint photo.png --mask hole.png
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
@sampling_options
def sample(
    sampling: dict[str, Any],
    checkpoint: TrainedModel = None,
    run_name: RunName = None,
    which: CheckpointName = None,
    num_images: Annotated[
        int | None,
        typer.Option(min=1, max=10_000_000, help="Number of images. Default: 8; with --encode 1."),
    ] = None,
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
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Start from an image with noise (SDEdit)."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much noise: 0 ... 1 of T, where 1 forgets the image. Default: 0.6."),
    ] = None,
    inpaint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fill a part of an image, its --mask (RePaint)."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Black and white, of the image's size: white is filled, black stays as it is.",
        ),
    ] = None,
    resample: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="How often each part is walked. Default: 10."),
    ] = None,
    jump: Annotated[
        int | None, typer.Option(min=1, help="How many steps make such a part. Default: 10.")
    ] = None,
    encode: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To its latent and back (DDIM): what the model keeps."),
    ] = None,
    between: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="FILE FILE", help="From one image to another, through their latents."),
    ] = None,
) -> None:
    console = plain_console()
    try:
        asked = {
            "image": image,
            "strength": strength,
            "inpaint": inpaint,
            "mask": mask,
            "resample": resample,
            "jump": jump,
            "encode": encode,
            "between": between,
        }
        size = parse_size(image_size) if image_size else None
        source = which_model(checkpoint, run_name, which)
        device = usable_device(device)
        import torch

        from dataset import fit_image
        from generation import Sampling, resolve_precision
        from generation.edit_options import (
            INVERTING,
            apply_edit,
            choose_sampler,
            which_edit,
            which_seeds,
        )
        from generation.folder import Copies, draw, find_jobs
        from weights import load_model

        kind = which_edit(asked)
        given = None if seeds is None else parse_seeds(seeds)
        chosen = which_seeds(kind, seed, given, num_images)
        model = load_model(source, weights).to(device)
        guide = sampling.get("guide")
        measured = kind in INVERTING and precision == "auto"  # so not in what merely looks the same
        numbers = "float32" if measured else precision
        plan = Sampling(
            model,
            choose_sampler(kind, sampling, model.config.sampling.sampler),
            source=str(source),
            precision=resolve_precision(model.config, torch.device(device), numbers),
            size=size,
            guide=load_model(guide, weights).to(device) if guide else None,
        )
        plan, originals = apply_edit(plan, kind, asked, len(chosen), fit_image)
        if format == "jpg" and model.shape[0] in (2, 4):
            raise ValueError("--format jpg knows no transparency, which these images have; png")
        folder, jobs = find_jobs(plan, chosen, output_dir)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        raise typer.Exit(fail(error)) from None
    copies = Copies(grid, upscale, format, gif)
    try:
        how: dict[str, Any] = dict(copies=copies, batch_size=batch_size, originals=originals)
        draw(plan, jobs, chosen, folder, console, **how)
    except KeyboardInterrupt:
        console.print(f"stopped; what is finished is in {folder}, the same command continues")
        raise typer.Exit(130) from None
    except Exception as error:
        fail(error)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
