"""What a search found: a table and a figure of the rows of `importance`, and val loss over the epochs by setting."""

from collections.abc import Callable, Sequence

from fashion.reports.console import CHANCE
from fashion.reports.page.content import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Block,
    Column,
    Figure,
    Line,
    Panel,
    Row,
    Series,
    Style,
    Table,
    TableRow,
    VerticalLine,
    bar_style,
    epoch_ticks,
    format_value,
    is_finite,
    join_lines,
    range_of,
)
from fashion.reports.page.reading import Search
from fashion.reports.page.runs import val_losses

MAX_CURVES = 60
"""Trials whose val loss is drawn, those with most epochs: of more, no line could be followed."""
THIRDS = (Style(BLUE, dash="solid"), Style(ORANGE, dash="dash"), Style(VERMILLION, dash="dot"))
LOWEST = Style(BLACK, marker="diamond", size=6)
IMPORTANCE = Style(BLUE)
EFFECT = Style(VERMILLION, size=9)
RISE = Style(GREEN, marker="square", size=9)


def findings_blocks(number: int, search: Search) -> list[Block]:
    """Show importance, effects and the winner's neighbourhood; an empty list if the search has no such rows."""
    rows = search.findings
    if not rows:
        return []
    figure = importance_figure(number, rows)
    return [*([figure] if figure else []), findings_text(rows), findings_table(rows)]


def findings_text(rows: Sequence[Row]) -> str:
    """Say what the figures of the table are, and over which trials."""
    first = next((row for row in rows if is_finite(row["importance"])), None)
    if first is None:
        return f"What mattered is not estimated: {next((row['note'] for row in rows if row['note']), 'not known')}."
    text = (
        f"Importance is the share of what sets the best {first['best_trials']} of {first['trials']} trials apart "
        f"(PED-ANOVA); p is the probability of as much by chance. Trials are ranked by the best epoch that each ran, "
        f"so the {first['stopped_trials']} that were stopped early rank by fewer epochs than the others."
    )
    compared = next((row for row in rows if is_finite(row["effect"])), None)
    if compared is not None:
        text += (
            " Effects, from the lowest to the highest third of a setting's values with 95 % intervals, are differences "
            f"of val accuracy by epoch {compared['epoch']}, the last that all {compared['effect_trials']} trials "
            "reached; an early epoch favours trials that learn fast."
        )
    near = next((row for row in rows if is_finite(row["near_drop"])), None)
    if near is not None:
        text += (
            f" The {near['near_trials']} trials nearest to the winner lose {100 * near['near_drop']:.2f} points to "
            "it (median), each compared at the last epoch that both reached."
        )
    return text


def findings_table(rows: Sequence[Row]) -> Table:
    """List the settings, the most important first."""
    titles = ("importance", "p", "winner", "best trials have", "effect, points", "effect on rise of val loss, nats")
    columns = [Column("setting", number=False), *(Column(title) for title in titles)]
    columns += [Column("costs below 1 point"), Column("falls per tenth of range, points"), Column("note", number=False)]
    return Table(columns, [finding_row(row) for row in rows])


def finding_row(row: Row) -> TableRow:
    """Return a setting's row of the table."""
    effect = with_interval(row, "effect", 100)
    if effect and row["winner_choice"] is not None:
        effect += f" {row['effect_from']} to {row['effect_to']}"
    return TableRow(
        [
            str(row["setting"]),
            format_value(row["importance"], "{:.2f}".format),
            format_value(row["p"], "{:.2g}".format),
            format_value(row["winner"] if row["winner_choice"] is None else row["winner_choice"], "{:.3g}".format),
            span(row, "best_low", "best_high"),
            effect,
            with_interval(row, "overfit_effect", 1),
            span(row, "flat_low", "flat_high"),
            format_value(row["fall_per_tenth"] and 100 * row["fall_per_tenth"], "{:.2f}".format),
            row["note"] or "",
        ],
        "" if is_finite(row["p"]) and row["p"] <= CHANCE else "chance",
    )


def span(row: Row, low: str, high: str) -> str:
    """Return a range of a setting's values, '' if it is not known."""
    return f"{row[low]:.3g} to {row[high]:.3g}" if is_finite(row[low]) and is_finite(row[high]) else ""


def with_interval(row: Row, name: str, factor: float) -> str:
    """Return an effect with its 95 % interval, in units of 1 / `factor`; '' if it is not known."""
    values = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
    if not all(map(is_finite, values)):
        return ""
    digits = 2 if factor == 100 else 3
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def importance_figure(number: int, rows: Sequence[Row]) -> Figure | None:
    """Draw importance, and the effects with their intervals, a line for each setting; None if nothing is known."""
    known = [row for row in rows if is_finite(row["importance"])]
    if not known:
        return None
    place = {row["setting"]: len(known) - rank for rank, row in enumerate(known)}

    def bar(row: Row) -> Line:
        text = f"{row['setting']}: {row['importance']:.2f}, p {row['p']:.2g}"
        return [(x, place[row["setting"]], text) for x in (0.0, row["importance"])]

    def panel(title: str, x_title: str, series: Sequence[Series], x_range: tuple[float, float]) -> Panel:
        return Panel(
            title=title,
            x_title=x_title,
            series=series,
            vertical_lines=[VerticalLine(0, "", GREY, "dot")],
            x_range=x_range,
            y_ticks={y: str(name) for name, y in place.items()},
            y_range=(0.4, len(known) + 0.6),
            height=max(240, 130 + 34 * len(known)),
        )

    bars = join_lines("importance", bar_style(IMPORTANCE), map(bar, known), points=False)
    panels = [panel("Importance", "share", [bars], (0.0, 1.0))]
    for title, unit, name, factor, style in (
        ("Effect on val accuracy", "percentage points", "effect", 100.0, EFFECT),
        ("Effect on the rise of val loss", "nats per image", "overfit_effect", 1.0, RISE),
    ):
        shown = [row for row in known if with_interval(row, name, factor)]
        if shown:
            series = effect_series(shown, name, factor, style, lambda row: place[row["setting"]])
            panels.append(panel(title, unit, series, range_of(series)))
    caption = (
        "A line is a 95 % interval, the point the difference from the lowest to the highest third of the setting's "
        "values, or from the worst to the best choice, with the other settings held at their average. The rise of val "
        "loss is that from its lowest to the last epoch, over the trials that ran every epoch."
    )
    return Figure(name=f"search-{number}-importance", title="What mattered", caption=caption, panels=panels)


def effect_series(
    rows: Sequence[Row], name: str, factor: float, style: Style, place: Callable[[Row], float]
) -> list[Series]:
    """Return two series: the intervals as lines, and the effects as points."""
    texts = [f"{row['setting']}: {with_interval(row, name, factor)}" for row in rows]

    def interval(row: Row, text: str) -> Line:
        return [(factor * row[f"{name}_{end}"], place(row), text) for end in ("low", "high")]

    lines = [interval(row, text) for row, text in zip(rows, texts, strict=True)]
    points = Series(
        name="effect",
        x=[factor * row[name] for row in rows],
        y=[place(row) for row in rows],
        hover=texts,
        style=style,
        lines=False,
    )
    return [join_lines("95 %", style, lines, points=False), points]


# --- val loss over the epochs -----------------------------------------------------------------------------------------


def lowest_loss_epoch(epochs: Sequence[Row]) -> int | None:
    """Return the first epoch with the lowest val loss; None if there is no val loss."""
    losses = val_losses(epochs)
    return min(losses, key=lambda epoch: (losses[epoch], epoch), default=None)


def loss_curves(number: int, search: Search) -> Figure | None:
    """Draw each trial's val loss over its epochs, in a panel for each setting coloured by the thirds of its values.

    None if no trial has two epochs, or if the thirds are not known: they are in the search's rows of `importance`.
    """
    curves = {trial["trial_id"]: val_losses(search.epochs.get(trial["trial_id"], [])) for trial in search.trials}
    drawn = sorted(
        (trial for trial in search.trials if len(curves[trial["trial_id"]]) > 1),
        key=lambda trial: -len(curves[trial["trial_id"]]),
    )
    known = [row for row in search.findings if is_finite(row["first_third"]) and is_finite(row["second_third"])]
    if not drawn or not known:
        return None
    left_out, drawn = len(drawn) - MAX_CURVES, drawn[:MAX_CURVES]
    limits = loss_limits([loss for trial in drawn for loss in curves[trial["trial_id"]].values()])
    turned = sum(
        min(curve, key=lambda epoch: (curve[epoch], epoch)) < max(curve)
        for curve in (curves[trial["trial_id"]] for trial in drawn)
    )
    caption = (
        "Each line is a trial, coloured by the third of the trials in which its value lies; a diamond marks its lowest "
        f"val loss, from which on it overfits. Of {len(drawn)} trials, {turned} have turned before their last epoch."
    )
    if left_out > 0:
        caption += f" The {left_out} trials with fewer epochs are left out."
    if limits is not None:
        caption += f" The axis ends at {limits[1]:.2f}."
    panels = [loss_panel(row, drawn, curves, search.max_epochs, limits) for row in known]
    return Figure(name=f"search-{number}-loss", title="Val loss by setting", caption=caption, panels=panels)


def loss_panel(
    row: Row,
    trials: Sequence[Row],
    curves: dict[str, dict[int, float]],
    last: int,
    limits: tuple[float, float] | None,
) -> Panel:
    """Return the panel of one setting: three series of curves, and their lowest points."""
    name, first, second = row["setting"], row["first_third"], row["second_third"]
    names = (f"up to {first:.2g}", f"to {second:.2g}", f"above {second:.2g}")
    groups: list[list[Line]] = [[], [], []]
    lowest: Line = []
    for trial in trials:
        value, curve = trial.get(name), curves[trial["trial_id"]]
        if not is_finite(value):
            continue
        line: Line = [
            (epoch, loss, f"{trial['trial_id']}, {name} {value:.3g}, epoch {epoch}: {loss:.4f}")
            for epoch, loss in curve.items()
        ]
        groups[int(value > first) + int(value > second)].append(line)
        lowest.append(min(line, key=lambda point: (point[1] or 0.0, point[0] or 0.0)))
    series = [
        join_lines(label, style, lines, points=False)
        for label, style, lines in zip(names, THIRDS, groups, strict=True)
        if lines
    ]
    x, y, hover = zip(*lowest, strict=True) if lowest else ((), (), ())
    series.append(Series(name="lowest", x=x, y=y, hover=hover, style=LOWEST, lines=False))
    return Panel(
        title=f"By {name}",
        x_title="epoch",
        y_title="val loss",
        series=series,
        x_range=(0.5, last + 0.5),
        x_ticks=epoch_ticks(last),
        y_range=limits,
        height=380,
    )


def loss_limits(losses: Sequence[float]) -> tuple[float, float] | None:
    """Return axis limits that leave out high outliers: losses more than four times as far above the lowest as most are.

    Most are four in five. None if there are no outliers.
    """
    order = sorted(losses)
    low, usual = order[0], order[-1 - len(order) // 5]
    high = low + 4 * (usual - low)
    if order[-1] <= high or usual == low:
        return None
    margin = 0.08 * (high - low)
    return low - margin, high
