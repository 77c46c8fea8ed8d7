#!/usr/bin/env python3
"""Draw the paper's figures of a trained model."""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import track

from cli import (
    CheckpointName,
    Device,
    Seed,
    Weights,
    checkpoint_of,
    fail,
    fields_of,
    plain_console,
    sampling_options,
    usable_device,
)

HELP = """
Draw the paper's figures of a trained model.

\b
progressive      x_t, and x_0 as it is estimated from it, along the chain (Fig. 6)
interpolation    two images, mixed at several t and denoised (Fig. 8 and 9)
neighbours       samples beside the training images that are nearest to them
rate-distortion  the variational bound as a curve, beside the paper's Table 4 (Fig. 5)
chain            the reverse process, moving
schedule         alpha_bar, SNR and the step table of a sampler
health           the loss over t beside what the data allow, and the samples nearest to copies

CKPT is a checkpoint or a run's folder. Sampling options that are not given are those of its config.
An existing figure is replaced.

Examples:

\b
  python figures.py progressive lightning_logs/digits
  python figures.py interpolation lightning_logs/digits --t 250 --t 500 \\
      --image one.png --image other.png
  python figures.py chain lightning_logs/digits --output chain.gif
"""

Kind = Literal[
    "progressive", "interpolation", "neighbours", "rate-distortion", "chain", "schedule", "health"
]
HOW = (*fields_of("sampling"), "fast")
STEERING = "class_label", "guidance_scale", "guidance_interval", "guide"
SAMPLING = (*HOW, *STEERING)
TAKES = {  # options that not all kinds take
    "progressive": ("num_images", *SAMPLING),
    "interpolation": ("num_images", "t", "image", *SAMPLING),
    "neighbours": ("num_images", "extractor", *SAMPLING),
    "rate-distortion": ("num_images", "variance"),
    "chain": ("num_images", *SAMPLING),
    "schedule": HOW,
    "health": ("num_images", "extractor", *HOW),
}

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
@sampling_options
def figures(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="Which figure.")],
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run's folder.")
    ],
    sampling: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(help="A .png, .pdf or .svg; for chain a .gif. Default: figures/KIND."),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Number of samples, pairs or measured images.")
    ] = None,
    seed: Seed = 0,
    t: Annotated[
        list[int] | None, typer.Option(help="interpolation: where to mix; again for more rows.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", "--picture", help="interpolation: two files. Default: validation images."
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="neighbours, health: torch-fidelity's name of a feature extractor, or a "
            "TorchScript file. Default: the network itself."
        ),
    ] = None,
    which: CheckpointName = None,
    weights: Weights = "ema",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one network call.")] = 256,
    device: Device = "auto",
) -> None:
    console = plain_console()
    bar = partial(
        track, description="", console=console, transient=True, disable=not console.is_terminal
    )
    given = {"num_images": num_images, "t": t, "image": image, "extractor": extractor}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        path = check_request(kind, asked | sampling, output)
        place, checkpoint = usable_device(device), checkpoint_of(checkpoint, which)
        from generation import Sampling, quick_settings
        from plotting import STUDIES, Study
        from weights import load_model

        if kind == "rate-distortion":  # the bound is that of ddpm over all T
            sampling |= {"sampler": "ddpm", "timesteps": None}
        model = load_model(checkpoint, weights).to(place)
        if kind == "health" and not sampling:
            sampling |= quick_settings(model.diffusion)
        if own := model.config.dataset.classes and "class_label" not in TAKES[kind]:
            sampling |= {"class_label": ["all"], "guidance_scale": 1.0}  # whatever an image has
        guide = sampling.get("guide")
        plan = Sampling(
            model,
            sampling,
            source=str(checkpoint),
            precision="float32",
            guide=load_model(guide, weights).to(place) if guide else None,
        )
        if len(plan.labels) > 1 and not own:
            raise ValueError("a figure is of one --class-label")
        label = None if own else plan.labels[0]
        recipe = plan.recipe(label) | {"kind": kind, "seed": seed, **asked}
        study = Study(plan, recipe, bar, seed=seed, batch_size=batch_size, **asked)
        STUDIES[kind](study, path)
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(fail(error)) from None
    console.print(f"figure: {path}")


def check_request(kind: Kind, asked: dict[str, Any], output: Path | None) -> Path:
    """Return where the figure goes; ValueError where an option says nothing about its kind."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures are drawn by matplotlib: pip install matplotlib") from None
    option = lambda name: f"--{name.replace('_', '-')}"
    if other := [name for name in asked if name not in TAKES[kind]]:
        takes = ", ".join(map(option, TAKES[kind]))
        raise ValueError(f"{option(other[0])} says nothing about {kind}; it takes {takes}")
    suffixes = (".gif",) if kind == "chain" else (".png", ".pdf", ".svg")
    path = output or Path("figures", f"{kind}{suffixes[0]}")
    if path.suffix not in suffixes:
        raise ValueError(f"--output {path}: {kind} ends in {' or '.join(suffixes)}")
    return path


if __name__ == "__main__":
    app()
