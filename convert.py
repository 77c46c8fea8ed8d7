#!/usr/bin/env python3
"""Convert weights of other DDPM codes to ours, and ours to theirs; push them; make EMAs.

Examples:

\b
  python convert.py import google/ddpm-cifar10-32 cifar10.ckpt
  python convert.py import ema_cifar10.ckpt cifar10.ckpt dataset.name=cifar10
  python convert.py export lightning_logs/digits digits-diffusers
  python convert.py export lightning_logs/digits digits.safetensors --format safetensors
  python convert.py push lightning_logs/digits you/digits --dry-run
  python convert.py ema lightning_logs/digits --length 0.08
"""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import Overrides, Weights, fail, plain_console, usable_device

if TYPE_CHECKING:
    from weights import Model

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)


@contextmanager
def one_message() -> Iterator[None]:
    """End with the message of an error, or at Ctrl-C with 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:  # an exporter can raise anything
        raise typer.Exit(fail(error)) from None


@app.command("import")
@one_message()
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Files, or an id on the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.ckpt", help="The checkpoint to write.")],
    overrides: Overrides = None,
) -> None:
    """Write a checkpoint of ours from SOURCE.

    SOURCE is a diffusers folder or its id on the Hub, official weights (a PyTorch state dict, a
    TensorFlow checkpoint, or .npz arrays under its names), or a safetensors file. Sizes, schedule,
    prediction and variance come from the files; SECTION.KEY=VALUE wins over them. The checkpoint
    holds weights alone: sample from it, evaluate it, or fine-tune it with train.py
    --checkpoint-path.
    """
    from weights.export import import_model

    about = import_model(source, out, overrides or [])
    plain_console().print(f"{about}\nto sample: python sample.py {out}")


Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="What sample.py takes.")]
License = Annotated[str, typer.Option(help="For the model card: mit, cc-by-4.0")]


@app.command()
@one_message()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a new file.")],
    format: Annotated[
        Literal["diffusers", "safetensors", "onnx"], typer.Option(help="What to write.")
    ] = "diffusers",
    weights: Weights = "ema",
    license: License = "unknown",
) -> None:
    """Write a model for other programs.

    diffusers: a folder with a model card that DDPMPipeline and DDIMPipeline load. safetensors: one
    file with the config inside, that sample.py takes. onnx: the network, (x, t), with labels where
    it has them, -> its prediction, for any number of images. Each is read back and compared before
    it gets its name.
    """
    from weights.export import export_model

    plain_console().print(export_model(checkpoint, out, format, weights, license))


@app.command()
@one_message()
def push(
    checkpoint: Checkpoint,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its id on the Hub.")],
    weights: Weights = "ema",
    license: License = "unknown",
    num_images: Annotated[
        int,
        typer.Option(min=0, max=400, help="Images to show; with classes, of each. 0: none."),
    ] = 16,
    public: Annotated[
        bool, typer.Option("--public", help="For all to see. Default: for you alone.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder here, and push nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="With --dry-run, the new folder. Default: NAME.")
    ] = None,
) -> None:
    """Publish a model on the Hugging Face Hub, by `hf auth login` or HF_TOKEN.

    It is diffusers' folder, as export writes it, that every command here reads by its id, too. The
    card has the recipe, images by the sampler of few calls, and what evaluate.py has measured of
    these very weights. What is on the Hub already gets a new commit.
    """
    from weights.push import push_model

    if output and not dry_run:
        raise ValueError("--output is of --dry-run; what is pushed is kept on the Hub alone")

    def draw(model: "Model", path: Path) -> str:
        import torch

        from generation import Sampling, resolve_precision
        from generation.folder import draw_grid

        device = torch.device(usable_device("auto"))
        chosen = {"fast": True} | ({"class_label": ["all"]} if model.config.dataset.classes else {})
        precision = resolve_precision(model.config, device)
        plan = Sampling(model.to(device), chosen, source=repo, precision=precision)
        plain_console().print(f"drawing images.png, {len(plan.steps)} network calls an image")
        return draw_grid(plan, num_images, path)

    folder = (output or Path(repo.rpartition("/")[2])) if dry_run else None
    draws = draw if num_images else None
    told = push_model(
        checkpoint, repo, weights=weights, license=license, draw=draws, public=public, folder=folder
    )
    plain_console().print(f"{told}\nto sample: python sample.py {folder or repo}")


@app.command()
@one_message()
def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    length: Annotated[float, typer.Option(help="Its relative length, below 0.28.")],
    step: Annotated[
        int | None, typer.Option(help="A snapshot's step. Default: the newest.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A .safetensors file. Default: one in RUN/ema.")
    ] = None,
) -> None:
    """Make the EMA of any length after training, from the snapshots of a few.

    The length is the EMA's width in parts of the run (Karras et al. 2024): 0.1 averages about its
    last fifth. A run writes snapshots where it has training.ema_lengths, say [0.05, 0.1].
    """
    from weights.ema import rebuild

    about, path = rebuild(run, length, step, output)
    plain_console().print(f"{about}\nto sample: python sample.py {path}")


if __name__ == "__main__":
    app()
