#!/usr/bin/env python3
"""Train a diffusion model from one YAML file."""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

import shlex
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track

from cli import (
    EXPECTED,
    Overrides,
    fail,
    is_main_process,
    plain_console,
    quiet_libraries,
    usable_device,
)
from config import Config, load_config
from files import differences, to_yaml

if TYPE_CHECKING:
    from pl_utils import DDPM
    from training.runs import Start
    from weights import ModelFiles

HELP = """
Train a diffusion model from one YAML file.

Losses and samples go to TensorBoard, checkpoints to lightning_logs/RUN/checkpoints. Ctrl-C saves
and stops; --continue-training goes on as if nothing had happened.

Examples:

\b
  python train.py configs/digits.yml
  python train.py configs/cifar10.yml training.batch_size=64 --run-name small
  python train.py configs/cifar10.yml training.batch_size=64 --run-name small \\
      --continue-training
  python train.py configs/cifar10.yml --dry-run --dollars-per-hour 3.50
  tensorboard --logdir lightning_logs
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
def train(
    config_file: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A YAML file; without one, configs/ is listed."),
    ] = None,
    overrides: Overrides = None,
    run_name: Annotated[
        str | None, typer.Option(help="The run's folder in lightning_logs. Default: the config's.")
    ] = None,
    continue_training: Annotated[
        bool, typer.Option("--continue-training", help="Continue from the newest good checkpoint.")
    ] = False,
    checkpoint_path: Annotated[
        Path | None,
        typer.Option(
            help="Continue from this checkpoint. Weights alone (a converted checkpoint, a "
            "diffusers folder, a safetensors file) start a new run: fine-tuning."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only measure what the run will take, and its cost.")
    ] = False,
    dollars_per_hour: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="Price of all its hardware; implies --dry-run."),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many images into RUN/samples when training has ended."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole config, explained, and exit.")
    ] = False,
) -> None:
    console = plain_console(quiet=not is_main_process())
    if config_file is None:
        list_configs(console)
        raise typer.Exit(2)
    start, code = None, 0
    try:
        config = load_config(config_file, overrides or ())
        if print_config:
            print(to_yaml(config), end="")
        elif dry_run or dollars_per_hour is not None:
            if run_name or continue_training or checkpoint_path or sample:
                raise ValueError("--dry-run measures a run from its start: give no other options")
            quiet_libraries()
            from dataset import with_facts
            from training.dry_run import measure

            if is_main_process():
                with console.status("measuring a few steps"):
                    try:
                        config = with_facts(config)
                    except FileNotFoundError as error:
                        if config.training.max_epochs:
                            counts = "training.max_epochs counts the images"
                            hint = "--dry-run without them takes training.max_steps"
                            raise ValueError(f"{counts}: {error}; {hint}") from None
                    rows = measure(config, dollars_per_hour)  # of random images where none are
                for name, text in rows.items():
                    console.print(f"{name}: {text}")
        else:
            from training.runs import find_start

            start = find_start(
                config,
                run_name or config_file.stem,
                chosen=run_name is not None,
                continue_training=continue_training,
                checkpoint_path=checkpoint_path,
                is_main=is_main_process(),
            )
            console.print(f"run folder: {start.run}")
            quiet_libraries()
            code = fit(config, start, console)
            if sample and not code and is_main_process():
                code = draw_samples(start.run, sample, config.hardware.accelerator, console)
    except KeyboardInterrupt:
        console.print("stopped before the first step; nothing was saved")
        code = 130
    except Exception as error:
        code = fail(error)
    if start:
        start.release(untouched=code == 2)
        if start.run.is_dir():
            console.print(f"run folder: {start.run}")
    raise typer.Exit(code)


def fit(config: Config, start: "Start", console: Console) -> int:
    """Train, and say how it ended; return the exit code."""
    from dataset import with_facts
    from evaluation.callback import Evaluation, HealthCheck
    from pl_utils import DDPM
    from training import Checkpoints, ImageData, Interrupted, build_trainer
    from training.runs import check_continuation

    bar = partial(track, description="Decoding images", console=console, transient=True)
    run, config = start.run, with_facts(config, bar)
    if start.checkpoint and not check_continuation(config, *start.checkpoint, console.print):
        return 0
    goes_on = (
        f"python train.py {shlex.quote(str(run / 'config.yml'))} "
        f"--run-name {shlex.quote(run.name)} --continue-training"
    )

    def report(error: BaseException, last_checkpoint: Path | None) -> None:
        if isinstance(error, OSError) and error.strerror and not error.filename:
            error.filename = str(run)  # a write that fails does not know of what
        fail(error)
        if not isinstance(error, EXPECTED):
            with suppress(OSError):  # the disk may be what failed
                (run / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
                console.print(f"details: {run / 'error.log'}")
        if last_checkpoint:
            console.print(f"the last checkpoint: {last_checkpoint}")
        if last_checkpoint or (isinstance(error, OSError) and (run / "config.yml").is_file()):
            console.print(f"to continue: {goes_on}")

    path, step = None, 0
    if start.checkpoint:
        path, step = start.checkpoint[0], start.checkpoint[1]["global_step"]
    trainer = build_trainer(config, run, console, loaded=start.checkpoint, on_failure=report)
    if config.evaluation.evaluate_every:
        trainer.callbacks.append(Evaluation(config, console))  # type: ignore[attr-defined]
    if config.evaluation.validate_every:
        trainer.callbacks.append(HealthCheck(config, console, step))  # type: ignore[attr-defined]
    start.checkpoint = None  # the trainer has it: memory for one, not for two
    data, ddpm = ImageData(config), DDPM(config)
    if start.weights:
        fine_tune(ddpm, start.weights, console)
    checkpoints = Checkpoints.of(trainer)
    try:
        trainer.fit(ddpm, data, ckpt_path=path, weights_only=True)
    except SystemExit:  # Lightning's way out of a Ctrl-C before the first step
        raise KeyboardInterrupt from None
    except Interrupted as signal:
        console.print(
            f"{signal}: stopped after step {trainer.global_step:,}, saved {checkpoints.last}\n"
            f"to continue: {goes_on}"
        )
        # a launcher would take another rank's code for a crash
        return 128 + signal.signum if is_main_process() else 0
    except Exception:  # `report` has said it
        return 1 if checkpoints.began else 2
    curves = {
        "tensorboard": f"tensorboard --logdir {run.parent}",
        "csv": f"{run}/csv/*/metrics.csv",
        "wandb": "the page that wandb has named",
    }
    console.print(
        f"trained {trainer.global_step:,} steps; checkpoint: {run / 'checkpoints' / 'last.ckpt'}\n"
        f"to sample: python sample.py {run} --num-images 8\n"
        f"to look at the curves: {curves[config.logging.logger[0]]}"
    )
    return 0


def draw_samples(run: Path, count: int, accelerator: str, console: Console) -> int:
    """Draw images into RUN/samples, as `sample.py RUN` does; return the exit code."""
    from training.samples import draw_into

    folder = run / "samples"
    try:
        device = usable_device("cuda" if accelerator == "gpu" else accelerator)
        draw_into(folder, run, count, device, console)
    except KeyboardInterrupt:
        console.print(
            f"stopped; the run is whole, and what is finished is in {folder}: --continue-training "
            f"--sample {count} draws the rest"
        )
        return 130
    except Exception as error:
        console.print("the run is whole; its images are not:")
        fail(error)
        return 1
    return 0


def fine_tune(ddpm: "DDPM", files: "ModelFiles", console: Console) -> None:
    """Begin from weights alone: both sets from their EMA."""
    from weights import copy_tensors, starting_weights

    state = starting_weights(files, ddpm.config)
    for network in (ddpm.unet, ddpm.ema):
        copy_tensors(network, state, files.path)
    step = f", after {files.step:,} steps" if files.step else ""
    console.print(f"weights from {files.path}{step}; a fresh optimizer, step 0")
    for line in differences(files.config, ddpm.config):
        if line.startswith(("model.", "diffusion.", "dataset.classes")):
            console.print(f"not as where they come from: {line}")
    if state is not files.ema:
        console.print("other labels: it begins as the model is without one")


def list_configs(console: Console) -> None:
    """Print one line for each config."""
    console.print("python train.py CONFIG; there are:\n")
    here = Path("configs") if Path("configs").is_dir() else Path(__file__).with_name("configs")
    for path in sorted(here.glob("*.yml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        about = first.removeprefix("#").strip() if first.startswith("#") else ""
        console.print(f"  {path!s:<28}  {about}")
    console.print(f"\nto begin with: python train.py {here / 'digits.yml'}; more: --help")


if __name__ == "__main__":
    app()
