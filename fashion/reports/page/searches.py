"""The section about a hyperparameter search: a table of its trials, and its figures."""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from fashion.reports.page.content import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Annotation,
    Column,
    Figure,
    Line,
    Panel,
    Row,
    Section,
    Series,
    Style,
    Table,
    TableRow,
    VerticalLine,
    bar_chart_height,
    bar_style,
    epoch_ticks,
    format_fraction,
    format_value,
    is_finite,
    join_lines,
    pluralize,
)
from fashion.reports.page.findings import findings_blocks, loss_curves, lowest_loss_epoch
from fashion.reports.page.reading import Search, is_stand_in, searched_settings, spent_epochs
from fashion.reports.page.runs import status_cell

MAX_TRIALS = 15
"""How many trials a search's table shows before a click."""
STATUS_STYLES = {
    "completed": Style(BLUE, marker="circle", size=8),
    "stopped": Style(ORANGE, dash="dash", marker="triangle-up", size=9),
    "running": Style(GREEN, dash="dashdot", marker="square", size=8),
    "diverged": Style(PURPLE, dash="dot", marker="x", size=9),
    "error": Style(BLACK, dash="dot", marker="x", size=9),
}
OTHER_STATUS = Style(GREY, dash="dot", marker="diamond")
BEST = Style(VERMILLION, marker="circle", width=4, size=10)


def search_section(number: int, search: Search) -> Section:
    """Show a search: its trials by status, the epochs it trained, a table of its trials, and its figures."""
    spent, full, saved = spent_epochs(search)
    groups = ", ".join(f"{len(trials)} {name}" for name, _, trials in group_by_status(search.trials))
    text = f"{pluralize(len(search.trials), 'trial')}: {groups}. Epochs: {spent} trained, {full} for full trials"
    text += f" ({spent / full:.0%}); ASHA saved {saved} by stopping trials early." if full else "."
    mark = " (STAND-IN DATA)" if any(map(is_stand_in, search.runs.values())) else ""
    return Section(
        f"search-{number}-section",
        f"Search {search.search_id}{mark}",
        [text, trials_table(search), *findings_blocks(number, search), *search_figures(number, search)],
    )


def trials_table(search: Search) -> Table:
    """List the trials, best first; those after the first MAX_TRIALS are shown on a click."""
    names = searched_settings(search.trials)
    columns = [Column("trial", number=False), Column("val accuracy"), Column("val loss"), Column("best epoch")]
    columns += [
        Column("epochs"),
        Column("lowest loss at"),
        Column("rung"),
        *(Column(name) for name in names),
        Column("s"),
    ]
    columns += [Column("status", number=False)]
    order = sorted(search.trials, key=lambda row: -row["val_accuracy"] if is_finite(row["val_accuracy"]) else 1.0)
    rows = [
        TableRow(
            [
                str(row["trial_id"]),
                *(format_fraction(row[name]) for name in ("val_accuracy", "val_loss")),
                *(format_value(row[name]) for name in ("best_epoch", "epochs_done")),
                format_value(lowest_loss_epoch(search.epochs.get(row["trial_id"], []))),
                format_value(row["rung"]),
                *(format_value(row.get(name)) for name in names),
                format_value(row["wall_s"], "{:.0f}".format),
                status_cell(row),
            ],
            "best" if row is search.best else "",
        )
        for row in order
    ]
    return Table(columns, rows, MAX_TRIALS)


def search_figures(number: int, search: Search) -> list[Figure]:
    """Return the figures of a search, without those for which the reports have no data."""
    figures = [
        trial_curves(number, search),
        loss_curves(number, search),
        timeline(number, search),
        accuracy_over_settings(number, search),
        parallel_coordinates(number, search),
        saved_epochs(number, search),
    ]
    return [figure for figure in figures if figure is not None]


def group_by_status(trials: Iterable[Row]) -> list[tuple[str, Style, list[Row]]]:
    """Group trials by status, in the order of STATUS_STYLES; unknown statuses come last."""
    groups: dict[str, list[Row]] = {name: [] for name in STATUS_STYLES}
    for trial in trials:
        groups.setdefault(str(trial["status"]), []).append(trial)
    return [(name, STATUS_STYLES.get(name, OTHER_STATUS), group) for name, group in groups.items() if group]


def describe_trial(trial: Row, settings: Sequence[str]) -> str:
    """Return the hover text of a trial: id, status, searched settings, val accuracy."""
    values = ", ".join(f"{name} {format_value(trial[name])}" for name in settings)
    return f"{trial['trial_id']} ({trial['status']}): {values}; val accuracy {format_value(trial['val_accuracy'])}"


def trial_curves(number: int, search: Search) -> Figure | None:
    """Draw each trial's val accuracy over its epochs, and the rungs at which ASHA stops trials."""
    best, settings, series = search.best, searched_settings(search.trials), list[Series]()
    for outcome, style, trials in group_by_status(trial for trial in search.trials if trial is not best):
        lines = [trial_line(search, trial, settings) for trial in trials]
        series.append(join_lines(outcome, style, lines))
    if best is not None:
        series.append(join_lines("best", BEST, [trial_line(search, best, settings)]))
    last = search.max_epochs
    if not any(one.x for one in series) or last == 1:
        return None
    limits, remark = limits_without_outliers([y for one in series for y in one.y if y is not None])
    panel = Panel(
        title="",
        x_title="epoch",
        y_title="val accuracy",
        series=[one for one in series if one.x],
        vertical_lines=[VerticalLine(rung, f"rung {rung}", GREY, "dot", label_height=0.0) for rung in search.rungs],
        x_range=(0.5, last + 0.5),
        x_ticks=epoch_ticks(last),
        y_range=limits,
        height=420,
    )
    caption = (
        "Each line is a trial. At each rung (dotted) ASHA compares the trials that reached it and stops the worse ones."
    )
    caption += remark
    return Figure(name=f"search-{number}-epochs", title="Trials over epochs", caption=caption, panels=[panel])


def trial_line(search: Search, trial: Row, settings: Sequence[str]) -> Line:
    """Return a trial's points (epoch, val accuracy, hover text)."""
    rows = [row for row in search.epochs.get(trial["trial_id"], []) if row["split"] == "val"]
    text = describe_trial(trial, settings)
    return [
        (row["epoch"], row["accuracy"], f"epoch {row['epoch']}: {row['accuracy']:.4f} - {text}")
        for row in sorted(rows, key=lambda row: int(row["epoch"]))
        if is_finite(row["accuracy"])
    ]


def timeline(number: int, search: Search) -> Figure | None:
    """Draw when each trial ran; None if no run of a trial has a start time."""
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
        return [(minutes_since(moment, origin), y, describe_trial(trial, settings)) for moment in (start, end or now)]

    series = [
        join_lines(name, bar_style(style), map(span, group), points=False)
        for name, style, group in group_by_status(trials)
    ]
    panel = Panel(
        title="",
        x_title="minutes since the search began",
        series=series,
        y_ticks=bar_ticks(place),
        y_range=(0.3, len(trials) + 0.7),
        height=bar_chart_height(len(trials)),
    )
    caption = (
        "Each bar is a trial from its start to its end, sorted by start; while there is no bar, the search was waiting."
    )
    return Figure(name=f"search-{number}-time", title="Trials over time", caption=caption, panels=[panel])


def minutes_since(moment: datetime, origin: datetime) -> float:
    """Return the minutes from `origin` to `moment`."""
    return (moment - origin).total_seconds() / 60


def bar_ticks(place: dict[str, int]) -> dict[float, str]:
    """Label each bar with the end of its trial's id; no labels if there are more than 32 bars."""
    return {y: str(trial_id)[-14:] for trial_id, y in place.items()} if len(place) <= 32 else {}


def accuracy_over_settings(number: int, search: Search) -> Figure | None:
    """Draw val accuracy over each numeric setting that was searched; None if there is nothing to draw."""
    trials = [trial for trial in search.trials if is_finite(trial["val_accuracy"])]
    settings = searched_settings(search.trials)
    numeric = [name for name in settings if all(is_finite(trial.get(name)) for trial in trials)]
    if not trials or not numeric:
        return None

    def points(name: str, label: str, style: Style, group: Sequence[Row]) -> Series:
        return Series(
            name=label,
            x=[trial[name] for trial in group],
            y=[trial["val_accuracy"] for trial in group],
            hover=[describe_trial(trial, settings) for trial in group],
            style=style,
            lines=False,
        )

    def panel(name: str) -> Panel:
        rest = group_by_status(trial for trial in trials if trial is not search.best)
        series = [points(name, outcome, style, group) for outcome, style, group in rest]
        series.append(points(name, "best", BEST, [trial for trial in trials if trial is search.best]))
        log_x = is_log_scaled(name, [trial[name] for trial in trials])
        x_title = name + (" (log scale)" if log_x else "")
        return Panel(title=f"Over {name}", x_title=x_title, series=series, log_x=log_x, y_range=limits)

    missing = len(search.trials) - len(trials)
    limits, remark = limits_without_outliers([trial["val_accuracy"] for trial in trials])
    caption = "Each point is a trial; a stopped trial has the val accuracy that it had when it was stopped." + remark
    if missing:
        caption += f" {missing} trial(s) without a val accuracy are left out."
    title = "Val accuracy over the settings"
    return Figure(
        name=f"search-{number}-settings", title=title, caption=caption, panels=[panel(name) for name in numeric]
    )


def is_log_scaled(name: str, values: Sequence[float]) -> bool:
    """Return whether a setting is drawn on a logarithmic axis: learning rate and weight decay, if positive."""
    return name in ("lr", "weight_decay") and min(values) > 0


def limits_without_outliers(values: Sequence[float]) -> tuple[tuple[float, float] | None, str]:
    """Return axis limits that leave out low outliers, and a sentence for the caption; (None, '') without outliers.

    An outlier lies more than four times as far below the highest value as the 20th percentile does.
    """
    order = sorted(values)
    top, usual = order[-1], order[len(order) // 5]
    if top - order[0] <= 4 * (top - usual):
        return None, ""
    kept = [value for value in order if value >= top - 4 * (top - usual)]
    margin = 0.08 * (top - kept[0])
    low, left_out = kept[0] - margin, len(order) - len(kept)
    return (low, top + margin), f" The axis leaves out {left_out} point(s) below {low:.3f}."


def normalise(name: str, values: Sequence[Any]) -> tuple[list[float], str, str]:
    """Map values to 0..1 (log scale see `is_log_scaled`, words in alphabetical order); also label the two ends."""
    if all(is_finite(value) for value in values):
        numbers = (
            [math.log(value) for value in values] if is_log_scaled(name, values) else [float(value) for value in values]
        )
        low, high = min(numbers), max(numbers)
        return [(x - low) / ((high - low) or 1) for x in numbers], format_value(min(values)), format_value(max(values))
    words = sorted({str(value) for value in values})
    return [words.index(str(value)) / max(1, len(words) - 1) for value in values], words[0], words[-1]


def parallel_coordinates(number: int, search: Search) -> Figure | None:
    """Draw each trial as a line through its settings, epochs and val accuracy; None for fewer than two trials."""
    settings = searched_settings(search.trials)
    trials = [trial for trial in search.trials if is_finite(trial["val_accuracy"])]
    trials = [trial for trial in trials if all(trial.get(name) is not None for name in settings)]
    if len(trials) < 2 or not settings:
        return None
    axes = [*settings, "epochs_done", "val_accuracy"]
    columns = [normalise(name, [trial[name] for trial in trials]) for name in axes]
    ranked = sorted(range(len(trials)), key=lambda row: -trials[row]["val_accuracy"])
    quarter = max(2, math.ceil(len(trials) / 4))

    def line(row: int) -> Line:
        text = describe_trial(trials[row], settings)
        return [(place, values[row], text) for place, (values, _, _) in enumerate(columns)]

    groups = [
        ("the rest", Style(GREY, dash="dot", width=1.5, size=4), ranked[quarter:]),
        ("best quarter", Style(BLUE, dash="dash", marker="square", size=6), ranked[1:quarter]),
        ("best", BEST, ranked[:1]),
    ]
    panel = Panel(
        title="",
        x_title="",
        series=[join_lines(name, style, map(line, rows)) for name, style, rows in groups if rows],
        vertical_lines=[VerticalLine(place, "", "#CCCCCC", "solid") for place in range(len(axes))],
        annotations=[
            Annotation(place, height, label)
            for place, (_, low, high) in enumerate(columns)
            for height, label in ((-0.1, low), (1.1, high))
        ],
        x_ticks=dict(enumerate(axes)),
        x_range=(-0.4, len(axes) - 0.6),
        y_range=(-0.2, 1.2),
        y_ticks={},
        height=420,
    )
    caption = (
        "Each line is a trial; each axis goes from the lowest value among the trials (bottom) to the highest (top)."
    )
    return Figure(name=f"search-{number}-parallel", title="Parallel coordinates", caption=caption, panels=[panel])


def saved_epochs(number: int, search: Search) -> Figure | None:
    """Draw the epochs that each trial ran and those that it did not; None if no trial ran an epoch."""
    spent, full, saved = spent_epochs(search)
    if not full:
        return None
    last, settings = search.max_epochs, searched_settings(search.trials)
    trials = sorted(search.trials, key=lambda trial: (trial["epochs_done"] or 0, trial["val_accuracy"] or 0))
    place = {trial["trial_id"]: row + 1 for row, trial in enumerate(trials)}

    def ran(trial: Row) -> Line:
        ends: tuple[float, float] = (0, trial["epochs_done"] or 0)
        return [(x, place[trial["trial_id"]], describe_trial(trial, settings)) for x in ends]

    def not_run(trial: Row) -> Line:
        ends: tuple[float, float] = (trial["epochs_done"] or 0, last)
        text = f"{trial['trial_id']}: {last - ends[0]:.0f} epoch(s) not run"
        return [(x, place[trial["trial_id"]], text) for x in ends if ends[0] < last]

    series = [
        join_lines(name, bar_style(style), map(ran, group), points=False)
        for name, style, group in group_by_status(trials)
    ]
    series.append(join_lines("not run", Style(GREY, dash="dot", width=1.5), map(not_run, trials), points=False))
    panel = Panel(
        title="",
        x_title="epochs",
        series=[one for one in series if one.x],
        vertical_lines=[VerticalLine(rung, f"rung {rung}", GREY, "dot") for rung in search.rungs],
        x_range=(0, last + 0.3),
        x_ticks=epoch_ticks(last),
        y_ticks=bar_ticks(place),
        y_range=(0.3, len(trials) + 1.2),
        height=bar_chart_height(len(trials)),
    )
    caption = (
        f"{len(trials)} full trials of {last} epochs would have cost {full} epochs; the search spent {spent} "
        f"({spent / full:.0%}). ASHA's stops saved {saved}"
    )
    rest = full - spent - saved
    caption += f"; {rest} were not run because trials diverged, failed or are not over." if rest else "."
    return Figure(name=f"search-{number}-saved", title="What ASHA saved", caption=caption, panels=[panel])
