"""The page itself: its controls, what they do, and what is shown while a chain denoises."""

import base64
import errno
import html
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from generation import quick_settings, resolve_precision
from generation.images import as_image, image_grid
from generation.recipe import knows_no_label
from generation.samplers import SAMPLERS
from page.draw import BYTES, IMAGES, PIXELS, command_line, draw, draw_health, make_plan
from weights import Model

NEW, LIKE, FILL = "New images", "Variations of an image", "Fill a part"
DRAWN = "what is painted over"
REGIONS: dict[str, Any] = {  # of an image of height 1 and width 1: top, bottom, left, right
    "the lower half": (0.5, 1, 0, 1),
    "the upper half": (0, 0.5, 0, 1),
    "the left half": (0, 1, 0, 0.5),
    "the right half": (0, 1, 0.5, 1),
    "the middle": (0.25, 0.75, 0.25, 0.75),
}
PAUSE = 0.1  # seconds between frames: what a browser shows smoothly
# what a request ends in that no browser with this page would send
UNREADABLE = ValidationError, TypeError, LookupError, AttributeError, ArithmeticError
CSS = """
.live img { width: 100%; max-width: 40rem; image-rendering: pixelated; display: block; }
.pixels img { image-rendering: pixelated; }
.images .fixed-height { min-height: 0 !important; }
.images .grid-container { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)) !important; }
.live code { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid currentColor !important; outline-offset: 2px; }
"""


class Page(gr.Blocks):
    """The page of a model; whatever a request ends in, the terminal stays clean.

    Args:
        source: where the model is from, for recipes. precision: as `resolve_precision` takes it.
        explain: an error -> the message for a visitor.
    """

    def __init__(
        self,
        model: Model,
        *,
        source: str,
        precision: str,
        explain: Callable[[BaseException], str],
    ):
        Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow refuses twice as many
        self.folder = tempfile.TemporaryDirectory(prefix="ddpm-page-")
        os.environ["GRADIO_TEMP_DIR"] = str(Path(self.folder.name, "kept"))  # half an hour
        self.model, self.source, self.explain = model, source, explain
        self.precision = resolve_precision(model.config, model.device, precision)
        height, width = model.config.dataset.size
        title = f"{model.config.dataset.name}, {height}x{width}"
        super().__init__(title=title, analytics_enabled=False, delete_cache=(60, 1800))
        with self:
            self._lay_out()
        self.queue(max_size=100, default_concurrency_limit=1)

    def mounted_by(self, app: Any, **where: Any) -> Any:
        """Return a FastAPI application with this page at its root."""
        theme = gr.themes.Default(font="system-ui", font_mono="monospace")  # nothing to load
        quiet: dict[str, Any] = {"footer_links": [], "run_history": False, "ssr_mode": False}
        return gr.mount_gradio_app(
            app, self, path="/", theme=theme, css=CSS, max_file_size=BYTES, **quiet, **where
        )

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except Exception as error:
            cause = error.__cause__ or error  # a control that could not read its value has one
            if isinstance(cause, Image.DecompressionBombError):
                text = f"this image has more than {PIXELS:,} pixels"
            elif isinstance(cause, OSError | SyntaxError) and (
                cause is not error  # of a control, so of what was brought
                or (cause.filename and cause.args[0] != errno.ENOSPC)  # of the system
            ):
                text = "this is not an image, or it is damaged; try PNG or JPEG"
            elif isinstance(cause, UNREADABLE):
                text = "this request cannot be read"
            else:
                text = str(cause.message) if isinstance(cause, gr.Error) else self.explain(cause)
            text = re.sub(r"--(?=\w)", "", text)  # there are no options here
            raise gr.Error(html.escape(text[:300]), duration=None, print_exception=False) from None

    def draw(
        self, kind: str, count: float, seed: float, labels: list[str] | None, sampler: str,
        steps: float, eta: float, scale: float, editor: dict | None, strength: float, region: str,
        resample: float,
    ) -> Iterator[tuple[Any, Any]]:  # fmt: skip
        """Yield (HTML of the chain, gallery) after each network call."""
        sampling: dict[str, Any] = {"sampler": sampler, "timesteps": int(steps)}
        if sampler == "ddim":
            sampling["eta"] = float(eta)
        if sampler == "ddpm" and kind == FILL:
            sampling["variance"] = "small"
        if labels:
            sampling |= {"class_label": list(labels), "guidance_scale": float(scale)}
        seeds = list(range(int(seed), int(seed) + int(count)))
        with tempfile.TemporaryDirectory(dir=self.folder.name) as name:
            folder, edit = Path(name), dict[str, Any]()
            if kind != NEW:
                image = Path((editor or {}).get("background") or "")
                if not image.is_file():
                    raise ValueError("choose an image first: upload it, or paste it")
                if kind == LIKE:
                    edit = {"image": image, "strength": float(strength)}
                else:
                    mask = write_mask(image, editor or {}, region, folder / "mask.png")
                    edit = {"inpaint": image, "mask": mask, "resample": int(resample)}
                    edit["jump"] = max(1, min(10, int(steps) // 2))
            plan = make_plan(
                self.model,
                sampling,
                source=self.source,
                precision=self.precision,
                count=len(seeds),
                edit=edit,
            )
            shown, columns = 0.0, len(seeds) if len(plan.labels) > 1 else None
            for frame in draw(plan, seeds, folder):
                if time.monotonic() - shown < PAUSE:
                    yield gr.skip(), gr.skip()  # the library looks whether anybody still waits
                else:
                    shown = time.monotonic()
                    told = f"step {frame.done:,} of {frame.calls:,}"
                    yield as_html(frame.grid(columns), told), gr.skip()
            told = html.escape(command_line(self.source, sampling, seeds, edit))
            grid = image_grid(torch.cat(frame.finished), columns)
            yield as_html(grid, f"The same images: <code>{told}</code>"), frame.files

    def switch(self, kind: str) -> list[Any]:
        """Return what becomes of the editor, strength, filling, sampler and steps."""
        diffusion, fill = self.model.diffusion, kind == FILL
        quick = quick_settings(diffusion)
        if fill:  # RePaint goes back and forth by samplers of one step, and needs some
            quick = {"sampler": "ddim", "timesteps": min(50, diffusion.timesteps)}
        return [
            gr.update(visible=kind != NEW),
            gr.update(visible=kind == LIKE),
            gr.update(visible=fill),
            gr.update(choices=["ddim", "ddpm"] if fill else [*SAMPLERS], value=quick["sampler"]),
            gr.update(value=quick["timesteps"]),
        ]

    def check_up(self) -> str:
        """Return the file of the health figure, which is drawn once."""
        path = Path(self.folder.name, "health.png")
        if not path.exists():
            draw_health(self.model, self.source, path)
        return str(path)

    def _lay_out(self) -> None:
        config, diffusion = self.model.config, self.model.diffusion
        classes, quick = config.dataset.classes, quick_settings(diffusion)
        free = knows_no_label(self.model)  # then it can draw without one, and be guided
        pixels = ["pixels"] if max(config.dataset.size) < 64 else []
        weights = {"ema": "the EMA", "raw": "raw weights"}[self.model.weights]
        gr.Markdown(
            f"# {self.title}\n`{self.source}`: {weights} after {self.model.step:,} training steps"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                kind = gr.Radio([NEW, LIKE, FILL], value=NEW, label="What to make")
                count = gr.Slider(1, IMAGES, 4 if classes else 16, step=1, label="Images")
                seed = gr.Number(0, label="Seed", minimum=0, maximum=2**31, precision=0)
                labels = gr.Dropdown(
                    classes, value=classes[:4], multiselect=True, label="Classes, a row for each",
                    info="none: whatever the model likes" if free else None, visible=bool(classes),
                )  # fmt: skip
                scale = gr.Slider(
                    0, 10, config.guidance.scale, step=0.1, label="Guidance",
                    visible=bool(classes) and free,
                    info="1 follows the class, more exaggerates it",
                )  # fmt: skip
                sampler = gr.Dropdown(list(SAMPLERS), value=quick["sampler"], label="Sampler")
                steps = gr.Slider(1, diffusion.timesteps, quick["timesteps"], step=1, label="Steps")
                eta = gr.Slider(
                    0, 1, config.sampling.eta, step=0.05, label="eta, the noise of ddim",
                    visible=False,
                )  # fmt: skip
                strength = gr.Slider(
                    0.1, 1, 0.6, step=0.05, label="Strength", visible=False,
                    info="1 forgets the image",
                )  # fmt: skip
                with gr.Column(visible=False) as filling:
                    region = gr.Dropdown([DRAWN, *REGIONS], value=DRAWN, label="Fill")
                    resample = gr.Slider(1, 20, 5, step=1, label="How often each part is walked")
                with gr.Row():
                    button = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=2, min_width=300):
                editor = gr.ImageEditor(
                    label="The image; paint over what is to be filled", type="filepath",
                    sources=["upload", "clipboard"], format="png", layers=False, visible=False,
                    brush=gr.Brush(colors=["#ffffff"], default_size=24), transforms=(),
                    elem_classes=pixels, buttons=[],
                )  # fmt: skip
                chain = gr.HTML("<p>Draw, and the images emerge here.</p>", elem_classes=["live"])
                gallery = gr.Gallery(
                    label="Images", show_label=False, height="auto", object_fit="contain",
                    elem_classes=[*pixels, "images"], buttons=["download"],
                )  # fmt: skip
                with gr.Accordion("Health of the model", open=False):
                    gr.Markdown(
                        "Its loss beside what its data allow, and its images beside their nearest "
                        "training images. It takes about half a minute, once."
                    )
                    look = gr.Button("Measure")
                    figure = gr.Image(label="Health", type="filepath", buttons=["download"])
        inputs = [
            kind, count, seed, labels, sampler, steps, eta, scale, editor, strength, region,
            resample,
        ]  # fmt: skip
        private: dict[str, Any] = {"api_visibility": "private"}
        at_once: dict[str, Any] = private | {"concurrency_limit": None, "show_progress": "hidden"}
        drawing = button.click(
            self.draw, inputs, [chain, gallery], show_progress_on=[chain], **private
        )
        stop.click(None, cancels=[drawing], **private)
        look.click(self.check_up, None, figure, **private)
        kind.change(self.switch, kind, [editor, strength, filling, sampler, steps], **at_once)
        sampler.change(lambda name: gr.update(visible=name == "ddim"), sampler, eta, **at_once)


def as_html(pixels: Tensor, text: str) -> str:
    """Return uint8 [3, H, W] with a line below it."""
    file = io.BytesIO()
    as_image(pixels).save(file, "jpeg", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="what is drawn" src="data:image/jpeg;base64,{data}"><p>{text}</p>'


def write_mask(image: Path, editor: dict, region: str, path: Path) -> Path:
    """Write the mask of an image: white where it is painted over, or a part of it by name.

    Raises:
        ValueError: nothing is painted.
    """
    with Image.open(image) as opened:
        width, height = opened.size
    mask = np.zeros((height, width), np.uint8)
    if region in REGIONS:
        top, bottom, left, right = REGIONS[region]
        rows = slice(round(top * height), round(bottom * height))
        mask[rows, round(left * width) : round(right * width)] = 255
    else:
        for layer in editor.get("layers") or []:
            with Image.open(layer) as opened:
                alpha = opened.convert("RGBA").getchannel("A").resize((width, height))
            mask |= np.asarray(alpha)
        mask = np.where(mask >= 128, 255, 0).astype(np.uint8)
        if not mask.any():
            raise ValueError("paint over what is to be filled, or choose a part by name")
    Image.fromarray(mask).save(path)
    return path
