"""Figures on paper: boards of pictures, charts, tables. It knows numbers and pictures, no model."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from files import atomic_write

INK, GREY, FAINT = "#1b1f24", "#6b7280", "#e5e7eb"
OURS, THEIRS = "#2563eb", "#d97706"
CELL = 0.62  # inches a picture
FRAMES_PER_SECOND, STAYS = 12, 2  # and seconds that the last frame stays

matplotlib.rcParams.update(
    {
        "font.size": 8,
        "text.color": INK,
        "axes.edgecolor": GREY,
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
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "mathtext.fontset": "dejavusans",
        "svg.fonttype": "none",
    }
)


def write_figure(figure: Figure, path: Path, **recipe: str) -> None:
    """In the format of its suffix, complete or not at all; a PNG carries `recipe` as text."""
    with atomic_write(path, keep_suffix=True) as temporary:
        figure.savefig(temporary, metadata=recipe if path.suffix == ".png" else None)


# ---- boards


def enlarged(picture: Tensor, scale: int) -> np.ndarray:
    """uint8 [C, H, W] -> [scale H, scale W, 3], each pixel a square."""
    pixels = picture[: 3 if len(picture) >= 3 else 1].expand(3, -1, -1)  # alpha has no place here
    return pixels.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)


class Board:
    """Rows of pictures, each a whole number of dots a pixel.

    Args:
        cells: rows of uint8 [C, H, W] of one size; None is left white.
        columns, rows: a label each, or none.
        corner: stands before the columns' labels.
        headings: (text, first column, last column), over the columns' labels.
        column_gaps, row_gaps: those that stand a little apart from the one before.
    """

    def __init__(
        self,
        cells: list[list[Tensor | None]],
        *,
        title: str,
        note: str,
        columns: Iterable[str] = (),
        rows: Iterable[str] = (),
        corner: str = "",
        headings: Iterable[tuple[str, int, int]] = (),
        column_gaps: Iterable[int] = (),
        row_gaps: Iterable[int] = (),
    ):
        size = cells[0][0].shape[-1]
        self.scale = max(1, round(96 / size))
        self.side = self.scale * size
        dpi = self.side / CELL
        self.x = self._offsets(len(cells[0]), column_gaps)
        self.y = self._offsets(len(cells), row_gaps)
        rows, columns = list(rows), list(columns)

        inch = lambda inches: round(inches * dpi)
        left = inch(0.2 + 0.066 * max(map(len, rows), default=0) + 0.1 * bool(rows))
        top = inch(0.62 + 0.2 * bool(columns) + 0.24 * bool(headings))
        margin = inch(0.2)
        self.width, self.height = self.x[-1] + self.side, self.y[-1] + self.side
        width = max(left + self.width + margin, inch(5.2))  # room for the note
        height = top + self.height + margin
        width, height = width + width % 2, height + height % 2  # a film's are even
        self.figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
        FigureCanvasAgg(self.figure)

        def text(x: float, y: float, string: str, **style):
            return self.figure.text(x / width, 1 - y / height, string, **style)

        box = (
            left / width,
            1 - (top + self.height) / height,
            self.width / width,
            self.height / height,
        )
        axes = self.figure.add_axes(box)
        axes.set_axis_off()
        self.image = axes.imshow(self.compose(cells), interpolation="nearest", aspect="auto")
        first = left if not rows else inch(0.2)
        self.title = text(first, inch(0.2), title, va="top", size=11, weight="bold")
        self.note = text(first, inch(0.42), note, va="top", size=7, color=GREY)
        for x, label in zip(self.x, columns, strict=False):
            text(left + x + self.side / 2, top - inch(0.06), label, ha="center", va="bottom")
        if corner:
            text(left - inch(0.1), top - inch(0.06), corner, ha="right", va="bottom")
        for y, label in zip(self.y, rows, strict=False):
            text(left - inch(0.1), top + y + self.side / 2, label, ha="right", va="center")
        over = top - inch(0.06 + 0.2 * bool(columns))
        for label, first, last in headings:
            middle = left + (self.x[first] + self.x[last] + self.side) / 2
            text(middle, over, label, ha="center", va="bottom", weight="bold")

    def _offsets(self, count: int, gaps: Iterable[int]) -> list[int]:
        small, large = max(1, self.side // 16), self.side // 4
        extra = np.cumsum([large * (i in set(gaps)) for i in range(count)])
        return [int(i * (self.side + small) + extra[i]) for i in range(count)]

    def compose(self, cells: list[list[Tensor | None]]) -> np.ndarray:
        paper = np.full((self.height, self.width, 3), 255, np.uint8)
        for y, row in zip(self.y, cells, strict=True):
            for x, picture in zip(self.x, row, strict=True):
                if picture is None:
                    continue
                paper[y : y + self.side, x : x + self.side] = enlarged(picture, self.scale)
        return paper


def write_animation(frames: Iterable[tuple[str, list[list[Tensor]]]], path: Path, **layout) -> None:
    """A board that changes, as .gif or .mp4; each frame is (title, cells), and the last one stays.

    Raises:
        ValueError: .mp4 without imageio-ffmpeg.
    """
    write = write_mp4 if path.suffix == ".mp4" else write_gif
    images = list(rendered(frames, **layout))
    with atomic_write(path, keep_suffix=True) as temporary:
        write(images, temporary)


def rendered(frames: Iterable[tuple[str, list[list[Tensor]]]], **layout) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each frame."""
    board = None
    for title, cells in frames:
        if board is None:
            board = Board(cells, title=title, **layout)
        board.title.set_text(title)
        board.image.set_data(board.compose(cells))
        board.figure.canvas.draw()
        yield np.asarray(board.figure.canvas.buffer_rgba())[..., :3].copy()


def write_gif(frames: list[np.ndarray], path: Path) -> None:
    # flat squares stay flat without dithering, and the file stays small
    images = [Image.fromarray(f).quantize(256, dither=Image.Dither.NONE) for f in frames]
    durations = [1000 // FRAMES_PER_SECOND] * (len(images) - 1) + [STAYS * 1000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def write_mp4(frames: list[np.ndarray], path: Path) -> None:
    try:
        from imageio_ffmpeg import write_frames
    except ImportError:
        raise ValueError("an .mp4 needs pip install imageio-ffmpeg; a .gif does not") from None
    height, width, _ = frames[0].shape
    writer = write_frames(str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2)
    writer.send(None)
    for frame in [*frames, *[frames[-1]] * (STAYS * FRAMES_PER_SECOND)]:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


# ---- charts


def chart(height: float, *, title: str, note: str, panels: list[float]) -> tuple:
    """A figure with its heading, and axes whose widths are as the numbers `panels`."""
    width = 9.2
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0.015, 0.02, 0.97, 1 - 0.72 / height), wspace=0.06)
    figure.text(0.2 / width, 1 - 0.2 / height, title, va="top", size=11, weight="bold")
    figure.text(0.2 / width, 1 - 0.42 / height, note, va="top", size=7, color=GREY)
    return figure, figure.subplots(1, len(panels), width_ratios=panels)


# Table 4: reverse time T - t + 1 of T = 1000, rate in bits/dim, RMSE on [0, 255]; CIFAR-10, test
TABLE_4 = np.array(
    [
        (1000, 1.77581, 0.95136),
        (900, 0.11994, 12.02277),
        (800, 0.05415, 18.47482),
        (700, 0.02866, 24.43656),
        (600, 0.01507, 30.80948),
        (500, 0.00716, 38.03236),
        (400, 0.00282, 46.12765),
        (300, 0.00081, 54.18826),
        (200, 0.00013, 60.97170),
        (100, 0.00000, 67.60125),
    ]
)


def plot_rate_distortion(rate: np.ndarray, rmse: np.ndarray, *, name: str, note: str) -> Figure:
    """rate, rmse: [T], where entry t is of reverse time T - t."""
    T, (_, paper_rate, paper_rmse) = len(rate), TABLE_4.T
    times = [round(time * T / 1000) for time, *_ in TABLE_4]
    at = [T - time for time in times]
    figure, (left, right) = chart(3.7, title="Rate and distortion", note=note, panels=[1.25, 1])
    left.plot(rate, rmse, color=OURS, linewidth=1.2, label=name)
    dots = dict(marker="o", markersize=4, linestyle="none", clip_on=False, zorder=3)
    left.plot(rate[at], rmse[at], color=OURS, **dots)
    left.plot(paper_rate, paper_rmse, color=THEIRS, label="CIFAR-10, the paper's Table 4", **dots)
    left.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE on 0 ... 255", xlim=0, ylim=0)
    left.legend()
    columns = [
        Column("reverse\ntime", [f"{time:,}" for time in times]),
        Column(f"{name}\nrate", [f"{x:.4f}" for x in rate[at]], OURS, gap=0.5),
        Column("\nRMSE", [f"{x:.1f}" for x in rmse[at]], OURS),
        Column("CIFAR-10\nrate", [f"{x:.4f}" for x in paper_rate], THEIRS, gap=0.5),
        Column("\nRMSE", [f"{x:.1f}" for x in paper_rmse], THEIRS),
    ]
    table(right, columns)
    return figure


def plot_schedule(alpha_bar: np.ndarray, steps: list, *, note: str) -> Figure:
    """alpha_bar: [T]; steps: `diffusion_utils.Step`."""
    t = np.array([step.t for step in steps])
    figure, (share, snr, right) = chart(3.2, title="Schedule", note=note, panels=[1, 1, 1.2])
    with np.errstate(divide="ignore"):
        ratio = alpha_bar / (1 - alpha_bar)
    share.plot(alpha_bar, color=OURS)
    share.set_title(r"$\bar{\alpha}_t$, what is left of the picture in $x_t$")
    snr.semilogy(ratio, color=OURS)
    snr.set_title("signal to noise")
    for axes, values in ((share, alpha_bar), (snr, ratio)):
        axes.set(xlabel="$t$", xlim=(0, len(alpha_bar)))
        if len(steps) <= 100:  # where the sampler stops by
            axes.plot(t, values[t], "o", color=OURS, markersize=3, clip_on=False)

    rows = np.unique(np.linspace(0, len(steps) - 1, 11).round().astype(int))
    columns = [Column("$t$", [f"{steps[row].t}" for row in rows])]
    columns += [Column("$s$", [f"{steps[row].s}" if steps[row].s >= 0 else "data" for row in rows])]
    heads = {"c_t": "$c_t$", "c_0": "$c_0$", "c_1": "$c_1$", "sigma": r"$\sigma$"}
    for key, head in heads.items():
        if any(getattr(step, key) for step in steps):
            columns.append(Column(head, [f"{getattr(steps[row], key):.4f}" for row in rows]))
    table(right, columns)
    part = f", {len(rows)} of {len(steps)}" if len(rows) < len(steps) else ""
    right.set_title(f"steps{part}")
    return figure


class Column(NamedTuple):
    """Of a table: a head, which may have two lines, and as many cells as the others."""

    head: str
    cells: list[str]
    colour: str = INK
    gap: float = 0.0  # before it, in columns


def table(axes: Axes, columns: list[Column]) -> None:
    """Columns aligned to the right, a line under their heads; fills `axes`."""
    axes.set_axis_off()
    lines = 1 + max(column.head.count("\n") for column in columns)
    height = 1 / (len(columns[0].cells) + lines + 0.6)
    right = np.cumsum([1 + column.gap for column in columns])
    for x, column in zip(right / right[-1], columns, strict=True):
        style = dict(ha="right", color=column.colour, size=7.5)
        axes.text(x, 1 - lines * height, column.head, va="bottom", weight="bold", **style)
        for row, cell in enumerate(column.cells):
            y = 1 - (lines + 0.6 + row + 0.5) * height
            axes.text(x, y, cell, va="center", **style)
    axes.axhline(1 - (lines + 0.3) * height, color=GREY, linewidth=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1))
