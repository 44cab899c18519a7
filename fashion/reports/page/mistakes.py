"""The most confident mistakes of a run, and their pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fashion.config import CLASS_NAMES, NUM_CLASSES, UserError
from fashion.data import splits
from fashion.data.manifest import find_manifest
from fashion.reports.page.figures import Row
from fashion.storage import Storage

MAX_MISTAKES = 24


@dataclass(frozen=True)
class Mistakes:
    """The most confident mistakes of a run, (N,) each: row number in the official file, classes, probabilities."""

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float64]
    label_probability: NDArray[np.float64]
    total: int
    """All mistakes, also those not kept."""


def mistake_lines(found: Mistakes) -> list[list[str]]:
    """Write what is said under each image."""
    columns = (found.label, found.predicted, found.probability, found.label_probability)
    return [
        [f"is: {CLASS_NAMES[label]}", f"said: {CLASS_NAMES[predicted]} {sure:.1%}", f"right one: {right:.1%}"]
        for label, predicted, sure, right in zip(*(column.tolist() for column in columns), strict=True)
    ]


def find_mistakes(predictions: pa.Table, split: str) -> Mistakes | None:
    """Return up to 24 rows of `split` that were mistaken with the highest probability; None if it has no rows."""
    rows = predictions.filter(pa.compute.equal(predictions["split"], split)) if len(predictions) else predictions
    if not len(rows):
        return None
    label = rows["label"].to_numpy().astype(np.int64)
    predicted = rows["predicted"].to_numpy().astype(np.int64)
    chances = rows["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, NUM_CLASSES).astype(np.float64)
    sure = np.take_along_axis(chances, predicted[:, None], axis=1)[:, 0]
    wrong = np.flatnonzero(label != predicted)
    top = wrong[np.argsort(-np.nan_to_num(sure[wrong]), kind="stable")][:MAX_MISTAKES]
    right = np.take_along_axis(chances, label[:, None], axis=1)[:, 0]
    index = rows["index"].to_numpy().astype(np.int64)
    return Mistakes(index[top], label[top], predicted[top], sure[top], right[top], len(wrong))


def find_pixels(storage: Storage, run: Row, split: str, index: Sequence[int]) -> dict[int, NDArray[np.uint8]] | str:
    """Return images of a split by their index, or why they cannot be shown."""
    try:
        manifest = find_manifest(storage)
        if manifest is None:
            return "The images are not shown: this storage holds no prepared data."
        if manifest.sha256 != run["dataset_sha256"]:
            return "The images are not shown: the prepared data in this storage is not what the run was trained on."
        rows = splits.load_split(storage, manifest, split)
    except (UserError, pa.ArrowException, OSError) as error:
        return f"The images are not shown: {' '.join(str(error).split())}"
    images = dict(zip(rows.index.tolist(), rows.images, strict=True))
    if not set(index) <= set(images):
        return f"The images are not shown: the predictions name images that the prepared {split} split lacks."
    return {each: images[each] for each in index}
