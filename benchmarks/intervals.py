"""Measure what checkpoints, previews and validation add to the steps, at the paper's settings."""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer

from benchmarks.common import ROOT, environment, markdown, publish, report
from config import load_config
from generation import quick_steps
from pl_utils import DDPM
from training.dry_run import Seconds, flops_per_image, project, validation_calls
from training.hardware import timed
from weights import read_checkpoint, write_checkpoint

SPEEDS = {"cifar10": 21.0, "celeba": 2.2}  # steps a second on 8 TPU v3 cores (appendix B)
VALIDATION = {"cifar10": 10_000, "celeba": 0}  # images
H200 = 0.4 * 790e12  # FLOP/s
CPU = torch.device("cpu")


def measure(name: str, folder: Path, rounds: int) -> list[str]:
    """Return a row of the table."""
    report(name)
    config = load_config(ROOT / f"configs/{name}.yml")
    training, logging, ddpm = config.training, config.logging, DDPM(config)
    optimizer = ddpm.configure_optimizers()
    for parameter in ddpm.unet.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    contents = {
        "global_step": 1,
        "state_dict": ddpm.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": config.model_dump(mode="json"),
    }
    path = folder / f"{name}.ckpt"
    write = statistics.median(
        timed(lambda: write_checkpoint(contents, path), CPU) for _ in range(rounds)
    )
    read = timed(lambda: read_checkpoint(path), CPU)

    forward, backward = (flops / H200 for flops in flops_per_image(config))
    calls = logging.preview_images * len(quick_steps(ddpm.diffusion))
    validation = forward * validation_calls(ddpm, VALIDATION[name], 30_000)
    once = Seconds(backward * training.batch_size, forward * calls, validation, write)
    whole = project(config, once)
    parts = [whole.checkpoint, whole.preview, whole.validation, sum(whole) - whole.step]
    tpu = write / (logging.save_every / SPEEDS[name] + write)
    shares = [f"{part / sum(whole):.2%}" for part in parts]
    return [
        name,
        f"{path.stat().st_size / 1e6:,.0f}",
        f"{write:.2f}",
        f"{read:.2f}",
        f"{tpu:.2%}",
        *shares,
    ]


def main(
    folder: Annotated[Path, typer.Argument(help="On the disk to be measured.")] = Path("."),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    write: Annotated[bool, typer.Option("--write", help="Into benchmarks/RESULTS.md.")] = False,
):
    heads = ["", "MB", "s to write", "s to check and read", "checkpoints, TPU"]
    heads += ["checkpoints, H200", "previews", "validation", "together"]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        rows = [measure(name, Path(temporary), rounds) for name in SPEEDS]
    publish(
        "What is done beside the steps",
        f"{environment(CPU)}\n\n{markdown(heads, rows)}\n\n"
        f"A checkpoint is written, forced to disk and renamed; median of {rounds}, on the disk of "
        "this machine. The shares are of the whole run with the intervals as shipped: on 8 TPU v3 "
        "cores at the speed that the paper reports (21 and 2.2 steps a second), and on an H200 if "
        "it did 40% of 790 TFLOP/s, network calls in previews and validation too.",
        write=write,
    )


if __name__ == "__main__":
    typer.run(main)
