"""What the page shows, as plain dataclasses: sections of paragraphs, tables, figures and images.

In `drawing/`, `plotly_json.py` draws a `Figure` for the page and `matplotlib_png.py` draws the same `Figure` as a PNG
file, so both show the same data and labels. The templates turn sections into HTML; no dataclass holds markup.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fashion.config import CLASS_NAMES

Row = dict[str, Any]
"""A row of a report: column name -> value."""

# Okabe and Ito's colours, distinct to colour-blind readers (https://jfly.uni-koeln.de/color/).
BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
BLACK, GREY = "#222222", "#8A8A8A"
GRID, DIAGONAL = "#E6E6E6", "#DDDDDD"


@dataclass(frozen=True)
class Style:
    """How a series looks. Dash and marker differ as well as colour, for colour-blind readers and grey prints."""

    colour: str
    dash: str = "solid"
    """solid, dash, dot or dashdot."""
    marker: str = "circle"
    """circle, square, triangle-up, diamond or x."""
    width: float = 2.0
    """Line width in pixels."""
    size: float = 7.0
    """Marker size in pixels."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (x, y), each with a hover text; a y of None leaves a gap in the line."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    hover: Sequence[str]
    style: Style
    lines: bool = True
    points: bool = True


@dataclass(frozen=True)
class VerticalLine:
    """A vertical line across a panel, with a label."""

    x: float
    label: str
    colour: str = BLACK
    dash: str = "dash"
    label_height: float = 1.0
    """Where the label is written, from 0 at the bottom of the panel to 1 at its top."""


@dataclass(frozen=True)
class Annotation:
    """A text at a point of a panel."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot with an x and a y axis. Ticks map positions to labels; with None the plotting library chooses them."""

    title: str
    x_title: str
    y_title: str = ""
    series: Sequence[Series]
    vertical_lines: Sequence[VerticalLine] = ()
    annotations: Sequence[Annotation] = ()
    log_x: bool = False
    x_ticks: dict[float, str] | None = None
    y_ticks: dict[float, str] | None = None
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    height: int = 340
    """In pixels."""


@dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """A confusion matrix: `counts[label][predicted]`, (10, 10)."""

    title: str
    counts: list[list[int]]
    names: tuple[str, ...] = CLASS_NAMES
    height: int = 560


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One or more panels with a title and a caption that explains how to read them."""

    name: str
    """Element id on the page and name of the PNG file: ASCII, unique on the page."""
    title: str
    caption: str
    panels: Sequence[Panel | ConfusionMatrix] = field(default_factory=list)


# --- tables, images, sections -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are aligned to the right."""

    title: str
    number: bool = True


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table cell with more than plain text."""

    text: str
    badge: str = ""
    """Warning label after the text."""
    note: str = ""
    """Small text after the text."""
    error: str = ""
    """Error message below the text."""
    code: bool = False
    """Whether the text is set in a fixed-width font."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table, with a cell for each column."""

    cells: Sequence[str | Cell]
    css_class: str = ""
    """'reference' (shaded, stays at the top), 'best' (bold), 'chance' (grey) or ''."""


@dataclass(frozen=True)
class Table:
    """A table with a header row. In a browser a click on a header sorts it, and a long one can be filtered."""

    columns: Sequence[Column]
    rows: Sequence[TableRow]
    shown: int = 0
    """How many rows are shown until the reader asks for all; 0 shows all."""


@dataclass(frozen=True)
class Details:
    """A table that stays hidden until a click on its title."""

    title: str
    table: Table


@dataclass(frozen=True)
class SideBySide:
    """Figures next to each other where the window is wide enough."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Image:
    """A grey image, `pixels` (H, W) uint8, and the lines of text below it."""

    pixels: NDArray[np.uint8]
    lines: Sequence[str]


@dataclass(frozen=True)
class Images:
    """A grid of images. `name` and `title` are those of the PNG file that shows all of them."""

    name: str
    title: str
    items: Sequence[Image]


Block = str | Table | Details | Figure | SideBySide | Images
"""What a section may contain; a string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A section of the page; the table of contents links to its `anchor`."""

    anchor: str
    title: str
    blocks: Sequence[Block]


# --- helpers of several figures ---------------------------------------------------------------------------------------

Line = list[tuple[float | None, float | None, str]]
"""Points (x, y, hover text) of one line."""


def join_lines(name: str, style: Style, lines: Iterable[Line], *, points: bool = True) -> Series:
    """Make one series of several lines, with gaps between them, so that they share one entry of the legend."""
    flat: Line = []
    for line in lines:
        flat += [*line, (None, None, "")] if line else []
    flat = flat[:-1]
    return Series(
        name=name,
        x=[x for x, _, _ in flat],
        y=[y for _, y, _ in flat],
        hover=[text for _, _, text in flat],
        style=style,
        points=points,
    )


def range_of(series: Sequence[Series]) -> tuple[float, float]:
    """Return the range of an axis that shows all x values of some series, and 0, with a margin."""
    values = [0.0, *(x for one in series for x in one.x if x is not None)]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


def bar_style(style: Style) -> Style:
    """Return the style of a horizontal bar: a thick line. Dots and dash-dots stay; dashes would look like gaps."""
    return Style(style.colour, dash="solid" if style.dash == "dash" else style.dash, width=9)


def bar_chart_height(count: int) -> int:
    """Return the height in pixels of a panel with `count` horizontal bars."""
    return min(900, 130 + 24 * count)


def epoch_ticks(last: int) -> dict[float, str]:
    """Return ticks at whole epochs from 1 to `last`, about ten at most."""
    step = max(1, math.ceil(last / 10))
    return {epoch: str(epoch) for epoch in (range(1, last + 1) if step == 1 else range(step, last + 1, step))}


def is_finite(value: Any) -> bool:
    """Return whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def format_value(value: Any, form: Callable[[Any], str] = "{:.4g}".format) -> str:
    """Format a value for display: numbers with `form`, None as '-', anything else with `str`."""
    if value is None:
        return "-"
    return form(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def format_fraction(value: Any) -> str:
    """Format an accuracy or a loss with four decimals, None as '-'."""
    return format_value(value, "{:.4f}".format)


def pluralize(number: int, word: str, plural: str = "") -> str:
    """Return a number with its noun in the singular or plural: '1 run', '2 runs'."""
    return f"{number} {word if number == 1 else plural or word + 's'}"
