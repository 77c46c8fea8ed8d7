"""One evaluation: its folder, the work on each rank with its forecast, and the report."""

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from evaluation.classes import (
    Label,
    class_scores,
    class_table,
    overall_accuracy,
    rows_by_label,
    share_by_label,
)
from evaluation.distributed import Advance, Ranks, read, reference_statistics
from evaluation.health import Checkup, check_up, losses_of
from evaluation.likelihood import Bound, bits_per_dim, likelihood_scores
from evaluation.metrics import KEPT, Score, Statistics, compute, save_arrays, spread
from evaluation.protocol import Options, Plan
from evaluation.yardsticks import bin_edges, get_yardsticks
from files import atomic_write
from generation import generate, make_denoiser
from generation.folder import fill, missing_seeds
from generation.recipe import folder_names, label_vector
from training.hardware import duration, timed
from weights import Model

VERSIONS = "torch", "torch_fidelity", "numpy", "scipy", "pytorch_lightning"


class Measurement(Plan):
    """The work of one evaluation, shared by all ranks, and its report."""

    statistics: Statistics | None = None  # of the reference
    bound: Bound | None = None
    checkup: Checkup | None = None

    def __init__(self, options: Options, console: Console):
        super().__init__(options, console)
        self.missing = {options.seed + row for row in range(self.count)}
        self.subfolders = {label: name for name, label in folder_names(self.by_label).items()}
        self.folder = self._choose_folder()
        self.seconds: dict[str, float] = {}
        self._announce()

    def _choose_folder(self) -> Path:
        """Return --output; or evaluations/NAME, NAME-2, ...: the first without other numbers."""
        if self.options.output:
            return self._check(self.options.output)
        for number in count(1):
            suffix = "" if number == 1 else f"-{number}"
            with suppress(ValueError):
                return self._check(Path("evaluations", f"{self.name}{suffix}"))
        raise AssertionError

    def _check(self, folder: Path) -> Path:
        """Return the folder; ValueError where another recipe's numbers or images are in it."""
        path = folder / "metrics.json"
        try:
            other = dict(json.loads(path.read_text())["recipe"]) if path.exists() else self.recipe
        except (ValueError, KeyError, TypeError):
            wrong = f"{path} is not of this command; choose another --output"
            raise ValueError(wrong) from None
        differing = [k for k in self.recipe | other if self.recipe.get(k) != other.get(k)]
        if differing:
            wrong = f"{folder} holds another evaluation ({', '.join(differing)} differ)"
            raise ValueError(f"{wrong}; choose another --output")
        if self.options.save_images and self.model:
            missing = (
                missing_seeds(
                    self.place(folder, label), self.seeds(rows), self.sampling.recipe(label)
                )
                for label, rows in self.by_label.items()
            )
            self.missing = set().union(*missing)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def place(self, folder: Path, label: Label) -> Path:
        """Return where images of a label are kept: with several labels each has its folder."""
        return folder / "images" / self.subfolders[label]

    def seeds(self, rows: list[int]) -> list[int]:
        """Return the seeds of images: of the first, and 1 more for each next one."""
        return [self.options.seed + row for row in rows]

    def _announce(self) -> None:
        shown = "step", "weights", "images", "sampler", "timesteps", "precision"
        how = ", ".join(f"{key} {self.recipe[key]}" for key in shown if self.recipe.get(key))
        self.console.print(f"{self.options.source}: {how}")
        if labels := self.recipe.get("labels"):
            few, many = min(labels.values()), max(labels.values())
            each = f"{few:,}" if few == many else f"{few:,} to {many:,}"
            self.console.print(f"labels: {len(labels)}, {each} images of each")
        if self.extractor:
            self.console.print(f"features: {self.extractor.name}, sha256 {self.extractor.digest}")
            if self.shape[0] in (2, 4):
                self.console.print("alpha is dropped")
        self.console.print(f"output: {self.folder}")

    # ---- on each rank

    @property
    def draws(self) -> bool:
        """True where anything is measured of images, drawn or there already."""
        return bool(self.extractor) or "health" in self.metrics

    def networks(self) -> list[nn.Module | None]:
        """Return what must be on each rank's device."""
        # those that draw are copies, in bfloat16
        drawing = [self.sampling.network, self.sampling.guide_network] if self.model else []
        return [self.model, self.guide, self.extractor, *drawing, *self.models.values()]

    def work(self, ranks: Ranks) -> None:
        """Measure the reference, then the images, then the likelihood."""
        self.missing = ranks.first(self.missing)
        real, size, extractor = self.reference, self.options.batch_size, self.extractor
        if isinstance(real, Statistics):
            self.statistics = real
        elif real is not None and extractor:
            cache = Path(self.config.dataset.cache if self.config else "data/cache")
            with self._stage("reference", len(real) // ranks.count) as advance:
                found = reference_statistics(real, extractor, ranks, cache, size, advance)
            self.statistics = found
        if model := self.model:
            lacking = [len(self.missing & set(self.seeds(rows))) for rows in self.by_label.values()]
            self.batches = sum(-(-count // (ranks.count * size)) for count in lacking)
            self._forecast(ranks)
        if self.draws:
            with self._stage("images", len(self.missing) // ranks.count) as advance:
                images = self._images(ranks, advance)
                images = self._keep_some(images) if "health" in self.metrics else images
                if extractor:
                    ranks.measure(images, self.tally, extractor)
                else:
                    deque(images, maxlen=0)
        if model and "health" in self.metrics:
            looked_at = sum(len(probe.images) for probe in self.probes.values())
            with self._stage("health", looked_at * len(self.models) // ranks.count) as advance:
                self._check_health(model, ranks, advance)
        if model and "nll" in self.metrics:
            with self._stage("likelihood", len(self.nll_rows) // ranks.count) as advance:
                self.bound = self._measure_likelihood(model, ranks, advance)

    def _images(self, ranks: Ranks, advance: Advance) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (rows, uint8 images) of this rank, in an order that is always the same."""
        for label, batches in share_by_label(ranks, self.by_label, self.options.batch_size):
            if self.images is not None:
                yield from read(self.images, self.rows, batches, advance)
            else:
                yield from self._draw(label, [*filter(None, batches)], ranks, advance)

    def _draw(
        self, label: Label, batches: list[list[int]], ranks: Ranks, advance: Advance
    ) -> Iterator[tuple[list[int], Tensor]]:
        denoiser = self.sampling.denoiser(label, batches=self.batches)
        how: Any = {"shape": self.shape, "device": ranks.device, "advance": advance}

        def make(some: list[int]) -> Tensor:
            ((_, images),) = generate(denoiser, self.steps, some, batch_size=len(some), **how)
            return images

        seeds = [self.seeds(batch) for batch in batches]
        if self.options.save_images:
            # whatever is there already: sums in another order have other last digits
            place, recipe = self.place(self.folder, label), self.sampling.recipe(label)
            drawn = fill(place, seeds, self.missing, recipe, make)
        else:
            drawn = ((some, make(some)) for some in seeds)
        for batch, (_, images) in zip(batches, drawn, strict=True):
            yield batch, images

    def _keep_some(
        self, images: Iterator[tuple[list[int], Tensor]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Pass images on, and keep those that are looked at for copies."""
        place = {row: i for i, row in enumerate(spread(len(self.kept), self.count))}
        for rows, pixels in images:
            for i in place.keys() & rows:
                self.kept[place[i]] = pixels[rows.index(i)].cpu()
            yield rows, pixels

    def _check_health(self, model: Model, ranks: Ranks, advance: Advance) -> None:
        """Measure the losses together; rank 0 looks for copies."""
        flips, diffusion = model.config.dataset.random_flip, model.diffusion
        yardsticks = None
        if ranks.is_first:
            cache = Path(model.config.dataset.cache)
            how: Any = {"flips": flips, "cache": cache, "say": self.console.print}
            yardsticks = get_yardsticks(self.data, diffusion, **how)
        bins = range(ranks.rank, len(bin_edges(diffusion.timesteps)) - 1, ranks.count)
        losses = losses_of(
            self.models, self.probes, device=ranks.device, batch_size=self.options.batch_size,
            bins=bins, advance=advance,
        )  # fmt: skip
        ranks.add_up(self.kept, *losses.values())
        if yardsticks:
            self.checkup = check_up(
                model, losses, images=self.data, probes=self.probes, yardsticks=yardsticks,
                samples=self.kept, extractor=self.extractor,
            )  # fmt: skip

    def _measure_likelihood(self, model: Model, ranks: Ranks, advance: Advance) -> Bound:
        """Return, on rank 0, the bound of all images; the i-th has the noise of the seed + i."""
        options, rows, images = self.options, self.nll_rows, self.data[self.split]
        t = torch.tensor(self.nll_times)
        bits, mse = torch.zeros(2, len(rows), len(t), dtype=torch.float64)
        found = Bound(t, bits, mse, prior=torch.zeros(len(rows), dtype=torch.float64))
        # few images at a time, several t of each in a network call
        few = max(1, options.batch_size // 16)
        for label, batches in share_by_label(ranks, rows_by_label(images, rows), few):
            vector = label_vector(label, images.classes) if label else None
            # in float32, whatever is drawn in
            denoiser = make_denoiser(model.network, model.diffusion, label=vector)
            for batch, x_0 in read(images, rows, batches, advance):
                part = bits_per_dim(
                    denoiser, model.diffusion, x_0.to(ranks.device), self.seeds(batch),
                    variance=model.config.sampling.variance, batch_size=options.batch_size,
                    stride=options.stride,
                )  # fmt: skip
                for whole, some in zip(found[1:], part[1:], strict=True):
                    whole[batch] = some
        ranks.add_up(*found[1:])
        return found

    def _forecast(self, ranks: Ranks) -> None:
        """Say how long it will take, measured on network calls of a batch of real size."""
        label, most = max(self.by_label.items(), key=lambda item: len(item[1]))
        batch = min(self.options.batch_size, len(most))
        share = lambda count: math.ceil(count / ranks.count / batch)
        x = torch.zeros(batch, *self.shape, device=ranks.device)
        denoiser = self.sampling.denoiser(label, batches=self.batches)
        run = lambda: denoiser(x, self.steps[0].t)
        call = median(timed(run, ranks.device) for _ in range(6))  # the first is slow
        said, total = [], 0.0
        if self.draws:
            steps = len(self.steps)
            total += self.batches * steps * call
            said.append(f"{self.batches:,} batches of {batch} images x {steps:,} steps")
        if extractor := self.extractor:
            extract = lambda: extractor(x.to(torch.uint8))
            total += share(self.count) * min(timed(extract, ranks.device) for _ in range(2))
        if "health" in self.metrics:
            looked_at = sum(probe.t.numel() for probe in self.probes.values())
            calls = share(looked_at * len(self.models))
            if not self.extractor:  # the network's own features, on rank 0 alone
                calls += math.ceil(min(KEPT, len(self.data["train"])) / batch)
            total += calls * call
            said.append(f"{calls:,} calls for the health")
        if "nll" in self.metrics:
            calls = share(len(self.nll_rows) * len(self.nll_times))
            total += calls * call
            said.append(f"{calls:,} calls for the likelihood")
        self.console.print(
            f"it will take about {duration(total)}: {', '.join(said)}, on {ranks.count} device(s), "
            f"at {1000 * call:.3g} ms a network call"
        )

    @contextmanager
    def _stage(self, what: str, total: int) -> Iterator[Advance]:
        """Time a stage and show how far it is; give what hears of the images that are done."""
        start = said = time.perf_counter()
        done, hidden = 0.0, not self.console.is_terminal
        with Progress(console=self.console, transient=True, disable=hidden) as bar:
            task = bar.add_task(what, total=total)

            def advance(images: float) -> None:
                nonlocal done, said
                done += images
                bar.update(task, completed=done)
                if hidden and time.perf_counter() - said > 60:
                    said = time.perf_counter()
                    self.console.print(f"{what}: {done:,.0f} of {total:,} on this device")

            yield advance
        self.seconds[what] = round(time.perf_counter() - start, 2)

    # ---- rank 0 alone

    def report(self, devices: int) -> None:
        """Print the table; write metrics.json and nll.npz."""
        start, scores = time.perf_counter(), dict[str, Score]()
        by_class, without = dict[str, dict[str, float]](), list[str]()
        if self.extractor:
            scores = compute(self.metrics, self.tally, self.statistics)
            if known := self.labelled:
                how = self.metrics, self.tally, self.statistics, known, self.options.batch_size
                by_class, without = class_scores(*how)
                scores |= overall_accuracy(self.tally, known.labels)
        if self.bound and self.model:
            T = self.model.diffusion.timesteps
            scores |= likelihood_scores(self.bound, stride=self.options.stride, timesteps=T)
            save_arrays(self.folder / "nll.npz", rows=self.nll_rows, **self.bound._asdict())
        if self.checkup:
            save_arrays(self.folder / "health.npz", **self.checkup.lines)
        self.seconds["metrics"] = round(time.perf_counter() - start, 2)
        facts: dict[str, Any] = {
            "scores": {
                name: score._asdict() if score.error is not None else {"value": score.value}
                for name, score in scores.items()
            },
            **({"classes": by_class, "without": without} if by_class else {}),
            **({"health": self.checkup.facts()} if self.checkup else {}),
            "recipe": self.recipe,
            "not as in the paper": self.departures(),
            "versions": {name: version(name) for name in VERSIONS if find_spec(name)},
            "devices": devices,
            "seconds": self.seconds,
        }
        if (real := self.statistics) is not None:
            facts["reference"] = {"images": real.count, "digest": real.digest()}
        with atomic_write(self.folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if scores:
            self._print(scores)
        if self.checkup:
            self._print_health(self.checkup)
        if by_class:
            self.console.print(class_table(by_class))
        for line in without:
            self.console.print(line)
        self.console.print(f"all of it: {self.folder / 'metrics.json'}")

    def _print(self, scores: dict[str, Score]) -> None:
        say, papers = self.console.print, self.papers()
        table = Table("", "value", "±", *(["Ho et al. 2020"] if papers else []))
        for name, score in scores.items():
            digits = 6 if name in ("KID", "prior") else 4
            error = "" if score.error is None else f"{score.error:.{digits}f}"
            paper = [papers.get(name.partition("-")[0], "")] if papers else []
            table.add_row(name, f"{score.value:.{digits}f}", error, *paper)
        say(table)
        if any(name.startswith(("FID-", "IS-")) for name in scores):
            say("FID is biased upwards and IS downwards when images are few: "
                "compare only with numbers of as many")  # fmt: skip
        for line in self.departures():
            say(f"not as in the paper: {line}")

    def _print_health(self, checkup: Checkup) -> None:
        facts, say = checkup.facts(), self.console.print
        table = Table("loss (error of eps)", "all t", *(f"{i} of 4" for i in range(1, 5)))
        for name, values in facts["losses"].items():
            table.add_row(name, *("" if x is None else f"{x:.4g}" for x in values))
        say(table)
        behind = ", ".join(f"{kind} {n:,}" for kind, n in facts["training images"].items())
        say(f"training images looked at: {behind}")
        for name, (found, *others) in facts["copies"].items():
            beside = f"; of validation images {others[0][0]} of {others[0][1]}" if others else ""
            say(f"copies of training images by {name}: {found[0]} of {found[1]} samples{beside}")
        say(f"health: {facts['summary']}")
        for line in facts["advice"].values():
            say(f"advice: {line}")
        if not facts["advice"]:
            say("nothing is wrong")
