"""Print the table of hours and dollars of docs/speed.md: python docs/costs.py.

It is arithmetic: a run's FLOPs, counted as the dry run counts them, over a share of a GPU's peak.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import load_config
from training.dry_run import flops_per_image
from training.hardware import si

ROOT = Path(__file__).parent.parent
SHARE = 0.4  # of the peak
GPUS = {  # TFLOP/s, dense, bfloat16 summed in float32 (T4, which has no bfloat16: float32); $/hour
    "RTX 3060": (25.5, 0.10),
    "T4": (8.1, 0.35),
    "RTX 4090": (165, 0.40),
    "A100": (312, 1.50),
    "H100": (989, 2.50),
    "H200": (989, 3.50),
}


def cost(flops: float, peak: float, price: float) -> str:
    """Return '3.4 h, $1.20' of a run."""
    hours = flops / (SHARE * peak * 1e12) / 3600
    if hours < 0.1:  # launches and the host decide
        return "minutes"
    dollars = hours * price
    return f"{hours:,.{int(hours < 10)}f} h, ${dollars:,.{2 if dollars < 10 else 0}f}"


def row(path: Path) -> str:
    """Return a config's row of the table."""
    config = load_config(path)
    flops = flops_per_image(config)[1] * config.training.batch_size * config.training.max_steps
    costs = " | ".join(cost(flops, *gpu) for gpu in GPUS.values())
    return f"| `{path.stem}` | {si(flops, 'FLOP')} | {costs} |"


def main() -> None:
    print(f"| | the steps take | {' | '.join(GPUS)} |\n|{'---|' * (2 + len(GPUS))}")
    print(f"| peak, TFLOP/s | | {' | '.join(f'{peak:g}' for peak, _ in GPUS.values())} |")
    print(f"| dollars an hour | | {' | '.join(f'{price:.2f}' for _, price in GPUS.values())} |")
    for path in sorted((ROOT / "configs").glob("*.yml")):
        if path.stem != "smoke":
            print(row(path))


if __name__ == "__main__":
    main()
