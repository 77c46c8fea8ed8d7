"""Measure images/s of one global batch on 1 and on 2 processes of one thread each, in turn.

python benchmarks/scaling.py [ROUNDS]
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile

COMMAND = (
    "train.py configs/digits.yml training.batch_size=64 training.max_steps=120 "
    "logging.log_every=20 evaluation.validate_every=0 logging.preview_every=0 "
    "logging.save_every=0 hardware.accelerator=cpu"
)


def images_per_second(devices: int, folder: str) -> float:
    arguments = [
        *COMMAND.split(),
        f"hardware.devices={devices}",
        f"logging.results_folder={folder}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s", output)]
    return statistics.median(rates[1:])  # the first holds the warm-up


def main(rounds: int) -> None:
    rates = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for devices in rates:
                rates[devices].append(images_per_second(devices, folder))
    for devices, values in rates.items():
        print(f"{devices} process(es): median {statistics.median(values):.0f} images/s of {values}")
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"ratio 2 to 1, round by round: median {statistics.median(ratios):.2f} of {ratios}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
