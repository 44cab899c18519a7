"""Prints on the console: a run's plan, results beside the published ones, trials, studies, classes, benchmarks."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fashion.config import CLASS_NAMES, printable

Row = dict[str, Any]

TRIALS_SHOWN = 8
CHANCE = 0.05
"""p above which chance alone explains a setting's importance."""

# The article's results for the same network.
PUBLISHED = {
    "train_accuracy": 0.9684,
    "train_loss": 0.0909,
    "test_accuracy": 0.9304,
    "test_loss": 0.2591,
}


def print_plan(kind: str, name: str, storage: str, lines: Sequence[str]) -> None:
    """Print the name of the run or search (`kind`), the storage, and the lines of its plan."""
    print(f"{kind:11}{name}\nstorage    {storage}")
    print("\n".join(lines), flush=True)


def print_result(run_id: str, row: dict[str, Any], paths: dict[str, str], *, was_finished: bool) -> None:
    """Print a finished run: the four published numbers beside its own, its speed, and the paths of its files."""
    if was_finished:
        print(f"run {run_id} is finished already; nothing to do")
    table = Table(title=f"{run_id} on {row['dataset']}")
    table.add_column("")
    for name in ("published", "this run"):
        table.add_column(name, justify="right")
    for key, published in PUBLISHED.items():
        table.add_row(key.replace("_", " "), f"{published:.4f}", f"{row[key]:.4f}")
    held_out = row["val_accuracy"] is not None
    table.add_row("val accuracy", "", f"{row['val_accuracy']:.4f}" if held_out else "trained on")
    table.add_row("best epoch", "", f"{row['best_epoch']} of {row['epochs_done']}")
    Console(width=100).print(table)
    if row["dataset"].endswith("synthetic"):
        print("NOTE: trained on the drawn stand-in, not on Fashion-MNIST; the numbers are not comparable.")
    print(
        f"{row['wall_s']:.0f} s in all, {row['images_per_s']:.0f} images/s, {row['world_size']} worker(s) on "
        f"{row['device']}, {row['precision']}; test counted {row['test_rows']} rows"
    )
    for name, path in paths.items():
        print(f"{name}: {path}")


def print_trials(search_id: str, names: Sequence[str], trials: Sequence[Row], max_epochs: int) -> None:
    """Print a search's best trials, and the share of epochs that were trained in spite of early stopping.

    `names` are the searched settings; `trials` are dictionaries, best first, with `trial_id`, `status`, `settings`,
    `epochs_done`, and `best`: the metrics of the best epoch, empty if there is none.
    """
    table = Table(title=f"{search_id}: the best of {len(trials)} trials")
    for name in ("trial", "status", *names, "epochs", "best epoch", "val accuracy", "val loss"):
        table.add_column(name, justify="left" if name in ("trial", "status") else "right")
    for trial in trials[:TRIALS_SHOWN]:
        best = trial["best"]
        metrics = [f"{best[name]:.4f}" if name in best else "-" for name in ("val_accuracy", "val_loss")]
        settings = [shorten(trial["settings"].get(name)) for name in names]
        epochs = (str(trial["epochs_done"]), str(best.get("epoch", "-")))
        table.add_row(trial["trial_id"], trial["status"], *settings, *epochs, *metrics)
    Console(width=120).print(table)
    counts = Counter(trial["status"] for trial in trials)
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    trained, full = sum(trial["epochs_done"] for trial in trials), max_epochs * len(trials)
    print(f"{trained} epochs trained, {trained / full:.0%} of the {full} that full trials would have cost")


def shorten(value: Any) -> str:
    """Format a setting in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_findings(rows: Sequence[Row]) -> None:
    """Print what a search found in three lines, from its rows of `importance`: importance, effects, neighbourhood.

    Where something is not known the line says why. Prints nothing for a search without trials.
    """
    if not rows:
        return
    why = next((row["note"] for row in rows if row.get("note")), "the trials do not tell")
    parts = {
        "importance": (importance_texts, importance_basis),
        "effect": (effect_texts, effect_basis),
        "winner": (flat_texts, flat_basis),
    }
    for name, (texts_of, basis_of) in parts.items():
        texts = texts_of(rows)
        print(f"{name:11}" + (", ".join(texts) + basis_of(rows) if texts else f"not estimated: {why}"))


def importance_texts(rows: Sequence[Row]) -> list[str]:
    """Return each setting's share; those that chance alone would explain come last, with a remark."""
    known = [row for row in rows if row.get("importance") is not None]
    texts = [
        [f"{row['setting']} {row['importance']:.2f}" for row in known if (row["p"] > CHANCE) is by_chance]
        for by_chance in (False, True)
    ]
    return [*texts[0], *([f"no more than chance {', '.join(texts[1])}"] if texts[1] else [])]


def importance_basis(rows: Sequence[Row]) -> str:
    """Return what the importance says, and of how many trials."""
    row = next(row for row in rows if row.get("importance") is not None)
    early = f"; {row['stopped_trials']} were stopped early" if row["stopped_trials"] else ""
    early += f", {row['diverged_trials']} diverged" if row["diverged_trials"] else ""
    return f": share of what sets the best {row['best_trials']} of {row['trials']} trials apart{early}"


def effect_texts(rows: Sequence[Row]) -> list[str]:
    """Return each setting's effect with its interval, in percentage points."""
    return [
        f"{row['setting']} {points(row, '')}"
        + (f" ({row['effect_from']} to {row['effect_to']})" if is_choice(row) else "")
        for row in rows
        if row.get("effect") is not None
    ]


def effect_basis(rows: Sequence[Row]) -> str:
    """Return what the effects are differences of."""
    row = next(row for row in rows if row.get("effect") is not None)
    until = f"by epoch {row['epoch']}, which all {row['effect_trials']} trials reached"
    return f": points of val accuracy {until}, from the lowest to the highest third of values [95 % interval]"


def flat_texts(rows: Sequence[Row]) -> list[str]:
    """Return the values around the winner's that cost less than a point."""
    return [
        f"{row['setting']} {shorten(row['flat_low'])} to {shorten(row['flat_high'])}"
        for row in rows
        if row.get("flat_low") is not None
    ]


def flat_basis(rows: Sequence[Row]) -> str:
    """Return what the ranges mean, and what the nearest trials lose."""
    row = next(row for row in rows if row.get("flat_low") is not None)
    lost = f"its {row['near_trials']} nearest trials lose {100 * row['near_drop']:.2f} points (median)"
    return f" cost less than a point of val accuracy each; {lost}"


def is_choice(row: Row) -> bool:
    """Return whether a row of `importance` is of a setting with names in place of numbers."""
    return row.get("winner_choice") is not None


def print_study(part: str, rows: list[dict[str, Any]]) -> None:
    """Print the `study` rows of a part: each arm's accuracies, and their differences to the first arm's.

    Differences are in percentage points.
    """
    first = rows[0]
    sizes = f"{first['seeds']} seed(s), {first['epochs']} epochs of {first['train_rows']} rows"
    table = Table(title=f"{part}: {sizes}, preset {first['preset']}; differences to {first['arm']} in points")
    for name in ("arm", "val", "test", "val difference", "test difference", "only arm : only base", "p", "turns at"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        accuracies = [with_spread(row[f"{split}_accuracy"], row[f"{split}_accuracy_std"]) for split in ("val", "test")]
        comparison = [""] * 4
        if row["baseline"] is not None:
            comparison = [points(row, split) for split in ("val", "test")]
            comparison += [f"{row['only_arm_right']} : {row['only_baseline_right']}", f"{row['mcnemar_p']:.2g}"]
        table.add_row(row["arm"], *accuracies, *comparison, f"{row['turning_epoch']:g}")
    Console(width=140).print(table)


def with_spread(mean: float | None, std: float | None) -> str:
    """Format an accuracy and its standard deviation; '-' if there is no accuracy."""
    return "-" if mean is None else f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def points(row: dict[str, Any], split: str) -> str:
    """Format a difference of accuracies and its interval in percentage points; '-' if there is no difference.

    The columns are those of `split`, `<split>_effect`, or with an empty `split` just `effect`.
    """
    name = f"{split}_effect" if split else "effect"
    mean, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if mean is None:
        return "-"
    return f"{100 * mean:+.2f}" + ("" if low is None else f" [{100 * low:+.2f}, {100 * high:+.2f}]")


def print_classes(classes: list[dict[str, Any]]) -> None:
    """Print the `classes` rows as a table."""
    table = Table()
    for name in ("class", "precision", "recall", "f1", "support"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in classes:
        ratios = [f"{row[name]:.4f}" for name in ("precision", "recall", "f1")]
        table.add_row(row["name"], *ratios, str(row["support"]))
    Console(width=100).print(table)


def print_image_predictions(
    num_images: int, num_unreadable: int, unreadable: Sequence[Row], least: Sequence[Row]
) -> None:
    """Print the least certain predictions on a user's images, and why some images could not be read."""
    if least:
        table = Table(title=f"the {len(least)} least certain of {num_images - num_unreadable:,}")
        for name in ("certainty", "class", "image"):
            table.add_column(name, justify="right" if name == "certainty" else "left", overflow="fold")
        for row in least:
            table.add_row(f"{row['certainty']:.3f}", CLASS_NAMES[row["label"]], Text(place_of(row)))
        Console(width=120).print(table)
    if num_unreadable:
        print(f"{num_unreadable:,} of {num_images:,} images could not be read:")
        print("\n".join(f"  {printable(place_of(row))}: {row['error']}" for row in unreadable))
        if len(unreadable) < num_unreadable:
            print("  ... (the others are in the predictions, column error)")


def place_of(row: Row) -> str:
    """Return an image's path, with its row in a Parquet file if it is one."""
    return str(row["path"]) if row["row"] is None else f"{row['path']} row {row['row']}"


def print_bench(rows: list[dict[str, Any]]) -> None:
    """Print the `bench` rows as a table."""
    table = Table()
    for name in ("row", "ours", "reference", "unit", "ratio (min to max)", "target", "met"):
        table.add_column(name, justify="left" if name in ("row", "unit") else "right")
    for row in rows:
        rates = (f"{row['ours']:.1f}", f"{row['reference']:.1f}")
        ratio = f"{row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f}, n={row['repeats']})"
        # A row without a target neither meets nor misses one.
        verdict = (f"{row['target']:g}", "yes" if row["met"] else "no") if row["target"] else ("", "")
        table.add_row(row["row"], *rates, row["unit"], ratio, *verdict)
    Console(width=120).print(table)
