"""How figures are drawn: for the page as Plotly's JSON, for files as PNG with matplotlib.

Two libraries, since Plotly's own PNG export (kaleido) needs a Chrome installed and matplotlib's pictures do not answer
the pointer. Both draw the same `fashion.reports.page.figures.Figure`; both are imported only when something is drawn.
"""

import base64
import gzip
import html
import io
import json
import math
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fashion.reports.page.figures import BLACK, BLUE, Figure, Matrix, Panel, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GRID = "#E6E6E6"
DIAGONAL = "#DDDDDD"
GREY_LINE = "#999999"
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKERS = {"circle": "o", "square": "s", "triangle-up": "^", "diamond": "D", "x": "X"}


# --- the page: Plotly -------------------------------------------------------------------------------------------------


def library_base64() -> str:
    """Return plotly.js, gzip'd and in base64, the same bytes every time: 1.9 MB in place of 4.8."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), compresslevel=6, mtime=0)).decode()


def panel_json(panel: Panel | Matrix) -> str:
    """Return a panel as Plotly's JSON (data and layout), checked by Plotly and safe inside a script element."""
    import plotly.graph_objects as go

    data, layout = matrix_parts(panel) if isinstance(panel, Matrix) else panel_parts(panel)
    figure = go.Figure(data=data, layout=layout)
    figure.update_layout(template=None)
    text = json.dumps(json.loads(figure.to_json()), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def panel_parts(panel: Panel) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a panel's traces and layout."""
    layout = base_layout(panel.title, panel.height)
    layout["xaxis"] |= axis(panel.x_title, panel.x_ticks, panel.x_range)
    layout["yaxis"] |= axis(panel.y_title, panel.y_ticks, panel.y_range)
    if panel.log_x:
        # Plotly labels minor ticks of a log axis "2", "5"; these say the whole number.
        layout["xaxis"] |= {"type": "log", "dtick": "D2" if decades(panel) < 1.5 else 1, "exponentformat": "power"}
    layout["shapes"] = [
        {
            "type": "line",
            "x0": mark.x,
            "x1": mark.x,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": mark.colour, "dash": mark.dash, "width": 1.5},
            "layer": "between",
        }
        for mark in panel.marks
    ]
    middle = sum(panel.x_range) / 2 if panel.x_range else math.inf
    layout["annotations"] = [
        {
            "x": mark.x,
            "yref": "paper",
            "y": 0.02 + 0.98 * mark.height,
            "yanchor": "top" if mark.height > 0.5 else "bottom",
            "xanchor": "left" if mark.x < middle else "right",
            "text": escaped(mark.label),
            "showarrow": False,
            "font": {"size": 12, "color": BLACK},
            "bgcolor": "rgba(255,255,255,0.8)",
        }
        for mark in panel.marks
        if mark.label
    ] + [
        {"x": note.x, "y": note.y, "text": escaped(note.text), "showarrow": False, "font": {"size": 12}}
        for note in panel.notes
    ]
    return [trace(series) for series in panel.series], layout


def decades(panel: Panel) -> float:
    """Return how many powers of ten the points of a panel span along x."""
    values = [x for series in panel.series for x in series.x if x]
    return math.log10(max(values) / min(values)) if values else 0.0


def base_layout(title: str, height: int) -> dict[str, Any]:
    """Return what all panels share."""
    grid = {"gridcolor": GRID, "linecolor": GREY_LINE, "zeroline": False, "automargin": True, "ticks": "outside"}
    return {
        "title": {"text": f"<b>{escaped(title)}</b>", "font": {"size": 15}, "x": 0, "xref": "paper", "y": 0.98},
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 64 if title else 36, "b": 48},
        "font": {"family": FONT, "size": 13, "color": BLACK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 12}},
        "xaxis": dict(grid),
        "yaxis": dict(grid),
    }


def axis(title: str, ticks: dict[float, str] | None, limits: tuple[float, float] | None) -> dict[str, Any]:
    """Return the settings of an axis."""
    settings: dict[str, Any] = {"title": {"text": escaped(title), "font": {"size": 13}, "standoff": 8}}
    if ticks is not None:
        settings |= {"tickvals": list(ticks), "ticktext": [escaped(text) for text in ticks.values()]}
    if limits is not None:
        settings["range"] = list(limits)
    return settings


def trace(series: Series) -> dict[str, Any]:
    """Return a series as a scatter trace in SVG; its dash and marker tell it apart without colour."""
    style = series.style
    modes = [name for name, wanted in (("lines", series.lines), ("markers", series.points)) if wanted]
    return {
        "type": "scatter",
        "mode": "+".join(modes),
        "name": escaped(series.name),
        "x": list(series.x),
        "y": list(series.y),
        "text": [escaped(text) for text in series.hover],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": style.colour, "dash": style.dash, "width": style.width},
        "marker": {"color": style.colour, "symbol": style.marker, "size": style.size},
        "connectgaps": False,
    }


def matrix_parts(matrix: Matrix) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a confusion matrix as two heat maps: mistakes by their count, and the diagonal in grey."""
    names = [escaped(name) for name in matrix.names]
    size = range(len(names))

    def told(label: int, predicted: int) -> str:
        what = "right" if label == predicted else f"taken for {names[predicted]}"
        return f"{names[label]}, {what}: {matrix.counts[label][predicted]}"

    common = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "customdata": [[told(a, b) for b in size] for a in size],
        "texttemplate": "%{z}",
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{customdata}<extra></extra>",
        "hoverongaps": False,
        "showscale": False,
    }
    wrong = [[matrix.counts[a][b] if a != b else None for b in size] for a in size]
    right = [[matrix.counts[a][b] if a == b else None for b in size] for a in size]
    layout = base_layout(matrix.title, matrix.height)
    layout["showlegend"] = False
    layout["margin"]["t"] = 44
    layout["xaxis"] |= axis("predicted", None, None) | {"showgrid": False, "tickangle": -45}
    layout["yaxis"] |= axis("true class", None, None) | {"autorange": "reversed", "showgrid": False}
    return [
        common | {"z": wrong, "zmin": 0, "colorscale": [[0, "#FFFFFF"], [1, BLUE]]},
        common | {"z": right, "colorscale": [[0, DIAGONAL], [1, DIAGONAL]]},
    ], layout


def escaped(text: str) -> str:
    """Escape what Plotly would take for markup."""
    return html.escape(text, quote=False)


# --- files: matplotlib ----------------------------------------------------------------------------------------------


def figure_png(figure: Figure) -> bytes:
    """Draw a figure as PNG, its panels side by side, three to a row at most."""
    columns = min(3, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    height = max(panel.height for panel in figure.panels) / 80
    width = 5.6 * columns if columns > 1 else 8.5
    canvas = new_canvas(width, height * rows + 0.5)
    canvas.suptitle(plain(figure.title), fontsize=13, fontweight="bold")
    for place, panel in enumerate(figure.panels):
        axes = canvas.add_subplot(rows, columns, place + 1)
        axes.set_title(plain(panel.title), fontsize=11, loc="left")
        if isinstance(panel, Matrix):
            draw_matrix(axes, panel)
        else:
            draw_panel(axes, panel)
    return as_png(canvas)


def new_canvas(width: float, height: float) -> "Canvas":
    """Return an empty matplotlib figure of `width` x `height` inches, free of any global state."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")


def as_png(canvas: "Canvas") -> bytes:
    """Return a matplotlib figure as PNG, without the library's version, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plain(text: str) -> str:
    """Keep matplotlib from reading a dollar sign as mathematics."""
    return text.replace("$", "\\$")


def numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Turn None into NaN, which matplotlib leaves out."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def draw_panel(axes: "Axes", panel: Panel) -> None:
    """Draw a panel's series, marks and notes."""
    for series in panel.series:
        style = series.style
        axes.plot(
            numbers(series.x),
            numbers(series.y),
            color=style.colour,
            linestyle=DASHES[style.dash] if series.lines else "",
            linewidth=style.width * 0.8,
            marker=MARKERS[style.marker] if series.points else "",
            markersize=style.size * 0.8,
            label=plain(series.name),
            solid_capstyle="butt",
        )
    if panel.log_x:
        axes.set_xscale("log")
    for mark in panel.marks:
        axes.axvline(mark.x, color=mark.colour, linestyle=DASHES[mark.dash], linewidth=1.2, zorder=1)
    set_axes(axes, panel)
    draw_words(axes, panel)
    axes.legend(fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.2)


def set_axes(axes: "Axes", panel: Panel) -> None:
    """Set titles, ticks and limits."""
    axes.set_xlabel(plain(panel.x_title))
    axes.set_ylabel(plain(panel.y_title))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.x_ticks is not None:
        axes.set_xticks(list(panel.x_ticks), [plain(text) for text in panel.x_ticks.values()])
    if panel.y_ticks is not None:
        axes.set_yticks(list(panel.y_ticks), [plain(text) for text in panel.y_ticks.values()])
    if panel.x_range is not None:
        axes.set_xlim(*panel.x_range)
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)


def draw_words(axes: "Axes", panel: Panel) -> None:
    """Write the labels of marks beside them, towards the middle, and the notes."""
    for mark in panel.marks:
        left = mark.x < sum(axes.get_xlim()) / 2
        axes.annotate(
            plain(mark.label),
            (mark.x, 0.02 + 0.96 * mark.height),
            xycoords=("data", "axes fraction"),
            xytext=(4 if left else -4, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="top" if mark.height > 0.5 else "bottom",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    for note in panel.notes:
        axes.text(note.x, note.y, plain(note.text), ha="center", va="center", fontsize=9)


def draw_matrix(axes: "Axes", matrix: Matrix) -> None:
    """Draw a confusion matrix: mistakes from white to blue, the diagonal grey."""
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
    axes.set_xticks(places, [plain(name) for name in matrix.names], rotation=45, ha="right")
    axes.set_yticks(places, [plain(name) for name in matrix.names])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")


def contact_sheet_png(title: str, images: Sequence[NDArray[np.uint8]], labels: Sequence[str]) -> bytes:
    """Draw images (28, 28) uint8 with a label under each, eight to a row."""
    rows = -(-len(images) // 8)
    canvas = new_canvas(12, 2.1 * rows + 0.5)
    canvas.suptitle(plain(title), fontsize=13, fontweight="bold")
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        axes = canvas.add_subplot(rows, 8, place + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(plain(label), fontsize=8)
    return as_png(canvas)


# --- images -----------------------------------------------------------------------------------------------------------


def gray_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey image (H, W) uint8 as PNG (RFC 2083): one byte a pixel, filter 0 before each line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in image)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
