"""From a loaded model and seeds to images: the denoiser as a closure, noise, and the one iterator.

Samples, previews, evaluation and figures all stand on `generate`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Config
from diffusion_utils import Denoiser, GaussianDiffusion, to_uint8
from generation.samplers import Step, make_steps, reverse
from model import Network, exact_float32, has_bf16

MANY_CALLS = 5000  # of the network; from here compiling on CUDA repays its minute


class Guidance(NamedTuple):
    """A scale that leads estimates away from a worse model's (Ho & Salimans 2022, Eq. 6).

    eps_0 + scale (eps_1 - eps_0), where eps_1 is of the model that is asked, and eps_0 of it
    without its label (classifier-free), or of another model (Karras et al. 2024, autoguidance).
    `interval` holds it to noise levels sqrt((1 - alpha_bar) / alpha_bar) from its first to its
    second number (Kynkaanniemi et al. 2024).
    """

    scale: float = 1.0
    interval: Sequence[float] | None = None

    def at(self, alpha_bar: float) -> float:
        """Return the scale where so much of the variance is x_0's."""
        low, high = self.interval or (0, math.inf)
        level = math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar else math.inf
        return self.scale if low <= level <= high else 1.0


def embedder(
    network: Network, times: Iterable[int], label: Tensor | None
) -> Callable[[int | Tensor], Tensor]:
    """Return t -> its conditioning with a label, [any], or [B, any] for t [B]; make `times` now."""
    device = next(network.parameters()).device
    row = None if label is None else label[None].to(device)
    known = list(dict.fromkeys(times))  # in their order: rows elsewhere round otherwise
    with torch.no_grad():
        rows = network.embed(torch.tensor(known, device=device), row).unbind() if known else ()
    embeddings = dict(zip(known, rows, strict=True))

    def embed(t: int | Tensor) -> Tensor:
        if isinstance(t, Tensor):
            return network.embed(t.to(device), row)
        if t in embeddings:
            return embeddings[t]
        return network.embed(torch.tensor([t], device=device), row)[0]

    return embed


def make_denoiser(
    network: Network,
    diffusion: GaussianDiffusion,
    *,
    times: Iterable[int] = (),
    clip: bool = True,
    compiled: bool = False,
    label: Tensor | None = None,
    guidance: Guidance = Guidance(),  # noqa: B008 (it is frozen)
    guide: Denoiser | None = None,
) -> Denoiser:
    """Return (x_t [B, C, H, W], t) -> x0_hat, of x_t's type and on its device.

    With True as a third argument it returns (x0_hat, v), v as in `GaussianDiffusion.log_variance`.
    Everything that makes an estimate is closed over here: whoever calls it sees x_t and t alone.

    Args:
        network: at the precision that is wanted, see `model.at_precision`.
        times: t that will be asked for as ints; their embeddings are made once.
        clip: x0_hat to [-1, 1], as the official code does before it is used.
        compiled: by torch.compile, on first use.
        label: [classes], with a 1 for each class that is wanted; None asks for none.
        guide: the worse model of `guidance`, not clipped; None is this one without the label.
    """
    device = next(network.parameters()).device
    times = list(times)
    with_label = embedder(network, times, label)
    without = embedder(network, times, None) if label is not None and guide is None else with_label
    predict = network.predict
    if compiled:
        torch._dynamo.config.suppress_errors = True  # where it cannot: slower, with a warning
        predict = torch.compile(predict)

    def estimate(x_t: Tensor, t: int | Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        with exact_float32():
            F = predict(x_t.to(device, torch.float32), embedding).to(x_t)
        return diffusion.predict_x_0(x_t, t, F), F[:, x_t.shape[1] :]

    def guided(x_t: Tensor, t: int | Tensor, with_v: bool) -> tuple[Tensor, Tensor]:
        if not isinstance(t, Tensor):
            scale: Any = guidance.at(diffusion.alpha_bar(t))
            if scale == 1:
                return estimate(x_t, t, with_label(t))
            if scale == 0 and not with_v:
                return (guide(x_t, t), x_t[:, :0]) if guide else estimate(x_t, t, without(t))
        else:
            scales = [guidance.at(a) for a in diffusion.alpha_bar(t).tolist()]
            scale = torch.tensor(scales, device=x_t.device, dtype=x_t.dtype).view(-1, 1, 1, 1)
        # x0_hat is affine in eps_hat, so that guiding one guides the other
        if guide:
            worse, (better, v) = guide(x_t, t), estimate(x_t, t, with_label(t))
        else:
            rows = [e.expand(len(x_t), e.shape[-1]) for e in (without(t), with_label(t))]
            twice = torch.cat([t, t]) if isinstance(t, Tensor) else t
            both, vs = estimate(torch.cat([x_t, x_t]), twice, torch.cat(rows))
            (worse, better), (_, v) = both.chunk(2), vs.chunk(2)
        return worse + scale * (better - worse), v  # the label's own variance

    def denoise(x_t: Tensor, t: int | Tensor, with_v: bool = False) -> Any:
        plain = guidance.scale == 1
        x0_hat, v = estimate(x_t, t, with_label(t)) if plain else guided(x_t, t, with_v)
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        return (x0_hat, v) if with_v else x0_hat

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


Walk = Callable[..., Iterator[tuple[Step, Tensor, Tensor]]]  # called as `chain` is


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
    walk: Walk = chain,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (seeds, images) of each batch: uint8 [B, C, H, W] on the CPU.

    Args:
        steps: a sampler's table, see `generation.make_steps`.
        seeds: one an image, in the order that they are wanted.
        shape: (C, H, W).
        advance: hears after each network call how many images' worth it was.
        walk: how a batch goes through the table; editing starts elsewhere, see `generation.edit`.
    """
    for start in range(0, len(seeds), batch_size):
        batch = list(seeds[start : start + batch_size])
        for _, x, _ in walk(denoiser, steps, batch, shape=shape, device=device):
            advance(len(batch) / len(steps))
        yield batch, to_uint8(x).cpu()


def pays_to_compile(config: Config, device: torch.device, calls: int) -> bool:
    """Tell whether so many network calls repay the minute that compiling takes."""
    return device.type == "cuda" and calls >= MANY_CALLS and bool(config.hardware.compile)


def quick_settings(diffusion: GaussianDiffusion) -> dict[str, Any]:
    """Return what --fast, and previews and evaluations while training, use: 10 steps of UniPC."""
    return {"sampler": "unipc", "timesteps": min(10, diffusion.timesteps), "spacing": "trailing"}


def quick_steps(diffusion: GaussianDiffusion) -> list[Step]:
    """Return the step table of `quick_settings`."""
    return make_steps(diffusion, variance="large", eta=0.0, **quick_settings(diffusion))


def resolve_precision(config: Config, device: torch.device, asked: str = "auto") -> str:
    """Return "float32" or "bfloat16": what training steps and drawn images use on a device."""
    if asked != "auto":
        return asked
    precision = config.hardware.precision
    bf16 = precision == "bf16-mixed" or (precision == "auto" and has_bf16(device))
    return "bfloat16" if bf16 else "float32"
