"""bfloat16 against float32: gradients, 500 steps of training from one seed, images."""

import sys
from pathlib import Path
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
from dataset import Batch, Images
from diffusion_utils import from_uint8
from generation import generate, make_denoiser, make_steps
from model import at_precision
from pl_utils import DDPM, TRAIN, VALIDATE
from plotting.boards import GRAY, INK, OURS, THEIRS, chart, write_figure
from training.datamodule import open_images, train_batches
from weights import load_model

FIGURE = ROOT / "benchmarks" / "precision.png"
PRETRAINED = ROOT / "pretrained" / "digits.safetensors"
RUNS = {  # label: overrides, colour
    "float32": (["hardware.precision=32-true"], INK),
    "bfloat16": (["hardware.precision=bf16-mixed"], OURS),
    "float32, another seed": (["hardware.precision=32-true", "training.seed=1"], THEIRS),
}


def set_precision(ddpm: DDPM, precision: str) -> None:
    hardware = ddpm.config.hardware.model_copy(update={"precision": precision})
    ddpm.config = ddpm.config.model_copy(update={"hardware": hardware})


def gradient(ddpm: DDPM, batch: Tensor, precision: str) -> Tensor:
    """Return the gradient of one training batch, as one vector."""
    set_precision(ddpm, precision)
    t, eps, *_ = ddpm.draw(TRAIN, 0, len(batch))
    loss = ddpm.diffusion.loss(ddpm.train_network, from_uint8(batch), t, eps).mean()
    gradients = torch.autograd.grad(loss, list(ddpm.unet.parameters()))
    return torch.cat([g.flatten() for g in gradients]).double()


def compare_gradients(ddpm: DDPM, batch: Tensor) -> list[str]:
    """Return the cosine, and the difference's length as a share of float32's."""
    wide, narrow = (gradient(ddpm, batch, p) for p in ("32-true", "bf16-mixed"))
    cosine = wide @ narrow / (wide.norm() * narrow.norm())
    return [f"{cosine:.6f}", f"{(wide - narrow).norm() / wide.norm():.2%}"]


def train(
    overrides: list[str], steps: int, device: torch.device
) -> tuple[DDPM, dict[str, Images], np.ndarray]:
    """Train configs/digits.yml for some steps; return the loss of each, too."""
    config = load_config(ROOT / "configs/digits.yml", ["dataset.labels=false", *overrides])
    ddpm, splits = DDPM(config).to(device), open_images(config)
    optimizer, losses = ddpm.configure_optimizers(), []
    for step, batch in zip(range(steps), train_batches(splits["train"], config), strict=False):
        ddpm.update(batch._replace(images=batch.images.to(device)), optimizer, step=step)
        losses.append(ddpm.tally[0].clone())
        ddpm.tally.zero_()
    return ddpm, splits, torch.stack(losses).cpu().numpy()


@torch.no_grad()
def validation_loss(ddpm: DDPM, images: Images) -> float:
    """Return the EMA's loss, with the same t and noise for all."""
    pixels = images[list(range(len(images)))].images.to(ddpm.device)
    t, eps, *_ = ddpm.draw(VALIDATE, 0, len(pixels))
    return ddpm.validation_losses(ddpm.ema, Batch(pixels), t, eps).mean().item()


def compare_images(device: torch.device, count: int) -> list[list[str]]:
    """Compare the shipped model's images from the same noise, in levels of 0 ... 255."""
    model, rows = load_model(PRETRAINED).to(device), []
    for sampler, timesteps in (("dpm++", 20), ("dpm++", 50), ("ddim", 50), ("ddpm", 1000)):
        report(f"images: {sampler}, {timesteps} steps")
        steps = make_steps(
            model.diffusion,
            sampler=sampler,
            variance="large",
            eta=0.0,
            timesteps=timesteps,
            spacing="trailing",
        )
        times, images = [step.t for step in steps], []
        for precision in ("float32", "bfloat16"):
            network = at_precision(model.network, precision)
            denoiser = make_denoiser(network, model.diffusion, times=times)
            made = generate(denoiser, steps, range(count), shape=model.shape, device=device)
            images.append(torch.cat([batch for _, batch in made]).short())
        apart = (images[0] - images[1]).abs()
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
    axes[1].set_title("each step's loss, apart from float32's", color=GRAY)
    write_figure(figure, FIGURE)


def main(
    steps: Annotated[int, typer.Option(min=100, help="Of training.")] = 500,
    count: Annotated[int, typer.Option(min=1, help="Images to compare.")] = 64,
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
        ddpm, splits, curves[name] = train(overrides, steps, place)
        if name == "float32":
            batch = next(iter(train_batches(splits["train"], ddpm.config))).images.to(place)
            after = f"digits' network after {steps} steps"
            gradients.append([after, *compare_gradients(ddpm, batch)])
            set_precision(ddpm, "32-true")
        last = curves[name][-100:]
        rows.append(
            [name, digits(last.mean()), digits(validation_loss(ddpm, splits["validation"]))]
        )
    plot(curves, f"configs/digits.yml, the first {steps} steps, on {place.type}")
    text = "\n\n".join(
        [
            environment(place),
            "Gradients of one batch, of all weights as one vector:",
            markdown(["", "cosine", "apart, of float32's length"], gradients),
            f"{steps} steps of `configs/digits.yml`:",
            markdown(["", "loss of the last 100 steps", "validation, of the EMA"], rows),
            "![loss curves](precision.png)",
            f"{count} images of `{PRETRAINED.relative_to(ROOT)}` from the same noise, in levels "
            "of 0 ... 255:",
            markdown(["", "mean apart", "values within 2", "most"], compare_images(place, count)),
        ]
    )
    publish(f"bfloat16 against float32, {place.type}", text, write=write)


if __name__ == "__main__":
    typer.run(main)
