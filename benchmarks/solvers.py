"""FID of each solver by network calls, with trailing spacing. From the project's folder:

python benchmarks/extractor.py configs/digits.yml digits.pt
python benchmarks/solvers.py pretrained/digits.safetensors digits.pt
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

SOLVERS = {
    "ddpm large": ["--sampler", "ddpm", "--variance", "large"],
    "ddpm small": ["--sampler", "ddpm", "--variance", "small"],
    "ddim": ["--sampler", "ddim", "--eta", "0"],
    "sde-dpm++": ["--sampler", "sde-dpm++"],
    "heun": ["--sampler", "heun"],
    "dpm++": ["--sampler", "dpm++"],
    "dpm++3": ["--sampler", "dpm++3"],
    "unipc": ["--sampler", "unipc"],
}


def main(
    checkpoint: Path,
    extractor: Path,
    calls: Annotated[str, typer.Option(help="Network calls.")] = "5,8,10,15,20,50",
    only: Annotated[str, typer.Option(help="Some of the solvers, by comma.")] = ",".join(SOLVERS),
    num_images: Annotated[int, typer.Option(help="Images of each number.")] = 2000,
    spacing: str = "trailing",
) -> None:
    """Print a Markdown table; the images of all numbers begin in the same noise.

    `heun` asks twice in all steps but the first and the last: an odd number has one call less.
    """
    counts = [int(count) for count in calls.split(",")]
    print(f"| solver | {' | '.join(map(str, counts))} |")
    print("|---" * (1 + len(counts)) + "|", flush=True)
    for name in only.split(","):
        print(f"| {name} |", end="", flush=True)
        for count in counts:
            steps = count // 2 + 1 if name == "heun" else count
            options = [*SOLVERS[name], "--timesteps", str(steps), "--spacing", spacing]
            print(f" {fid(checkpoint, extractor, num_images, options):.3f} |", end="", flush=True)
        print(flush=True)


def fid(checkpoint: Path, extractor: Path, count: int, options: list[str]) -> float:
    """Return the FID of an evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "evaluate.py", checkpoint, "--metrics", "fid"]
        command += ["--num-images", str(count), "--extractor", extractor, "--output", folder]
        command = [str(part) for part in (*command, *options)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        scores = json.loads(Path(folder, "metrics.json").read_text())["scores"]
    return next(score["value"] for name, score in scores.items() if name.startswith("FID"))


if __name__ == "__main__":
    typer.run(main)
