"""Measure what the yardsticks of a dataset take: python benchmarks/health.py [--write]."""

import sys
import tempfile
import time
from pathlib import Path

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from benchmarks.common import environment, markdown, publish, report
from config import load_config
from dataset import Images
from diffusion_utils import GaussianDiffusion
from evaluation.yardsticks import get_yardsticks
from training.datamodule import open_images

SETS = {  # by shape: training images, flips
    (1, 28, 28): (60_000, False),
    (3, 32, 32): (50_000, True),
    (3, 64, 64): (30_000, True),
    (3, 256, 256): (6_000, True),
}


def smooth(count: int, shape: tuple[int, int, int], seed: int) -> Images:
    """Return images in memory whose pixels are correlated."""
    random, pixels = np.random.default_rng(seed), np.empty((count, *shape), np.uint8)
    for start in range(0, count, 500):
        block = pixels[start : start + 500]
        x = random.normal(size=block.shape).astype(np.float32).cumsum(-1).cumsum(-2)
        block[:] = (128 + 60 * x / x.std()).clip(0, 255)
    return Images(pixels)


def main() -> None:
    config = load_config("configs/digits.yml")
    diffusion = GaussianDiffusion(**config.diffusion.model_dump())
    sets = {"digits, 1x8x8": (open_images(config), False)}
    rows = []
    for shape in [None, *SETS]:
        if shape:
            count, flips = SETS[shape]
            images = {"train": smooth(count, shape, 0), "validation": smooth(2000, shape, 1)}
            sets = {f"{count:,} smooth images, {'x'.join(map(str, shape))}": (images, flips)}
        for name, (images, flips) in sets.items():
            report(name)
            seconds = []
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(2):  # measured, then read
                    start = time.perf_counter()
                    how = {"flips": flips, "cache": Path(folder), "say": report}
                    found = get_yardsticks(images, diffusion, **how)
                    seconds.append(time.perf_counter() - start)
            sampled = [f"{n:,}" for n in found.sampled]
            rows.append([name, f"{seconds[0]:.1f}", f"{seconds[1]:.2f}", *sampled])
    heads = ["training images", "s, once", "s, from the cache", "in the spectrum", "the memoriser"]
    text = f"{environment(torch.device('cpu'))}\n\n{markdown([*heads, 'copies'], rows)}"
    publish("Yardsticks of a dataset", text, write="--write" in sys.argv)


if __name__ == "__main__":
    main()
