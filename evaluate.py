#!/usr/bin/env python3
"""Measure a model as the paper did, with the recipe beside the number."""

if __name__ == "__main__":
    import terminal

    terminal.guard()  # before a package that may be missing is imported

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from files import atomic_write
from sample import Eta, Precision, Sampler, Spacing, Timesteps, Variance, Weights
from terminal import fail, is_main_process, plain_console, quiet_libraries

HELP = """
Measure a model as the paper did, with the recipe beside the number.

SOURCE is a checkpoint, a run's folder, a diffusers folder or .safetensors; or pictures as they are,
a folder or zip of one size; or a config, whose held-out pictures are measured: as good as it gets.

fid, is, kid and pr (precision and recall) are torch-fidelity's; nll is the variational bound, in
bits per dimension. The numbers go to metrics.json, with all that is needed to get them again. The
paper takes 50,000 pictures by its sampler of T steps, against all that it trained on.

Examples:

\b
  python evaluate.py lightning_logs/cifar10
  python evaluate.py lightning_logs/cifar10 --metrics fid,kid --num-images 5000 \\
      --sampler dpm++ --timesteps 20 --save-images
  python evaluate.py samples --reference data/faces.zip
"""

VERSIONS = "torch", "torch_fidelity", "numpy", "scipy", "pytorch_lightning"

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=HELP)
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What is measured.")],
    metrics: Annotated[
        str | None, typer.Option(help="Some of fid,is,kid,pr,nll. Default: all that apply.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=2, help="How many. Default: 50,000, or all there are.")
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            metavar="train|validation|FOLDER|ZIP|CONFIG|FILE.npz",
            help="Real pictures: of the model's dataset; others; or saved statistics of some.",
        ),
    ] = "train",
    output: Annotated[
        Path | None, typer.Option(help="Folder of metrics.json. Default: evaluations/NAME.")
    ] = None,
    save_images: Annotated[
        bool,
        typer.Option("--save-images", help="Keep the pictures; a stopped evaluation goes on."),
    ] = False,
    extractor: Annotated[
        str, typer.Option(help="Of features: torch-fidelity's name, or a TorchScript file.")
    ] = "inception-v3-compat",
    extractor_weights: Annotated[
        Path | None, typer.Option(help="Its weights, where they cannot be fetched.")
    ] = None,
    split: Annotated[
        Literal["train", "validation"] | None,
        typer.Option(help="Of nll, and of a config. Default: validation, if there is one."),
    ] = None,
    nll_images: Annotated[
        int | None, typer.Option(min=1, help="How many of the split. Default: all.")
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, help="Of nll: each so many-th t alone, for an estimate.")
    ] = 1,
    sampler: Sampler = None,
    timesteps: Timesteps = None,
    eta: Eta = None,
    spacing: Spacing = None,
    variance: Variance = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of the first picture; then + 1 each.")
    ] = 0,
    weights: Weights = "ema",
    precision: Precision = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time, a device.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many. Default: every GPU, or one CPU.")
    ] = None,
):
    asked = SimpleNamespace(**locals())
    console = plain_console(quiet=not is_main_process())
    began, goes_on = False, "nothing is kept without --save-images"
    try:
        quiet_libraries()
        from evaluation import OnEachDevice, build_predictor
        from protocol import Protocol
        from sample import usable_device

        asked.device = usable_device(device)
        trainer = build_predictor(asked.device, devices)
        job = Job(Protocol(asked, console.print), console)
        if save_images:
            goes_on = f"what is finished is in {job.images}, the same command goes on"
        began = True
        trainer.predict(OnEachDevice(job.work, *job.nets))
        if trainer.is_global_zero:
            job.report(trainer.world_size)
    except (KeyboardInterrupt, SystemExit):  # the second is what Lightning makes of the first
        console.print(f"stopped; {goes_on}")
        raise typer.Exit(130) from None
    except Exception as error:
        if not began and not isinstance(error, ValueError | OSError):
            raise
        fail(error)
        if began and (launcher := trainer.strategy.launcher):
            launcher.kill(signal.SIGKILL)  # the ranks started from here; they would work on alone
        raise typer.Exit(1 if began else 2) from None


class Job:
    """The work of one evaluation, shared by all ranks, and its report."""

    def __init__(self, protocol, console: Console):
        self.protocol, self.asked, self.console = protocol, protocol.asked, console
        self.nets = [net for net in (protocol.ddpm, protocol.extractor) if net]
        self.statistics = self.bound = None
        self.seconds: dict[str, float] = {}
        self.recipe = json.loads(json.dumps(protocol.recipe))
        self.seeds = [self.asked.seed + i for i in range(protocol.count)]
        self.missing = set(self.seeds)
        self.folder = self._choose_folder()
        self.images = self.folder / "images"
        self._announce()

    def _choose_folder(self) -> Path:
        """--output; or evaluations/NAME, NAME-2, ...: the first without another's numbers."""
        if self.asked.output:
            return self._check(self.asked.output)
        name = self.protocol.name
        for number in count(1):
            folder = Path("evaluations", name if number == 1 else f"{name}-{number}")
            try:
                return self._check(folder)
            except ValueError:
                pass

    def _check(self, folder: Path) -> Path:
        """The folder. ValueError where another recipe's numbers or pictures are in it."""
        from sample import missing_seeds

        path, other = folder / "metrics.json", self.recipe
        if path.exists():
            try:
                other = dict(json.loads(path.read_text())["recipe"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path} is not of this command; choose another --output"
                ) from None
        differing = [k for k in self.recipe | other if self.recipe.get(k) != other.get(k)]
        if differing:
            raise ValueError(
                f"{folder} holds another evaluation ({', '.join(differing)} differ); "
                "choose another --output"
            )
        if self.asked.save_images and self.protocol.ddpm:
            of_picture = self.protocol.of_picture
            self.missing = set(missing_seeds(folder / "images", self.seeds, of_picture))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _announce(self) -> None:
        protocol, recipe = self.protocol, self.recipe
        say = self.console.print
        if protocol.ddpm:
            step = f"step {recipe['step']:,}, " if recipe["step"] is not None else ""
            text = f"{recipe['source']} ({step}{recipe['weights']} weights)"
            if protocol.tally:
                text += f": {protocol.count:,} pictures by {recipe['sampler']}, "
                text += f"{recipe['timesteps']} steps, in {recipe['precision']}"
            say(text)
        else:
            say(f"{recipe['source']}: {protocol.count:,} pictures")
        if tally := protocol.tally:
            say(f"features: {protocol.extractor.name}, sha256 {protocol.extractor.digest}")
            if protocol.shape[0] in (2, 4):
                say("alpha is dropped")
            if {"kid", "pr"} & set(protocol.metrics):
                say(f"KID, precision and recall keep the features: {tally.features.nbytes:,} bytes")
        say(f"output: {self.folder}")

    # ---- on each rank

    def work(self, ranks) -> None:
        """The reference, then the pictures, then the likelihood."""
        from evaluation import measure, measure_likelihood, reference_statistics
        from metrics import Statistics

        protocol, asked = self.protocol, self.asked
        self.missing = ranks.first(self.missing)
        real, batch_size = protocol.reference, asked.batch_size
        if isinstance(real, Statistics):
            self.statistics = real
        elif real is not None:
            cache = Path(protocol.config.dataset.cache if protocol.config else "data/cache")
            with self._stage("reference") as over:
                options = dict(batch_size=batch_size, progress=over)
                self.statistics = reference_statistics(
                    real, protocol.extractor, ranks, cache, **options
                )
        if protocol.ddpm:
            batches = -(-len(self.missing) // (ranks.count * batch_size))
            bf16 = protocol.of_picture["precision"] == "bfloat16"
            self.net = protocol.ddpm.sampling_net(batches * len(protocol.steps), bf16=bf16)
            self._forecast(ranks)
        if protocol.tally:
            # whatever is there already: sums in another order have other last digits
            rows = list(range(protocol.count))
            with self._stage("pictures") as over:
                options = dict(batch_size=batch_size, progress=over)
                measure(self._make, rows, protocol.tally, protocol.extractor, ranks, **options)
        if "nll" in protocol.metrics:
            rows, pictures = protocol.nll_rows, protocol.data[protocol.split]
            with self._stage("likelihood") as over:
                self.bound = measure_likelihood(
                    protocol.ddpm, lambda batch: pictures[[rows[i] for i in batch]], len(rows),
                    ranks, seed=asked.seed, batch_size=batch_size, stride=asked.stride,
                    progress=over,
                )  # fmt: skip

    def _make(self, rows: list[int]):
        """The pictures of `rows`, uint8 [B, C, H, W]; sampled where they are not there."""
        from sample import draw, picture_file, read_pictures, write_png

        protocol = self.protocol
        if not protocol.ddpm:
            return protocol.pictures[[protocol.rows[row] for row in rows]]
        seeds = [self.seeds[row] for row in rows]
        recipe, advance = protocol.of_picture, self._advance
        sample = lambda seeds: draw(protocol.ddpm, protocol.steps, seeds, recipe, self.net, advance)
        if not self.asked.save_images:
            return sample(seeds)
        if new := [seed for seed in seeds if seed in self.missing]:
            for seed, pixels in zip(new, sample(new), strict=True):
                write_png(picture_file(self.images, seed), pixels, recipe | {"seed": seed})
        return read_pictures(self.images, seeds)

    def _forecast(self, ranks) -> None:
        """Says how long it will take, measured on five network calls of a batch of real size."""
        from diffusion_utils import to_uint8

        protocol, batch = self.protocol, min(self.asked.batch_size, self.protocol.count)
        chain = protocol.ddpm.chain([protocol.steps[0]] * 6, self.seeds[:batch], net=self.net)
        next(chain)[1].cpu()  # the first call is slow
        times = [time.perf_counter()]
        for _, x, _ in chain:
            x.cpu()  # waits for the device
            times.append(time.perf_counter())
        call = median(after - before for before, after in pairwise(times))
        share = lambda count: math.ceil(count / ranks.count / batch)
        steps, said, total = len(protocol.steps), [], 0.0
        if protocol.tally:
            pictures = to_uint8(x)
            protocol.extractor(pictures)
            start = time.perf_counter()
            protocol.extractor(pictures)[0].cpu()
            features = time.perf_counter() - start
            batches = share(len(self.missing))
            total += batches * steps * call + share(protocol.count) * features
            said.append(f"{batches:,} batches of {batch} pictures x {steps:,} steps")
        if "nll" in protocol.metrics:
            terms = len(range(0, protocol.ddpm.diffusion.timesteps, self.asked.stride))
            calls = share(len(protocol.nll_rows) * terms)
            total += calls * call
            said.append(f"{calls:,} calls for the likelihood")
        self.console.print(
            f"it will take about {duration(total)}: {', '.join(said)}, on {ranks.count} device(s), "
            f"at {1000 * call:.3g} ms a network call"
        )

    @contextmanager
    def _stage(self, what: str) -> Iterator:
        """Times it and shows how far it is; gives what wraps the list of a rank's batches."""
        start = time.perf_counter()
        hidden = not self.console.is_terminal
        with Progress(console=self.console, transient=True, disable=hidden) as bar:
            task = bar.add_task(what)
            self._advance = partial(bar.advance, task)

            def over(batches: list[list[int]]) -> Iterator[list[int]]:
                total, done, said = sum(map(len, batches)), 0, start
                bar.update(task, total=total)
                for batch in batches:
                    yield batch
                    done += len(batch)
                    bar.update(task, completed=done)
                    if hidden and time.perf_counter() - said > 60:
                        said = time.perf_counter()
                        self.console.print(f"{what}: {done:,} of {total:,} on this device")

            yield over
        self.seconds[what] = round(time.perf_counter() - start, 2)

    # ---- rank 0 alone

    def report(self, devices: int) -> None:
        """The table, metrics.json and nll.npz."""
        from evaluation import likelihood_scores
        from metrics import compute

        protocol, start = self.protocol, time.perf_counter()
        scores = {}
        if protocol.tally:
            scores = compute(protocol.metrics, protocol.tally, self.statistics)
        if self.bound:
            T = protocol.ddpm.diffusion.timesteps
            scores |= likelihood_scores(self.bound, stride=self.asked.stride, timesteps=T)
            self._save_terms()
        self.seconds["metrics"] = round(time.perf_counter() - start, 2)
        facts = {
            "scores": {name: score.facts() for name, score in scores.items()},
            "recipe": self.recipe,
            "not as in the paper": protocol.departures(),
            "versions": {name: version(name) for name in VERSIONS if find_spec(name)},
            "devices": devices,
            "seconds": self.seconds,
        }
        if self.statistics:
            facts["reference"] = {
                "pictures": self.statistics.count,
                "digest": self.statistics.digest(),
            }
        with atomic_write(self.folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self._print(scores)

    def _save_terms(self) -> None:
        import numpy as np

        arrays = {name: tensor.numpy() for name, tensor in self.bound._asdict().items()}
        with atomic_write(self.folder / "nll.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, rows=self.protocol.nll_rows, **arrays)

    def _print(self, scores: dict) -> None:
        papers = self.protocol.papers()
        table = Table("", "value", "±", *(["Ho et al. 2020"] if papers else []))
        for name, score in scores.items():
            digits = 6 if name in ("KID", "prior") else 4
            error = "" if score.error is None else f"{score.error:.{digits}f}"
            paper = [papers.get(name.partition("-")[0], "")] if papers else []
            table.add_row(name, f"{score.value:.{digits}f}", error, *paper)
        self.console.print(table)
        if any(name.startswith(("FID-", "IS-")) for name in scores):
            count = f"{self.protocol.count:,}"
            self.console.print(
                f"FID is biased upwards when pictures are few, and IS downwards: a number of "
                f"{count} compares with those of {count}, and not with the literature's 50,000"
            )
        for line in self.protocol.departures():
            self.console.print(f"not as in the paper: {line}")
        self.console.print(f"all of it: {self.folder / 'metrics.json'}")


def duration(seconds: float) -> str:
    """'3.2 hours', in the unit that fits."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


if __name__ == "__main__":
    app()
