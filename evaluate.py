#!/usr/bin/env python3
"""Measure a model as the paper did, with the recipe beside the number."""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

import signal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli import (
    CheckpointName,
    Device,
    Precision,
    Seed,
    Weights,
    checkpoint_of,
    fail,
    is_main_process,
    plain_console,
    quiet_libraries,
    sampling_options,
    usable_device,
)

HELP = """
Measure a model as the paper did, with the recipe beside the number.

SOURCE is a checkpoint, a run's folder, a diffusers folder or .safetensors; or images as they are,
a folder or zip of one size; or a config, whose validation images are measured: as good as it gets.

fid, is, kid and pr (precision and recall) are torch-fidelity's; nll is the variational bound, in
bits per dimension; health compares the loss with what the data allow, and looks for copies of
training images. The numbers go to metrics.json, with all that is needed to get them again. The
paper takes 50,000 images by its sampler of T steps, against all that it trained on; for health
alone it is 256, by 10 steps.

Examples:

\b
  python evaluate.py lightning_logs/cifar10
  python evaluate.py lightning_logs/cifar10 --metrics fid,kid --num-images 5000 \\
      --sampler dpm++ --timesteps 20 --save-images
  python evaluate.py lightning_logs/cifar10 --metrics health
  python evaluate.py samples --reference data/faces.zip
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
@sampling_options
def evaluate(
    sampling: dict[str, Any],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What is measured.")],
    which: CheckpointName = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Any of fid,is,kid,pr,nll,health. Default: all that apply but health."),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=2, help="Number of images. Default: 50,000, or all there are.")
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            metavar="train|validation|FOLDER|ZIP|CONFIG|FILE.npz",
            help="Real images: of the model's dataset; others; or saved statistics of some.",
        ),
    ] = "train",
    output: Annotated[Path | None, typer.Option(help="Folder; default: evaluations/NAME.")] = None,
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Keep the images; a stopped run continues.")
    ] = False,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="Feature extractor: torch-fidelity's name, or a TorchScript file. Default: "
            "inception-v3-compat; for health alone the network itself."
        ),
    ] = None,
    extractor_weights: Annotated[
        Path | None, typer.Option(help="Its weights, where they cannot be downloaded.")
    ] = None,
    split: Annotated[
        Literal["train", "validation"] | None,
        typer.Option(help="Split for nll, or of a config. Default: validation, if there is one."),
    ] = None,
    nll_images: Annotated[
        int | None, typer.Option(min=1, help="Images for nll. Default: all.")
    ] = None,
    stride: Annotated[int, typer.Option(min=1, help="Estimate nll from each STRIDE-th t.")] = 1,
    seed: Seed = 0,
    weights: Weights = "ema",
    precision: Precision = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time on a device.")] = 64,
    device: Device = "auto",
    devices: Annotated[int | None, typer.Option(min=1, help="Default: all GPUs, or 1 CPU.")] = None,
) -> None:
    asked = dict(locals())  # as `Options` has them, one by one
    console = plain_console(quiet=not is_main_process())
    began, goes_on = False, "nothing is kept without --save-images"
    try:
        quiet_libraries()
        from evaluation.distributed import OnEachDevice, build_predictor
        from evaluation.run import Measurement, Options

        asked["device"] = usable_device(device)
        asked["source"] = checkpoint_of(source, asked.pop("which"))
        trainer = build_predictor(asked["device"], devices)
        measurement = Measurement(Options(**asked), console)
        if save_images:
            goes_on = f"the images are in {measurement.folder}; the same command continues"
        began = True
        trainer.predict(OnEachDevice(measurement.work, *measurement.networks()))
        if trainer.is_global_zero:
            measurement.report(trainer.world_size)
    except (KeyboardInterrupt, SystemExit):  # the second is what Lightning makes of the first
        console.print(f"stopped; {goes_on}")
        raise typer.Exit(130) from None
    except Exception as error:
        fail(error)
        if began and (launcher := trainer.strategy.launcher):
            launcher.kill(signal.SIGKILL)  # the ranks started from here; they would work on alone
        raise typer.Exit(1 if began else 2) from None


if __name__ == "__main__":
    app()
