"""What a person reads on the console: the plan, the result next to the published one, per-class figures. Uses rich."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fashion.cluster import Plan

# The article's table for the same network; its test loss turns upward after epoch 10.
PUBLISHED = {
    "train_accuracy": 0.9684,
    "train_loss": 0.0909,
    "test_accuracy": 0.9304,
    "test_loss": 0.2591,
}


def print_plan(run_id: str, storage: str, plan: "Plan") -> None:
    """Print what will run where."""
    print(f"run        {run_id}\nstorage    {storage}")
    print("\n".join(plan.lines()), flush=True)


def print_result(run_id: str, row: dict[str, Any], paths: dict[str, str], *, was_finished: bool) -> None:
    """Print a finished run: the published four numbers beside its own, its speed, and where things lie."""
    if was_finished:
        print(f"run {run_id} is finished already; nothing to do")
    table = Table(title=f"{run_id} on {row['dataset']}")
    for name, side in (("", "left"), ("published", "right"), ("this run", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
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


def print_classes(classes: list[dict[str, Any]]) -> None:
    """Print the `classes` rows as a table."""
    table = Table()
    for name in ("class", "precision", "recall", "f1", "support"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in classes:
        figures = [f"{row[name]:.4f}" for name in ("precision", "recall", "f1")]
        table.add_row(row["name"], *figures, str(row["support"]))
    Console(width=100).print(table)


def print_bench(rows: list[dict[str, Any]]) -> None:
    """Print the `bench` rows as a table."""
    table = Table()
    for name in ("row", "ours", "reference", "unit", "ratio (min to max)", "target", "met"):
        table.add_column(name, justify="left" if name in ("row", "unit") else "right")
    for row in rows:
        spread = f"{row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f}, n={row['repeats']})"
        sides = (f"{row['ours']:.1f}", f"{row['reference']:.1f}")
        table.add_row(row["row"], *sides, row["unit"], spread, f"{row['target']:g}", "yes" if row["met"] else "no")
    Console(width=120).print(table)
