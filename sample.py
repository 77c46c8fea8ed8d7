#!/usr/bin/env python3
"""Make pictures with a trained model."""

if __name__ == "__main__":
    import terminal

    terminal.guard()  # before a package that may be missing is imported

import itertools
import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from terminal import did_you_mean, fail, plain_console

HELP = """
Make pictures with a trained model.

CKPT is a checkpoint, a run's folder, a safetensors file, a diffusers folder, or official weights;
everything not said here is as in its config. The picture of
seed 7 is 000007.png whatever else is made beside it. A second run makes only what is missing, and
pictures of another recipe go into a folder of their own.

Examples:

\b
  python sample.py pretrained/digits.safetensors --num-images 64
  python sample.py --run-name digits --seeds 0-7,100 --upscale 8
  python sample.py lightning_logs/digits/checkpoints/last.ckpt \\
      --sampler dpm++ --timesteps 20 --output-dir quick
"""

# options that evaluate.py and figures.py have, too
Sampler = Annotated[
    Literal["ddpm", "ddim", "dpm++"] | None,
    typer.Option(help="Algorithm 2; DDIM; or DPM-Solver++(2M), good at 20 steps."),
]
Timesteps = Annotated[
    int | None,
    typer.Option(min=1, help="Sampling steps; fewer than T take a spaced sub-sequence."),
]
Eta = Annotated[
    float | None, typer.Option(min=0, max=1, help="Noise of ddim: 0 none, 1 as ddpm small.")
]
Spacing = Annotated[
    Literal["trailing", "uniform", "quadratic", "logsnr"] | None,
    typer.Option(help="Which of the T steps, when fewer."),
]
Variance = Annotated[
    Literal["large", "small"] | None, typer.Option(help="Of ddpm: fixedlarge or fixedsmall.")
]
Weights = Annotated[
    Literal["ema", "raw"], typer.Option(help="The average, or the last training weights.")
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Of the network; auto: bfloat16 where the hardware multiplies it."),
]


def run_names(incomplete: str = "") -> list[str]:
    """The runs of lightning_logs whose names begin so."""
    names = (path.parent.name for path in Path("lightning_logs").glob("*/checkpoints"))
    return sorted(name for name in names if name.startswith(incomplete))


app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
def sample(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CKPT", help="A trained model.")
    ] = None,
    run_name: Annotated[
        str | None,
        typer.Option(
            help="Instead of CKPT: a run of lightning_logs, its newest.", autocompletion=run_names
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Other than that of training: at your own risk.")
    ] = None,
    timesteps: Timesteps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where they go. Default: samples, or samples-2, ... for another recipe."),
    ] = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    variance: Variance = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of the first picture; then + 1 each.")
    ] = 0,
    seeds: Annotated[
        str | None, typer.Option(help="Instead of both: which pictures, such as 0-63,100.")
    ] = None,
    weights: Weights = "ema",
    precision: Precision = "auto",
    grid: Annotated[bool, typer.Option(help="Write grid.png of up to 400 of them, too.")] = True,
    upscale: Annotated[
        int | None, typer.Option(min=2, max=64, help="Enlarged copies to look at, so many times.")
    ] = None,
    format: Annotated[
        Literal["png", "jpg", "npz"], typer.Option(help="Copies of another kind beside the PNGs.")
    ] = "png",
    gif: Annotated[bool, typer.Option("--gif", help="chain.gif: how 36 of them arise.")] = False,
):
    console = plain_console()
    try:
        given = {
            "sampler": sampler,
            "variance": variance,
            "eta": eta,
            "timesteps": timesteps,
            "spacing": spacing,
        }
        given = {key: value for key, value in given.items() if value is not None}
        chosen = list(range(seed, seed + num_images)) if seeds is None else parse_seeds(seeds)
        source = which_model(checkpoint, run_name)
        ddpm, steps, recipe = prepare(source, device, weights, image_size, given, precision)
        if format == "jpg" and ddpm.config.dataset.channels in (2, 4):
            raise ValueError("--format jpg knows no transparency, which these pictures have; png")
        if output_dir:
            missing = missing_seeds(output_dir, chosen, recipe)
        else:
            output_dir, missing = free_folder("samples", chosen, recipe)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        raise typer.Exit(fail(error)) from None
    for note in ddpm.notes:
        console.print(f"assumed: {note}")
    console.print(
        f"{recipe['checkpoint']} (step {recipe['step']:,}, {ddpm.weights} weights): "
        f"{recipe['sampler']}, {len(steps)} steps, on {ddpm.device} in {recipe['precision']}"
    )
    try:
        write_pictures(ddpm, steps, missing, batch_size, output_dir, recipe, console)
        kept = len(chosen) - len(missing)
        console.print(
            f"{len(missing)} pictures written to {output_dir}"
            + (f", {kept} were there already" if kept else "")
        )
        if grid:
            write_grid(output_dir, chosen[:400])
            console.print(f"all together: {output_dir / 'grid.png'}")
        for path in write_copies(ddpm, steps, chosen, recipe, output_dir, upscale, format, gif):
            console.print(f"also: {path}")
    except KeyboardInterrupt:
        console.print(f"stopped; what is finished is in {output_dir}, the same command goes on")
        raise typer.Exit(130) from None
    except Exception as error:
        fail(error)
        raise typer.Exit(1) from None


def which_model(checkpoint: Path | None, run_name: str | None) -> Path:
    """What the line asks for; ValueError where it asks for none, or for two."""
    logs, runs = Path("lightning_logs"), run_names()
    if (checkpoint is None) == (run_name is None):
        there = f" (there are: {', '.join(runs)})" if runs else ""
        raise ValueError(f"give a checkpoint or a --run-name{there}, one of them")
    if run_name and run_name not in runs:
        raise FileNotFoundError(f"no run {run_name!r} in {logs}{did_you_mean(run_name, runs)}")
    return checkpoint or logs / run_name


def parse_seeds(text: str) -> list[int]:
    """'0-2,7' -> [0, 1, 2, 7]."""
    seeds: dict[int, None] = {}
    most = 10_000_000
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--seeds {text!r}: {part!r} is neither 7 nor 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(seeds) + last - first >= most or last >= 2**63:
            raise ValueError(f"--seeds {text!r}: at most {most:,} of them, each below 2^63")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def write_copies(ddpm, steps, seeds, recipe, folder, upscale, format, gif) -> list[Path]:
    """The copies that the line asks for; where they are."""
    import copies

    written = []
    if upscale or format != "png":
        pictures = read_pictures(folder, seeds)
        if upscale:
            written.append(copies.write_enlarged(folder, seeds, pictures, upscale))
        if format != "png":
            write = {"jpg": copies.write_jpgs, "npz": copies.write_npz}[format]
            written.append(write(folder, seeds, pictures))
    if gif:
        path = folder / "chain.gif"
        written.append(copies.write_gif(ddpm, steps, seeds, recipe, path))
    return written


def prepare(
    checkpoint: Path,
    device: str,
    weights: str,
    image_size: int | None,
    given: dict,
    precision: str = "float32",
    draws_on: str | None = None,
):
    """The model on its device, the step table, and the recipe that a picture carries.

    Args:
        draws_on: the device that `precision` auto is about, where the model is moved later.
    """
    import torch

    from diffusion_utils import make_steps
    from pl_utils import load_ddpm, uses_bf16

    device = usable_device(device)
    ddpm = load_ddpm(checkpoint, weights=weights)
    settings = ddpm.config.sampling.model_dump() | given
    for option, only in (("eta", "ddim"), ("variance", "ddpm")):
        if option in given and settings["sampler"] != only:
            raise ValueError(
                f"--{option} belongs to --sampler {only}, and this is {settings['sampler']}"
            )
    steps = make_steps(ddpm.diffusion, **settings)
    size = image_size or ddpm.config.dataset.image_size
    if size % ddpm.unet.factor:
        near = max(1, round(size / ddpm.unet.factor)) * ddpm.unet.factor
        raise ValueError(
            f"--image-size {size} is not a multiple of {ddpm.unet.factor}, as this network "
            f"needs; try {near}"
        )
    recipe = {"checkpoint": str(checkpoint), "weights": ddpm.weights}
    recipe["digest"] = digest_of(ddpm)
    recipe |= {"step": ddpm.trained_steps, "image_size": size, **settings, "timesteps": len(steps)}
    if precision == "auto":
        bf16 = uses_bf16(ddpm.config, torch.device(draws_on or device))
        precision = "bfloat16" if bf16 else "float32"
    return ddpm.to(device), steps, recipe | {"precision": precision}


def usable_device(device: str) -> str:
    """Return the device that is meant; ValueError where it cannot be used here."""
    import torch

    there = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if device == "auto":
        return next(kind for kind, count in there.items() if count)
    kind, colon, index = device.partition(":")
    # nothing is put on a device: that would open a context on it, in each of several processes
    if kind not in there or (colon and not index.isdigit()) or int(index or 0) >= there[kind]:
        names = [k if n == 1 else f"{k}:0 ... {k}:{n - 1}" for k, n in there.items() if n]
        raise ValueError(f"--device {device} cannot be used here; there are: {', '.join(names)}")
    return device


def digest_of(ddpm) -> str:
    """Of the weights that sample and of the process: 16 hexadecimal digits."""
    import hashlib

    digest = hashlib.sha256(json.dumps(ddpm.config.diffusion.model_dump()).encode())
    for name, tensor in ddpm.net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def picture_file(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def free_folder(name: str, seeds: list[int], recipe: dict) -> tuple[Path, list[int]]:
    """`name`, or name-2, ...: the first with no other recipe in the way, and the seeds it lacks."""
    for number in itertools.count(2):
        try:
            return Path(name), missing_seeds(Path(name), seeds, recipe)
        except OtherRecipe:
            name = f"{name.partition('-')[0]}-{number}"


class OtherRecipe(ValueError):
    """A picture in the way was made by another recipe."""


def missing_seeds(folder: Path, seeds: list[int], recipe: dict) -> list[int]:
    """Seeds without a good picture of this recipe.

    Raises:
        OtherRecipe: a folder is one recipe's, and nothing is overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and images go into a folder; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in seeds if not is_good(picture_file(folder, seed), recipe)]
    there, asked = (p for p in folder.glob("*.png") if p.stem.isdigit()), set(seeds)
    another = next((p for p in there if int(p.stem) not in asked), None)
    ours = len(missing) < len(seeds) or (another and is_good(another, recipe))
    copies = (folder / name for name in ("grid.png", "pictures.npz", "chain.gif", "enlarged"))
    copies = [*copies, *(picture_file(folder, seed).with_suffix(".jpg") for seed in seeds)]
    if not ours and (foreign := next((path for path in copies if path.exists()), None)):
        raise OtherRecipe(f"{foreign} is in the way; choose another --output-dir, or delete it")
    return missing


def is_good(path: Path, recipe: dict) -> bool:
    """Whether a whole picture of this recipe is there; OtherRecipe where it is of another."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            other = json.loads(image.info.get("recipe", "{}"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        if path.read_bytes()[:4] in (b"", b"\x89PNG"):
            return False  # cut short
        raise OtherRecipe(f"{path} is no picture; choose another --output-dir") from None
    changed = [
        f"{key} {other.get(key)} -> {value}"
        for key, value in recipe.items()
        if key != "checkpoint" and other.get(key) != value
    ]
    if changed:
        raise OtherRecipe(
            f"{path} was made by another recipe ({', '.join(changed)}); "
            "choose another --output-dir, or delete it"
        )
    return True


def write_pictures(ddpm, steps, seeds, batch_size, folder, recipe, console) -> None:
    """NNNNNN.png of each seed, with the recipe inside; a bar over all network calls."""
    batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
    columns = (
        TextColumn("{task.completed:.0f}/{task.total} pictures"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    bf16 = recipe["precision"] == "bfloat16"
    net = ddpm.sampling_net(len(batches) * len(steps), bf16=bf16)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(seeds))
        for batch in batches:
            pictures = draw(ddpm, steps, batch, recipe, net, partial(bar.advance, task))
            for seed, pixels in zip(batch, pictures, strict=True):
                write_png(picture_file(folder, seed), pixels, recipe | {"seed": seed})


def draw(ddpm, steps, seeds: list[int], recipe: dict, net, advance):
    """The pictures of `seeds`, uint8 [B, C, H, W] on the CPU; `advance` hears how many's worth."""
    import torch

    from diffusion_utils import to_uint8

    with torch.inference_mode():
        chain = ddpm.chain(steps, seeds, image_size=recipe["image_size"], net=net)
        for _, x, _ in chain:
            advance(len(seeds) / len(steps))
        return to_uint8(x).cpu()


def write_png(path: Path, pixels, recipe: dict | None = None) -> None:
    """uint8 [C, H, W] as a PNG, complete or not at all."""
    from PIL.PngImagePlugin import PngInfo

    from copies import as_image, save

    text = PngInfo()
    if recipe:
        text.add_text("recipe", json.dumps(recipe))
    save(as_image(pixels), path, pnginfo=text)


def read_pictures(folder: Path, seeds: list[int]):
    """What `write_pictures` wrote, uint8 [N, C, H, W]."""
    import numpy as np
    import torch
    from PIL import Image

    arrays = [np.array(Image.open(picture_file(folder, seed))) for seed in seeds]
    pictures = torch.from_numpy(np.stack(arrays))
    return pictures[:, None] if pictures.ndim == 3 else pictures.permute(0, 3, 1, 2)


def write_grid(folder: Path, seeds: list[int]) -> None:
    from callbacks import picture_grid

    write_png(folder / "grid.png", picture_grid(read_pictures(folder, seeds)))


if __name__ == "__main__":
    app()
