"""Guidance scale and interval against accuracy, FID and recall. From the project's folder:

python benchmarks/extractor.py configs/digits.yml digits.pt
python benchmarks/guidance.py lightning_logs/digits digits.pt --num-images 2000
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

SCALES = 0.0, 1.0, 1.5, 2.0, 3.0, 5.0
COLUMNS = "accuracy", "FID", "precision", "recall"


def main(
    checkpoint: Path,
    extractor: Path,
    num_images: Annotated[int, typer.Option(help="Images of each row.")] = 2000,
    timesteps: Annotated[int, typer.Option(help="Steps of dpm++.")] = 20,
    interval: Annotated[str, typer.Option(help="Of the second table, in noise levels.")] = "0.3,5",
) -> None:
    """Print a Markdown table: each scale at all noise levels, then within the interval."""
    print(f"| scale | interval | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|", flush=True)
    for levels in ("", interval):
        for scale in SCALES if not levels else [s for s in SCALES if s > 1]:
            options = ["--guidance-scale", f"{scale:g}"]
            options += ["--guidance-interval", levels] if levels else []
            scores = measure(checkpoint, extractor, num_images, timesteps, options)
            values = [scores.get(name) for name in COLUMNS]
            shown = ["" if v is None else f"{v:.3f}" for v in values]
            print(f"| {scale:g} | {levels or 'all'} | {' | '.join(shown)} |", flush=True)


def measure(
    checkpoint: Path, extractor: Path, count: int, timesteps: int, options: list[str]
) -> dict[str, float]:
    """Return the scores of an evaluation, FID-2000 as FID."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "evaluate.py", checkpoint, "--metrics", "fid,is,pr"]
        command += ["--num-images", str(count), "--extractor", extractor, "--sampler", "dpm++"]
        command += ["--timesteps", str(timesteps), "--output", folder, *options]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        scores = json.loads(Path(folder, "metrics.json").read_text())["scores"]
    return {name.partition("-")[0]: score["value"] for name, score in scores.items()}


if __name__ == "__main__":
    typer.run(main)
