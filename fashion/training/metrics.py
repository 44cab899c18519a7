"""An epoch's metrics: one dictionary per epoch, the same on all ranks, and what follows from it for the reports.

Keys: `epoch` from 1; `train_` and, if val is held out, `val_` with `loss` (nats per row), `accuracy` (0..1) and `rows`;
`lr`; `epoch_time_s`, `data_wait_s` (the slowest rank's) and `val_time_s`. Knows the standard library only.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Metrics = dict[str, Any]

TIMES = {"train": ("epoch_time_s", "data_wait_s"), "val": ("val_time_s", "val_wait_s")}
"""Per split: the metrics that are its row's `epoch_time_s` and `data_wait_s`."""


def epoch_rows(metrics: Metrics) -> list[dict[str, Any]]:
    """Return the rows of the `epochs` table of one epoch: train, and val if it was held out."""
    return [
        {
            "epoch": int(metrics["epoch"]),
            "split": split,
            "loss": metrics[f"{split}_loss"],
            "accuracy": metrics[f"{split}_accuracy"],
            "rows": int(metrics[f"{split}_rows"]),
            "lr": metrics["lr"],
            "epoch_time_s": metrics[spent],
            "data_wait_s": metrics.get(waited, 0.0),
            "images_per_s": metrics[f"{split}_rows"] / metrics[spent],
        }
        for split, (spent, waited) in TIMES.items()
        if f"{split}_loss" in metrics
    ]


def from_rows(rows: Sequence[dict[str, Any]]) -> list[Metrics]:
    """Return the metrics, epoch after epoch, that `epochs` rows were made from; raises `ValueError` on other rows."""
    found: dict[int, Metrics] = {}
    needed = ("epoch", "loss", "accuracy", "rows", "lr", "epoch_time_s", "data_wait_s")
    for row in rows:
        if row["split"] not in TIMES or any(row[name] is None for name in needed) or not row["epoch_time_s"] > 0:
            raise ValueError(f"the row of epoch {row['epoch']} and split {row['split']!r} lacks figures")
    for row in sorted(rows, key=lambda row: (row["epoch"], row["split"])):
        split = row["split"]
        spent, waited = TIMES[split]
        metrics = found.setdefault(row["epoch"], {"epoch": row["epoch"], "lr": row["lr"]})
        metrics |= {f"{split}_{name}": row[name] for name in ("loss", "accuracy", "rows")}
        metrics |= {spent: row["epoch_time_s"], waited: row["data_wait_s"]}
    if list(found) != list(range(1, len(found) + 1)) or not all("train_rows" in each for each in found.values()):
        raise ValueError(f"epochs {list(found)[:20]} are not 1, 2, 3, ..., or one was not trained")
    splits = 1 + ("val_rows" in found[1]) if found else 0
    if len(rows) != splits * len(found) or len({len(each) for each in found.values()}) > 1:
        raise ValueError("an epoch has a row twice, or lacks one that others have")
    return list(found.values())


def checkpoint_score(metrics: Metrics) -> float:
    """Return what the best checkpoint has most of: val accuracy, and of equal ones the lower val loss.

    Accuracy, because it is what the project claims, and because val loss turns upward from overconfidence while
    accuracy still rises; the loss term is below half a row of val and only breaks ties. Without val the last is best.
    """
    if "val_accuracy" not in metrics:
        return float(metrics["epoch"])
    return float(metrics["val_accuracy"] - 1e-6 * min(metrics["val_loss"], 50.0))


def best_epoch(history: Sequence[Metrics]) -> int:
    """Return the number of the epoch with the best checkpoint, of equal ones the first; 0 before the first epoch."""
    return int(max(history, key=checkpoint_score)["epoch"]) if history else 0


def rung_score(metrics: Metrics, judge_by: str) -> float:
    """Return what trials are compared by at a rung, 0..1, the more the better; 0 for a trial that has no figures.

    `judge_by` names val's accuracy, its loss, or both. The loss counts as exp(-loss), the geometric mean of the
    probabilities that true labels are given: it orders as the loss does, but neither a loss that explodes nor a
    diverged trial drags the percentile at which others are cut. Both, in equal parts, since at the first rung many
    trials may have the accuracy of chance and the best one a loss above it.
    """
    if "val_loss" not in metrics:
        return 0.0
    accuracy, sureness = float(metrics["val_accuracy"]), math.exp(-metrics["val_loss"])
    return {"accuracy": accuracy, "loss": sureness, "both": (accuracy + sureness) / 2}[judge_by]


def summarise(history: Sequence[Metrics], best_epoch: int) -> dict[str, Any]:
    """Return the `runs` columns that follow from the epochs' metrics.

    The losses and accuracies are those of the best epoch, None for a val that was not held out. `images_per_s` is the
    median over epochs, without the first one, which pays for warming up, if there are others.
    """
    best = history[best_epoch - 1]
    rates = [metrics["train_rows"] / metrics["epoch_time_s"] for metrics in history]
    names = [f"{split}_{figure}" for split in ("train", "val") for figure in ("loss", "accuracy")]
    return {
        "epochs_done": len(history),
        "best_epoch": best_epoch,
        "images_per_s": statistics.median(rates[1:] or rates),
    } | {name: best.get(name) for name in names}
