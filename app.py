#!/usr/bin/env python3
"""Draw with a trained model on a page in the browser."""

if __name__ == "__main__":
    import cli  # noqa: F401  (first: it speaks of packages that are missing)

import os
from typing import Annotated

import typer

from cli import (
    CheckpointName,
    Device,
    Precision,
    RunName,
    TrainedModel,
    Weights,
    describe,
    fail,
    plain_console,
    usable_device,
    which_model,
)

HELP = """
Draw with a trained model on a page in the browser.

The page answers to this machine alone, and needs no network. Its images are those of sample.py by
the same seeds. CKPT is what sample.py takes.

Examples:

\b
  python app.py pretrained/digits.safetensors
  python app.py --run-name digits --port 8000
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
def draw(
    checkpoint: TrainedModel = None,
    run_name: RunName = None,
    which: CheckpointName = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where on 127.0.0.1.")] = 7860,
    device: Device = "auto",
    weights: Weights = "ema",
    precision: Precision = "auto",
) -> None:
    # no word to anybody: the library would count its users
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    console = plain_console()
    try:
        source = which_model(checkpoint, run_name, which)
        device = usable_device(device)
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            hint = "pip install -r requirements-extras.txt"
            raise ValueError(f"the page needs {error.name}: {hint}") from None
        from page import Page, serve
        from weights import load_model

        model = load_model(source, weights).to(device)
        page = Page(model, source=str(source), precision=precision, explain=describe)
        serve(page, port, console.print)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(fail(error)) from None


if __name__ == "__main__":
    app()
