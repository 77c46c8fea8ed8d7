#!/usr/bin/env python3
"""Train a diffusion model from one YAML file."""

if __name__ == "__main__":
    import terminal

    terminal.guard()  # before a package that may be missing is imported

import os
import shlex
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from config import (
    MAY_CHANGE,
    Config,
    check_config,
    differences,
    keys_like,
    load_config,
    to_yaml,
)
from terminal import EXPECTED, fail, is_main_process, plain_console, quiet_libraries

HELP = """
Train a diffusion model from one YAML file.

Losses and the average's samples go to TensorBoard, checkpoints to lightning_logs/RUN/checkpoints.
Ctrl-C saves and stops; --continue-training goes on as if nothing had happened.

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
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE",
            help="Values that win over the file's.",
            autocompletion=keys_like,
        ),
    ] = None,
    run_name: Annotated[
        str | None,
        typer.Option(help="The run's folder in lightning_logs. Default: the config's name."),
    ] = None,
    continue_training: Annotated[
        bool,
        typer.Option("--continue-training", help="Go on from the run's newest good checkpoint."),
    ] = False,
    checkpoint_path: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this checkpoint. Weights alone (a converted checkpoint, a diffusers "
            "folder, a safetensors file) start a new run: fine-tuning."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only measure: time, memory and cost of the run, from a few of its steps.",
        ),
    ] = False,
    dollars_per_hour: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="What all its hardware costs; implies --dry-run."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole config, explained, and end.")
    ] = False,
):
    console = plain_console(quiet=not is_main_process())
    run = None
    if config_file is None:
        list_configs(console)
        raise typer.Exit(2)
    if (dry_run or dollars_per_hour is not None) and not print_config:
        if run_name or continue_training or checkpoint_path:
            wrong = "--dry-run measures a run from its start: leave the other options out"
            raise typer.Exit(fail(ValueError(wrong)))
        raise typer.Exit(measure_only(config_file, overrides or (), dollars_per_hour, console))
    try:
        config = load_config(config_file, overrides or ())
        if print_config:
            print(to_yaml(config), end="")
            raise typer.Exit(0)
        results = Path(config.training.results_folder)
        name = check_name(run_name or config_file.stem)

        requeued = os.environ.get("SLURM_RESTART_COUNT", "0").strip("0").isdigit()
        begun = runs_of(results, name, run_name) if requeued or continue_training else []
        requeued = requeued and bool(begun)
        saved = bool(begun) and has_checkpoint(begun[0])
        weights = None
        if requeued and saved:  # whatever it began from, it has gone on since
            checkpoint_path = None
        elif checkpoint_path and not goes_on_from(checkpoint_path):
            from weights import read_source

            weights = None if saved else read_source(checkpoint_path)  # that run has gone on
            checkpoint_path = None
        if requeued or checkpoint_path or (continue_training and (begun or not weights)):
            run, checkpoint_path = find_run(results, name, run_name, checkpoint_path)
        else:
            run = new_run(results, name, explicit=run_name is not None)
        console.print(f"run folder: {run}")
        quiet_libraries()
        code = fit(config, run, checkpoint_path, weights, console)
    except KeyboardInterrupt:
        console.print("stopped before the first step; nothing was saved")
        code = 130
    except typer.Exit:
        raise
    except Exception as error:
        code = fail(error)
    if run and run.is_dir():
        console.print(f"run folder: {run}")
    raise typer.Exit(code)


def measure_only(config_file: Path, overrides, dollars_per_hour, console: Console) -> int:
    """What --dry-run does; the exit code."""
    try:
        config = load_config(config_file, overrides)
        quiet_libraries()
        from dry_run import rehearse

        if is_main_process():
            rehearse(config, console, dollars_per_hour=dollars_per_hour)
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        return 130
    except Exception as error:
        return fail(error)
    return 0


def curves(config: Config, run: Path) -> str:
    """How to look at them, for the first of the loggers."""
    return (
        "to look at the curves: "
        + {
            "tensorboard": f"tensorboard --logdir {run.parent}",
            "csv": f"{run}/csv/*/metrics.csv",
            "wandb": "the page that wandb has named",
        }[config.training.logger[0]]
    )


def list_configs(console: Console) -> None:
    """One line for each."""
    console.print("python train.py CONFIG; there are:\n")
    here = Path("configs") if Path("configs").is_dir() else Path(__file__).with_name("configs")
    paths = sorted(here.glob("*.yml"))
    width = max(len(str(path)) for path in paths)
    for path in paths:
        console.print(f"  {path!s:<{width}}  {first_comment(path)}")
    console.print(f"\nto begin with: python train.py {here / 'digits.yml'}; more: --help")


def first_comment(path: Path) -> str:
    """What a config says of itself on its first line."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def fit(config: Config, run: Path, checkpoint_path: Path | None, weights, console: Console) -> int:
    """Train, and say how it ended; the exit code."""
    from callbacks import Checkpoints, Interrupted
    from data import Data
    from pl_utils import DDPM
    from trainer import build_trainer

    step = 0
    if checkpoint_path:
        step = check_continuation(config, checkpoint_path, console)
        if step >= config.training.max_steps:
            return 0
    goes_on = (
        f"python train.py {shlex.quote(str(run / 'config.yml'))} "
        f"--run-name {shlex.quote(run.name)} --continue-training"
    )

    def report(error: BaseException, last_checkpoint: Path | None) -> None:
        if isinstance(error, Interrupted | KeyboardInterrupt):
            return
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
            console.print(f"to go on: {goes_on}")

    trainer = build_trainer(
        config, run, console, resumed_from=checkpoint_path, step=step, on_failure=report
    )
    data, ddpm = Data(config), DDPM(config)
    if weights:
        fine_tune(ddpm, weights, console)
    checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
    try:
        trainer.fit(ddpm, data, ckpt_path=checkpoint_path, weights_only=True)
    except SystemExit:  # Lightning's way out of a Ctrl-C before the first step
        raise KeyboardInterrupt from None
    except Interrupted as signal:
        console.print(
            f"{signal}: stopped after step {trainer.global_step:,}, saved {checkpoints.last}\n"
            f"to go on: {goes_on}"
        )
        # a launcher would take another rank's code for a crash
        return 128 + signal.signum if is_main_process() else 0
    except Exception:  # `report` has said it
        return 1 if checkpoints.began else 2
    console.print(
        f"trained {trainer.global_step:,} steps; checkpoint: {run / 'checkpoints' / 'last.ckpt'}\n"
        f"to sample: python sample.py {run} --num-images 8\n" + curves(config, run)
    )
    return 0


def goes_on_from(path: Path) -> bool:
    """Whether `path` holds a run's whole state, rather than weights alone."""
    from checkpoint import can_continue, up_to_date

    return (path / "checkpoints").is_dir() or can_continue(up_to_date(path))


def fine_tune(ddpm, source, console: Console) -> None:
    """Begin from a `Source`: both sets of weights from its average."""
    ddpm.take(source._replace(raw=source.ema))
    step = f", after {source.step:,} steps" if source.step else ""
    console.print(f"weights from {source.path}{step}; a fresh optimizer, step 0")
    for line in differences(source.config, ddpm.config, ignore={"dataset", "training", "sampling"}):
        console.print(f"other than where they come from: {line}")


def check_continuation(config: Config, checkpoint_path: Path, console: Console) -> int:
    """The step that training goes on from. ValueError where `config` would make another run."""
    from checkpoint import read_checkpoint

    checkpoint = read_checkpoint(checkpoint_path)
    step = checkpoint["global_step"]
    old = check_config(checkpoint["hyper_parameters"], source=str(checkpoint_path))
    if changed := differences(old, config, ignore=MAY_CHANGE):
        lines = "\n".join(f"  {line}" for line in changed)
        raise ValueError(
            f"this config is not that of {checkpoint_path}:\n{lines}\n"
            "Continue with the same values (overrides too), or start another run. To begin it with "
            "these weights: `python convert.py export CKPT w.safetensors --format safetensors`, "
            "then --checkpoint-path w.safetensors."
        )
    for line in differences(old, config):
        rounding = line.startswith(("training.precision", "training.compile"))
        console.print(f"changed: {line}{' (from here on rounding differs)' if rounding else ''}")
    if step >= config.training.max_steps:
        console.print(
            f"{checkpoint_path} has all {step:,} steps of training.max_steps; "
            "give a larger one to train on"
        )
    else:
        console.print(f"continuing from {checkpoint_path} (step {step:,})")
    return step


def find_run(
    results: Path, name: str, run_name: str | None, checkpoint: Path | None
) -> tuple[Path, Path | None]:
    """The folder to go on in, and the checkpoint to go on from; None is from the start."""
    from checkpoint import newest_checkpoint, up_to_date

    if checkpoint is None:
        runs = runs_of(results, name, run_name)
        if not runs:
            there = ", ".join(sorted(p.name for p in results.glob("*") if p.is_dir()))
            raise FileNotFoundError(
                f"no run {results / name} to continue"
                + (f"; there are: {there}" if there else "; leave out --continue-training")
            )
        if not has_checkpoint(runs[0]):  # it ended before its first
            return runs[0], None
        return runs[0], newest_checkpoint(runs[0])
    if checkpoint.is_dir():
        checkpoint = newest_checkpoint(checkpoint)
    elif not (checkpoint := up_to_date(checkpoint)).is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    home = checkpoint.parent.parent
    inside = checkpoint.parent.name == "checkpoints" and (home / "config.yml").is_file()
    if inside and (not run_name or home.resolve() == (results / name).resolve()):
        return home, checkpoint
    return new_run(results, name, explicit=run_name is not None), checkpoint


def new_run(results: Path, name: str, *, explicit: bool) -> Path:
    """A folder that holds no run yet: `name`, or name-2, name-3, ... unless the name was chosen."""
    if explicit and is_main_process() and (results / name / "config.yml").exists():
        raise ValueError(
            f"{results / name} holds a run: choose another --run-name, or go on with it by "
            "--continue-training without a path"
        )
    run, number = results / name, 1
    while (run / "config.yml").exists():
        number += 1
        run = results / f"{name}-{number}"
    return run


def runs_of(results: Path, name: str, run_name: str | None) -> list[Path]:
    """The folders that --continue-training can mean, the one last worked on first."""
    runs = [p for p in results.glob(f"{name}*") if p.name == name or is_numbered(p.name, name)]
    runs = [results / name] if run_name else sorted(runs, key=last_change, reverse=True)
    return [run for run in runs if run.is_dir()]  # one without marks failed at its first write


def has_checkpoint(run: Path) -> bool:
    return any(run.glob("checkpoints/*.ckpt"))


def is_numbered(folder: str, name: str) -> bool:
    return folder.startswith(f"{name}-") and folder.removeprefix(f"{name}-").isdigit()


def last_change(run: Path) -> float:
    marks = [*run.glob("checkpoints/*.ckpt"), *run.glob("config.yml")]
    return max((p.stat().st_mtime for p in marks), default=0.0)


def check_name(name: str) -> str:
    if not name.strip() or name[0] in ".~" or set(name) & set("/\\*?[]\0"):
        raise ValueError(
            f"a run cannot be called {name!r}: give a --run-name without / \\ * ? [ ] that begins "
            "with neither . nor ~"
        )
    return name


if __name__ == "__main__":
    app()
