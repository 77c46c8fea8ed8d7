"""Recipes of training against each other: what each knob buys. From the project's folder:

    python benchmarks/extractor.py configs/fashion_mnist.yml fashion16.pt \\
        dataset.image_size=16 'model.attention_resolutions=[8]'
    python benchmarks/recipes.py run fashion16 paper v+cosine-rate --extractor fashion16.pt
    python benchmarks/recipes.py table fashion16

A run is one line of benchmarks/recipes.jsonl; what stands there is not run again, so that a stop
loses the run in progress alone. A recipe is a set of overrides; `+` joins several, of
which any `section.key=value` may be one. Every run of a task is measured on the
same images with the same noise: FID, KID, precision and recall of 2,000 images by 20 steps of
DPM-Solver++ (EMA weights, no guidance) on the features of a classifier of that data; the error of
eps and bits/dim on validation images.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from config import Config, load_config
from dataset import Images, with_facts
from diffusion_utils import from_uint8, to_uint8
from evaluation.extractor import load_extractor
from evaluation.likelihood import bits_per_dim, likelihood_scores
from evaluation.metrics import Tally, compute
from generation import generate, make_denoiser, make_steps
from model import at_precision
from pl_utils import DDPM, TRAIN, seed_of
from plotting.boards import GRAY, OURS, chart, write_figure
from training.datamodule import open_images, train_batches

RESULTS = Path(__file__).with_suffix(".jsonl")
IMAGES, ERRORS, BITS = 2000, 2000, 100  # generated; of validation for eps and for bits/dim
PAPER = [  # where the configs of small sets depart from it
    "diffusion.prediction=eps", "training.loss_weight=eps", "training.t_density=uniform",
    "training.optimizer=adam",
]  # fmt: skip
FASHION = [
    *PAPER,
    "dataset.root=/usr/share/datasets/fashion-mnist", "model.base_channels=32",
    "model.num_res_blocks=1", "training.batch_size=64", "training.max_steps=1200",
    "training.learning_rate=1e-3", "training.warmup_steps=100", "training.ema_decay=0.995",
    "model.dropout=0",
]  # fmt: skip
TASKS = {  # config, overrides
    "digits": ("digits", [*PAPER, "training.max_steps=1000", "training.ema_decay=0.995"]),
    "digits-as-shipped": ("digits", []),
    "fashion16": (
        "fashion_mnist", [*FASHION, "dataset.image_size=16", "model.attention_resolutions=[8]"]
    ),
    "fashion28": ("fashion_mnist", FASHION),
    "emoji16": (
        "emoji",
        [
            *PAPER, "dataset.image_size=16", "model.attention_resolutions=[8]",
            "model.channel_multipliers=[1,2,2]", "diffusion.beta_schedule=linear",
            "training.batch_size=64",
            "training.max_steps=1800", "training.warmup_steps=100", "training.ema_decay=0.995",
        ],
    ),
}  # fmt: skip
RECIPES = {
    "paper": [],
    "x0": ["diffusion.prediction=x0"],
    "v": ["diffusion.prediction=v"],
    "x0-weight": ["training.loss_weight=x0"],
    "v-weight": ["training.loss_weight=v"],
    "min-snr": ["training.loss_weight=min-snr"],
    "soft-min-snr": ["training.loss_weight=soft-min-snr"],
    "p2": ["training.loss_weight=p2"],
    "sigmoid": ["training.loss_weight=sigmoid"],
    "normal": [
        "training.t_density=normal", "training.t_density_mean=0", "training.t_density_width=2"
    ],
    "wide": [
        "training.t_density=normal", "training.t_density_mean=1", "training.t_density_width=3"
    ],
    "stratified": ["training.t_stratified=true"],
    "ema-warmup": ["training.ema=warmup"],
    "ema-power": ["training.ema=power", "training.ema_lengths=[0.1]"],
    "learned-variance": ["diffusion.learned_variance=true"],
    "cosine-betas": ["diffusion.beta_schedule=cosine"],
    "linear-betas": ["diffusion.beta_schedule=linear"],
    "cosine-rate": ["training.learning_rate_decay=cosine"],
    "linear-rate": ["training.learning_rate_decay=linear"],
    "inverse-sqrt-rate": ["training.learning_rate_decay=inverse-sqrt"],
    "muon": ["training.optimizer=muon"],
    "adamw": [],  # these four are below
    "beta2-0.99": [],
    "immiscible": [],
    "augmented": [],
    "dropout": ["model.dropout=0.1"],
    "no-clip": ["training.gradient_clip_norm=null"],
}  # fmt: skip
COLUMNS = "FID", "KID", "precision", "recall", "eps", "bits", "clipped", "seconds"

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


def configure(task: str, recipe: str, seed: int) -> Config:
    """Return the config of a run; ValueError for what is no recipe."""
    name, overrides = TASKS[task]
    for part in recipe.split("+"):
        if part not in RECIPES and "=" not in part:
            raise ValueError(f"{part!r} is not one of {', '.join(RECIPES)}, nor section.key=value")
        overrides = [*overrides, *RECIPES.get(part, [part])]
    fixed = [f"training.seed={seed}", "guidance.scale=1"]
    return load_config(f"configs/{name}.yml", [*overrides, *fixed])


def found_runs() -> list[dict[str, Any]]:
    """Return the runs that are written down."""
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def train(config: Config, images: Images, kinds: list[str]) -> tuple[DDPM, float, float]:
    """Return a trained model, the share of clipped steps, and seconds."""
    ddpm = next((TRIALS[kind] for kind in kinds if kind in TRIALS), DDPM)(config)
    optimizer = ddpm.configure_optimizers()
    begin, steps = time.perf_counter(), config.training.max_steps
    for step, batch in zip(range(steps), train_batches(images, config), strict=False):
        ddpm.update(batch, optimizer, step=step)
    return ddpm, ddpm.tally[4].item() / steps, time.perf_counter() - begin


class Yardstick:
    """What all runs of a task are measured with: images, features, noise."""

    def __init__(self, config: Config, extractor: Path):
        self.images, self.classes = open_images(config), len(config.dataset.classes)
        self.extractor = load_extractor(str(extractor))
        train = self.images["train"]
        self.reference = self.tally(
            [train[list(range(i, min(i + 500, len(train))))][0] for i in range(0, len(train), 500)]
        ).statistics()
        # the classes have the shares that they have in training
        shares = (
            torch.ones(1) if train.labels is None else train[list(range(len(train)))][1].mean(0)
        )
        ends = [0, *(shares.cumsum(0) / shares.sum() * IMAGES).round().long().tolist()]
        self.seeds = list(itertools.pairwise(ends))
        validation = self.images["validation"]
        count = min(ERRORS, len(validation))
        self.batch = validation[list(range(count))]
        self.repeats = max(1, ERRORS // count)

    def tally(self, batches: list[Tensor]) -> Tally:
        """Return the features of images."""
        count = sum(map(len, batches))
        tally, done = Tally.of(self.extractor, count, batches[0].shape[1:], keep=10_000), 0
        for images in batches:
            tally.add(list(range(done, done + len(images))), *self.extractor(images))
            done += len(images)
        return tally

    @torch.inference_mode()
    def measure(self, ddpm: DDPM) -> dict[str, float]:
        """Return the scores of a model's EMA."""
        ddpm.eval()
        data, diffusion = ddpm.config.dataset, ddpm.diffusion
        classes = len(data.classes)
        labels: Any = torch.eye(classes)[: self.classes] if classes else [None]
        batches, network = [], at_precision(ddpm.ema, ddpm.precision)
        how = {"sampler": "dpm++", "timesteps": 20, "spacing": "trailing"}
        steps = make_steps(diffusion, variance="large", eta=0.0, **how)
        for label, bounds in zip(labels, self.seeds, strict=True):
            seeds = list(range(*bounds))
            denoiser = make_denoiser(network, diffusion, label=label)
            where: dict[str, Any] = {"shape": data.shape, "device": ddpm.device}
            batches += [x for _, x in generate(denoiser, steps, seeds, **where)]
        scores = compute(("fid", "kid", "pr"), self.tally(batches), self.reference)
        found = {name.partition("-")[0]: score.value for name, score in scores.items()}

        generator, total = torch.Generator().manual_seed(0), 0.0
        images = self.batch.images
        count, validation = len(images), self.batch
        if classes > self.classes:  # told that nothing was done to it
            told = torch.zeros(count, classes - self.classes)
            validation = validation._replace(labels=torch.cat([validation.labels, told], 1))
        for _ in range(self.repeats):
            t = (
                torch.arange(count) * diffusion.timesteps
                + torch.randint(diffusion.timesteps, (count,), generator=generator)
            ) // count
            t = t[torch.randperm(count, generator=generator)]
            eps = torch.randn((count, *data.shape), generator=generator)
            total += ddpm.validation_losses(ddpm.ema, validation, t, eps).mean().item()
        found["eps"] = total / self.repeats
        found["bits"] = self.bits(ddpm, labels)
        return found

    def bits(self, ddpm: DDPM, labels: Any) -> float:
        """Return bits/dim of validation images, of some t: the bound's denoiser is of one label."""
        total, stride = 0.0, ddpm.diffusion.timesteps // 50
        for label in labels:
            images, known = (part if part is None else part[:BITS] for part in self.batch)
            count = len(images)
            if label is not None:
                images = images[(known == label[: self.classes]).all(dim=1)]
            if not len(images):
                continue
            bound = bits_per_dim(
                make_denoiser(ddpm.ema, ddpm.diffusion, label=label),
                ddpm.diffusion,
                images,
                range(len(images)),
                variance="learned" if ddpm.config.diffusion.learned_variance else "small",
                batch_size=64,
                stride=stride,
            )
            scores = likelihood_scores(bound, stride=stride, timesteps=ddpm.diffusion.timesteps)
            total += next(iter(scores.values())).value * len(images) / count
        return total


# ---- what was tried and is no part of the project


class WithAdamW(DDPM):
    """Learns by AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rate = self.config.training.learning_rate
        return torch.optim.AdamW(self.unet.parameters(), rate, weight_decay=0.01, fused=True)


class WithBeta2(DDPM):
    """Learns by Adam with a shorter memory of squared gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rate = self.config.training.learning_rate
        return torch.optim.Adam(self.unet.parameters(), rate, betas=(0.9, 0.99), fused=True)


class Immiscible(DDPM):
    """Gives each image of a batch the noise that is near it (Li et al. 2024), one to one."""

    def update(self, batch: Any, *args: Any, **how: Any) -> None:
        self.images = from_uint8(batch.images).flatten(1)
        super().update(batch, *args, **how)

    def draw(self, stream: int, index: int, count: int) -> Any:
        draws = super().draw(stream, index, count)
        if stream != TRAIN:
            return draws
        far = torch.cdist(self.images, draws.eps.flatten(1)).square()
        return draws._replace(eps=draws.eps[linear_sum_assignment(far)[1]])


class Augmented(DDPM):
    """Turns, scales, stretches and shifts some images, and tells the network (EDM, App. F.2).

    What was done is told through further columns of the labels; images without a label, which are
    told nothing, stay as they are.
    """

    SHARE, TOLD = 0.12, 6  # of each kind; numbers that are told

    def __init__(self, config: Config):
        classes = [*config.dataset.classes, *(f"augmented {i}" for i in range(self.TOLD))]
        data = config.dataset.model_copy(update={"classes": classes})
        super().__init__(config.model_copy(update={"dataset": data}))

    def update(self, batch: Any, *args: Any, step: int, **how: Any) -> None:
        count = len(batch.images)
        generator = torch.Generator().manual_seed(seed_of(self.config.training.seed, 99, step))
        size = torch.randn(count, self.TOLD, generator=generator)
        some = torch.rand(count, self.TOLD, generator=generator) < self.SHARE
        told = size * some * self.draw(TRAIN, step, count).labelled[:, None]
        scale, angle, stretch, way, dx, dy = told.unbind(1)
        scale, stretch, angle = 2 ** (0.2 * scale), 2 ** (0.2 * stretch), 0.35 * angle
        turn = lambda a: torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1).view(-1, 2, 2)
        wide = torch.stack([scale * stretch, scale / stretch], 1).diag_embed()
        linear = turn(angle + way) @ wide @ turn(-way)
        affine = torch.cat([linear, 0.125 * torch.stack([dx, dy], 1)[..., None]], 2)
        x = from_uint8(batch.images)
        grid = torch.nn.functional.affine_grid(affine, list(x.shape), align_corners=False)
        warped = torch.nn.functional.grid_sample(
            x, grid, mode="bicubic", padding_mode="border", align_corners=False
        )
        images = torch.where(told.any(1)[:, None, None, None], to_uint8(warped), batch.images)
        labels = torch.cat([batch.labels, told], 1)
        super().update(batch._replace(images=images, labels=labels), *args, step=step, **how)


TRIALS = {"adamw": WithAdamW, "beta2-0.99": WithBeta2}
TRIALS |= {"immiscible": Immiscible, "augmented": Augmented}


@app.command()
def run(
    task: str,
    recipes: list[str],
    extractor: Annotated[Path, typer.Option()],
    seeds: str = "0,1,2",
) -> None:
    """Train and measure each recipe with each seed, where that is not written down."""
    yardstick = None
    for seed in map(int, seeds.split(",")):
        for recipe in recipes:
            if any(
                (r["task"], r["recipe"], r["seed"]) == (task, recipe, seed) for r in found_runs()
            ):
                continue
            config = with_facts(configure(task, recipe, seed))
            yardstick = yardstick or Yardstick(config, extractor)
            ddpm, clipped, seconds = train(config, yardstick.images["train"], recipe.split("+"))
            scores = {**yardstick.measure(ddpm), "clipped": clipped, "seconds": seconds}
            commit = subprocess.run(
                ["git", "describe", "--always"], capture_output=True, text=True
            ).stdout.strip()
            line = {"task": task, "recipe": recipe, "seed": seed, "commit": commit}
            line |= {name: float(f"{value:.5g}") for name, value in scores.items()}
            with RESULTS.open("a") as file:
                print(json.dumps(line), file=file)
            print(json.dumps(line), flush=True)


@app.command(name="time")
def time_steps(task: str, recipes: list[str], steps: int = 30, rounds: int = 5) -> None:
    """Print each recipe's seconds a step beside the first's; they take turns."""
    models = [DDPM(with_facts(configure(task, recipe, 0))) for recipe in recipes]
    optimizers = [ddpm.configure_optimizers() for ddpm in models]
    images = open_images(models[0].config)["train"]
    batches = list(zip(range(steps), train_batches(images, models[0].config), strict=False))
    took: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):  # the first warms up
        for ddpm, optimizer, seconds in zip(models, optimizers, took, strict=True):
            begin = time.perf_counter()
            for step, batch in batches:
                ddpm.update(batch, optimizer, step=step)
            seconds.append((time.perf_counter() - begin) / steps)
    for recipe, seconds in zip(recipes, took, strict=True):
        ratios = [a / b for a, b in zip(seconds[1:], took[0][1:], strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        milliseconds = 1e3 * statistics.median(seconds[1:])
        print(f"{recipe}: {milliseconds:.1f} ms, {middle:.2f} ({low:.2f}–{high:.2f}) of the first")


@app.command()
def table(task: str) -> None:
    """Print a Markdown table: means, and from the smallest to the largest of the seeds."""
    runs = [r for r in found_runs() if r["task"] == task]
    print(f"| recipe | seeds | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for recipe in dict.fromkeys(r["recipe"] for r in runs):
        rows = [r for r in runs if r["recipe"] == recipe]
        cells = []
        for name in COLUMNS:
            values = [r[name] for r in rows]
            cells.append(f"{statistics.mean(values):.4g}")
            if name in ("FID", "eps") and len(values) > 1:
                cells[-1] += f" ({min(values):.4g}–{max(values):.4g})"
        print(f"| {recipe} | {len(rows)} | {' | '.join(cells)} |")


@app.command()
def plot(out: Path, tasks: list[str]) -> None:
    """Plot each task's FIDs, a dot a seed, recipes in the order of the first task's means."""
    runs = [r for r in found_runs() if r["task"] in tasks and "max_steps" not in r["recipe"]]
    mean: dict[str, list[float]] = {r["recipe"]: [] for r in runs}
    for r in sorted(runs, key=lambda r: tasks.index(r["task"])):
        mean[r["recipe"]].append(r["FID"] + 100 * tasks.index(r["task"]))
    names = sorted(mean, key=lambda name: -min(mean[name]))
    note = "FID of 2,000 images on a small classifier's features, a dot a seed; line: the paper's"
    figure, axes = chart(
        0.8 + 0.17 * len(names), title="Recipes", note=note, panels=[1.0] * len(tasks)
    )
    for axis, task in zip(axes, tasks, strict=True):
        some = [r for r in runs if r["task"] == task]
        paper = statistics.mean(r["FID"] for r in some if r["recipe"] == "paper")
        axis.axvline(paper, color=GRAY, linewidth=0.6)
        height = [names.index(r["recipe"]) for r in some]
        axis.plot([r["FID"] for r in some], height, "o", color=OURS, markersize=3.5)
        axis.set(xscale="log", title=task, yticks=range(len(names)), ylim=(-0.6, len(names) - 0.4))
        low, high = axis.get_xlim()
        marks = [mark for mark in (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3) if low < mark < high]
        axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axis.minorticks_off()
        axis.set_yticklabels(names if axis is axes[0] else [""] * len(names), size=6.5)
    write_figure(figure, out)


if __name__ == "__main__":
    app()
