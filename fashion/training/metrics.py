"""An epoch's metrics: one dictionary per epoch, and what is derived from it: report rows, scores and summaries.

Keys: `epoch` from 1; `train_` and, if val is held out, `val_` with `loss` (nats per row), `accuracy` (0..1) and `rows`;
`lr`; `epoch_time_s`, `data_wait_s` (the longest of any rank) and `val_time_s`. Imports the standard library only.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Metrics = dict[str, Any]

NOTES = "notes"
"""A further key of what a worker reports: lines of text for the console, joined by line breaks."""
TIMES = {"train": ("epoch_time_s", "data_wait_s"), "val": ("val_time_s", "val_wait_s")}
"""Per split: the metrics that become the columns `epoch_time_s` and `data_wait_s` of its rows."""


def epoch_rows(metrics: Metrics) -> list[dict[str, Any]]:
    """Return the rows of one epoch in the `epochs` table: train, and val if it is held out."""
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
    """Return the metrics of each epoch from the rows that `epoch_rows` made of them; raises `ValueError` on others."""
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
    """Return the score of an epoch's checkpoint, higher is better: val accuracy, with ties broken by lower val loss.

    Accuracy, because the project reports it, and because val loss rises from overconfidence while accuracy still
    improves. The loss counts less than half a row of val, so it breaks ties only. Without val the last epoch is best.
    """
    if "val_accuracy" not in metrics:
        return float(metrics["epoch"])
    return float(metrics["val_accuracy"] - 1e-6 * min(metrics["val_loss"], 50.0))


def best_epoch(history: Sequence[Metrics]) -> int:
    """Return the number of the epoch with the highest `checkpoint_score`, the first of equals; 0 if there is none."""
    return int(max(history, key=checkpoint_score)["epoch"]) if history else 0


def rung_score(metrics: Metrics, judge_by: str) -> float:
    """Return the score by which ASHA compares trials at a rung, 0..1, higher is better; 0 without val metrics.

    `judge_by` is accuracy, loss or both, all of val. The loss counts as exp(-loss), the geometric mean of the
    probabilities that the network gives to the true labels: it ranks trials as the loss does, but an exploding loss or
    a diverged trial does not shift the percentile below which ASHA stops trials. `both` is the mean of the two: at the
    first rung many trials may have the accuracy of chance, while the best trial may have a higher loss than they.
    """
    if "val_loss" not in metrics:
        return 0.0
    accuracy, likelihood = float(metrics["val_accuracy"]), math.exp(-metrics["val_loss"])
    return {"accuracy": accuracy, "loss": likelihood, "both": (accuracy + likelihood) / 2}[judge_by]


def summarise(history: Sequence[Metrics], best_epoch: int) -> dict[str, Any]:
    """Return the `runs` columns that follow from the epochs' metrics.

    The losses and accuracies are those of `best_epoch`, None for val if it is not held out. `images_per_s` is the
    median over all epochs but the first, which is slower while caches warm up, if there are others.
    """
    best = history[best_epoch - 1]
    rates = [metrics["train_rows"] / metrics["epoch_time_s"] for metrics in history]
    names = [f"{split}_{figure}" for split in ("train", "val") for figure in ("loss", "accuracy")]
    return {
        "epochs_done": len(history),
        "best_epoch": best_epoch,
        "images_per_s": statistics.median(rates[1:] or rates),
    } | {name: best.get(name) for name in names}
