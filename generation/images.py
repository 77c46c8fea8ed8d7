"""Images as files: PNG, grid, GIF, and the copies that people make of them.

The numbered PNGs stay as they are: they hold the recipe, and are what a second run looks for.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from diffusion_utils import to_uint8
from files import atomic_write
from generation.samplers import Step

FRAMES = 60  # of an animation, at most


def image_file(folder: Path, seed: int) -> Path:
    """Return where the image of a seed is."""
    return folder / f"{seed:06d}.png"


def as_image(pixels: Tensor) -> Image.Image:
    """Return Pillow's image of uint8 [C, H, W]."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy().squeeze())


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    """Write an image in the format of its suffix, whole or not at all."""
    with atomic_write(path, keep_suffix=True) as temporary:
        image.save(temporary, **options)
    return path


def write_png(path: Path, pixels: Tensor, recipe: dict | None = None) -> None:
    """Write uint8 [C, H, W] as a PNG that carries its recipe."""
    text = PngInfo()
    if recipe:
        text.add_text("recipe", json.dumps(recipe))
    save(as_image(pixels), path, pnginfo=text)


def read_images(folder: Path, seeds: Sequence[int]) -> Tensor:
    """Read what `write_png` wrote for seeds, uint8 [N, C, H, W]."""
    arrays = [np.array(Image.open(image_file(folder, seed))) for seed in seeds]
    images = torch.from_numpy(np.stack(arrays))
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def fit_mask(levels: np.ndarray, size: tuple[int, int], fit: str = "crop") -> Tensor:
    """Return bool [H, W], true where a mask is white, cut and sized as its image is, by nearest.

    Args:
        levels: uint8 [H', W']. size: (H, W). fit: `crop` or `pad`; what is padded is not white.
    """
    resize = ImageOps.pad if fit == "pad" else ImageOps.fit
    mask = resize(Image.fromarray(levels >= 128), size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(mask))


def psnr(one: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio of uint8 images, in dB; inf where they are equal."""
    mse = (one.double() - other.double()).square().mean().item()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Return uint8 [N, C, H, W] as one uint8 [3, H', W'], tiny images enlarged.

    By default it is nearly square, whatever the shape of the images.
    """
    channels = 3 if images.shape[1] >= 3 else 1  # without alpha
    images = images[:, :channels].cpu()
    height, width = images.shape[2:]
    columns = columns or max(1, math.ceil(math.sqrt(len(images) * height / width)))
    scale = max(1, 64 // max(height, width))
    if scale > 1:
        images = interpolate(images, scale_factor=scale, mode="bicubic")
    return make_grid(images, nrow=columns, padding=2, pad_value=128)


def write_enlarged(folder: Path, seeds: Sequence[int], images: Tensor, factor: int) -> Path:
    """Write enlarged/NNNNNN.png: whole pixels where images are small, smooth from 64x64 on."""
    target = folder / "enlarged"
    height, width = images.shape[2:]
    filter = Image.Resampling.NEAREST if height < 64 else Image.Resampling.LANCZOS
    for seed, pixels in zip(seeds, images, strict=True):
        large = as_image(pixels).resize((width * factor, height * factor), filter)
        save(large, image_file(target, seed))
    return target


def write_jpgs(folder: Path, seeds: Sequence[int], images: Tensor) -> Path:
    """Write NNNNNN.jpg, of quality 95, without chroma subsampling."""
    for seed, pixels in zip(seeds, images, strict=True):
        path = image_file(folder, seed).with_suffix(".jpg")
        save(as_image(pixels), path, quality=95, subsampling=0)
    return folder


def write_npz(folder: Path, seeds: Sequence[int], images: Tensor) -> Path:
    """Write images.npz: `arr_0`, uint8 [N, H, W, C], as evaluation suites take it, and `seeds`."""
    path = folder / "images.npz"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), seeds=np.array(seeds))
    return path


@torch.inference_mode()
def write_gif(states: Iterator[tuple[Step, Tensor, Tensor]], count: int, path: Path) -> Path:
    """Write the reverse process of a batch as a grid: x_t from noise to data, then a rest.

    Args:
        states: what `generation.chain` yields. count: how many steps it has.
    """
    shown = set(np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int))
    frames = [as_image(image_grid(to_uint8(x))) for i, (_, x, _) in enumerate(states) if i in shown]
    durations = [80] * (len(frames) - 1) + [2000]  # milliseconds
    return save(
        frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
