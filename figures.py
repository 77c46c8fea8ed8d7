#!/usr/bin/env python3
"""The paper's figures of a trained model."""

if __name__ == "__main__":
    import terminal

    terminal.guard()  # before a package that may be missing is imported

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple

import typer
from rich.console import Console
from rich.progress import track

from sample import Eta, Sampler, Spacing, Timesteps, Variance, Weights
from terminal import fail, plain_console

HELP = """
The paper's figures of a trained model.

\b
progressive      x_t, and x_0 as it is estimated from it, along the chain (Fig. 6)
interpolation    two pictures, mixed at several t and denoised (Fig. 8 and 9)
neighbours       samples beside the training pictures that are nearest to them
rate-distortion  the variational bound as a curve, beside the paper's Table 4 (Fig. 5)
chain            the reverse process, moving
schedule         alpha_bar, SNR and the step table of a sampler

CKPT is a checkpoint or a run's folder; what is not said is as in its config. A figure that is there
is replaced.

Examples:

\b
  python figures.py progressive lightning_logs/digits
  python figures.py interpolation lightning_logs/digits --t 250 --t 500 \\
      --picture one.png --picture other.png
  python figures.py chain lightning_logs/digits --output chain.mp4
"""

SAMPLING = "sampler", "timesteps", "eta", "spacing", "variance"


class Kind(NamedTuple):
    options: tuple[str, ...]  # those that say something about it, and about not all
    suffixes: tuple[str, ...] = (".png", ".pdf", ".svg")


KINDS = {
    "progressive": Kind(("num_images", *SAMPLING)),
    "interpolation": Kind(("num_images", "t", "picture", *SAMPLING)),
    "neighbours": Kind(("num_images", "extractor", *SAMPLING)),
    "rate-distortion": Kind(("num_images", "variance")),
    "chain": Kind(("num_images", *SAMPLING), (".gif", ".mp4")),
    "schedule": Kind(SAMPLING),
}

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
def figures(
    kind: Annotated[
        Literal[
            "progressive", "interpolation", "neighbours", "rate-distortion", "chain", "schedule"
        ],  # KINDS
        typer.Argument(metavar="KIND", help="Which figure."),
    ],
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run's folder.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="A .png, .pdf or .svg; chain: .gif or .mp4. Default: figures/KIND."),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Samples, pairs, or pictures to measure.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of the first picture; then + 1 each.")
    ] = 0,
    t: Annotated[
        list[int] | None, typer.Option(help="interpolation: where to mix; again for more rows.")
    ] = None,
    picture: Annotated[
        list[Path] | None,
        typer.Option(help="interpolation: two files. Default: pictures of the dataset."),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="neighbours: of features, torch-fidelity's name or a TorchScript file. "
            "Default: the network's own middle."
        ),
    ] = None,
    sampler: Sampler = None,
    timesteps: Timesteps = None,
    eta: Eta = None,
    spacing: Spacing = None,
    variance: Variance = None,
    weights: Weights = "ema",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one network call.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
):
    asked = SimpleNamespace(**locals())
    console = plain_console()
    try:
        output = check_request(asked)
        job = prepare_job(asked, console)
        from plates import PLATES

        PLATES[kind](job, output)
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(fail(error)) from None
    console.print(f"figure: {output}")


def check_request(asked: SimpleNamespace) -> Path:
    """Where the figure goes. ValueError where an option says nothing about its kind."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures are drawn by matplotlib: pip install matplotlib") from None
    kind = KINDS[asked.kind]
    for option in ("num_images", "t", "picture", "extractor", *SAMPLING):
        if getattr(asked, option) is not None and option not in kind.options:
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in kind.options)
            raise ValueError(
                f"--{option.replace('_', '-')} says nothing about {asked.kind}; it takes {takes}"
            )
    output = asked.output or Path("figures", f"{asked.kind}{kind.suffixes[0]}")
    if output.suffix not in kind.suffixes:
        raise ValueError(f"--output {output}: {asked.kind} ends in {' or '.join(kind.suffixes)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def prepare_job(asked: SimpleNamespace, console: Console):
    """The `plates.Job`: the model, the step table, and what is said about them."""
    from plates import Job
    from sample import prepare

    given = {name: getattr(asked, name) for name in SAMPLING if getattr(asked, name) is not None}
    if asked.kind == "rate-distortion":  # the bound is that of ddpm over all T
        given |= {"sampler": "ddpm", "timesteps": None}
    ddpm, steps, recipe = prepare(asked.checkpoint, asked.device, asked.weights, None, given)
    path = asked.checkpoint
    run = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    detail = {"ddpm": f" {recipe['variance']}", "ddim": f" eta {recipe['eta']:g}"}
    caption = f"{run}, step {recipe['step']:,}" + (", raw weights" if ddpm.weights == "raw" else "")
    sampling = f"{recipe['sampler']}{detail.get(recipe['sampler'], '')}, {len(steps)} steps"
    bar = partial(
        track, description="", console=console, transient=True, disable=not console.is_terminal
    )
    own = {name: getattr(asked, name) for name in ("kind", "seed", "num_images", "t", "picture")}
    own["extractor"] = asked.extractor and str(asked.extractor)
    recipe |= {name: value for name, value in own.items() if value is not None}
    return Job(ddpm, steps, recipe, caption, sampling, asked, bar)


if __name__ == "__main__":
    app()
