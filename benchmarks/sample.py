"""A step of Algorithm 2 of ours, of diffusers and of denoising-diffusion-pytorch, in turn."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
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
from diffusion_utils import GaussianDiffusion
from generation import generate, make_denoiser, make_steps
from model import at_precision, build_network
from training.dry_run import flops_per_image
from weights.dialects import to_diffusers

T = 1000


def ours(options: Options, calls: int, compiled: bool = False) -> Contestant:
    config = options.config()
    network = wake(build_network(config)).to(options.device, memory_format=torch.channels_last)
    network = at_precision(network.eval(), "bfloat16" if options.bf16 else "float32")
    diffusion = GaussianDiffusion(**config.diffusion.model_dump())
    sampling = config.sampling.model_dump() | {"sampler": "ddpm"}
    steps = make_steps(diffusion, **sampling)[:calls]
    times = [step.t for step in steps]
    denoiser = make_denoiser(network, diffusion, times=times, compiled=compiled)
    shape = (config.dataset.channels, options.image_size, options.image_size)
    where = {"shape": shape, "device": options.device, "batch_size": options.batch_size}
    turn = lambda: list(generate(denoiser, steps, list(range(options.batch_size)), **where))
    flops = flops_per_image(config)[0] * options.batch_size * calls
    return Contestant(with_tf32(turn, True), flops)


def diffusers(options: Options, calls: int, fair: bool = False) -> Contestant:
    """Return DDPMPipeline's turn."""
    from diffusers import DDPMPipeline, DDPMScheduler

    net = diffusers_net(options).eval()
    flops = flops_of(net, options.image_size)[0] * options.batch_size * calls
    if fair:
        equip(net, options)
    pipeline = DDPMPipeline(net, DDPMScheduler.from_config(to_diffusers(options.config())[1]))
    pipeline.set_progress_bar_config(disable=True)
    turn = lambda: pipeline(options.batch_size, num_inference_steps=calls, output_type="np")
    return Contestant(with_tf32(turn, fair), flops)


def denoising_diffusion(options: Options, calls: int, fair: bool = False) -> Contestant:
    """Return the first steps of its p_sample_loop."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    size, net = options.image_size, denoising_diffusion_net(options)
    flops = flops_of(net, size)[0] * options.batch_size * calls
    if fair:
        equip(net, options)
    diffusion = GaussianDiffusion(net, image_size=size, objective="pred_noise").to(options.device)
    diffusion.eval()

    @torch.inference_mode()
    def turn():
        x = torch.randn(options.batch_size, 3, size, size, device=options.device)
        for t in range(T - 1, T - 1 - calls, -1):
            x, _ = diffusion.p_sample(x, t)
        diffusion.unnormalize(x).cpu()

    return Contestant(with_tf32(turn, fair), flops)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    image_size: Annotated[int, typer.Option(help="32 or 256, as the paper.")] = 32,
    batch_size: Annotated[int | None, typer.Option(help="Default: 16, on CUDA 128.")] = None,
    calls: Annotated[int | None, typer.Option(help="Steps a turn. Default: 4, on CUDA 40.")] = None,
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
    on_cuda = place.type == "cuda"
    batch_size, calls = batch_size or (128 if on_cuda else 16), calls or (40 if on_cuda else 4)
    options = Options(image_size, batch_size, place, compile)
    mine = {"ours": partial(ours, calls=calls)}
    if compile and on_cuda:
        mine["ours, compiled"] = partial(ours, calls=calls, compiled=True)
    peers = {"diffusers": diffusers, "denoising-diffusion-pytorch": denoising_diffusion}
    peers = {name: partial(build, calls=calls) for name, build in peers.items()}
    builders = line_up(mine, peers, options, fair=fair)
    table = race_table(
        builders, options, rounds, base="diffusers", calls=calls, images=batch_size * calls / T
    )
    with_all = ", fair" * fair + ", compiled" * compile
    publish(
        f"A sampling step, {image_size}x{image_size}, batch {batch_size}, {place.type}{with_all}",
        f"{environment(place)}\n\n"
        f"{table} Images/s are those of {T:,} steps, from turns of {calls}. {AS_THEY_SHIP} "
        "denoising-diffusion-pytorch is not the same work: another network.",
        write=write,
    )


if __name__ == "__main__":
    typer.run(main)
