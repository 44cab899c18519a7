"""Rows of the `confusion` and `classes` tables, from labels and predictions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fashion.config import (
    CLASS_NAMES,
    NUM_CLASSES,
)


def confusion_matrix(labels: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return counts (10, 10): row is the label, column the prediction."""
    cells = labels.astype(np.int64) * NUM_CLASSES + predicted
    return np.bincount(cells, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def confusion_rows(matrix: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the rows of the `confusion` table, all 100 cells."""
    return [
        {"label": label, "predicted": predicted, "count": int(matrix[label, predicted])}
        for label in range(NUM_CLASSES)
        for predicted in range(NUM_CLASSES)
    ]


def class_rows(matrix: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the rows of the `classes` table; a share of nothing is 0."""
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(CLASS_NAMES):
        hits, support, claimed = int(matrix[label, label]), int(matrix[label].sum()), int(matrix[:, label].sum())
        precision, recall = hits / max(claimed, 1), hits / max(support, 1)
        f1 = 2 * hits / max(claimed + support, 1)
        rows.append(
            {"label": label, "name": name, "precision": precision, "recall": recall, "f1": f1, "support": support}
        )
    return rows
