#!/usr/bin/env python3
"""Convert weights of other DDPM codes to ours, and ours to theirs; make EMAs after training.

Examples:

\b
  python convert.py import google/ddpm-cifar10-32 cifar10.ckpt
  python convert.py import ema_cifar10.ckpt cifar10.ckpt dataset.name=cifar10
  python convert.py export lightning_logs/digits digits-diffusers
  python convert.py export lightning_logs/digits digits.safetensors --format safetensors
  python convert.py ema lightning_logs/digits --length 0.08
"""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import Overrides, Weights, fail, plain_console

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


@app.command()
@one_message()
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="What sample.py takes.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a new file.")],
    format: Annotated[
        Literal["diffusers", "safetensors", "onnx"], typer.Option(help="What to write.")
    ] = "diffusers",
    weights: Weights = "ema",
    license: Annotated[str, typer.Option(help="For the model card: mit, cc-by-4.0")] = "unknown",
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
