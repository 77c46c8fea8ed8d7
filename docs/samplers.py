"""One image of all samplers: python docs/samplers.py CKPT OUT.png, from the project's folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from PIL import Image, ImageDraw, ImageFont

from generation import generate, make_denoiser, make_steps
from weights import load_model

ROWS = {
    "ddpm, large": dict(sampler="ddpm", variance="large"),
    "ddpm, small": dict(sampler="ddpm", variance="small"),
    "ddim": dict(sampler="ddim"),
    "dpm++": dict(sampler="dpm++"),
}
COLUMNS = 10, 20, 50, 1000
ACROSS, DOWN, SCALE = 4, 2, 2  # images of a cell, and how much they are enlarged
LEFT, TOP, GAP = 90, 26, 10


def main(checkpoint: str, out: str) -> None:
    model = load_model(checkpoint)
    side = SCALE * model.config.dataset.image_size
    width, height = (n * side + GAP for n in (ACROSS, DOWN))
    sheet = Image.new("RGB", (LEFT + len(COLUMNS) * width, TOP + len(ROWS) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, count in enumerate(COLUMNS):
        draw.text((LEFT + column * width, 5), f"{count:,} steps", "black", font)
    for row, (name, options) in enumerate(ROWS.items()):
        draw.text((6, TOP + row * height + height // 2 - 14), name, "black", font)
        for column, count in enumerate(COLUMNS):
            defaults = dict(variance="large", eta=0.0, spacing="trailing")
            steps = make_steps(model.diffusion, timesteps=count, **(defaults | options))
            times = [step.t for step in steps]
            denoiser = make_denoiser(model.network, model.diffusion, times=times)
            seeds = range(ACROSS * DOWN)
            [(_, images)] = generate(denoiser, steps, seeds, shape=model.shape)
            for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
                image = Image.fromarray(pixels.squeeze()).resize((side, side), Image.NEAREST)
                x, y = i % ACROSS * side, i // ACROSS * side
                sheet.paste(image, (LEFT + column * width + x, TOP + row * height + y))
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
