"""What people do with pictures once they are made: enlarge, convert, pack, animate.

The numbered PNGs stay as they are: they hold the recipe, and are what a second run looks for.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from callbacks import picture_grid
from diffusion_utils import to_uint8
from files import atomic_write

FRAMES = 60  # of an animation, at most


def as_image(pixels: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy().squeeze())


def save(image: Image.Image, path: Path, **options) -> Path:
    """In the format of its suffix, complete or not at all."""
    with atomic_write(path) as temporary:
        image.save(temporary, format=Image.registered_extensions()[path.suffix], **options)
    return path


def write_enlarged(folder: Path, seeds: list[int], pictures: Tensor, factor: int) -> Path:
    """enlarged/NNNNNN.png: whole pixels where pictures are small, smooth from 64x64 on."""
    target = folder / "enlarged"
    height, width = pictures.shape[2:]
    filter = Image.Resampling.NEAREST if height < 64 else Image.Resampling.LANCZOS
    for seed, pixels in zip(seeds, pictures, strict=True):
        image = as_image(pixels).resize((width * factor, height * factor), filter)
        save(image, target / f"{seed:06d}.png")
    return target


def write_jpgs(folder: Path, seeds: list[int], pictures: Tensor) -> Path:
    """NNNNNN.jpg, of quality 95, without chroma subsampling."""
    for seed, pixels in zip(seeds, pictures, strict=True):
        save(as_image(pixels), folder / f"{seed:06d}.jpg", quality=95, subsampling=0)
    return folder


def write_npz(folder: Path, seeds: list[int], pictures: Tensor) -> Path:
    """pictures.npz: `arr_0`, uint8 [N, H, W, C], as evaluation suites take it, and `seeds`."""
    path = folder / "pictures.npz"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=pictures.permute(0, 2, 3, 1).numpy(), seeds=np.array(seeds))
    return path


@torch.inference_mode()
def write_gif(ddpm, steps, seeds: list[int], recipe: dict, path: Path) -> Path:
    """The reverse process of up to 36 pictures in a grid: x_t from noise to data, then a rest."""
    shown = set(np.linspace(0, len(steps) - 1, min(FRAMES, len(steps))).round().astype(int))
    frames, net = [], ddpm.sampling_net(bf16=recipe["precision"] == "bfloat16")
    chain = ddpm.chain(steps, seeds[:36], image_size=recipe["image_size"], net=net)
    for i, (_, x, _) in enumerate(chain):
        if i in shown:
            frames.append(as_image(picture_grid(to_uint8(x))))
    durations = [80] * (len(frames) - 1) + [2000]  # milliseconds
    options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return save(frames[0], path, **options)
