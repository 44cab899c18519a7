"""Fashion-MNIST as tables: Kaggle's two CSV files, and the Parquet files of the hub, which hold PNG images.

Files are read in blocks, and no more rows than a split may have, so a file that promises much costs little.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from fashion.config import IMAGE_SIZE, NUM_CLASSES, UserError, require
from fashion.data.archives import MAX_ROWS_PER_SPLIT, Pair, first_bytes
from fashion.data.rows import PIXELS

CSV_BLOCK_BYTES = 8 << 20
PARQUET_BATCH_ROWS = 1000
# A PNG of 28 x 28 grey pixels takes some 600 bytes, and 900 uncompressed.
LONGEST_PNG_BYTES = 1 << 16
# Memory that a group of rows may take for each of them: what Arrow would allocate for its pages before a PNG is seen.
BYTES_PER_ROW = 1 << 12
PART_OF = re.compile(r"-of-(\d{5})\b")


def read_csv(path: Path) -> Pair:
    """Read images and labels from a CSV file of 785 columns: label, then 784 pixels; with or without a header.

    Raises `UserError` on other columns, and on a value that is no whole number from 0 to 255, or from 0 to 9.
    """
    names = header_of(path)
    columns = names or ["label", *(f"pixel{number}" for number in range(1, PIXELS + 1))]
    try:
        with pa_csv.open_csv(
            path,
            read_options=pa_csv.ReadOptions(block_size=CSV_BLOCK_BYTES, column_names=columns, skip_rows=bool(names)),
            parse_options=pa_csv.ParseOptions(ignore_empty_lines=True),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.uint8())),
        ) as reader:
            return joined_pairs(path, (pair_of_columns(path, batch) for batch in reader))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}; fetch it again") from error


def header_of(path: Path) -> list[str]:
    """Return the names in a CSV file's first line, an empty list if that is a row already.

    Raises `UserError` unless the names are label and 784 pixels that count from 0 or 1, in this order.
    """
    first_bytes(path)
    with path.open("rb") as file:
        line = file.readline(1 << 16).decode("utf-8-sig", errors="replace")
    names = [name.strip().strip('"') for name in line.split(",")]
    if not names[0] or names[0].lstrip("-").isdigit():
        return []
    right = [[f"pixel{number}" for number in range(start, start + PIXELS)] for start in (0, 1)]
    require(
        names[0].lower() == "label" and names[1:] in right,
        f"{path}: its columns are {', '.join(names[:3])[:60]}... ({len(names)}), expected label, pixel1 to "
        f"pixel{PIXELS} ({PIXELS + 1})",
    )
    return names


def pair_of_columns(path: Path, batch: pa.RecordBatch) -> Pair:
    """Return a block of a CSV file as images and labels; raises `UserError` if a value is missing or a label wrong."""
    empty = [name for name, column in zip(batch.schema.names, batch.columns, strict=True) if column.null_count]
    require(not empty, f"{path}: a value of the column {empty[0] if empty else ''} is missing; fetch it again")
    values = np.column_stack([column.to_numpy() for column in batch.columns])
    labels = checked_labels(path, values[:, 0])
    return np.ascontiguousarray(values[:, 1:]).reshape(-1, IMAGE_SIZE, IMAGE_SIZE), labels


def checked_labels(path: Path, labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return labels as uint8; raises `UserError` on one that is no class."""
    wrong = labels[(labels < 0) | (labels >= NUM_CLASSES)]
    require(not len(wrong), f"{path}: holds label {wrong[0] if len(wrong) else ''}, expected 0 to {NUM_CLASSES - 1}")
    return labels.astype(np.uint8)


def joined_pairs(path: Path, pairs: Iterable[Pair]) -> Pair:
    """Join blocks of rows; raises `UserError` if there are none, or more than a split may have."""
    images, labels, count = [], [], 0
    for block in pairs:
        count += len(block[1])
        require(count <= MAX_ROWS_PER_SPLIT, f"{path}: holds more than {MAX_ROWS_PER_SPLIT} rows")
        images.append(block[0])
        labels.append(block[1])
    require(count > 0, f"{path}: holds no rows; fetch it again")
    return np.concatenate(images), np.concatenate(labels)


def parquet_parts(paths: Sequence[Path]) -> list[Path]:
    """Return a split's Parquet files in the order of their rows; raises `UserError` if one of those named is missing.

    Names end in `-00000-of-00002`, as the hub writes them, or in anything else, and then sort by name.
    """
    parts = sorted(paths)
    for path in parts:
        if (total := PART_OF.search(path.name)) and len(parts) != int(total.group(1)):
            raise UserError(f"{path} is one of {int(total.group(1))} files, but {len(parts)} are there; fetch the rest")
    return parts


def read_parquet_images(paths: Sequence[Path]) -> Pair:
    """Read images and labels from Parquet files with the columns `image` (PNG bytes, or a struct with them) and
    `label` (an integer).

    Raises `UserError` on other columns or types, and on an image that is no grey PNG of 28 x 28 pixels.
    """
    parts = parquet_parts(paths)
    return joined_pairs(parts[0], (pair for path in parts for pair in read_part(path)))


def read_part(path: Path) -> Iterator[Pair]:
    """Yield the rows of one Parquet file in blocks."""
    first_bytes(path)
    try:
        with pq.ParquetFile(path) as file:
            check_columns(path, file.schema_arrow)
            promised = file.metadata.num_rows
            require(promised <= MAX_ROWS_PER_SPLIT, f"{path}: promises {promised} rows, more than {MAX_ROWS_PER_SPLIT}")
            check_sizes(path, file.metadata)
            start = 0
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=["image", "label"]):
                batch.validate(full=True)
                yield pair_of_images(path, start, batch)
                start += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}; fetch it again") from error


def check_sizes(path: Path, metadata: pq.FileMetaData) -> None:
    """Raise `UserError` if a group of rows takes more memory than its images may: a small file can hold gigabytes."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(group.column(column).total_uncompressed_size for column in range(group.num_columns))
        require(
            size <= group.num_rows * BYTES_PER_ROW + LONGEST_PNG_BYTES,
            f"{path}: {group.num_rows} rows take {size} bytes, more than {BYTES_PER_ROW} each; fetch it again",
        )


def check_columns(path: Path, schema: pa.Schema) -> None:
    """Raise `UserError` unless a Parquet file has the columns `image` and `label` with the types that hold them."""
    for name in ("image", "label"):
        require(
            schema.names.count(name) == 1, f"{path}: its columns are {', '.join(schema.names)[:200]}, not image, label"
        )
    image, label = schema.field("image").type, schema.field("label").type
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    is_bytes = pa.types.is_binary(image) or pa.types.is_large_binary(image)
    require(is_bytes, f"{path}: the column image is of type {str(schema.field('image').type)[:100]}, not PNG bytes")
    require(pa.types.is_integer(label), f"{path}: the column label is of type {label}, not an integer")


def pair_of_images(path: Path, start: int, batch: pa.RecordBatch) -> Pair:
    """Decode a block of rows, the first of which is row `start` of the file."""
    cells, labels = batch.column("image"), batch.column("label")
    if pa.types.is_struct(cells.type):
        cells = pc.struct_field(cells, "bytes")
    require(not labels.null_count, f"{path}: a label is missing; fetch it again")
    images = np.empty((len(batch), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for row, cell in enumerate(cells):
        images[row] = decode_png(cell.as_py() or b"", f"{path}: row {start + row + 1}")
    return images, checked_labels(path, labels.to_numpy())


def decode_png(data: bytes, where: str) -> NDArray[np.uint8]:
    """Return a grey PNG of 28 x 28 pixels as (28, 28) uint8; raises `UserError`, which begins with `where`, else.

    Size and mode are read from the header before a pixel is decoded, so a picture that promises more costs no memory.
    """
    require(len(data) <= LONGEST_PNG_BYTES, f"{where}: its image takes {len(data)} bytes; expected a PNG of 28 x 28")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            require(image.mode == "L", f"{where}: its PNG is of mode {image.mode}, not grey with 8 bits (L)")
            size = (IMAGE_SIZE, IMAGE_SIZE)
            require(image.size == size, f"{where}: its PNG is {image.width} x {image.height} pixels, not 28 x 28")
            return np.asarray(image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{where}: its image is no whole PNG ({' '.join(str(error).split())[:100]})") from error
