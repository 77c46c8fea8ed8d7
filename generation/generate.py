"""From a loaded model and seeds to images: the denoiser as a closure, noise, and the one iterator.

Samples, previews, evaluation and figures all stand on `generate`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from config import Config
from diffusion_utils import Denoiser, GaussianDiffusion, Step, make_steps, reverse, to_uint8
from model import Network, exact_float32, has_bf16

MANY_CALLS = 5000  # of the network; from here compiling on CUDA repays its minute


def make_denoiser(
    network: Network,
    diffusion: GaussianDiffusion,
    *,
    times: Iterable[int] = (),
    clip: bool = True,
    compiled: bool = False,
) -> Denoiser:
    """Return (x_t [B, C, H, W], t) -> x0_hat, of x_t's type and on its device.

    Everything that makes an estimate is closed over here: whoever calls it sees x_t and t alone.

    Args:
        network: at the precision that is wanted, see `model.at_precision`.
        times: t that will be asked for as ints; their embeddings are made once.
        clip: x0_hat to [-1, 1], as the official code does before it is used.
        compiled: by torch.compile, on first use.
    """
    device = next(network.parameters()).device
    known = list(dict.fromkeys(times))  # in their order: rows elsewhere round otherwise
    with torch.no_grad():
        rows = network.embed(torch.tensor(known, device=device)).split(1) if known else ()
    embeddings = dict(zip(known, rows, strict=True))
    predict = network.predict
    if compiled:
        torch._dynamo.config.suppress_errors = True  # where it cannot: slower, with a warning
        predict = torch.compile(predict)

    def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
        with exact_float32():
            if isinstance(t, Tensor):
                embedding = network.embed(t.to(device))
            elif t in embeddings:
                embedding = embeddings[t]
            else:
                embedding = network.embed(torch.tensor([t], device=device))
            F = predict(x_t.to(device, torch.float32), embedding).to(x_t)
        x0_hat = diffusion.predict_x_0(x_t, t, F)
        return x0_hat.clamp(-1, 1) if clip else x0_hat

    return denoise


class SeedNoise:
    """Standard normal [B, *shape] at each call; row i is a function of seeds[i] and the call."""

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
    ):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        # several calls' worth at once, fewer launches; how many depends on the shape alone
        self.size = (min(64, max(1, 2**17 // math.prod(shape))), *shape)
        self.queue: list[Tensor] = []

    def __call__(self, _: Step | None = None) -> Tensor:
        if not self.queue:
            drawn = [torch.randn(self.size, generator=g, device=g.device) for g in self.generators]
            self.queue = list(torch.stack(drawn, dim=1).flip(0))
        return self.queue.pop()


def chain(
    denoiser: Denoiser,
    steps: list[Step],
    seeds: Sequence[int],
    *,
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Walk the reverse process of one batch; yield (step, x_s, x0_hat), [B, C, H, W] each.

    An image belongs to its seed: neighbours in the batch, and how many, do not touch it.

    Args:
        shape: (C, H, W).
    """
    noise = SeedNoise(seeds, shape, device)
    return reverse(denoiser, noise(), steps, noise)


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    steps: list[Step],
    seeds: Sequence[int],
    *,
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    advance: Callable[[float], object] = lambda images: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (seeds, images) of each batch: uint8 [B, C, H, W] on the CPU.

    Args:
        steps: a sampler's table, see `diffusion_utils.make_steps`.
        seeds: one an image, in the order that they are wanted.
        shape: (C, H, W).
        advance: hears after each network call how many images' worth it was.
    """
    for start in range(0, len(seeds), batch_size):
        batch = list(seeds[start : start + batch_size])
        for _, x, _ in chain(denoiser, steps, batch, shape=shape, device=device):
            advance(len(batch) / len(steps))
        yield batch, to_uint8(x).cpu()


def pays_to_compile(config: Config, device: torch.device, calls: int) -> bool:
    """Tell whether so many network calls repay the minute that compiling takes."""
    return device.type == "cuda" and calls >= MANY_CALLS and bool(config.hardware.compile)


def quick_steps(diffusion: GaussianDiffusion) -> list[Step]:
    """Return the table of previews and of evaluations while training: 20 steps of DPM-Solver++."""
    return make_steps(
        diffusion,
        sampler="dpm++",
        variance="large",
        eta=0.0,
        timesteps=min(20, diffusion.timesteps),
        spacing="trailing",
    )


def resolve_precision(config: Config, device: torch.device, asked: str = "auto") -> str:
    """Return "float32" or "bfloat16": what training steps and drawn images use on a device."""
    if asked != "auto":
        return asked
    precision = config.hardware.precision
    bf16 = precision == "bf16-mixed" or (precision == "auto" and has_bf16(device))
    return "bfloat16" if bf16 else "float32"
