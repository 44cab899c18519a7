"""The sections about runs: a table next to the published results, learning curves, speed and hardware."""

from collections.abc import Sequence

from fashion.reports.console import PUBLISHED
from fashion.reports.page.content import (
    BLUE,
    GREY,
    VERMILLION,
    Block,
    Cell,
    Column,
    Details,
    Figure,
    Panel,
    Row,
    Section,
    Series,
    Style,
    Table,
    TableRow,
    VerticalLine,
    epoch_ticks,
    format_fraction,
    format_value,
    is_finite,
)
from fashion.reports.page.reading import Reports, is_stand_in, read_config

PUBLISHED_TURNING_EPOCH = 10
"""Epoch after which the published test loss rises (from the article whose results `console.PUBLISHED` holds)."""
MAX_CURVES = 6
"""How many runs have their learning curves drawn; the table lists all runs."""
TRAIN = Style(BLUE, dash="dash", marker="square")
VAL = Style(VERMILLION)


def runs_section(runs: Sequence[Row]) -> Section:
    """Compare the metrics of every run with the published ones."""
    measures = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", "test_accuracy", "test_loss")
    columns = [Column("run", number=False), Column("data", number=False), Column("epoch")]
    columns += [Column(name.replace("_", " ")) for name in measures] + [Column("status", number=False)]
    published = [format_fraction(PUBLISHED.get(name)) for name in measures]
    rows = [TableRow(["published", "fashion-mnist", "-", *published, "-"], "reference")]
    for place, row in enumerate(runs):
        values = [
            Cell(text=format_fraction(row[name]), note=difference_to_published(row) if name == "test_accuracy" else "")
            for name in measures
        ]
        cells: list[str | Cell] = [
            run_cell(row),
            format_value(row["dataset"]),
            best_epoch_text(row),
            *values,
            status_cell(row),
        ]
        rows.append(TableRow(cells, "best" if place == 0 else ""))
    text = (
        "Runs are sorted by val accuracy, best first; a refit, which trains on val too, by that of its best trial. The "
        "test set chooses nothing. Metrics are those of the chosen epoch: losses in nats per image, accuracies from 0 "
        "to 1. Of the published network only these four metrics are known; its optimizer, batch size and dropout rates "
        "were not published."
    )
    return Section("runs", "Published and measured", [text, Table(columns, rows), *settings_table(runs)])


def run_cell(row: Row) -> Cell:
    """Return a cell with a run's id, and a badge if the run used the stand-in data."""
    return Cell(text=str(row["run_id"]), badge="STAND-IN" if is_stand_in(row) else "")


def run_title(row: Row) -> str:
    """Return a run's id as text, with a remark if the run used the stand-in data."""
    return str(row["run_id"]) + (" (STAND-IN DATA)" if is_stand_in(row) else "")


def difference_to_published(row: Row) -> str:
    """Return the difference to the published test accuracy in percentage points; '' for a run on the stand-in data."""
    if not is_finite(row["test_accuracy"]) or is_stand_in(row):
        return ""
    return f"{100 * (row['test_accuracy'] - PUBLISHED['test_accuracy']):+.2f} pt"


def best_epoch_text(row: Row) -> str:
    """Return the chosen epoch and the number of epochs trained: '8 of 14'."""
    return "-" if row["best_epoch"] is None else f"{row['best_epoch']} of {format_value(row['epochs_done'])}"


def status_cell(row: Row) -> Cell:
    """Return a cell with a run's or trial's status and, if it failed, the first 300 characters of the error."""
    return Cell(text=format_value(row["status"]), error=str(row["error"] or "")[:300])


def settings_table(runs: Sequence[Row]) -> list[Block]:
    """List in tables that open on a click the settings in which runs differ, a row for each run, and the others."""
    configs = [{name: format_value(value) for name, value in read_config(row["config_json"]).items()} for row in runs]
    names = sorted({name for config in configs for name in config})
    differing = [name for name in names if len({config.get(name) for config in configs}) > 1]
    blocks: list[Block] = []
    if differing:
        columns = [Column("run", number=False), *(Column(name) for name in differing)]
        rows = [
            TableRow([str(row["run_id"]), *(config.get(name, "-") for name in differing)])
            for row, config in zip(runs, configs, strict=True)
        ]
        blocks.append(Details("Settings in which runs differ", Table(columns, rows)))
    common = [TableRow([name, configs[0][name]]) for name in names if name not in differing]
    if common:
        title = "Settings that all runs share" if len(runs) > 1 else "Settings of the run"
        blocks.append(Details(title, Table([Column("setting", number=False), Column("value", number=False)], common)))
    return blocks


def curves_section(reports: Reports) -> Section:
    """Draw the learning curves of the best runs."""
    last = {
        row["run_id"]: max((each["epoch"] for each in reports.epochs.get(row["run_id"], [])), default=0)
        for row in reports.runs
    }
    drawn = [row for row in reports.runs if last[row["run_id"]] > 1]
    short = [run_title(row) for row in reports.runs if last[row["run_id"]] == 1]
    blocks: list[Block] = []
    if drawn:
        blocks.append(
            "Train loss and accuracy are averages over the epoch as it was trained, with augmentation and dropout; val "
            "is measured after the epoch. The published test loss rises after epoch 10."
        )
    if len(drawn) > MAX_CURVES:
        blocks.append(f"The {MAX_CURVES} best of {len(drawn)} runs; choose others with --run-id.")
    for number, row in enumerate(drawn[:MAX_CURVES], start=1):
        blocks.append(learning_curves(number, run_title(row), reports.epochs[row["run_id"]]))
    if short:
        blocks.append(f"One epoch makes no curve; its figures are in the table above: {', '.join(short)}.")
    return Section("curves", "Learning curves", blocks)


def learning_curves(number: int, run_id: str, epochs: Sequence[Row]) -> Figure:
    """Draw loss and accuracy of train and val over the epochs; `number` makes the figure's name unique."""
    last = max((row["epoch"] for row in epochs), default=1)
    turn = turning_epoch(epochs)
    caption = (
        "Val loss is lowest at the last epoch."
        if turn is None
        else f"Val loss is lowest at epoch {turn} of {last} and never that low again: the network overfits from there."
    )
    if last < PUBLISHED_TURNING_EPOCH:
        caption += f" The published turning point, epoch {PUBLISHED_TURNING_EPOCH}, lies beyond the end of this run."
    # The two labels go where the curves leave room: at the top right of a falling loss, at the bottom of an accuracy.
    columns = (("Loss (nats per image)", "loss", (1.0, 0.9)), ("Accuracy", "accuracy", (0.1, 0.0)))
    panels = [
        Panel(
            title=title,
            x_title="epoch",
            series=[epoch_series(epochs, split, column, style) for split, style in (("train", TRAIN), ("val", VAL))],
            vertical_lines=turning_lines(turn, last, heights),
            x_range=(0.5, last + 0.5),
            x_ticks=epoch_ticks(last),
        )
        for title, column, heights in columns
    ]
    return Figure(name=f"curves-{number}", title=f"Learning curves of {run_id}", caption=caption, panels=panels)


def turning_epoch(epochs: Sequence[Row]) -> int | None:
    """Return the epoch with the lowest val loss, after which the network overfits; None if it is the last epoch."""
    losses = val_losses(epochs)
    lowest = min(losses, key=lambda epoch: (losses[epoch], epoch), default=None)
    return lowest if lowest is not None and lowest < max(losses) else None


def val_losses(epochs: Sequence[Row]) -> dict[int, float]:
    """Return the val loss of each epoch, in order; without values that are not finite."""
    rows = [row for row in epochs if row["split"] == "val" and is_finite(row["loss"])]
    return {int(row["epoch"]): float(row["loss"]) for row in sorted(rows, key=lambda row: int(row["epoch"]))}


def turning_lines(turn: int | None, last: int, heights: tuple[float, float]) -> list[VerticalLine]:
    """Return lines at this run's lowest val loss and at the published turning point, if they are not after `last`."""
    own = [] if turn is None else [VerticalLine(turn, f"lowest val loss: epoch {turn}", label_height=heights[0])]
    if last < PUBLISHED_TURNING_EPOCH:
        return own
    return [
        *own,
        VerticalLine(PUBLISHED_TURNING_EPOCH, f"published: epoch {PUBLISHED_TURNING_EPOCH}", GREY, "dot", heights[1]),
    ]


def epoch_series(epochs: Sequence[Row], split: str, column: str, style: Style) -> Series:
    """Return one column of one split over the epochs; a value that is not finite leaves a gap."""
    rows = sorted((row for row in epochs if row["split"] == split), key=lambda row: int(row["epoch"]))
    values = [row[column] if is_finite(row[column]) else None for row in rows]
    hover = [f"{split}, epoch {row['epoch']}: {column} {format_value(row[column])}" for row in rows]
    return Series(name=split, x=[row["epoch"] for row in rows], y=values, hover=hover, style=style)


def hardware_section(runs: Sequence[Row]) -> Section:
    """List each run's speed, hardware, versions and code."""
    text_columns = {"run", "device", "precision", "data", "hardware", "Ray", "torch", "code"}
    titles = ["run", "images/s", "time", "workers", "threads", "device", "precision", "data", "memory", "hardware"]
    columns = [Column(name, number=name not in text_columns) for name in [*titles, "Ray", "torch", "code"]]
    rows = []
    for row in runs:
        plain = [
            format_value(row["images_per_s"], "{:,.0f}".format),
            format_value(row["wall_s"], "{:,.0f} s".format),
            *(
                format_value(row[name])
                for name in ("world_size", "threads_per_worker", "device", "precision", "data_mode")
            ),
            format_value(row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e9, "{:.2f} GB".format),
            *(format_value(row[name]) for name in ("hardware", "ray_version", "torch_version")),
        ]
        code = Cell(text=format_value(row.get("commit") or row["source_hash"])[:12], code=True)
        rows.append(TableRow([run_cell(row), *plain, code]))
    text = (
        "Images/s: training images per second over all workers, median over the epochs. Time: the whole run, with "
        "evaluation. Memory: peak of the worker that used most. Code: first digits of the SHA-256 over the project's "
        "Python files."
    )
    return Section("hardware", "Speed and hardware", [text, Table(columns, rows)])
