"""Six runs on digits and their curves: python docs/healthy_run.py, from the project's folder.

It trains what is not there yet, in `lightning_logs`, and draws docs/healthy-run.png: 20 minutes on
two cores.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from plotting.boards import GRAY, OURS, THEIRS, chart, write_figure

PAPER = (
    "diffusion.prediction=eps training.loss_weight=eps training.t_density=uniform "
    "training.optimizer=adam training.max_steps=2800 training.ema_decay=0.998 "
    "evaluation.validate_every=400"
)
PLAIN = "dataset.name=npy dataset.labels=false guidance.scale=1"
RUNS = {
    "good": ("good", ""),
    "short": ("too short for its EMA", "training.max_steps=500 evaluation.validate_every=100"),
    "fast": ("learning rate 50 times too high", "training.learning_rate=0.05"),
    "fifty": (
        "fifty images, learned by heart",
        f"{PLAIN} dataset.root=hundred.npy dataset.validation_fraction=0.5",
    ),
    "dark": ("values of 0 ... 16, not 255", f"{PLAIN} dataset.root=dark.npy"),
    "schedule": (
        "T = 100 with the betas of 1,000",
        "diffusion.timesteps=100 diffusion.beta_schedule=linear",
    ),
}
LINES = {  # folder of the event file: name, color, style
    "": ("validation images, EMA", OURS, "--"),
    "yardsticks/training-images": ("training images, EMA", OURS, "-"),
    "yardsticks/raw-weights": ("validation images, raw weights", "#0d9488", "--"),
    "yardsticks/best-linear": ("best linear denoiser", THEIRS, "-"),
    "yardsticks/memoriser": ("memoriser, on training images", "#9333ea", "-"),
}


def make_data() -> None:
    digits = load_digits().images.astype(np.uint8)  # 0 ... 16
    np.save("dark.npy", digits)
    np.save("hundred.npy", (digits[:100] * (255 / 16)).astype(np.uint8))


def main() -> None:
    make_data()
    for name, (title, overrides) in RUNS.items():
        if not Path("lightning_logs", name).exists():
            command = f"train.py configs/digits.yml {PAPER} {overrides} --run-name {name}"
            done = subprocess.run(
                [sys.executable, *command.split()], capture_output=True, text=True, check=True
            )
            said = [x for x in done.stdout.splitlines() if x.startswith(("advice:", "health at"))]
            print(f"## {title}\n", f"python {command}", *said, sep="\n", end="\n\n")
    figure, axes = chart(
        3.6,
        title="Six runs",
        note="The plain error of eps over training steps",
        panels=[1] * len(RUNS),
    )
    for panel, (name, (title, _)) in zip(axes, RUNS.items(), strict=True):
        for folder, (label, color, style) in LINES.items():
            events = EventAccumulator(str(Path("lightning_logs", name, folder)))
            events.Reload()
            if "val/loss" in events.Tags()["scalars"]:
                points = [(e.step, e.value) for e in events.Scalars("val/loss")]
                panel.semilogy(*zip(*points, strict=True), style, color=color, label=label)
        panel.axhline(1, color=GRAY, linestyle=":", label="untrained")
        panel.set(xlabel="step", ylim=(0.008, 2), xlim=0)
        panel.set_title(textwrap.fill(title, 20), fontsize=8)
        panel.tick_params(labelleft=panel is axes[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    write_figure(figure, Path(__file__).with_name("healthy-run.png"))


if __name__ == "__main__":
    main()
