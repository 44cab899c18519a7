"""What a figure is: styles, series, panels and matrices as plain values, with every label and mark.

How a figure is drawn is the business of `drawing`, so that the page and the PNG files show the same. Knows the standard
library only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fashion.config import CLASS_NAMES

Row = dict[str, Any]

# Okabe and Ito's colours, distinct to colour-blind readers (https://jfly.uni-koeln.de/color/).
BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
BLACK, GREY = "#222222", "#8A8A8A"


@dataclass(frozen=True)
class Style:
    """How a series looks: never by colour alone."""

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
    """Points (x, y) with a text each to hover over; a y of None breaks the line."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    hover: Sequence[str]
    style: Style
    lines: bool = True
    points: bool = True


@dataclass(frozen=True)
class Mark:
    """A labelled vertical line across a panel."""

    x: float
    label: str
    colour: str = BLACK
    dash: str = "dash"
    height: float = 1.0
    """Where the label is written, from 0 at the panel's foot to 1 at its top."""


@dataclass(frozen=True)
class Note:
    """A word at a point."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. Ticks map positions to labels; None leaves them to the library."""

    title: str
    x_title: str
    y_title: str = ""
    series: Sequence[Series]
    marks: Sequence[Mark] = ()
    notes: Sequence[Note] = ()
    log_x: bool = False
    x_ticks: dict[float, str] | None = None
    y_ticks: dict[float, str] | None = None
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    height: int = 340
    """In pixels."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A confusion matrix (10, 10): row is the label, column the prediction."""

    title: str
    counts: list[list[int]]
    names: tuple[str, ...] = CLASS_NAMES
    height: int = 560


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that belong together, and what a reader should know to read them."""

    name: str
    """ASCII, unique on the page: anchor and file name."""
    title: str
    caption: str
    panels: Sequence[Panel | Matrix] = field(default_factory=list)


def epoch_ticks(last: int) -> dict[float, str]:
    """Return whole epochs to label, at most about ten."""
    step = max(1, math.ceil(last / 10))
    return {epoch: str(epoch) for epoch in (range(1, last + 1) if step == 1 else range(step, last + 1, step))}


def finite(value: Any) -> bool:
    """Tell whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def shown(value: Any, form: Callable[[Any], str] = "{:.4g}".format) -> str:
    """Write a value for a person: '-' for none."""
    if value is None:
        return "-"
    return form(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
