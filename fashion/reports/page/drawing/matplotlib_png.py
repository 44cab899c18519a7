"""Draws figures as PNG files with matplotlib, and encodes images as PNG.

Plotly draws the page but not these files, since its PNG export (kaleido) needs Chrome to be installed. matplotlib is
imported only inside the functions that need it, since importing it is slow.
"""

import io
import math
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fashion.reports.page.content import BLACK, BLUE, DIAGONAL, GRID, ConfusionMatrix, Figure, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKERS = {"circle": "o", "square": "s", "triangle-up": "^", "diamond": "D", "x": "X"}


def figure_png(figure: Figure) -> bytes:
    """Draw a figure as PNG, at most three panels in a row."""
    columns = min(3, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    height = max(panel.height for panel in figure.panels) / 80
    width = 5.6 * columns if columns > 1 else 8.5
    canvas = new_figure(width, height * rows + 0.5)
    canvas.suptitle(escape_dollars(figure.title), fontsize=13, fontweight="bold")
    for place, panel in enumerate(figure.panels):
        axes = canvas.add_subplot(rows, columns, place + 1)
        # A title stands above the legend, which is as wide as the panel where it has many entries.
        axes.set_title(escape_dollars(panel.title), fontsize=11, loc="left", pad=22 if len(figure.panels) > 1 else 6)
        if isinstance(panel, ConfusionMatrix):
            draw_matrix(axes, panel)
        else:
            draw_panel(axes, panel)
    return encode_figure(canvas)


def new_figure(width: float, height: float) -> "Canvas":
    """Return an empty matplotlib figure of `width` x `height` inches, without pyplot and its global state."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")


def encode_figure(canvas: "Canvas") -> bytes:
    """Return a matplotlib figure as PNG, without matplotlib's version, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def escape_dollars(text: str) -> str:
    """Escape dollar signs, which matplotlib reads as the start of a formula."""
    return text.replace("$", "\\$")


def to_array(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Return values as an array with NaN for None, which matplotlib leaves out."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def draw_panel(axes: "Axes", panel: Panel) -> None:
    """Draw a panel's series, vertical lines and annotations."""
    for series in panel.series:
        style = series.style
        axes.plot(
            to_array(series.x),
            to_array(series.y),
            color=style.colour,
            linestyle=DASHES[style.dash] if series.lines else "",
            linewidth=style.width * 0.8,
            marker=MARKERS[style.marker] if series.points else "",
            markersize=style.size * 0.8,
            label=escape_dollars(series.name),
            solid_capstyle="butt",
        )
    if panel.log_x:
        axes.set_xscale("log")
    for line in panel.vertical_lines:
        axes.axvline(line.x, color=line.colour, linestyle=DASHES[line.dash], linewidth=1.2, zorder=1)
    set_axes(axes, panel)
    draw_labels(axes, panel)
    axes.legend(fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.2)


def set_axes(axes: "Axes", panel: Panel) -> None:
    """Set the axes' titles, ticks and limits."""
    axes.set_xlabel(escape_dollars(panel.x_title))
    axes.set_ylabel(escape_dollars(panel.y_title))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.x_ticks is not None:
        axes.set_xticks(list(panel.x_ticks), [escape_dollars(text) for text in panel.x_ticks.values()])
    if panel.y_ticks is not None:
        axes.set_yticks(list(panel.y_ticks), [escape_dollars(text) for text in panel.y_ticks.values()])
    if panel.x_range is not None:
        axes.set_xlim(*panel.x_range)
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)


def draw_labels(axes: "Axes", panel: Panel) -> None:
    """Draw the labels of vertical lines, on the side that faces the middle of the panel, and the annotations."""
    for line in panel.vertical_lines:
        left = line.x < sum(axes.get_xlim()) / 2
        axes.annotate(
            escape_dollars(line.label),
            (line.x, 0.02 + 0.96 * line.label_height),
            xycoords=("data", "axes fraction"),
            xytext=(4 if left else -4, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="top" if line.label_height > 0.5 else "bottom",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    for label in panel.annotations:
        axes.text(label.x, label.y, escape_dollars(label.text), ha="center", va="center", fontsize=9)


def draw_matrix(axes: "Axes", matrix: ConfusionMatrix) -> None:
    """Draw a confusion matrix: mistakes from white to blue by their count, the diagonal in grey."""
    from matplotlib.colors import LinearSegmentedColormap

    counts = np.array(matrix.counts)
    right = np.eye(len(counts), dtype=bool)
    wrong = np.ma.masked_array(counts, mask=right)
    most = max(1, int(counts[~right].max()))
    axes.set_facecolor(DIAGONAL)
    axes.imshow(wrong, cmap=LinearSegmentedColormap.from_list("mistakes", ["#FFFFFF", BLUE]), vmin=0, vmax=most)
    for (label, predicted), count in np.ndenumerate(counts):
        dark = label != predicted and count > 0.6 * most
        axes.text(predicted, label, str(count), ha="center", va="center", color="white" if dark else BLACK, fontsize=9)
    places = list(range(len(counts)))
    axes.set_xticks(places, [escape_dollars(name) for name in matrix.names], rotation=45, ha="right")
    axes.set_yticks(places, [escape_dollars(name) for name in matrix.names])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")


def contact_sheet_png(title: str, images: Sequence[NDArray[np.uint8]], labels: Sequence[str]) -> bytes:
    """Draw images (28, 28) uint8 as PNG, eight in a row, with a label below each."""
    rows = -(-len(images) // 8)
    canvas = new_figure(12, 2.1 * rows + 0.5)
    canvas.suptitle(escape_dollars(title), fontsize=13, fontweight="bold")
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        axes = canvas.add_subplot(rows, 8, place + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(escape_dollars(label), fontsize=8)
    return encode_figure(canvas)


def encode_gray_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey image (H, W) uint8 as PNG (RFC 2083): one byte per pixel, filter type 0 for each row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in image)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
