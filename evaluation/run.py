"""One evaluation: its folder, the work on each rank with its forecast, and the report."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from diffusion_utils import to_uint8
from evaluation.distributed import Advance, Ranks, read, reference_statistics
from evaluation.likelihood import Bound, bits_per_dim, likelihood_scores
from evaluation.metrics import Score, Statistics, compute
from evaluation.protocol import Options, Protocol
from files import atomic_write
from generation import chain, generate, make_denoiser, pays_to_compile
from generation.folder import fill, missing_seeds
from model import at_precision
from training.hardware import duration

VERSIONS = "torch", "torch_fidelity", "numpy", "scipy", "pytorch_lightning"


class Measurement:
    """The work of one evaluation, shared by all ranks, and its report."""

    def __init__(self, options: Options, console: Console):
        self.options, self.console = options, console
        self.protocol = protocol = Protocol(options, console)
        self.recipe = json.loads(json.dumps(protocol.recipe))
        self.seeds = [options.seed + i for i in range(protocol.count)]
        self.missing = set(self.seeds)
        self.folder = self._choose_folder()
        both = protocol.model, protocol.extractor
        self.modules = [module for module in both if module]  # what must be on each device
        self.statistics: Statistics | None = None
        self.bound: Bound | None = None
        self.seconds: dict[str, float] = {}
        self._announce()

    def _choose_folder(self) -> Path:
        """Return --output; or evaluations/NAME, NAME-2, ...: the first without other numbers."""
        if self.options.output:
            return self._check(self.options.output)
        for number in count(1):
            suffix = "" if number == 1 else f"-{number}"
            try:
                return self._check(Path("evaluations", f"{self.protocol.name}{suffix}"))
            except ValueError:
                pass
        raise AssertionError

    def _check(self, folder: Path) -> Path:
        """Return the folder; ValueError where another recipe's numbers or images are in it."""
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
        if self.options.save_images and self.protocol.model:
            drawing = self.protocol.drawing
            self.missing = set(missing_seeds(folder / "images", self.seeds, drawing))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _announce(self) -> None:
        protocol, recipe, say = self.protocol, self.recipe, self.console.print
        text = recipe["source"]
        if protocol.model:
            step = f"step {recipe['step']:,}, " if recipe["step"] else ""
            text += f" ({step}{recipe['weights']} weights)"
        if protocol.tally:
            text += f": {protocol.count:,} images"
        if protocol.model and protocol.tally:
            text += f" by {recipe['sampler']}, {recipe['timesteps']} steps"
            text += f", in {recipe['precision']}"
        say(text)
        if protocol.tally and protocol.extractor:
            say(f"features: {protocol.extractor.name}, sha256 {protocol.extractor.digest}")
            if protocol.shape[0] in (2, 4):
                say("alpha is dropped")
            if size := protocol.tally.features.nbytes:
                say(f"KID, precision and recall keep the features: {size:,} bytes")
        say(f"output: {self.folder}")

    # ---- on each rank

    def work(self, ranks: Ranks) -> None:
        """Measure the reference, then the images, then the likelihood."""
        protocol, options = self.protocol, self.options
        self.missing = ranks.first(self.missing)
        real, size = protocol.reference, options.batch_size
        if isinstance(real, Statistics):
            self.statistics = real
        elif real is not None and protocol.extractor:
            cache = Path(protocol.config.dataset.cache if protocol.config else "data/cache")
            with self._stage("reference", len(real) // ranks.count) as advance:
                self.statistics = reference_statistics(
                    real, protocol.extractor, ranks, cache, batch_size=size, advance=advance
                )
        if model := protocol.model:
            batches = -(-len(self.missing) // (ranks.count * size))
            self.denoiser = make_denoiser(
                at_precision(model.network, protocol.drawing["precision"]),
                model.diffusion,
                times=[step.t for step in protocol.steps],
                compiled=pays_to_compile(model.config, ranks.device, batches * len(protocol.steps)),
            )
            self._forecast(ranks)
        if protocol.tally and protocol.extractor:
            first = options.seed if protocol.model else 0
            todo = len(self.missing) if protocol.model else protocol.count
            with self._stage("images", todo // ranks.count) as advance:
                images = self._images(ranks, advance)
                ranks.measure(images, protocol.tally, protocol.extractor, first=first)
        if "nll" in protocol.metrics:
            with self._stage("likelihood", len(protocol.nll_rows) // ranks.count) as advance:
                self.bound = self._measure_likelihood(ranks, advance)

    def _images(self, ranks: Ranks, advance: Advance) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (seeds or rows, uint8 images) of this rank, in an order that is always the same."""
        protocol, size = self.protocol, self.options.batch_size
        batches = [batch for batch in ranks.share(protocol.count, size) if batch]
        if protocol.images is not None:
            return read(protocol.images, batches, rows=protocol.rows, advance=advance)

        draw = partial(
            generate, self.denoiser, protocol.steps, shape=protocol.shape, device=ranks.device,
            batch_size=size, advance=advance,
        )  # fmt: skip
        seeds = [[self.seeds[row] for row in batch] for batch in batches]
        if not self.options.save_images:
            return draw([seed for batch in seeds for seed in batch])
        # whatever is there already: sums in another order have other last digits
        make = lambda some: next(draw(some))[1]
        return fill(self.folder / "images", seeds, self.missing, protocol.drawing, make)

    def _measure_likelihood(self, ranks: Ranks, advance: Advance) -> Bound:
        """Return, on rank 0, the bound of all images; the i-th has the noise of the seed + i."""
        protocol, options = self.protocol, self.options
        model, rows = protocol.model, protocol.nll_rows
        assert model
        denoiser = make_denoiser(model.network, model.diffusion)  # in float32, whatever is drawn in
        # few images at a time, several t of each in a network call
        batches = ranks.share(len(rows), max(1, options.batch_size // 16))
        found = []
        for batch, x_0 in read(protocol.data[protocol.split], batches, rows=rows, advance=advance):
            bound = bits_per_dim(
                denoiser,
                model.diffusion,
                x_0.to(ranks.device),
                [options.seed + i for i in batch],
                variance=model.config.sampling.variance,
                batch_size=options.batch_size,
                stride=options.stride,
            )
            found.append((batch, bound))
        t = ranks.first(found[0][1].t if found else None)
        bits, mse = torch.zeros(2, len(rows), len(t), dtype=torch.float64)
        prior = torch.zeros(len(rows), dtype=torch.float64)
        for batch, bound in found:
            bits[batch], mse[batch], prior[batch] = bound.bits, bound.mse, bound.prior
        ranks.add_up(bits, mse, prior)
        return Bound(t, bits, mse, prior)

    def _forecast(self, ranks: Ranks) -> None:
        """Say how long it will take, measured on five network calls of a batch of real size."""
        protocol, batch = self.protocol, min(self.options.batch_size, self.protocol.count)
        assert protocol.model
        steps, seeds = protocol.steps, self.seeds[:batch]
        walk = chain(
            self.denoiser, [steps[0]] * 6, seeds, shape=protocol.shape, device=ranks.device
        )
        x = next(walk)[1].cpu()  # the first call is slow
        times = [time.perf_counter()]
        for _, x, _ in walk:
            x.cpu()  # waits for the device
            times.append(time.perf_counter())
        call = median(after - before for before, after in pairwise(times))
        share = lambda count: math.ceil(count / ranks.count / batch)
        said, total = [], 0.0
        if protocol.tally and protocol.extractor:
            images = to_uint8(x)
            protocol.extractor(images)
            start = time.perf_counter()
            protocol.extractor(images)[0].cpu()
            features = time.perf_counter() - start
            batches = share(len(self.missing))
            total += batches * len(steps) * call + share(protocol.count) * features
            said.append(f"{batches:,} batches of {batch} images x {len(steps):,} steps")
        if "nll" in protocol.metrics:
            terms = len(range(0, protocol.model.diffusion.timesteps, self.options.stride))
            calls = share(len(protocol.nll_rows) * terms)
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
        protocol, start = self.protocol, time.perf_counter()
        scores: dict[str, Score] = {}
        if protocol.tally:
            scores = compute(protocol.metrics, protocol.tally, self.statistics)
        if self.bound and protocol.model:
            T = protocol.model.diffusion.timesteps
            scores |= likelihood_scores(self.bound, stride=self.options.stride, timesteps=T)
            arrays = {name: tensor.numpy() for name, tensor in self.bound._asdict().items()}
            path = self.folder / "nll.npz"
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.savez(file, rows=protocol.nll_rows, **arrays)
        self.seconds["metrics"] = round(time.perf_counter() - start, 2)
        facts: dict[str, Any] = {
            "scores": {name: score.facts() for name, score in scores.items()},
            "recipe": self.recipe,
            "not as in the paper": protocol.departures(),
            "versions": {name: version(name) for name in VERSIONS if find_spec(name)},
            "devices": devices,
            "seconds": self.seconds,
        }
        if (real := self.statistics) is not None:
            facts["reference"] = {"images": real.count, "digest": real.digest()}
        with atomic_write(self.folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self._print(scores)

    def _print(self, scores: dict[str, Score]) -> None:
        papers = self.protocol.papers()
        table = Table("", "value", "±", *(["Ho et al. 2020"] if papers else []))
        for name, score in scores.items():
            digits = 6 if name in ("KID", "prior") else 4
            error = "" if score.error is None else f"{score.error:.{digits}f}"
            paper = [papers.get(name.partition("-")[0], "")] if papers else []
            table.add_row(name, f"{score.value:.{digits}f}", error, *paper)
        self.console.print(table)
        if any(name.startswith(("FID-", "IS-")) for name in scores):
            images = f"{self.protocol.count:,}"
            self.console.print(
                f"FID is biased upwards when images are few, and IS downwards: a number of "
                f"{images} compares with those of {images}, and not with the literature's 50,000"
            )
        for line in self.protocol.departures():
            self.console.print(f"not as in the paper: {line}")
        self.console.print(f"all of it: {self.folder / 'metrics.json'}")
