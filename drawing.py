"""Figures on paper: boards of pictures, charts, tables. It knows numbers and pictures, no model."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

INK, GREY, FAINT = "#1b1f24", "#6b7280", "#e5e7eb"
OURS, THEIRS, THIRD, FOURTH = "#2563eb", "#d97706", "#059669", "#a21caf"
CELL = 0.62  # inches a picture
FRAMES_PER_SECOND = 15

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
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, metadata=recipe if path.suffix == ".png" else None)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        self.figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
        FigureCanvasAgg(self.figure)

        def text(x: float, y: float, string: str, **style):
            return self.figure.text(x / width, 1 - y / height, string, **style)

        box = left / width, margin / height, self.width / width, self.height / height
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
        small, large = max(1, self.side // 16), self.side // 3
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
        ValueError: .mp4 without ffmpeg.
    """
    options = dict(fps=FRAMES_PER_SECOND)
    if path.suffix == ".mp4":
        matplotlib.rcParams["animation.ffmpeg_path"] = find_ffmpeg()
        even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p"]
        writer = FFMpegWriter(**options, codec="libx264", extra_args=even)
    else:
        writer = PillowWriter(**options)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        board = None
        for title, cells in frames:
            if board is None:
                board = Board(cells, title=title, **layout)
                writer.setup(board.figure, str(temporary))
            board.title.set_text(title)
            board.image.set_data(board.compose(cells))
            writer.grab_frame()
        for _ in range(2 * FRAMES_PER_SECOND):
            writer.grab_frame()
        writer.finish()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def find_ffmpeg() -> str:
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise ValueError(
            "an .mp4 needs ffmpeg: pip install imageio-ffmpeg, or --output to a .gif"
        ) from None


# ---- charts


def chart(width: float, height: float, *, title: str, note: str, panels: list) -> tuple:
    """A figure with its heading, and axes whose widths are as the numbers `panels`."""
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
    T = len(rate)
    paper = "CIFAR-10, Table 4"
    figure, (left, right) = chart(
        9.2, 3.7, title="Rate and distortion", note=note, panels=[1.25, 1]
    )
    left.plot(rate, rmse, color=OURS, label=name)
    left.plot(TABLE_4[:, 1], TABLE_4[:, 2], "o", color=THEIRS, markersize=4, label=paper)
    left.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE of [0, 255]", xlim=0, ylim=0)
    left.legend()

    shares = TABLE_4[:, 0] / 1000
    at = [T - round(share * T) for share in shares]
    rows = [
        [f"{T - t:,}", f"{rate[t]:.4f}", f"{rmse[t]:.1f}", f"{paper_rate:.4f}", f"{paper_rmse:.1f}"]
        for t, (_, paper_rate, paper_rmse) in zip(at, TABLE_4, strict=True)
    ]
    header = ["reverse time", "rate", "RMSE", "rate", "RMSE"]
    table(
        right,
        header,
        rows,
        widths=[1, 0.8, 0.7, 0.9, 0.7],
        colours=[INK, OURS, OURS, THEIRS, THEIRS],
    )
    return figure


def plot_schedule(alpha_bar: np.ndarray, steps: list, *, note: str) -> Figure:
    """alpha_bar: [T]; steps: `diffusion_utils.Step`."""
    T, t = len(alpha_bar), np.array([step.t for step in steps])
    figure, (share, snr, weights) = chart(9.2, 3.0, title="Schedule", note=note, panels=[1, 1, 1])
    dots = dict(color=INK, markersize=3, linestyle="none", marker="o", zorder=3)
    few = len(steps) <= 100
    share.plot(alpha_bar, color=OURS)
    share.set_title(r"$\bar{\alpha}_t$, the share of $x_0$")
    ratio = alpha_bar / (1 - alpha_bar)
    snr.semilogy(ratio, color=OURS)
    snr.set_title("signal to noise")
    if few:
        share.plot(t, alpha_bar[t], **dots)
        snr.plot(t, ratio[t], **dots)
    for key, label, colour in (
        ("c_t", "$c_t$, of $x_t$", OURS),
        ("c_0", r"$c_0$, of $\hat{x}_0$", THEIRS),
        ("c_1", r"$c_1$, of the $\hat{x}_0$ before", THIRD),
        ("sigma", r"$\sigma$, of noise", FOURTH),
    ):
        values = np.array([getattr(step, key) for step in steps])
        if values.any():
            weights.plot(t, values, color=colour, marker="o" * few, markersize=2.5, label=label)
    weights.set_title("each step's weights")
    weights.legend()
    for axes in (share, snr, weights):
        axes.set(xlabel="$t$", xlim=(0, T - 1))
    return figure


def table(axes: Axes, header: list[str], rows: list[list[str]], *, widths: list[float], colours=()):
    """Right-aligned columns of text, a line under the header; fills `axes`."""
    axes.set_axis_off()
    right = np.cumsum(widths) / sum(widths)
    height = 1 / (len(rows) + 1.5)
    for row, cells in enumerate([header, *rows]):
        y = 1 - (row + 0.5 + 0.3 * (row > 0)) * height
        for column, (x, cell) in enumerate(zip(right, cells, strict=True)):
            colour = colours[column] if colours else INK
            weight = "bold" if row == 0 else "normal"
            axes.text(x, y, cell, ha="right", va="center", color=colour, weight=weight, size=7.5)
    axes.axhline(1 - 1.15 * height, color=GREY, linewidth=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1))
