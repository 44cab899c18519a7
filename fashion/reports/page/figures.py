"""What the report page shows: rows of the reports -> figures as plain values, with every label and mark.

How a figure is drawn is `drawing.py`'s business, so that the page and the PNG files show the same thing. Knows
the standard library only.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from fashion.config import CLASS_NAMES, NUM_CLASSES, TrainConfig

Row = dict[str, Any]

PUBLISHED_TURN = 10
"""Epoch after which the published test loss rises."""

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


# --- one run --------------------------------------------------------------------------------------------------------

TRAIN = Style(BLUE, dash="dash", marker="square")
VAL = Style(VERMILLION)


def turning_point(epochs: Sequence[Row]) -> int | None:
    """Return the epoch of the lowest val loss, from which it only gets worse; None if that is the last epoch."""
    losses = {row["epoch"]: row["loss"] for row in epochs if row["split"] == "val" and finite(row["loss"])}
    if not losses:
        return None
    lowest = min(losses, key=lambda epoch: (losses[epoch], epoch))
    return int(lowest) if lowest < max(losses) else None


def learning_curves(number: int, run_id: str, epochs: Sequence[Row]) -> Figure:
    """Draw loss and accuracy over the epochs, train and val; `number` makes the name unique."""
    last = max((row["epoch"] for row in epochs), default=1)
    turn = turning_point(epochs)
    caption = (
        "Val loss is lowest at the last epoch."
        if turn is None
        else f"Val loss is lowest at epoch {turn} of {last} and never as low again: from there on the network overfits."
    )
    if last < PUBLISHED_TURN:
        caption += f" The published turning point, epoch {PUBLISHED_TURN}, lies beyond the end of this run."
    # Labels stand one above the other where curves leave room: loss falls from the top, accuracy rises to it.
    columns = (("Loss (nats per image)", "loss", (1.0, 0.9)), ("Accuracy", "accuracy", (0.1, 0.0)))
    panels = [
        Panel(
            title=title,
            x_title="epoch",
            series=[curve(epochs, split, column, style) for split, style in (("train", TRAIN), ("val", VAL))],
            marks=turning_marks(turn, last, heights),
            x_range=(0.5, last + 0.5),
            x_ticks=epoch_ticks(last),
        )
        for title, column, heights in columns
    ]
    return Figure(name=f"curves-{number}", title=f"Learning curves of {run_id}", caption=caption, panels=panels)


def turning_marks(turn: int | None, last: int, heights: tuple[float, float]) -> list[Mark]:
    """Mark this run's turning point and the published one, those that lie within its `last` epochs, at `heights`."""
    own = [] if turn is None else [Mark(turn, f"val loss turns: epoch {turn}", height=heights[0])]
    if last < PUBLISHED_TURN:
        return own
    return [*own, Mark(PUBLISHED_TURN, f"published: epoch {PUBLISHED_TURN}", GREY, "dot", heights[1])]


def curve(epochs: Sequence[Row], split: str, column: str, style: Style) -> Series:
    """Draw one column of one split over the epochs; a number that is not finite leaves a gap."""
    rows = sorted((row for row in epochs if row["split"] == split), key=lambda row: int(row["epoch"]))
    values = [row[column] if finite(row[column]) else None for row in rows]
    hover = [f"{split}, epoch {row['epoch']}: {column} {shown(row[column])}" for row in rows]
    return Series(name=split, x=[row["epoch"] for row in rows], y=values, hover=hover, style=style)


def epoch_ticks(last: int) -> dict[float, str]:
    """Return whole epochs to label, at most about ten."""
    step = max(1, math.ceil(last / 10))
    return {epoch: str(epoch) for epoch in (range(1, last + 1) if step == 1 else range(step, last + 1, step))}


def confusion(run_id: str, split: str, cells: Iterable[Row]) -> Figure:
    """Draw the confusion matrix of a run's predictions."""
    counts = [[0] * NUM_CLASSES for _ in range(NUM_CLASSES)]
    for cell in cells:
        counts[cell["label"]][cell["predicted"]] += cell["count"]
    wrong = [(counts[a][b], a, b) for a in range(NUM_CLASSES) for b in range(NUM_CLASSES) if a != b]
    most, label, predicted = max(wrong, key=lambda entry: (entry[0], -entry[1], -entry[2]))
    caption = (
        f"Rows are the true classes, columns what {run_id} said on {split}. The diagonal (grey) is right; "
        "the bluer another cell, the more mistakes."
    )
    if most:
        caption += f" The commonest: {CLASS_NAMES[label]} taken for {CLASS_NAMES[predicted]}, {most} times."
    matrix = Matrix(title=f"{sum(map(sum, counts)):,} images, {sum(w[0] for w in wrong):,} mistaken", counts=counts)
    return Figure(name="confusion", title="Confusion matrix", caption=caption, panels=[matrix])


def class_figures(rows: Sequence[Row]) -> Figure:
    """Draw precision, recall and F1 of each class, the hardest at the foot."""
    order = sorted(rows, key=lambda row: float(row["f1"]))
    measures = (
        ("precision", Style(BLUE, marker="triangle-up", size=10)),
        ("recall", Style(ORANGE, marker="diamond", size=10)),
        ("f1", Style(BLACK, marker="circle", size=7)),
    )
    series = [
        Series(
            name="F1" if name == "f1" else name,
            x=[row[name] for row in order],
            y=list(range(len(order))),
            hover=[f"{row['name']}: {name} {row[name]:.4f}" for row in order],
            style=style,
            lines=False,
        )
        for name, style in measures
    ]
    panel = Panel(
        title="",
        x_title="share (0 to 1)",
        series=series,
        y_ticks={place: str(row["name"]) for place, row in enumerate(order)},
        y_range=(-0.6, len(order) - 0.4),
        height=560,
    )
    caption = (
        "Precision: of the images called so, the share that are. Recall: of the class, the share that was found. "
        "F1: their harmonic mean. Best class on top."
    )
    return Figure(name="classes", title="Precision, recall and F1 per class", caption=caption, panels=[panel])


# --- a search -------------------------------------------------------------------------------------------------------

STATUS_STYLES = {
    "completed": Style(BLUE, marker="circle", size=8),
    "stopped": Style(ORANGE, dash="dash", marker="triangle-up", size=9),
    "running": Style(GREEN, dash="dashdot", marker="square", size=8),
    "diverged": Style(PURPLE, dash="dot", marker="x", size=9),
    "error": Style(BLACK, dash="dot", marker="x", size=9),
}
OTHER_STATUS = Style(GREY, dash="dot", marker="diamond")
BEST = Style(VERMILLION, marker="circle", width=4, size=10)
NOT_SEARCHED = ("preset", "epochs", "seed")


@dataclass(frozen=True)
class Search:
    """The trials of one search, with their epochs (trial id -> rows) and their runs (trial id -> row)."""

    search_id: str
    trials: Sequence[Row]
    epochs: dict[str, list[Row]]
    runs: dict[str, Row]

    @property
    def best(self) -> Row | None:
        """The trial with the highest val accuracy among those that did not fail; None if there is none."""
        sound = [trial for trial in self.trials if trial["status"] not in ("diverged", "error")]
        scored = [trial for trial in sound if finite(trial["val_accuracy"])]
        return max(scored, key=lambda trial: float(trial["val_accuracy"]), default=None)

    @property
    def max_epochs(self) -> int:
        """Epochs of a full trial: the column `max_epochs` where there is one, else the longest trial's."""
        told = [trial["max_epochs"] for trial in self.trials if trial.get("max_epochs")]
        return int(max([*told, *(trial["epochs_done"] or 0 for trial in self.trials)]))

    @property
    def rungs(self) -> list[int]:
        """Epochs at which ASHA judged: the values of `rung`, the last rung that a trial reached, as an epoch."""
        return sorted({int(trial["rung"]) for trial in self.trials if trial["rung"]})


def spent_epochs(search: Search) -> tuple[int, int, int]:
    """Return the epochs spent, those that full trials would have cost, and those that ASHA's stops saved."""
    full = search.max_epochs
    spent = sum(trial["epochs_done"] or 0 for trial in search.trials)
    saved = sum(full - (trial["epochs_done"] or 0) for trial in search.trials if trial["status"] == "stopped")
    return spent, full * len(search.trials), saved


def searched_settings(trials: Sequence[Row]) -> list[str]:
    """Return the columns that are settings of a run and differ between the trials, lr and dropout first."""
    settings = [each.name for each in fields(TrainConfig) if each.name not in NOT_SEARCHED] + ["depth"]
    first = ["lr", "dropout_conv", "dropout_fc"]
    order = first + [name for name in settings if name not in first]
    return [name for name in order if len({trial[name] for trial in trials if trial.get(name) is not None}) > 1]


def search_figures(number: int, search: Search) -> list[Figure]:
    """Draw a search; figures for which the reports hold nothing are left out."""
    figures = [
        trial_curves(number, search),
        timeline(number, search),
        over_settings(number, search),
        parallel(number, search),
        savings(number, search),
    ]
    return [figure for figure in figures if figure is not None]


def by_status(trials: Iterable[Row]) -> list[tuple[str, Style, list[Row]]]:
    """Group trials by status, in a fixed order, unknown ones last."""
    groups: dict[str, list[Row]] = {name: [] for name in STATUS_STYLES}
    for trial in trials:
        groups.setdefault(str(trial["status"]), []).append(trial)
    return [(name, STATUS_STYLES.get(name, OTHER_STATUS), group) for name, group in groups.items() if group]


def told(trial: Row, settings: Sequence[str]) -> str:
    """Describe a trial in a line."""
    values = ", ".join(f"{name} {shown(trial[name])}" for name in settings)
    return f"{trial['trial_id']} ({trial['status']}): {values}; val accuracy {shown(trial['val_accuracy'])}"


def trial_curves(number: int, search: Search) -> Figure | None:
    """Draw each trial's val accuracy over its epochs, and the rungs at which trials were stopped."""
    best, settings, series = search.best, searched_settings(search.trials), list[Series]()
    for status, style, trials in by_status(trial for trial in search.trials if trial is not best):
        lines = [trial_line(search, trial, settings) for trial in trials]
        series.append(joined(status, style, lines))
    if best is not None:
        series.append(joined("best", BEST, [trial_line(search, best, settings)]))
    if not any(one.x for one in series):
        return None
    last = search.max_epochs
    limits, cut = without_outliers([y for one in series for y in one.y if y is not None])
    panel = Panel(
        title="",
        x_title="epoch",
        y_title="val accuracy",
        series=[one for one in series if one.x],
        marks=[Mark(rung, f"rung {rung}", GREY, "dot", height=0.0) for rung in search.rungs],
        x_range=(0.5, last + 0.5),
        x_ticks=epoch_ticks(last),
        y_range=limits,
        height=420,
    )
    caption = "A line is a trial. At each rung (dotted) ASHA compares the trials that got there and stops the poorer."
    caption += cut
    return Figure(name=f"search-{number}-epochs", title="Trials over epochs", caption=caption, panels=[panel])


Line = list[tuple[float | None, float | None, str]]


def trial_line(search: Search, trial: Row, settings: Sequence[str]) -> Line:
    """Return a trial's points (epoch, val accuracy, hover text)."""
    rows = [row for row in search.epochs.get(trial["trial_id"], []) if row["split"] == "val"]
    text = told(trial, settings)
    return [
        (row["epoch"], row["accuracy"], f"epoch {row['epoch']}: {row['accuracy']:.4f} - {text}")
        for row in sorted(rows, key=lambda row: int(row["epoch"]))
        if finite(row["accuracy"])
    ]


def joined(name: str, style: Style, lines: Iterable[Line], *, points: bool = True) -> Series:
    """Make one series of many lines, with gaps between them, so that the legend has one entry."""
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


def timeline(number: int, search: Search) -> Figure | None:
    """Draw when each trial ran; None unless the runs say so."""
    times = {key: (run["started_at"], run["finished_at"]) for key, run in search.runs.items() if run["started_at"]}
    trials = sorted(
        (trial for trial in search.trials if trial["trial_id"] in times), key=lambda t: times[t["trial_id"]][0]
    )
    if not trials:
        return None
    origin = times[trials[0]["trial_id"]][0]
    now = max(moment for pair in times.values() for moment in pair if moment)
    place = {trial["trial_id"]: len(trials) - row for row, trial in enumerate(trials)}
    settings = searched_settings(search.trials)

    def span(trial: Row) -> Line:
        start, end = times[trial["trial_id"]]
        y = place[trial["trial_id"]]
        return [(minutes(moment, origin), y, told(trial, settings)) for moment in (start, end or now)]

    series = [joined(name, bar(style), map(span, group), points=False) for name, style, group in by_status(trials)]
    panel = Panel(
        title="",
        x_title="minutes since the search began",
        series=series,
        y_ticks=trial_ticks(place),
        y_range=(0.3, len(trials) + 0.7),
        height=bars_height(len(trials)),
    )
    caption = "A bar is a trial, from its start to its end, in the order of their starts; gaps are waiting."
    return Figure(name=f"search-{number}-time", title="Trials over time", caption=caption, panels=[panel])


def minutes(moment: datetime, origin: datetime) -> float:
    """Return the minutes from `origin` to `moment`."""
    return (moment - origin).total_seconds() / 60


def bar(style: Style) -> Style:
    """Return the style of a bar: a broad line; the dash stays, so that it is told apart without colour."""
    return Style(style.colour, dash="solid" if style.dash == "dash" else style.dash, width=9)


def bars_height(count: int) -> int:
    """Return the pixels that `count` bars need."""
    return min(900, 130 + 24 * count)


def trial_ticks(place: dict[str, int]) -> dict[float, str]:
    """Label the bars, unless there are too many to read."""
    return {y: str(trial_id)[-14:] for trial_id, y in place.items()} if len(place) <= 32 else {}


def over_settings(number: int, search: Search) -> Figure | None:
    """Draw val accuracy over each setting that was searched as a number."""
    trials = [trial for trial in search.trials if finite(trial["val_accuracy"])]
    settings = searched_settings(search.trials)
    numeric = [name for name in settings if all(finite(trial.get(name)) for trial in trials)]
    if not trials or not numeric:
        return None

    def points(name: str, label: str, style: Style, group: Sequence[Row]) -> Series:
        return Series(
            name=label,
            x=[trial[name] for trial in group],
            y=[trial["val_accuracy"] for trial in group],
            hover=[told(trial, settings) for trial in group],
            style=style,
            lines=False,
        )

    def panel(name: str) -> Panel:
        rest = by_status(trial for trial in trials if trial is not search.best)
        series = [points(name, status, style, group) for status, style, group in rest]
        series.append(points(name, "best", BEST, [trial for trial in trials if trial is search.best]))
        spread = is_log(name, [trial[name] for trial in trials])
        x_title = name + (" (log scale)" if spread else "")
        return Panel(title=f"Over {name}", x_title=x_title, series=series, log_x=spread, y_range=limits)

    missing = len(search.trials) - len(trials)
    limits, cut = without_outliers([trial["val_accuracy"] for trial in trials])
    caption = "A point is a trial; a stopped trial stands where it was when it was stopped." + cut
    if missing:
        caption += f" {missing} trial(s) without a val accuracy are left out."
    title = "Val accuracy over the settings"
    return Figure(
        name=f"search-{number}-settings", title=title, caption=caption, panels=[panel(name) for name in numeric]
    )


def is_log(name: str, values: Sequence[float]) -> bool:
    """Tell whether a setting is one of those that are searched by orders of magnitude."""
    return name in ("lr", "weight_decay") and min(values) > 0


def without_outliers(values: Sequence[float]) -> tuple[tuple[float, float] | None, str]:
    """Return limits that leave out a few far-off low values, and a sentence that says so; None and '' if all fit."""
    order = sorted(values)
    top, usual = order[-1], order[len(order) // 5]
    if top - order[0] <= 4 * (top - usual):
        return None, ""
    kept = [value for value in order if value >= top - 4 * (top - usual)]
    margin = 0.08 * (top - kept[0])
    low, left_out = kept[0] - margin, len(order) - len(kept)
    return (low, top + margin), f" The axis leaves out {left_out} point(s) below {low:.3f}."


def scaled(name: str, values: Sequence[Any]) -> tuple[list[float], str, str]:
    """Map values onto 0..1, some settings along a log scale, words by rank; return also the ends' labels."""
    if all(finite(value) for value in values):
        numbers = [math.log(value) for value in values] if is_log(name, values) else [float(value) for value in values]
        low, high = min(numbers), max(numbers)
        return [(x - low) / ((high - low) or 1) for x in numbers], shown(min(values)), shown(max(values))
    words = sorted({str(value) for value in values})
    return [words.index(str(value)) / max(1, len(words) - 1) for value in values], words[0], words[-1]


def parallel(number: int, search: Search) -> Figure | None:
    """Draw each trial as a line across its settings to its val accuracy."""
    settings = searched_settings(search.trials)
    trials = [trial for trial in search.trials if finite(trial["val_accuracy"])]
    trials = [trial for trial in trials if all(trial.get(name) is not None for name in settings)]
    if len(trials) < 2 or not settings:
        return None
    axes = [*settings, "epochs_done", "val_accuracy"]
    columns = [scaled(name, [trial[name] for trial in trials]) for name in axes]
    ranked = sorted(range(len(trials)), key=lambda row: -trials[row]["val_accuracy"])
    quarter = max(2, math.ceil(len(trials) / 4))

    def line(row: int) -> Line:
        text = told(trials[row], settings)
        return [(place, values[row], text) for place, (values, _, _) in enumerate(columns)]

    groups = [
        ("the rest", Style(GREY, dash="dot", width=1.5, size=4), ranked[quarter:]),
        ("best quarter", Style(BLUE, dash="dash", marker="square", size=6), ranked[1:quarter]),
        ("best", BEST, ranked[:1]),
    ]
    panel = Panel(
        title="",
        x_title="",
        series=[joined(name, style, map(line, rows)) for name, style, rows in groups if rows],
        marks=[Mark(place, "", "#CCCCCC", "solid") for place in range(len(axes))],
        notes=[
            Note(place, height, label)
            for place, (_, low, high) in enumerate(columns)
            for height, label in ((-0.1, low), (1.1, high))
        ],
        x_ticks=dict(enumerate(axes)),
        x_range=(-0.4, len(axes) - 0.6),
        y_range=(-0.2, 1.2),
        y_ticks={},
        height=420,
    )
    caption = "A line is a trial; each axis runs from the lowest value (foot) to the highest (top) that was tried."
    return Figure(name=f"search-{number}-parallel", title="Parallel coordinates", caption=caption, panels=[panel])


def savings(number: int, search: Search) -> Figure | None:
    """Draw the epochs that each trial ran and those that it was spared."""
    spent, full, saved = spent_epochs(search)
    if not full:
        return None
    last, settings = search.max_epochs, searched_settings(search.trials)
    trials = sorted(search.trials, key=lambda trial: (trial["epochs_done"] or 0, trial["val_accuracy"] or 0))
    place = {trial["trial_id"]: row + 1 for row, trial in enumerate(trials)}

    def ran(trial: Row) -> Line:
        ends: tuple[float, float] = (0, trial["epochs_done"] or 0)
        return [(x, place[trial["trial_id"]], told(trial, settings)) for x in ends]

    def spared(trial: Row) -> Line:
        ends: tuple[float, float] = (trial["epochs_done"] or 0, last)
        text = f"{trial['trial_id']}: {last - ends[0]:.0f} epoch(s) not run"
        return [(x, place[trial["trial_id"]], text) for x in ends if ends[0] < last]

    series = [joined(name, bar(style), map(ran, group), points=False) for name, style, group in by_status(trials)]
    series.append(joined("not run", Style(GREY, dash="dot", width=1.5), map(spared, trials), points=False))
    panel = Panel(
        title="",
        x_title="epochs",
        series=[one for one in series if one.x],
        marks=[Mark(rung, f"rung {rung}", GREY, "dot") for rung in search.rungs],
        x_range=(0, last + 0.3),
        x_ticks=epoch_ticks(last),
        y_ticks=trial_ticks(place),
        y_range=(0.3, len(trials) + 1.2),
        height=bars_height(len(trials)),
    )
    caption = (
        f"{len(trials)} full trials of {last} epochs would have cost {full} epochs; the search spent {spent} "
        f"({spent / full:.0%}). ASHA's stops saved {saved}"
    )
    rest = full - spent - saved
    caption += f"; {rest} were not run because trials diverged, failed or are not over." if rest else "."
    return Figure(name=f"search-{number}-saved", title="What ASHA saved", caption=caption, panels=[panel])


# --- a study --------------------------------------------------------------------------------------------------------

EFFECTS = {"val": Style(BLUE, marker="square", size=9), "test": Style(VERMILLION, size=9)}


def study_effects(number: int, study_id: str, rows: Sequence[Row]) -> Figure | None:
    """Draw what each arm differs by from its baseline, with the 95 % intervals; None where nothing is compared."""
    compared = [row for row in rows if all(finite(row[f"{split}_effect"]) for split in EFFECTS)]
    if not compared:
        return None
    place = {id(row): len(compared) - number for number, row in enumerate(compared)}
    # Side by side, so that one does not hide the other.
    offsets = {"val": 0.13, "test": -0.13}

    def told(row: Row, split: str) -> str:
        ends = " to ".join(f"{100 * end:+.2f}" for end in bounds(row, split))
        mean = f"{100 * row[f'{split}_effect']:+.2f} points" + (f" ({ends})" if ends else "")
        return f"{row['part']}, {row['arm']} - {row['baseline']}: {split} accuracy {mean}"

    def bounds(row: Row, split: str) -> list[float]:
        return [end for end in (row[f"{split}_effect_low"], row[f"{split}_effect_high"]) if finite(end)]

    def interval(row: Row, split: str) -> Line:
        return [(100 * end, place[id(row)] + offsets[split], told(row, split)) for end in bounds(row, split)]

    series = [
        joined(f"{split}, 95 %", style, [interval(row, split) for row in compared], points=False)
        for split, style in EFFECTS.items()
    ] + [
        Series(
            name=split,
            x=[100 * row[f"{split}_effect"] for row in compared],
            y=[place[id(row)] + offsets[split] for row in compared],
            hover=[told(row, split) for row in compared],
            style=style,
            lines=False,
        )
        for split, style in EFFECTS.items()
    ]
    panel = Panel(
        title="",
        x_title="difference of accuracy, percentage points",
        series=[one for one in series if one.x],
        marks=[Mark(0, "no difference", GREY, "dot")],
        y_ticks={place[id(row)]: f"{row['part']}: {row['arm']}" for row in compared},
        y_range=(0.3, len(compared) + 1.2),
        height=bars_height(len(compared)),
    )
    caption = (
        "Each arm beside the first one of its part, seed by seed. A line is the 95 % confidence interval of the mean "
        "difference (Student's t); an arm of one seed has none."
    )
    return Figure(name=f"study-{number}-effects", title=f"Differences in {study_id}", caption=caption, panels=[panel])


# --- numbers --------------------------------------------------------------------------------------------------------


def finite(value: Any) -> bool:
    """Tell whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def shown(value: Any, form: Callable[[Any], str] = "{:.4g}".format) -> str:
    """Write a value for a person: '-' for none."""
    if value is None:
        return "-"
    return form(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
