"""Measure whether the data keeps up: a part of profile.py."""

import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.common import Options, markdown, report
from dataset import Images
from training.datamodule import train_batches

# what an H200 consumes at 40% of 790 TFLOP/s, images/s
CONSUMED = {32: 8500, 256: 212}


def array_loader(
    options: Options, count: int, workers: int = 0, file: Path | None = None
) -> DataLoader:
    """Return the train loader over `count` random images, in memory or in a memory-mapped file."""
    size = options.image_size
    shape, random = (count, 3, size, size), np.random.default_rng(0)
    if file:
        pixels = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
        for start in range(0, count, 100):
            block = pixels[start : start + 100]
            block[:] = random.integers(0, 256, block.shape, np.uint8)
        pixels.flush()
    else:
        pixels = random.integers(0, 256, shape, np.uint8)
    config = options.config(f"hardware.num_workers={workers}")
    return train_batches(Images(file or pixels), config)


def loader_table(options: Options, seconds: float) -> str:
    rows = []
    sets = (32, 128, 50_000, (0, 4)), (32, 128, 1_000_000, (0,)), (256, 64, 3000, (0, 4))
    for size, batch, count, some in sets:
        sized = options._replace(image_size=size, batch_size=batch)
        for workers in some:
            report(f"loader: {size}x{size}, {workers} workers")
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "images.npy") if size == 256 else None
                batches = iter(array_loader(sized, count, workers, file))
                for _ in range(10):
                    next(batches)
                began, done = time.perf_counter(), 0
                while (now := time.perf_counter()) - began < seconds:
                    next(batches)
                    done += batch
                rate = done / (now - began)
                del batches  # and its workers
            kind = "in memory" if size == 32 else "memory-mapped"
            ratio = f"{rate / CONSUMED[size]:.1f}"
            what = f"{size}x{size}, {count:,} images {kind}"
            rows.append([what, str(workers), f"{rate:,.0f}", f"{CONSUMED[size]:,}", ratio])
    heads = ["", "workers", "images/s", "an H200 takes", "times as much"]
    return (
        markdown(heads, rows)
        + "\n\nThe loader alone, batches of 128 and 64. An H200 takes what 40% of 790 TFLOP/s "
        "need; the memory-mapped file is in the page cache."
    )
