"""Figures on paper: boards of images, charts, tables. They know numbers and images, no model."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from evaluation.metrics import spread
from files import atomic_write
from generation import Step
from generation.images import save

INK, GRAY, FAINT = "#1b1f24", "#6b7280", "#e5e7eb"
OURS, THEIRS = "#2563eb", "#d97706"
CELL = 0.62  # inches an image, if it is a square; others have its area
FRAME, LAST_FRAME = 83, 2000  # milliseconds

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.titlepad": 8,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",
}
for axis in ("xtick", "ytick"):
    STYLE |= {f"{axis}.color": GRAY, f"{axis}.labelcolor": INK, f"{axis}.major.size": 2.5}
matplotlib.rcParams.update(STYLE)


def write_figure(figure: Figure, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Write a figure in the format of its suffix; a PNG carries its recipe."""
    text = {"recipe": json.dumps(recipe, default=str)} if path.suffix == ".png" else None
    with atomic_write(path, keep_suffix=True) as temporary:
        figure.savefig(temporary, metadata=text)


# ---- boards


Cells = list[list[Tensor | None]]  # rows of uint8 [C, H, W] of one size; None stays white


class Board:
    """A page with rows of images, each pixel a whole number of dots.

    Args:
        columns, rows: a label each, or none.
        corner: stands before the columns' labels.
        headings: (text, first column, last column), over the columns' labels.
        column_gaps, row_gaps: those that stand a little apart from the one before.
    """

    def __init__(
        self,
        cells: Cells,
        *,
        title: str,
        note: str,
        columns: Sequence[str] = (),
        rows: Sequence[str] = (),
        corner: str = "",
        headings: Sequence[tuple[str, int, int]] = (),
        column_gaps: Sequence[int] = (),
        row_gaps: Sequence[int] = (),
    ):
        height, width = next(image.shape[-2:] for image in cells[0] if image is not None)
        self.scale = max(1, round(96 / math.sqrt(height * width)))
        self.cell = self.scale * height, self.scale * width  # in dots
        side = math.sqrt(math.prod(self.cell))
        dpi = side / CELL
        inch = lambda inches: round(inches * dpi)
        left = inch(0.2 + 0.066 * max(map(len, rows), default=0) + 0.1 * bool(rows))
        top = inch(0.62 + 0.2 * bool(columns) + 0.24 * bool(headings))
        small, large = max(1, int(side) // 16), int(side) // 4
        place = lambda i, size, gaps: i * (size + small) + large * sum(g <= i for g in gaps)
        self.y = [top + place(i, self.cell[0], row_gaps) for i in range(len(cells))]
        self.x = [left + place(i, self.cell[1], column_gaps) for i in range(len(cells[0]))]
        self.width = max(self.x[-1] + self.cell[1] + inch(0.2), inch(5.2))  # room for the note
        self.height = self.y[-1] + self.cell[0] + inch(0.2)
        self.figure = Figure(figsize=(self.width / dpi, self.height / dpi), dpi=dpi)
        self.canvas = FigureCanvasAgg(self.figure)
        self.image = self.figure.figimage(self.compose(cells), origin="upper", zorder=-1)
        axes = self.figure.add_axes((0, 0, 1, 1))  # its units are dots
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        axes.set_axis_off()

        start, middle, centre = inch(0.2) if rows else left, self.cell[0] / 2, self.cell[1] / 2
        self.title = axes.text(start, inch(0.2), title, va="top", size=11, weight="bold")
        axes.text(start, inch(0.42), note, va="top", size=7, color=GRAY)
        axes.text(left - inch(0.1), top - inch(0.06), corner, ha="right", va="bottom")
        for x, label in zip(self.x, columns, strict=False):
            axes.text(x + centre, top - inch(0.06), label, ha="center", va="bottom")
        for y, label in zip(self.y, rows, strict=False):
            axes.text(left - inch(0.1), y + middle, label, ha="right", va="center")
        over = top - inch(0.06 + 0.2 * bool(columns))
        for label, first, last in headings:
            x = (self.x[first] + self.x[last]) / 2 + centre
            axes.text(x, over, label, ha="center", va="bottom", weight="bold")

    def compose(self, cells: Cells) -> np.ndarray:
        """Return the page without its words, uint8 [height, width, 3]."""
        page, (height, width) = np.full((self.height, self.width, 3), 255, np.uint8), self.cell
        for y, row in zip(self.y, cells, strict=True):
            for x, image in zip(self.x, row, strict=True):
                if image is not None:
                    page[y : y + height, x : x + width] = enlarged(image, self.scale)
        return page

    def render(self, title: str, cells: Cells) -> np.ndarray:
        """Return the page with another title and other images, uint8 [height, width, 3]."""
        self.title.set_text(title)
        self.image.set_data(self.compose(cells))
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def enlarged(image: Tensor, scale: int) -> np.ndarray:
    """Return uint8 [C, H, W] as [scale H, scale W, 3], without alpha, each pixel a square."""
    pixels = image[: 3 if len(image) >= 3 else 1].expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)


def write_animation(frames: list[tuple[str, Cells]], path: Path, **layout: Any) -> None:
    """Write a board that changes as a GIF; each frame is (title, cells), and the last one stays.

    Args:
        layout: options of `Board`.
    """
    title, cells = frames[0]
    board = Board(cells, title=title, **layout)
    pages = (Image.fromarray(board.render(*frame)) for frame in frames)
    # without dithering flat squares stay flat, and the file stays small
    first, *others = (page.quantize(256, dither=Image.Dither.NONE) for page in pages)
    durations = [FRAME] * len(others) + [LAST_FRAME]
    save(first, path, save_all=True, append_images=others, duration=durations, loop=0)


# ---- charts


def chart(
    height: float, *, title: str, note: str, panels: list[float]
) -> tuple[Figure, list[Axes]]:
    """Return a figure with its heading, and axes whose widths are in the ratio of `panels`."""
    width = 9.2
    top = 0.6 + 0.12 * (1 + note.count("\n"))
    layout = ConstrainedLayoutEngine(rect=(0.015, 0.02, 0.97, 1 - top / height), wspace=0.06)
    figure = Figure(figsize=(width, height), dpi=160, layout=layout)
    FigureCanvasAgg(figure)
    figure.text(0.2 / width, 1 - 0.2 / height, title, va="top", size=11, weight="bold")
    figure.text(0.2 / width, 1 - 0.42 / height, note, va="top", size=7, color=GRAY)
    return figure, list(figure.subplots(1, len(panels), width_ratios=panels))


# Table 4 (CIFAR-10, test) at reverse time T - t + 1 of T = 1000: bits/dim, and RMSE on [0, 255]
PAPER_TIMES = range(1000, 0, -100)
PAPER_RATE = 1.77581, 0.11994, 0.05415, 0.02866, 0.01507, 0.00716, 0.00282, 0.00081, 0.00013, 0.0
PAPER_RMSE = (
    0.95136, 12.02277, 18.47482, 24.43656, 30.80948, 38.03236, 46.12765, 54.18826, 60.9717, 67.60125
)  # fmt: skip


def plot_rate_distortion(rate: np.ndarray, rmse: np.ndarray, *, name: str, note: str) -> Figure:
    """Plot rate and RMSE, [T] each, where entry t is of reverse time T - t."""
    T = len(rate)
    times = [round(time * T / 1000) for time in PAPER_TIMES]
    at = [T - time for time in times]
    figure, (left, right) = chart(3.7, title="Rate and distortion", note=note, panels=[1.25, 1])
    left.plot(rate, rmse, color=OURS, linewidth=1.2, label=name)
    dots: dict[str, Any] = dict(marker="o", markersize=4, linestyle="none", clip_on=False, zorder=3)
    left.plot(rate[at], rmse[at], color=OURS, **dots)
    left.plot(PAPER_RATE, PAPER_RMSE, color=THEIRS, label="CIFAR-10, the paper's Table 4", **dots)
    left.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE on 0 ... 255", xlim=0, ylim=0)
    left.legend()
    heads = ["reverse\ntime", f"{name}\nrate", "\nRMSE", "CIFAR-10\nrate", "\nRMSE"]
    points = zip(times, rate[at], rmse[at], PAPER_RATE, PAPER_RMSE, strict=True)
    rows = [[f"{t:,}", f"{r:.4f}", f"{d:.1f}", f"{R:.4f}", f"{D:.1f}"] for t, r, d, R, D in points]
    table(right, heads, rows, [INK, OURS, OURS, THEIRS, THEIRS])
    return figure


# of the figure of health: color, line style, width
LOOKS = {
    "untrained": (GRAY, ":", 1.0),
    "best linear": (THEIRS, "-", 1.2),
    "memoriser, training": ("#9333ea", "-", 1.0),
    "memoriser, validation": ("#9333ea", "--", 1.0),
    "EMA, training": (OURS, "-", 1.6),
    "EMA, validation": (OURS, "--", 1.6),
    "raw weights, training": ("#0d9488", "-", 0.8),
    "raw weights, validation": ("#0d9488", "--", 0.8),
}


def plot_health(
    lines: dict[str, np.ndarray],
    edges: np.ndarray,
    cells: list[list[Tensor]],
    ratios: list[str],
    *,
    notes: list[str],
) -> Figure:
    """Plot losses [bins] over t, whose bins end at `edges`, beside rows of images.

    Args:
        cells: a sample, its nearest training image and the second nearest. ratios: of distances.
        notes: a line each, under the title.
    """
    notes = [line for note in notes for line in textwrap.wrap(note, 170)]
    height = 3.9 + 0.12 * len(notes)
    figure, (left, right) = chart(height, title="Health", note="\n".join(notes), panels=[1.7, 1])
    for name, values in lines.items():
        color, style, width = LOOKS[name]
        middle = (edges[1:] + edges[:-1]) / 2
        left.semilogy(middle, values, style, color=color, linewidth=width, label=name)
    least = min(values.min() for values in lines.values())
    left.set(xlabel="$t$", xlim=(0, edges[-1]), ylim=(max(least / 1.5, 1e-4), 3))
    left.set_title("loss: the mean of (eps - its estimate)$^2$")
    left.legend(fontsize=7)
    right.set_axis_off()
    right.set_title("sample, nearest, second nearest: ratio")
    gap = 2
    for i, (row, ratio) in enumerate(zip(cells, ratios, strict=True)):
        across, down = i % 2, i // 2
        for j, image in enumerate(row):
            pixels = enlarged(image, 1)
            h, w = pixels.shape[:2]
            x, y = (across * 4 + j) * (w + gap), down * (h + gap)
            right.imshow(pixels, extent=(x, x + w, y + h, y), interpolation="nearest")
        right.text(x + w + gap, y + h / 2, ratio, va="center", size=7)
    right.set(xlim=(0, 8 * (w + gap)), ylim=(6 * (h + gap), 0), aspect="equal", anchor="NW")
    return figure


def plot_schedule(alpha_bar: np.ndarray, steps: list[Step], *, note: str) -> Figure:
    """Plot alpha_bar [T], the SNR and a step table."""
    t = np.array([step.t for step in steps])
    figure, (share, snr, right) = chart(3.2, title="Schedule", note=note, panels=[1, 1, 1.2])
    with np.errstate(divide="ignore"):
        ratio = alpha_bar / (1 - alpha_bar)
    share.plot(alpha_bar, color=OURS)
    share.set_title(r"$\bar{\alpha}_t$, what is left of the image in $x_t$")
    snr.semilogy(ratio, color=OURS)
    snr.set_title("signal to noise")
    for axes, values in ((share, alpha_bar), (snr, ratio)):
        axes.set(xlabel="$t$", xlim=(0, len(alpha_bar)))
        if len(steps) <= 100:  # where the sampler stops by
            axes.plot(t, values[t], "o", color=OURS, markersize=3, clip_on=False)

    shown = [steps[row] for row in spread(11, len(steps))]
    columns = [[f"{step.t}" for step in shown]]
    columns += [[f"{step.s}" if step.s >= 0 else "data" for step in shown]]
    for parts in ([s.x for s in shown], [s.x0 for s in shown], [(s.sigma,) for s in shown]):
        most = max(map(len, parts))  # what a row lacks of the history counts 0 there
        padded = [(*part, *[0.0] * most)[:most] for part in parts]
        columns += [["  ".join(f"{x:.4f}" for x in part) for part in padded]]
    heads = ["$t$", "$s$", "$x_t$", r"$\hat{x}_0$", r"$\sigma$"]
    table(right, heads, [list(row) for row in zip(*columns, strict=True)])
    part = f", {len(shown)} of {len(steps)}" if len(shown) < len(steps) else ""
    right.set_title(f"steps{part}")
    return figure


def table(axes: Axes, heads: list[str], rows: list[list[str]], colors: Sequence[str] = ()) -> None:
    """Fill axes with rows under a line of heads, aligned to the right."""
    axes.set_axis_off()
    grid = axes.table(rows, colLabels=heads, colLoc="right", bbox=Bbox.unit(), edges="")
    grid.auto_set_font_size(False)
    grid.auto_set_column_width(list(range(len(heads))))
    for (row, column), cell in grid.get_celld().items():
        color = colors[column] if colors else INK
        cell.set_text_props(color=color, size=7.5, weight="normal" if row else "bold")
