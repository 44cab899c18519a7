"""The section about an ablation study: a table of its arms, and a figure of their differences to the baselines."""

from collections.abc import Sequence

from fashion.reports.console import points, with_spread
from fashion.reports.page.content import (
    BLUE,
    GREY,
    VERMILLION,
    Block,
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
    format_value,
    is_finite,
    join_lines,
    range_of,
)
from fashion.reports.page.reading import read_config

EFFECTS = {"val": Style(BLUE, marker="square", size=9), "test": Style(VERMILLION, size=9)}


def study_section(number: int, study_id: str, rows: Sequence[Row]) -> Section:
    """Show a study: the accuracies of each arm, and its differences to the baseline with confidence intervals."""
    text_columns = ("arm", "settings")
    titles = (
        *text_columns,
        "trained",
        "val",
        "test",
        "val difference",
        "test difference",
        "only one correct",
        "p",
        "lowest loss at",
    )
    columns = [Column(name, number=name not in text_columns) for name in titles]
    text = (
        "Trained: seeds x epochs x rows. Accuracies are means and standard deviations over the seeds. The first arm of "
        "a part is its baseline; differences, in percentage points, are to the baseline at the same seed, with their "
        "95 % confidence intervals. Choices are made by val. Only one correct: test images that only the arm's model "
        "of seed 0 classifies correctly : those that only the baseline's does; p is that of McNemar's test. Lowest "
        "loss at: the epoch of the lowest val loss, median over the seeds."
    )
    figure = effects_figure(number, study_id, rows)
    blocks: list[Block] = [text, Table(columns, [study_row(row) for row in rows]), *([figure] if figure else [])]
    return Section(f"study-{number}-section", f"Study {study_id}", blocks)


def study_row(row: Row) -> TableRow:
    """Return an arm's row of the table."""
    compared = [""] * 4
    if row["baseline"] is not None:
        compared = [points(row, split) for split in ("val", "test")]
        compared += [
            f"{row['only_arm_right']} : {row['only_baseline_right']}",
            format_value(row["mcnemar_p"], "{:.2g}".format),
        ]
    settings = ", ".join(f"{name} {format_value(value)}" for name, value in read_config(row["settings_json"]).items())
    size = " x ".join(format_value(row[name], "{:,}".format) for name in ("seeds", "epochs", "train_rows"))
    reached = [with_spread(row[f"{split}_accuracy"], row[f"{split}_accuracy_std"]) for split in ("val", "test")]
    cells = [f"{row['part']}: {row['arm']}", settings or f"preset {row['preset']}", size, *reached, *compared]
    return TableRow([*cells, format_value(row["turning_epoch"])], "" if row["baseline"] else "reference")


def effects_figure(number: int, study_id: str, rows: Sequence[Row]) -> Figure | None:
    """Draw each arm's difference to its baseline with the 95 % interval; None if no arm is compared."""
    compared = [row for row in rows if all(is_finite(row[f"{split}_effect"]) for split in EFFECTS)]
    if not compared:
        return None
    place = {id(row): len(compared) - number for number, row in enumerate(compared)}
    # Val a little above test, so that one does not hide the other.
    offsets = {"val": 0.13, "test": -0.13}

    def describe_difference(row: Row, split: str) -> str:
        ends = " to ".join(f"{100 * end:+.2f}" for end in bounds(row, split))
        mean = f"{100 * row[f'{split}_effect']:+.2f} points" + (f" ({ends})" if ends else "")
        return f"{row['part']}, {row['arm']} - {row['baseline']}: {split} accuracy {mean}"

    def bounds(row: Row, split: str) -> list[float]:
        return [end for end in (row[f"{split}_effect_low"], row[f"{split}_effect_high"]) if is_finite(end)]

    def interval(row: Row, split: str) -> Line:
        return [
            (100 * end, place[id(row)] + offsets[split], describe_difference(row, split)) for end in bounds(row, split)
        ]

    series = [
        join_lines(f"{split}, 95 %", style, [interval(row, split) for row in compared], points=False)
        for split, style in EFFECTS.items()
    ] + [
        Series(
            name=split,
            x=[100 * row[f"{split}_effect"] for row in compared],
            y=[place[id(row)] + offsets[split] for row in compared],
            hover=[describe_difference(row, split) for row in compared],
            style=style,
            lines=False,
        )
        for split, style in EFFECTS.items()
    ]
    panel = Panel(
        title="",
        x_title="difference of accuracy, percentage points",
        series=[one for one in series if one.x],
        vertical_lines=[VerticalLine(0, "no difference", GREY, "dot")],
        x_range=range_of(series),
        y_ticks={place[id(row)]: f"{row['part']}: {row['arm']}" for row in compared},
        y_range=(0.3, len(compared) + 1.2),
        height=bar_chart_height(len(compared)),
    )
    caption = (
        "Each arm against the baseline, the first arm of its part, at the same seeds. A line is the 95 % confidence "
        "interval of the mean difference (Student's t); an arm with one seed has none."
    )
    return Figure(name=f"study-{number}-effects", title=f"Differences in {study_id}", caption=caption, panels=[panel])
