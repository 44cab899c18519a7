"""Figures of a search: curves of its trials, when they ran, over their settings, and what stopping early saved."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from fashion.config import TrainConfig
from fashion.reports.page.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Figure,
    Mark,
    Note,
    Panel,
    Row,
    Series,
    Style,
    epoch_ticks,
    finite,
    shown,
)

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
