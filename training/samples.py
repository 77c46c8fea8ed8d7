"""Images of a run that has ended, as `sample.py RUN` draws them."""

from pathlib import Path

import torch
from rich.console import Console

from generation import Sampling, resolve_precision
from generation.folder import draw, find_jobs
from weights import load_model


def draw_into(folder: Path, run: Path, count: int, device: str, console: Console) -> None:
    """Draw `count` images by the newest EMA, from seed 0 on, into `folder`, or folder-2, ...

    A model with labels draws as many of each class as it takes to make so many.
    """
    model = load_model(run).to(device)
    classes = model.config.dataset.classes
    seeds = range(-(-count // max(1, len(classes))))
    precision = resolve_precision(model.config, torch.device(device))
    plan = Sampling(model, {"class_label": classes}, source=str(run), precision=precision)
    folder, jobs = find_jobs(plan, seeds, None, str(folder))
    draw(plan, jobs, seeds, folder, console)
