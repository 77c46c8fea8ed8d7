"""Whether the data keeps up: a part of profile.py."""

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.common import Options, markdown, report
from data import Data
from dataset import Pictures

# what an H200 consumes at 40% of 790 TFLOP/s, images/s
CONSUMED = {32: 8500, 256: 212}


def array_loader(options: Options, count: int, workers: int = 0, file: Path | None = None):
    """Data's train loader over `count` random pictures, in memory or in a memory-mapped file."""
    size = options.image_size
    shape, random = (count, 3, size, size), np.random.default_rng(0)
    if file:
        pictures = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
        for start in range(0, count, 100):
            pictures[start : start + 100] = random.integers(
                0, 256, pictures[start : start + 100].shape, np.uint8
            )
        pictures.flush()
    else:
        pictures = random.integers(0, 256, shape, np.uint8)
    data = Data(options.config(f"training.num_workers={workers}"))
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    data.pictures = {"train": Pictures(file or pictures)}
    return data.train_dataloader()


def loader_table(options: Options, seconds: float) -> str:
    rows = []
    sets = (32, 128, 50_000, (0, 4)), (32, 128, 1_000_000, (0,)), (256, 64, 3000, (0, 4))
    for size, batch, count, some in sets:
        sized = options._replace(image_size=size, batch_size=batch)
        for workers in some:
            report(f"loader: {size}x{size}, {workers} workers")
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "pictures.npy") if size == 256 else None
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
            what = f"{size}x{size}, {count:,} pictures {kind}"
            rows.append([what, str(workers), f"{rate:,.0f}", f"{CONSUMED[size]:,}", ratio])
    heads = ["", "workers", "images/s", "an H200 takes", "times as much"]
    return (
        markdown(heads, rows)
        + "\n\nThe loader alone, batches of 128 and 64. An H200 takes what 40% of 790 TFLOP/s "
        "need; the memory-mapped file is in the page cache."
    )
