"""Figures of runs and studies: learning curves, confusion matrix, classes, differences between arms."""

from collections.abc import Iterable, Sequence

from fashion.config import CLASS_NAMES, NUM_CLASSES
from fashion.reports.page.figures import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    Figure,
    Mark,
    Matrix,
    Panel,
    Row,
    Series,
    Style,
    epoch_ticks,
    finite,
    shown,
)
from fashion.reports.page.search_figures import Line, bars_height, joined

PUBLISHED_TURN = 10
"""Epoch after which the published test loss rises."""


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
