"""A model's card: the README.md of its folder, as people and the Hub read it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import Config, TrainingConfig
from files import differences, to_yaml
from weights.model import Model

PAPER = {"dataset": {"name": "cifar10", "image_size": 32}, "training": {"max_steps": 800_000}}


def about_ema(training: TrainingConfig) -> str:
    """Return which EMA samples, in words."""
    if training.ema == "power":
        return f"relative length {training.ema_lengths[0]:g}"
    return f"decay {'up to ' * (training.ema == 'warmup')}{training.ema_decay}"


def model_card(
    model: Model,
    license: str,
    address: str = "THIS_FOLDER",
    *,
    images: str = "",
    numbers: Iterable[str] = (),
) -> str:
    """Return the README.md of a diffusers folder, as the Hub reads it.

    Args:
        license: of the weights.
        address: what loads the folder.
        images: what is said of images.png, where there is one.
        numbers: what `about_numbers` returns, of each evaluation.

    Raises:
        ValueError: the license cannot be an identifier.
    """
    if not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"--license {license!r}: letters, digits, . + and -; try mit or cc-by-4.0")
    config = model.config
    height, width = config.dataset.size
    size = f"{height}x{width}"
    ema = f"the EMA of the weights, {about_ema(config.training)}"
    which = ema if model.weights == "ema" else "the last training weights, not their EMA"
    kind = "class-conditional" if config.dataset.classes else "unconditional"
    task = "" if config.dataset.classes else f"pipeline_tag: {kind}-image-generation\n"
    shown = f"![images](images.png)\n\n*{images}*\n\n" if images else ""
    measured = "\n".join(numbers)
    return f"""---
license: {license}
library_name: diffusers
{task}tags: [ddpm, diffusers, {kind}-image-generation]
datasets: [{config.dataset.name}]
---

# DDPM, {config.dataset.name}, {size}

A denoising diffusion probabilistic model (Ho et al. 2020, [arXiv 2006.11239](https://arxiv.org/abs/2006.11239))
of {config.dataset.channels}-channel images, after {model.step:,} training steps of
{config.training.batch_size} images: {which}.

{shown}{usage(config, address)}
The code that trained it reads this folder, too: `python sample.py {address}`.

{f"## Numbers{chr(10)}{chr(10)}{measured}{chr(10)}" if measured else ""}## Recipe

{departures(config)}
## Settings

```yaml
{to_yaml(config).strip()}
```
"""


def departures(config: Config) -> str:
    """Return where a recipe is not the paper's of CIFAR-10, which the defaults are."""
    paper = Config.model_validate(PAPER)
    lines = differences(paper, config, learned=True)
    found = "".join(f"- `{line}`\n" for line in lines if not line.startswith("dataset."))
    if not found:
        return "The paper's, of CIFAR-10.\n"
    return f"Where it departs from the paper's of CIFAR-10:\n\n{found}"


def about_numbers(facts: dict[str, Any]) -> str:
    """Return the scores of a metrics.json as a table under what they are of."""
    recipe, how = facts["recipe"], []
    if "images" in recipe:
        drawn = f"{recipe['images']:,} images by {recipe['sampler']}, {recipe['timesteps']} steps"
        scale = recipe.get("guidance_scale", 1)
        how += [f"{drawn}{f', guidance {scale:g}' * (scale != 1)}, in {recipe['precision']}"]
    # names alone: folders of this machine are nobody's business
    if real := recipe.get("reference"):
        how += [f"against {Path(real['name']).name}"]
    if features := recipe.get("extractor"):
        how += [f"features of {Path(features['name']).name}"]
    if bound := recipe.get("nll"):
        how += [f"bits/dim of {bound['images']:,} {bound['split']} images"]
    names, values = [], []
    for name, score in facts["scores"].items():
        names.append(name)
        error = score.get("error")
        values.append(f"{score['value']:.4g}" + ("" if error is None else f" ± {error:.2g}"))
    rows = [names, ["---"] * len(names), values] if names else []
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    health = facts.get("health", {}).get("summary")
    return f"By `evaluate.py`: {'; '.join(how)}.\n\n{table}" + (f"\n{health}\n" if health else "")


def usage(config: Config, address: str = "THIS_FOLDER") -> str:
    """Return how to draw images with diffusers, for the model card."""
    T, classes = config.diffusion.timesteps, len(config.dataset.classes)
    few, learned = min(50, T), config.diffusion.learned_variance
    if not classes:
        ddim = f"""
ddim = DDIMPipeline.from_pretrained("{address}")
ddim(num_inference_steps={few}).images[0].save("ddim.png")"""
        return f"""```python
from diffusers import {"" if learned else "DDIMPipeline, "}DDPMPipeline

ddpm = DDPMPipeline.from_pretrained("{address}")
ddpm(num_inference_steps={T}).images[0].save("ddpm.png"){"" if learned else ddim}
```
"""
    sample = f"sample[:, :{config.dataset.channels}]" if learned else "sample"
    shape = ", ".join(map(str, config.dataset.shape))
    none, guide = "There is no label for none, and so no guidance.", ""
    if config.training.label_dropout:
        none = f"{classes} is no label, which guidance needs."
        guide = f"""
        F_0 = unet(x, t, torch.tensor([{classes}])).{sample}  # no label
        F = F_0 + 2.0 * (F - F_0)  # guidance of scale 2"""
    return f"""Labels are numbers: 0 is the first of `classes` below, {classes - 1} the last. {none}

```python
import torch
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("{address}", subfolder="unet")
scheduler = DDIMScheduler.from_pretrained("{address}", subfolder="scheduler")
scheduler.set_timesteps({few})
label = torch.tensor([0])
x = torch.randn(1, {shape})
for t in scheduler.timesteps:
    with torch.no_grad():
        F = unet(x, t, label).{sample}{guide}
    x = scheduler.step(F, t, x, use_clipped_model_output=True).prev_sample
image = (x / 2 + 0.5).clamp(0, 1)
```
"""
