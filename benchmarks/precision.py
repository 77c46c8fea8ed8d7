"""bfloat16 against float32: gradients, 500 steps of training from one seed, pictures."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.common import (
    ROOT,
    digits,
    environment,
    markdown,
    pick_device,
    publish,
    report,
    wake,
)
from config import load_config
from data import Data
from diffusion_utils import from_uint8, make_steps
from drawing import GREY, INK, OURS, THEIRS, chart, write_figure
from pl_utils import DDPM, TRAIN, VALIDATE, load_ddpm

PICTURE = ROOT / "benchmarks" / "precision.png"
PRETRAINED = ROOT / "pretrained" / "digits.safetensors"
RUNS = {  # label: overrides, colour
    "float32": (["training.precision=32-true"], INK),
    "bfloat16": (["training.precision=bf16-mixed"], OURS),
    "float32, another seed": (["training.precision=32-true", "training.seed=1"], THEIRS),
}


def at_precision(ddpm: DDPM, precision: str) -> None:
    training = ddpm.config.training.model_copy(update={"precision": precision})
    ddpm.config = ddpm.config.model_copy(update={"training": training})


def gradient(ddpm: DDPM, batch: Tensor, precision: str) -> Tensor:
    """Of one training batch, as one vector."""
    at_precision(ddpm, precision)
    t, eps, _ = ddpm.draw(TRAIN, 0, len(batch))
    net = ddpm._train_net
    loss = ddpm.diffusion.loss(net, from_uint8(batch), t, eps).mean()
    gradients = torch.autograd.grad(loss, list(ddpm.unet.parameters()))
    return torch.cat([g.flatten() for g in gradients]).double()


def compare_gradients(ddpm: DDPM, batch: Tensor) -> list[str]:
    """Cosine, and the difference's length as a share of float32's."""
    wide, narrow = (gradient(ddpm, batch, p) for p in ("32-true", "bf16-mixed"))
    cosine = wide @ narrow / (wide.norm() * narrow.norm())
    return [f"{cosine:.6f}", f"{(wide - narrow).norm() / wide.norm():.2%}"]


def train(overrides: list[str], steps: int, device: torch.device) -> tuple[DDPM, Data, np.ndarray]:
    """configs/digits.yml for some steps; the loss of each."""
    config = load_config(ROOT / "configs/digits.yml", overrides)
    data, ddpm = Data(config), DDPM(config).to(device)
    data.setup()
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    optimizer, losses = ddpm.configure_optimizers(), []
    for step, batch in zip(range(steps), data.train_dataloader(), strict=False):
        ddpm.update(batch.to(device), optimizer, step=step)
        losses.append(ddpm.tally[0].clone())
        ddpm.tally.zero_()
    return ddpm, data, torch.stack(losses).cpu().numpy()


@torch.no_grad()
def held_out_loss(ddpm: DDPM, data: Data) -> float:
    """Of the average, with the same t and noise for all."""
    pictures = data.pictures["validation"]
    x_0 = from_uint8(pictures[range(len(pictures))])
    x_0 = x_0.to(ddpm.device)
    t, eps, _ = ddpm.draw(VALIDATE, 0, len(x_0))
    return ddpm.diffusion.loss(ddpm, x_0, t, eps).mean().item()


def compare_pictures(device: torch.device, count: int) -> list[list[str]]:
    """The shipped model's, from the same noise: mean absolute difference in levels of 0 ... 255."""
    ddpm, rows = load_ddpm(PRETRAINED).to(device), []
    for sampler, timesteps in (("dpm++", 20), ("dpm++", 50), ("ddim", 50), ("ddpm", 1000)):
        report(f"pictures: {sampler}, {timesteps} steps")
        steps = make_steps(
            ddpm.diffusion,
            sampler=sampler,
            variance="large",
            eta=0.0,
            timesteps=timesteps,
            spacing="trailing",
        )
        pictures = []
        for precision in ("32-true", "bf16-mixed"):
            net = ddpm.sampling_net(bf16=precision == "bf16-mixed")
            pictures.append(ddpm.sample(steps, list(range(count)), net=net).short())
        apart = (pictures[0] - pictures[1]).abs()
        rows.append(
            [
                f"{sampler}, {timesteps} steps",
                f"{apart.float().mean():.2f}",
                f"{(apart <= 2).float().mean():.1%}",
                str(int(apart.max())),
            ]
        )
    return rows


def plot(curves: dict[str, np.ndarray], note: str) -> None:
    figure, axes = chart(3.2, title="Training in bfloat16", note=note, panels=[1.4, 1])
    window = 25
    for name, losses in curves.items():
        colour = RUNS[name][1]
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        middles = np.arange(len(smooth)) + window // 2
        style = dict(color=colour, label=name, linewidth=1.2)
        if name == "bfloat16":
            style |= dict(linestyle=(0, (3, 2)), zorder=3)
        axes[0].plot(middles, smooth, **style)
        if name != "float32":
            apart = np.abs(losses - curves["float32"])
            axes[1].semilogy(apart, color=colour, linewidth=0.8, label=name)
    axes[0].set(xlabel="step", ylabel=f"loss, mean of {window} steps", ylim=0)
    axes[0].legend()
    axes[1].set(xlabel="step")
    axes[1].set_title("each step's loss, apart from float32's", color=GREY)
    write_figure(figure, PICTURE)


def main(
    steps: Annotated[int, typer.Option(min=100, help="Of training.")] = 500,
    count: Annotated[int, typer.Option(min=1, help="Pictures to compare.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    write: Annotated[bool, typer.Option("--write", help="Into benchmarks/RESULTS.md.")] = False,
):
    place = pick_device(device)
    gradients, rows, curves = [], [], {}
    report("gradients of the CIFAR-10 network")
    paper = load_config(ROOT / "configs/cifar10.yml", ["training.batch_size=4", "model.dropout=0"])
    ddpm = DDPM(paper).to(place)
    wake(ddpm.unet)
    batch = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device=place)
    gradients.append(["CIFAR-10's network, random weights", *compare_gradients(ddpm, batch)])

    for name, (overrides, _) in RUNS.items():
        report(f"training: {name}")
        ddpm, data, curves[name] = train(overrides, steps, place)
        if name == "float32":
            batch = next(iter(data.train_dataloader())).to(place)
            after = f"digits' network after {steps} steps"
            gradients.append([after, *compare_gradients(ddpm, batch)])
            at_precision(ddpm, "32-true")
        last = curves[name][-100:]
        rows.append([name, digits(last.mean()), digits(held_out_loss(ddpm, data))])
    plot(curves, f"configs/digits.yml, the first {steps} steps, on {place.type}")
    text = "\n\n".join(
        [
            environment(place),
            "Gradients of one batch, of all weights as one vector:",
            markdown(["", "cosine", "apart, of float32's length"], gradients),
            f"{steps} steps of `configs/digits.yml`:",
            markdown(["", "loss of the last 100 steps", "held out, of the average"], rows),
            "![loss curves](precision.png)",
            f"{count} pictures of `{PRETRAINED.relative_to(ROOT)}` from the same noise, in levels "
            "of 0 ... 255:",
            markdown(["", "mean apart", "values within 2", "most"], compare_pictures(place, count)),
        ]
    )
    publish(f"bfloat16 against float32, {place.type}", text, write=write)


if __name__ == "__main__":
    typer.run(main)
