"""Editing: a `Sampling` whose chains start from an image, or keep a part of one.

Each function takes a plan and returns a copy with another table, another way of walking it, and
what was added to the recipe. Images and masks are uint8 [C, H, W], of the plan's shape.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from diffusion_utils import Denoiser, GaussianDiffusion, from_uint8
from generation.generate import SeedNoise, Walk
from generation.recipe import Sampling
from generation.samplers import FARTHEST, Step, ddim_steps, reverse

Chain = Iterator[tuple[Step, Tensor, Tensor]]


def _edited(
    plan: Sampling, steps: list[Step], walk: Walk, facts: dict[str, Any], *, clip: bool = True
) -> Sampling:
    plan = copy(plan)
    plan.steps, plan.walk, plan.clip, plan.facts = steps, walk, clip, plan.facts | facts
    return plan


def digest(pixels: Tensor) -> str:
    """Return 16 hexadecimal digits that name an image."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]


# ---- from an image


def steps_from(steps: list[Step], t: float) -> list[Step]:
    """Return the part of a step table from t on, inclusive, or from the next time that it visits.

    It starts where no earlier state is needed. Earlier estimates are missing there: the oldest that
    there is stands for them, so that the first step is one of the first order.
    """
    starts = [i for i, step in enumerate(steps) if len(step.x) == 1]
    start = next((i for i in starts if steps[i].t <= t), starts[-1])
    return [
        step._replace(x0=(*step.x0[:i], sum(step.x0[i:]))) if len(step.x0) > i else step
        for i, step in enumerate(steps[start:])
    ]


def from_image(plan: Sampling, image: Tensor, strength: float) -> Sampling:
    """Start at t <= strength T from an image with that much noise (SDEdit, Meng et al. 2022)."""
    if not 0 < strength <= 1:
        raise ValueError(f"--strength {strength:g} is outside (0, 1]; 1 forgets the image")
    diffusion, x_0 = plan.model.diffusion, from_uint8(image)[None].to(plan.model.device)
    T = diffusion.timesteps
    steps = steps_from(plan.steps, round(strength * T, 6))
    if steps[0].t > round(strength * T, 6):
        raise ValueError(
            f"--strength {strength:g} is less than the last of {len(plan.steps)} steps takes away, "
            f"{steps[0].t / T:g}; take more of it, or more --timesteps"
        )

    def walk(denoiser: Denoiser, steps: list[Step], seeds: Sequence[int], **where: Any) -> Chain:
        noise = SeedNoise(seeds, **where)
        return reverse(denoiser, diffusion.q_sample(x_0, steps[0].t, noise()), steps, noise)

    return _edited(plan, steps, walk, {"image": digest(image), "strength": strength})


# ---- a hole


def resampled(
    diffusion: GaussianDiffusion, steps: list[Step], *, resample: int, jump: int
) -> list[Step]:
    """Return a table in which each `jump` rows, counted from the data, are walked `resample` times.

    Between two times there is one row up: noise as q adds it (Lugmayr et al. 2022, section 4.2 and
    Algorithm 1, line 10, of all rows at once). The first rows, from pure noise, are walked once.
    """
    first = len(steps) % jump or jump
    found = steps[:first]
    for i in range(first, len(steps), jump):
        part = steps[i : i + jump]
        s, t = part[-1].s, part[0].t
        ratio = diffusion.alpha_bar(t) / diffusion.alpha_bar(s)
        up = Step(s, t, x=(math.sqrt(ratio),), x0=(), sigma=math.sqrt(1 - ratio))
        found += [*part, *[up, *part] * (resample - 1)]
    return found


def inpaint(
    plan: Sampling, image: Tensor, fill: Tensor, *, resample: int = 10, jump: int = 10
) -> Sampling:
    """Fill a part of an image so that it suits the rest (RePaint, Lugmayr et al. 2022).

    Args:
        plan: of a sampler whose rows look at the newest state alone.
        fill: bool [H, W], true where the image is to be filled; the rest stays, bit for bit.
        resample, jump: see `resampled`.
    """
    if resample > 1 and jump >= len(plan.steps):
        raise ValueError(
            f"--jump {jump} goes back further than {len(plan.steps)} steps can; choose less"
        )
    device, diffusion = plan.model.device, plan.model.diffusion
    x_0, hole = from_uint8(image)[None].to(device), fill.to(device)

    def walk(denoiser: Denoiser, steps: list[Step], seeds: Sequence[int], **where: Any) -> Chain:
        noise = SeedNoise(seeds, **where)
        own = SeedNoise([~seed for seed in seeds], **where)  # of the known part
        x = noise()
        for step in steps:
            ((_, x, x0_hat),) = reverse(denoiser, x, [step], noise)
            if step.s < step.t:
                x = torch.where(hole, x, diffusion.q_sample(x_0, step.s, own()))
            yield step, x, x0_hat

    steps = resampled(diffusion, plan.steps, resample=resample, jump=jump)
    facts: dict[str, Any] = {"inpaint": digest(image), "mask": digest(fill)}
    facts |= {"filled": fill.double().mean().item(), "resample": resample, "jump": jump}
    return _edited(plan, steps, walk, facts)


# ---- there and back


def inversion(diffusion: GaussianDiffusion, times: list[int]) -> list[Step]:
    """Return DDIM's table from the data up to the last of rising times (Song et al. 2020, 5.4).

    Each row asks at the t of the state that it starts from. The data has none: it asks at 0, whose
    eps_hat the first row takes; x0_hat is of x_0 as if it were x_t at 0.
    """
    signal = math.sqrt(diffusion.alpha_bar(0))
    steps = [Step(0, 0, (1 + signal,), (-signal,))]
    for t, s in itertools.pairwise(times):
        a_t, a_s = diffusion.alpha_bar(t), diffusion.alpha_bar(s)
        c_t = math.sqrt((1 - a_s) / (1 - a_t))
        steps.append(Step(t, s, (c_t,), (math.sqrt(a_s) - c_t * math.sqrt(a_t),)))
    return steps


def slerp(ends: Tensor, m: Tensor) -> Tensor:
    """Return latents on the arc between two: ends [2, C, H, W], m [B] from 0 to 1."""
    one, other = ends.cpu().double()
    angle = torch.acos(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).clamp(-1, 1))
    m = m.double().view(-1, 1, 1, 1)
    if angle < 1e-4:  # nothing between them
        return ((1 - m) * one + m * other).to(ends)
    return ((((1 - m) * angle).sin() * one + (m * angle).sin() * other) / angle.sin()).to(ends)


def encode(plan: Sampling, images: Sequence[Tensor], count: int = 1) -> Sampling:
    """Walk images to their latents by DDIM, and back, without clipping on either way.

    One image is its reconstruction, as the image of seed 0. Two are `count` images on the arc
    between their latents: the first and the last are reconstructions.

    Args:
        plan: of `ddim` with eta 0.
    """
    device, diffusion = plan.model.device, plan.model.diffusion
    x_0 = torch.stack([from_uint8(image) for image in images]).to(device)
    # beyond FARTHEST rows differ by more than eps_hat can tell
    seen = (step.t for step in plan.steps if diffusion.alpha_bar(step.t) * (1 + FARTHEST**2) >= 1)
    times = sorted({0, *seen})
    up = inversion(diffusion, times)
    if len(images) == 2 > count:
        raise ValueError(f"--num-images {count}: both ends are among them; at least 2")

    def walk(denoiser: Denoiser, steps: list[Step], seeds: Sequence[int], **where: Any) -> Chain:
        noise = SeedNoise(seeds, **where)  # asked by no row
        *_, (_, latents, _) = reverse(denoiser, x_0, up, noise)
        if len(latents) == 2:
            latents = slerp(latents, torch.tensor(seeds).double() / (count - 1))
        yield from reverse(denoiser, latents, steps, noise)

    down = ddim_steps(diffusion, [*times[::-1], -1], eta=0.0)
    facts: dict[str, Any] = {"encode": digest(images[0])}
    if len(images) == 2:
        facts = {"between": [digest(image) for image in images], "num_images": count}
    return _edited(plan, down, walk, facts, clip=False)
