"""The sections about a run's predictions: confusion matrix, metrics per class, the most confident mistakes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fashion.config import CLASS_NAMES, IMAGE_SIZE, NUM_CLASSES, UserError
from fashion.data import loading
from fashion.data.images import predictions as image_predictions
from fashion.data.images.reading import read_again
from fashion.data.manifest import find_manifest
from fashion.reports.console import place_of
from fashion.reports.page.content import (
    BLACK,
    BLUE,
    ORANGE,
    Block,
    Column,
    ConfusionMatrix,
    Details,
    Figure,
    Image,
    Images,
    Panel,
    Row,
    Section,
    Series,
    SideBySide,
    Style,
    Table,
    TableRow,
    format_fraction,
    pluralize,
)
from fashion.reports.page.reading import read_files, read_run_rows
from fashion.reports.page.runs import run_title
from fashion.storage import Storage, open_storage

MAX_MISTAKES = 24
MAX_LEAST_CERTAIN = 24


@dataclass(frozen=True)
class Mistakes:
    """The N most confident mistakes of a run; every array is (N,)."""

    index: NDArray[np.int64]
    """Row number of the image in the official file."""
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float64]
    """Of the predicted class."""
    label_probability: NDArray[np.float64]
    """Of the true class."""
    total: int
    """Number of all mistakes, of which N are kept."""


def predictions_sections(storage: Storage, runs: Sequence[Row]) -> list[Section]:
    """Show the predictions of the best run that has any: on test, else on val, else on train."""
    for row in runs:
        cells = read_run_rows(storage, "confusion", row["run_id"])
        for split in ("test", "val", "train"):
            rows = [cell for cell in cells if cell["split"] == split]
            if rows:
                return [confusion_section(storage, row, split, rows), *mistakes_section(storage, row, split)]
    return []


def confusion_section(storage: Storage, run: Row, split: str, cells: Sequence[Row]) -> Section:
    """Draw the confusion matrix and the metrics per class."""
    matrix = confusion_figure(run_title(run), split, cells)
    classes = [row for row in read_run_rows(storage, "classes", run["run_id"]) if row["split"] == split]
    blocks: list[Block] = [SideBySide([matrix, class_figure(classes)]), class_table(classes)] if classes else [matrix]
    return Section("classes-of-run", f"Predictions of {run_title(run)} on {split}", blocks)


def image_predictions_section(folder: str) -> Section:
    """Show a folder of predictions on a user's images: how many of each class, and the least certain as the network
    saw them, read again from where they lie.

    Raises `UserError` if the folder holds no predictions, or damaged ones.
    """
    out = open_storage(folder, "--predictions")
    manifest = image_predictions.load_manifest(out)
    if manifest is None:
        raise UserError(f"--predictions {folder} holds no predictions; name a folder that jobs.predict has written")
    summary = image_predictions.summarise(out, manifest.num_parts, MAX_LEAST_CERTAIN)
    predicted = summary.num_images - summary.num_unreadable
    text = (
        f"{summary.num_images:,} of {pluralize(manifest.num_images, 'image')} of {manifest.images} by {manifest.model}"
    )
    text += f", of which {summary.num_unreadable:,} could not be read." if summary.num_unreadable else "."
    counts = [
        TableRow([name, f"{count:,}", f"{count / max(predicted, 1):.1%}"])
        for name, count in zip(CLASS_NAMES, summary.class_counts, strict=True)
    ]
    blocks: list[Block] = [text, Table([Column("class", number=False), Column("images"), Column("share")], counts)]
    if summary.least_certain:
        blocks += [
            f"The {len(summary.least_certain)} least certain, as the network saw them: class, certainty, file.",
            Images(
                "least-certain", "The least certain", [certainty_image(row, manifest) for row in summary.least_certain]
            ),
        ]
    if summary.unreadable:
        rows = [TableRow([place_of(row), row["error"]]) for row in summary.unreadable]
        table = Table([Column("image", number=False), Column("why", number=False)], rows)
        blocks.append(Details(f"{len(rows)} of the images that could not be read", table))
    return Section("your-images", "Predictions on your images", blocks)


def certainty_image(row: Row, manifest: image_predictions.Manifest) -> Image:
    """Return an image with its class, certainty and file name; a grey square where it cannot be read any more."""
    pixels = read_again(row["path"], row["row"], images=manifest.images, column=manifest.column, photo=manifest.photo)
    name = place_of(row).rpartition("/")[2]
    lines = [f"{CLASS_NAMES[row['label']]} {row['certainty']:.1%}", name]
    if isinstance(pixels, str):
        return Image(np.full((IMAGE_SIZE, IMAGE_SIZE), 128, np.uint8), [*lines, f"not shown: {pixels}"])
    return Image(pixels, lines)


def class_table(classes: Sequence[Row]) -> Table:
    """List precision, recall, F1 and the number of images of each class."""
    columns = [Column("class", number=False), *(Column(name) for name in ("precision", "recall", "F1", "images"))]
    rows = [
        TableRow(
            [row["name"], *(format_fraction(row[name]) for name in ("precision", "recall", "f1")), str(row["support"])]
        )
        for row in classes
    ]
    return Table(columns, rows)


def confusion_figure(run_id: str, split: str, cells: Iterable[Row]) -> Figure:
    """Draw the confusion matrix of a run's predictions; `cells` are the rows of the table `confusion`."""
    counts = [[0] * NUM_CLASSES for _ in range(NUM_CLASSES)]
    for cell in cells:
        counts[cell["label"]][cell["predicted"]] += cell["count"]
    wrong = [(counts[a][b], a, b) for a in range(NUM_CLASSES) for b in range(NUM_CLASSES) if a != b]
    most, label, predicted = max(wrong, key=lambda entry: (entry[0], -entry[1], -entry[2]))
    caption = (
        f"Rows are the true classes, columns the classes that {run_id} predicted on {split}. The diagonal "
        "(grey) counts correct predictions; elsewhere, a darker blue means more mistakes."
    )
    if most:
        caption += f" Most frequent: {CLASS_NAMES[label]} predicted as {CLASS_NAMES[predicted]}, {most} times."
    matrix = ConfusionMatrix(
        title=f"{sum(map(sum, counts)):,} images, {sum(w[0] for w in wrong):,} misclassified", counts=counts
    )
    return Figure(name="confusion", title="Confusion matrix", caption=caption, panels=[matrix])


def class_figure(rows: Sequence[Row]) -> Figure:
    """Draw precision, recall and F1 of each class, the class with the lowest F1 at the bottom."""
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
        x_title="score (0 to 1)",
        series=series,
        y_ticks={place: str(row["name"]) for place, row in enumerate(order)},
        y_range=(-0.6, len(order) - 0.4),
        height=560,
    )
    caption = (
        "Precision: of the images predicted as the class, the fraction that belong to it. Recall: of the images of "
        "the class, the fraction predicted as it. F1: their harmonic mean. Best class on top."
    )
    return Figure(name="classes", title="Precision, recall and F1 per class", caption=caption, panels=[panel])


def mistakes_section(storage: Storage, run: Row, split: str) -> list[Section]:
    """Show the most confident mistakes as images, or why they cannot be shown; no section without predictions."""
    tables = read_files(storage, "predictions", run["run_id"])
    found = find_mistakes(pa.concat_tables(tables), split) if tables else None
    if found is None:
        return []
    heading = "The most confident mistakes"
    pixels = load_images(storage, run, split, found.index.tolist())
    if isinstance(pixels, str):
        return [Section("mistakes", heading, [pixels])]
    lines = mistake_texts(found)
    text = (
        f"{len(lines)} of the {pluralize(found.total, 'mistake')} on {split}, most confident first: the "
        "true class and the predicted class, each with the probability that the network gave it."
    )
    images = [Image(pixels[index], entry) for index, entry in zip(found.index.tolist(), lines, strict=True)]
    return [Section("mistakes", heading, [text, Images("mistakes", heading, images)])]


def mistake_texts(found: Mistakes) -> list[list[str]]:
    """Return the lines below each image: the true and the predicted class, each with its probability."""
    columns = (found.label, found.predicted, found.probability, found.label_probability)
    return [
        [f"true: {CLASS_NAMES[label]} {label_chance:.1%}", f"predicted: {CLASS_NAMES[predicted]} {chance:.1%}"]
        for label, predicted, chance, label_chance in zip(*(column.tolist() for column in columns), strict=True)
    ]


def find_mistakes(predictions: pa.Table, split: str) -> Mistakes | None:
    """Return the wrong predictions on `split` with the highest probability, at most MAX_MISTAKES.

    `predictions` holds rows of the table `predictions`; None if none of them is of this split.
    """
    rows = predictions.filter(pa.compute.equal(predictions["split"], split)) if len(predictions) else predictions
    if not len(rows):
        return None
    label = rows["label"].to_numpy().astype(np.int64)
    predicted = rows["predicted"].to_numpy().astype(np.int64)
    probabilities = (
        rows["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, NUM_CLASSES).astype(np.float64)
    )
    chance = np.take_along_axis(probabilities, predicted[:, None], axis=1)[:, 0]
    wrong = np.flatnonzero(label != predicted)
    top = wrong[np.argsort(-np.nan_to_num(chance[wrong]), kind="stable")][:MAX_MISTAKES]
    label_chance = np.take_along_axis(probabilities, label[:, None], axis=1)[:, 0]
    index = rows["index"].to_numpy().astype(np.int64)
    return Mistakes(index[top], label[top], predicted[top], chance[top], label_chance[top], len(wrong))


def load_images(storage: Storage, run: Row, split: str, index: Sequence[int]) -> dict[int, NDArray[np.uint8]] | str:
    """Return images (28, 28) of a split by their index, or a sentence that says why they cannot be shown."""
    try:
        manifest = find_manifest(storage)
        if manifest is None:
            return "The images are not shown: this storage holds no prepared data."
        if manifest.sha256 != run["dataset_sha256"]:
            return "The images are not shown: the prepared data in this storage is not what the run was trained on."
        rows = loading.load_split(storage, manifest, split)
    except (UserError, pa.ArrowException, OSError) as error:
        return f"The images are not shown: {' '.join(str(error).split())}"
    images = dict(zip(rows.index.tolist(), rows.images, strict=True))
    if not set(index) <= set(images):
        return f"The images are not shown: the predictions name images that the prepared {split} split lacks."
    return {each: images[each] for each in index}
