"""A training step of ours, of diffusers and of denoising-diffusion-pytorch, in turn.

diffusers: UNet2DModel with what its unconditional training script does around it. The other has
another network (27% fewer FLOPs at 32x32): its images/s say what it costs, not how well it is made.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
import typer

from benchmarks.common import (
    AS_THEY_SHIP,
    Contestant,
    Options,
    denoising_diffusion_net,
    diffusers_net,
    environment,
    equip,
    flops_of,
    line_up,
    pick_device,
    publish,
    race_table,
    wake,
    with_tf32,
)
from dataset import Batch
from pl_utils import DDPM
from training.dry_run import flops_per_image

STEPS = 800_000  # of the learning rate's schedule


def ours(options: Options, compiled: bool = False) -> Contestant:
    ddpm = DDPM(options.config()).to(options.device)
    wake(ddpm.unet), wake(ddpm.ema)
    if compiled:
        ddpm.unet.compile()
    optimizer = ddpm.configure_optimizers()
    size = options.image_size
    batch = torch.randint(0, 256, (options.batch_size, 3, size, size), dtype=torch.uint8)
    batch, step = Batch(batch.to(options.device)), 0

    def turn():
        nonlocal step
        ddpm.update(batch, optimizer, step=step)
        step += 1

    flops = flops_per_image(ddpm.config)[1] * options.batch_size
    return Contestant(with_tf32(turn, True), flops)


def diffusers(options: Options, fair: bool = False) -> Contestant:
    """Train as examples/unconditional_image_generation/train_unconditional.py, with --use_ema."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    device, size = options.device, options.image_size
    net = diffusers_net(options).train()
    flops = flops_of(net, size)[1] * options.batch_size
    average = EMAModel(
        net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
    )
    average.to(device)
    if fair:
        equip(net, options)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=STEPS)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    x_0 = torch.rand(options.batch_size, 3, size, size, device=device) * 2 - 1

    def turn():
        eps = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),), device=device).long()
        x_t = scheduler.add_noise(x_0, eps, t)
        loss = F.mse_loss(net(x_t, t).sample.float(), eps.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        loss.detach().item()  # it logs every step

    return Contestant(with_tf32(turn, fair), flops)


def denoising_diffusion(options: Options, fair: bool = False) -> Contestant:
    """Train as its Trainer: Adam, clipping, the EMA every ten steps."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    size, net = options.image_size, denoising_diffusion_net(options)
    flops = flops_of(net, size)[1] * options.batch_size
    diffusion = GaussianDiffusion(net, image_size=size, objective="pred_noise").to(options.device)
    average = EMA(diffusion, beta=0.995, update_every=10).to(options.device)
    if fair:
        equip(net, options)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    x_0 = torch.rand(options.batch_size, 3, size, size, device=options.device)

    def turn():
        loss = diffusion(x_0)
        loss.item()  # it shows every step's
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return Contestant(with_tf32(turn, fair), flops)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    image_size: Annotated[int, typer.Option(help="32 or 256, as the paper.")] = 32,
    batch_size: Annotated[int | None, typer.Option(help="Default: 16, on CUDA 128.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    fair: Annotated[
        bool, typer.Option("--fair", help="Peers with bfloat16 and channels_last, too.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Ours compiled, too; and the peers of --fair.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Into benchmarks/RESULTS.md.")] = False,
):
    place = pick_device(device)
    batch_size = batch_size or (128 if place.type == "cuda" else 16)
    options = Options(image_size, batch_size, place, compile)
    mine = {"ours": ours} | ({"ours, compiled": partial(ours, compiled=True)} if compile else {})
    peers = {"diffusers": diffusers, "denoising-diffusion-pytorch": denoising_diffusion}
    builders = line_up(mine, peers, options, fair=fair)
    table = race_table(
        builders, options, rounds, base="diffusers", calls=1, images=options.batch_size
    )
    with_all = ", fair" * fair + ", compiled" * compile
    publish(
        f"A training step, {image_size}x{image_size}, batch {batch_size}, {place.type}{with_all}",
        f"{environment(place)}\n\n"
        f"{table} {AS_THEY_SHIP} "
        "denoising-diffusion-pytorch is not the same work: another network, and the EMA every "
        "tenth step.",
        write=write,
    )


if __name__ == "__main__":
    typer.run(main)
