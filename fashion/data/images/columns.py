"""Images in a column of a Parquet file: PNG or JPEG files as bytes, or 28 x 28 pixels as bytes or numbers."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from fashion.config import IMAGE_SIZE, UserError, require
from fashion.data.images.decoding import MAGIC, Unreadable, decode_image
from fashion.data.rows import PIXELS

READ_BYTES = 32 << 20
"""About as much of a Parquet file is in memory at a time, decompressed."""
MOST_ROWS = 4096
MOST_FILES = 64
"""Most image files of a column in memory at a time. The size that a Parquet file tells is that of its coded cells, and
a picture that a thousand rows share is stored once, but decoded a thousand times."""
BUFFER_BYTES = 1 << 20

Decoded = tuple[NDArray[np.uint8], list[str | None]]
"""Pixels (N, 28, 28), and why each image could not be read: None if it could. Its pixels are then 0."""


@contextlib.contextmanager
def open_parquet(filesystem: pafs.FileSystem, path: str, place: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; raises `UserError`, which calls it `place`, if it or what is read of it is damaged."""
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    try:
        # pyarrow takes no local names that are no text. Without a buffer, and with reading ahead, it would hold a whole
        # column of a row group, which may be hundreds of megabytes.
        with (
            open(path, "rb") if is_local else filesystem.open_input_file(path) as source,
            pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False) as file,
        ):
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--images: {place} cannot be read ({' '.join(str(error).split())[:200]})") from error


def image_column(schema: pa.Schema, column: str, place: str) -> str:
    """Return the name of the column that holds images: `column` if it is named, else `image`, else the only one.

    Raises `UserError`, which calls the file `place`, if there is none, or several.
    """
    found = [field.name for field in schema if holds_images(field.type)]
    names = ", ".join(schema.names)[:200]
    if column:
        require(schema.names.count(column) == 1, f"--column {column} is not in {place}, whose columns are {names}")
        kind = str(schema.field(column).type)[:100]
        require(
            column in found,
            f"--column {column} of {place} is of type {kind}; images are PNG or JPEG bytes, a struct with a field "
            f"bytes, or {PIXELS} whole numbers",
        )
        return column
    if found.count("image") == 1:
        return "image"
    require(bool(found), f"--images: {place} has no column of images; its columns are {names}")
    require(len(found) == 1, f"--images: {place} may hold images in {', '.join(found)}; name one by --column")
    return str(found[0])


def holds_images(kind: pa.DataType) -> bool:
    """Tell whether a column of type `kind` may hold images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
    return is_bytes(kind) or holds_pixels(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Tell whether a type is that of bytes of any length."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def holds_pixels(kind: pa.DataType) -> bool:
    """Tell whether a type is that of 784 bytes, or of a list of whole numbers."""
    if pa.types.is_fixed_size_binary(kind):
        return bool(kind.byte_width == PIXELS)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


def read_cells(file: pq.ParquetFile, column: str, start: int, stop: int) -> Iterator[pa.Array]:
    """Yield the cells of `column` in the rows from `start` up to, not including, `stop`, in pieces.

    Rows of the same group before `start` are read and dropped.
    """
    metadata, first, skipped = file.metadata, 0, 0
    groups: list[int] = []
    for number in range(metadata.num_row_groups):
        rows = metadata.row_group(number).num_rows
        if first < stop and start < first + rows:
            skipped = first if not groups else skipped
            groups.append(number)
        first += rows
    # Sizes of single columns would be nearer, but pyarrow 26 crashes where damaged metadata lack one.
    size = sum(metadata.row_group(number).total_byte_size for number in groups)
    rows = sum(metadata.row_group(number).num_rows for number in groups)
    most = MOST_ROWS if holds_pixels(file.schema_arrow.field(column).type) else MOST_FILES
    batch_rows = int(np.clip(READ_BYTES * rows // max(size, 1), 1, most))
    for batch in file.iter_batches(batch_rows, row_groups=groups, columns=[column]):
        cells = batch.column(0)
        wanted = slice(max(start - skipped, 0), max(stop - skipped, 0))
        skipped += len(cells)
        if wanted.stop > wanted.start and wanted.start < len(cells):
            piece = cells[wanted]
            piece.validate(full=True)
            yield piece
        if skipped >= stop:
            return


def decode_cells(cells: pa.Array, *, photo: bool) -> Decoded:
    """Return the images of a column's cells."""
    if pa.types.is_struct(cells.type):
        cells = pc.struct_field(cells, "bytes")
    if pa.types.is_fixed_size_binary(cells.type):
        cells = cells.cast(pa.binary())
    return decode_bytes(cells, photo) if is_bytes(cells.type) else decode_lists(cells)


def decode_bytes(cells: pa.Array, photo: bool) -> Decoded:
    """Return images that are bytes: PNG or JPEG files, or 784 pixels."""
    pixels = np.zeros((len(cells), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    errors: list[str | None] = [None] * len(cells)
    lengths = pc.fill_null(pc.binary_length(cells), -1).to_numpy(zero_copy_only=False)
    if len(cells) and bool((lengths == PIXELS).all()):
        # All are of one length, so they lie one after the other in the buffer.
        offsets = np.frombuffer(cells.buffers()[1], np.int32 if pa.types.is_binary(cells.type) else np.int64)
        values = np.frombuffer(cells.buffers()[2], np.uint8, len(cells) * PIXELS, int(offsets[cells.offset]))
        pixels[:] = values.reshape(pixels.shape)
        starts = pixels.reshape(-1, PIXELS)[:, :2]
        is_file = ((starts == (0x89, 0x50)) | (starts == (0xFF, 0xD8))).all(1)
    else:
        is_file = np.ones(len(cells), bool)
    for row in np.flatnonzero(is_file).tolist():
        data = cells[row].as_py()
        if data is not None and len(data) == PIXELS and not data.startswith(MAGIC):
            pixels[row] = np.frombuffer(data, np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE)
            continue
        pixels[row] = 0
        try:
            pixels[row] = decode_image(data or b"", photo=photo)
        except Unreadable as error:
            errors[row] = str(error)
    return pixels, errors


def decode_lists(cells: pa.Array) -> Decoded:
    """Return images that are lists of 784 whole numbers from 0 to 255."""
    pixels = np.zeros((len(cells), PIXELS), np.uint8)
    errors: list[str | None] = [None] * len(cells)
    lengths = pc.fill_null(pc.list_value_length(cells), -1).to_numpy(zero_copy_only=False)
    right = lengths == PIXELS
    for row in np.flatnonzero(~right).tolist():
        errors[row] = "it is empty" if lengths[row] < 1 else f"it holds {lengths[row]} numbers, not {PIXELS}"
    values = pc.list_flatten(cells.filter(pa.array(right)))
    numbers = values.cast(pa.int64(), safe=False).fill_null(-1) if values.null_count else values
    table = numbers.to_numpy(zero_copy_only=False).reshape(-1, PIXELS)
    wrong = ((table < 0) | (table > 255)).any(1)
    pixels[np.flatnonzero(right)[~wrong]] = table[~wrong]
    for row in np.flatnonzero(right)[wrong].tolist():
        errors[row] = "it holds a number outside of 0 to 255, or none"
    return pixels.reshape(-1, IMAGE_SIZE, IMAGE_SIZE), errors
