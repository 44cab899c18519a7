"""Makes the rows of the `confusion` and `classes` tables from labels and predictions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fashion.config import CLASS_NAMES, NUM_CLASSES


def confusion_matrix(labels: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the counts (10, 10) of `labels` and `predicted` (n,): rows are labels, columns are predictions."""
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
    """Return the rows of the `classes` table; a ratio whose denominator is 0 counts as 0."""
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(CLASS_NAMES):
        correct, support, predicted = int(matrix[label, label]), int(matrix[label].sum()), int(matrix[:, label].sum())
        precision, recall = correct / max(predicted, 1), correct / max(support, 1)
        f1 = 2 * correct / max(predicted + support, 1)
        rows.append(
            {"label": label, "name": name, "precision": precision, "recall": recall, "f1": f1, "support": support}
        )
    return rows
