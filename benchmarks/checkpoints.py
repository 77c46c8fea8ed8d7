"""Seconds and bytes of one checkpoint at the paper's settings, and their share of training.

python benchmarks/checkpoints.py [FOLDER]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import read_checkpoint, write_checkpoint
from config import load_config
from pl_utils import DDPM

PAPER_STEPS_PER_SECOND = {"cifar10": 21.0, "celeba": 2.2}  # on 8 TPU v3 cores (appendix B)


def main(folder: Path) -> None:
    print(
        "config, MB, seconds to write (median of 3), to check and read, share at the paper's speed"
    )
    for name, speed in PAPER_STEPS_PER_SECOND.items():
        config = load_config(f"configs/{name}.yml")
        ddpm = DDPM(config)
        optimizer = ddpm.configure_optimizers()
        for parameter in ddpm.unet.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        checkpoint = {
            "global_step": 1,
            "state_dict": ddpm.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "hyper_parameters": config.model_dump(mode="json"),
        }
        path, seconds = folder / f"{name}.ckpt", []
        for _ in range(3):
            began = time.perf_counter()
            write_checkpoint(checkpoint, path)
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        read_checkpoint(path)
        read = time.perf_counter() - began
        write = statistics.median(seconds)
        share = write / (config.training.save_every / speed + write)
        size = path.stat().st_size / 1e6
        print(f"{name}, {size:,.0f}, {write:.2f}, {read:.2f}, {share:.2%}")
        path.unlink()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(dir=".") as temporary:
            main(Path(temporary))
