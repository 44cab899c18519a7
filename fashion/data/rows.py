"""Rows of the data set, as numpy arrays and as Arrow tables with the schema of the Parquet files."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fashion.config import IMAGE_SIZE, NUM_CLASSES, require

PIXELS = IMAGE_SIZE * IMAGE_SIZE
SCHEMA = pa.schema([("index", pa.int32()), ("label", pa.uint8()), ("image", pa.binary(PIXELS))])


@dataclass(frozen=True)
class Split:
    """Rows in memory: `images` (N, 28, 28) uint8, `labels` (N,) uint8, `index` (N,) int32.

    `index` is the row's number in the official archive that the row comes from.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    index: NDArray[np.int32]


def to_table(split: Split) -> pa.Table:
    """Return `split` as a table with `SCHEMA`; images become binaries of 784 bytes without a copy for each row."""
    rows = len(split.labels)
    buffer = pa.py_buffer(np.ascontiguousarray(split.images))
    images = pa.Array.from_buffers(pa.binary(PIXELS), rows, [None, buffer])
    return pa.Table.from_arrays([pa.array(split.index), pa.array(split.labels), images], schema=SCHEMA)


def from_table(table: pa.Table) -> Split:
    """Return a table with `SCHEMA` as arrays; raises `UserError` on another schema, on nulls and on labels above 9."""
    require(table.schema.equals(SCHEMA), f"prepared data has columns {table.schema.names}, expected {SCHEMA.names}")
    require(
        not any(table[name].null_count for name in SCHEMA.names),
        "prepared data holds nulls; remove and prepare it again",
    )
    if not len(table):
        return Split(np.empty((0, IMAGE_SIZE, IMAGE_SIZE), np.uint8), np.empty(0, np.uint8), np.empty(0, np.int32))
    column = table["image"].combine_chunks()
    offset = column.offset * PIXELS
    buffer = column.buffers()[1]
    images = np.frombuffer(buffer, np.uint8, len(column) * PIXELS, offset).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
    labels = table["label"].to_numpy()
    require(bool((labels < NUM_CLASSES).all()), "prepared data holds a label above 9; remove and prepare it again")
    return Split(images, labels, table["index"].to_numpy())


def joined(*splits: Split) -> Split:
    """Return the rows of `splits` as one split, in the order given."""
    return Split(
        np.concatenate([split.images for split in splits]),
        np.concatenate([split.labels for split in splits]),
        np.concatenate([split.index for split in splits]),
    )
