"""Train a diffusion model from one YAML file."""

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from config import MAY_CHANGE, Config, check_config, differences, load_config, to_yaml

HELP = """
Train a diffusion model from one YAML file.

Losses and the average's samples go to TensorBoard, checkpoints to lightning_logs/RUN/checkpoints.
Ctrl-C saves and stops; --continue-training goes on as if nothing had happened.

Examples:

  python train.py configs/digits.yml

  python train.py configs/cifar10.yml training.batch_size=64 model.dropout=0 --run-name small-batch

  python train.py configs/cifar10.yml --run-name small-batch --continue-training

  tensorboard --logdir lightning_logs
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
def train(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/cifar10.yml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that win over the file's."),
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
        typer.Option(help="Go on from this checkpoint; implies --continue-training."),
    ] = None,
):
    is_main = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0
    console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
    run = None
    try:
        config = load_config(config_file, overrides or ())
        results = Path(config.training.results_folder)
        name = check_name(run_name or config_file.stem)

        if checkpoint_path or continue_training:
            run, checkpoint_path = find_run(results, name, run_name, checkpoint_path)
        else:
            run = new_run(results, name, explicit=run_name is not None)
        console.print(f"run folder: {run}")
        quiet_libraries()
        code = fit(config, run, checkpoint_path, console)
    except KeyboardInterrupt:
        console.print("stopped before the first step; nothing was saved")
        code = 130
    except (ValueError, OSError) as error:
        fail(error)
        code = 2
    if run:
        console.print(f"run folder: {run}")
    raise typer.Exit(code)


def fit(config: Config, run: Path, checkpoint_path: Path | None, console: Console) -> int:
    """Train, and say how it ended; the exit code. Raises what goes wrong before the first step."""
    from callbacks import Interrupted
    from checkpoint import read_checkpoint
    from pl_utils import DDPM, Data, build_trainer

    step = 0
    if checkpoint_path:
        checkpoint = read_checkpoint(checkpoint_path)
        step = checkpoint["global_step"]
        old = check_config(checkpoint["hyper_parameters"], source=str(checkpoint_path))
        if changed := differences(old, config, ignore=MAY_CHANGE):
            lines = "\n".join(f"  {line}" for line in changed)
            raise ValueError(
                f"this config is not that of {checkpoint_path}:\n{lines}\n"
                "Continue with the same values (overrides too), or start another run."
            )
        for line in differences(old, config):
            console.print(f"changed: {line}")
        if step >= config.training.max_steps:
            console.print(
                f"{checkpoint_path} has all {step:,} steps of training.max_steps; "
                "give a larger one to train on"
            )
            return 0
        console.print(f"continuing from {checkpoint_path} (step {step:,})")

    trainer = build_trainer(config, run, console, resumed_step=step)
    data, ddpm = Data(config), DDPM(config)
    if trainer.is_global_zero:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yml").write_text(to_yaml(config), encoding="utf-8")
    summarise(ddpm, trainer, console)
    checkpoints = trainer.callbacks[-1]
    command = f"python train.py {run / 'config.yml'} --run-name {run.name} --continue-training"
    try:
        trainer.fit(ddpm, data, ckpt_path=checkpoint_path, weights_only=True)
    except Interrupted as signal:
        console.print(
            f"{signal}: stopped after step {trainer.global_step:,}, saved {checkpoints.last}\n"
            f"to go on: {command}"
        )
        return 128 + signal.signum
    except Exception as error:
        if trainer.global_step == step and isinstance(error, ValueError | OSError):
            raise
        log = run / "error.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        fail(error)
        console.print(f"the last checkpoint: {checkpoints.last or 'none yet'}; details: {log}")
        if checkpoints.last:
            console.print(f"to go on: {command}")
        return 1
    console.print(
        f"trained {trainer.global_step:,} steps; checkpoint: {run / 'checkpoints' / 'last.ckpt'}\n"
        f"to sample: python sample.py {run} --num-images 8\n"
        f"to look at the curves: tensorboard --logdir {run.parent}"
    )
    return 0


def find_run(
    results: Path, name: str, run_name: str | None, checkpoint: Path | None
) -> tuple[Path, Path]:
    """The folder to go on in, and the checkpoint to go on from."""
    from checkpoint import newest_checkpoint

    if checkpoint is None:
        runs = [p for p in results.glob(f"{name}*") if p.name == name or is_numbered(p.name, name)]
        runs = [results / name] if run_name else sorted(runs, key=last_change, reverse=True)
        if not runs or not runs[0].is_dir():
            there = ", ".join(sorted(p.name for p in results.glob("*") if p.is_dir()))
            raise FileNotFoundError(
                f"no run {results / name} to continue"
                + (f"; there are: {there}" if there else "; leave out --continue-training")
            )
        return runs[0], newest_checkpoint(runs[0])
    if checkpoint.is_dir():
        checkpoint = newest_checkpoint(checkpoint)
    elif not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    if run_name:
        return results / name, checkpoint
    home = checkpoint.parent.parent
    inside = checkpoint.parent.name == "checkpoints" and (home / "config.yml").is_file()
    return home if inside else new_run(results, name, explicit=False), checkpoint


def new_run(results: Path, name: str, *, explicit: bool) -> Path:
    """A folder that holds no run yet: `name`, or name-2, name-3, ... unless the name was chosen."""
    if explicit and (results / name / "config.yml").exists():
        raise ValueError(
            f"{results / name} holds a run: add --continue-training to go on with it, or choose "
            "another --run-name"
        )
    run, number = results / name, 1
    while (run / "config.yml").exists():
        number += 1
        run = results / f"{name}-{number}"
    return run


def is_numbered(folder: str, name: str) -> bool:
    return folder.startswith(f"{name}-") and folder.removeprefix(f"{name}-").isdigit()


def last_change(run: Path) -> float:
    return max((p.stat().st_mtime for p in run.glob("checkpoints/*.ckpt")), default=0.0)


def check_name(name: str) -> str:
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name:
        raise ValueError(f"--run-name {name!r} must be a plain name, without folders")
    return name


def summarise(ddpm, trainer, console: Console) -> None:
    config = ddpm.config
    training, data = config.training, config.dataset
    parameters = sum(p.numel() for p in ddpm.unet.parameters())
    share = training.batch_size // trainer.world_size
    micro = training.micro_batch_size or share
    console.print(
        f"model: {parameters:,} parameters, {data.channels}x{data.image_size}x{data.image_size}, "
        f"T = {config.diffusion.timesteps}\n"
        f"data: {data.name}, flips {'on' if data.random_flip else 'off'}\n"
        f"training: {training.max_steps:,} steps of {training.batch_size} pictures = "
        f"{trainer.world_size} device(s) x {share // micro} micro-batch(es) x {micro}, "
        f"learning rate {training.learning_rate:g}, EMA {training.ema_decay}, "
        f"seed {training.seed}"
    )


def quiet_libraries() -> None:
    """Lightning's tips and hardware lines are not about this run."""
    import pytorch_lightning  # noqa: F401  (it sets its level when it is imported)

    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")


def fail(error: BaseException) -> None:
    print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    app()
