"""Reads the images of a listing, in order and a few at a time."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs as pafs

from fashion.config import IMAGE_SIZE, UserError
from fashion.data.images.columns import Decoded, decode_cells, open_parquet, read_cells
from fashion.data.images.decoding import MAX_BYTES, Unreadable, decode_image
from fashion.data.images.listing import Listing
from fashion.storage import open_storage

# An object store answers after some 50 ms, so files are asked for side by side.
REQUESTS = 16
# What is wrong with one file, and not with the storage. Anything else ends the job, which can go on later.
FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def read_images(listing: Listing, start: int, stop: int, step: int, *, photo: bool = False) -> Iterator[Decoded]:
    """Yield the images from `start` up to, not including, `stop`: `step` at a time, the last ones fewer.

    Raises `UserError` if a Parquet file is damaged, and `OSError` if the storage does not answer. An image that cannot
    be read is no error: see `Decoded`.
    """
    if listing.kind == "rows":
        yield from chunked(read_rows(listing, start, stop, photo), step)
        return
    for first in range(start, stop, step):
        yield read_files(listing, range(first, min(first + step, stop)), photo)


def read_again(path: str, row: int | None, *, images: str, column: str, photo: bool) -> NDArray[np.uint8] | str:
    """Return the pixels (28, 28) of one image that a prediction names by its path and row, or why it cannot be read.

    `images`, `column` and `photo` are those of the prediction; a URI's query is in `images` alone.
    """
    try:
        folder, _, name = path.rpartition("/")
        if "://" in images:
            folder = quote(folder, safe="/:%") + images[len(images.partition("?")[0]) :]
        storage = open_storage(folder or "/", "--images")
        names = pa.array([os.fsencode(name)], pa.large_binary())
        if row is None:
            listing = Listing(storage, "files", names, "", 0)
            ((pixels, errors),) = read_images(listing, 0, 1, 1, photo=photo)
        else:
            with open_parquet(storage.fs, f"{storage.root.rstrip('/')}/{name}", path) as file:
                cells = list(read_cells(file, column, row, row + 1))
            if not cells:
                return "its row is not there"
            pixels, errors = decode_cells(cells[0], photo=photo)
    except (UserError, OSError) as error:
        return str(error)
    return errors[0] or pixels[0]


def read_files(listing: Listing, numbers: range, photo: bool) -> Decoded:
    """Read image files; those of an object store are fetched side by side, and decoded one after the other."""
    pixels = np.zeros((len(numbers), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    errors: list[str | None] = [None] * len(numbers)
    for begin in range(0, len(numbers), REQUESTS):
        block = numbers[begin : begin + REQUESTS]
        for row, data in enumerate(fetch(listing, block), start=begin):
            try:
                if isinstance(data, OSError):
                    raise Unreadable(f"it cannot be opened ({data.strerror or type(data).__name__})")
                pixels[row] = decode_image(data, photo=photo)
            except Unreadable as error:
                errors[row] = str(error)
    return pixels, errors


def fetch(listing: Listing, numbers: range) -> Iterator[bytes | OSError]:
    """Yield the content of files, or why one cannot be opened."""
    paths = [listing.file(number) for number in numbers]
    if listing.storage.is_folder:
        yield from map(local_content, paths)
        return
    with ThreadPoolExecutor(len(paths)) as threads:
        yield from threads.map(lambda path: remote_content(listing.storage.fs, path), paths)


def local_content(path: str) -> bytes | OSError:
    """Return a local file's content, of a huge one no more than shows that it is too long."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        # A link that leads to itself has no class of its own.
        if not isinstance(error, FILE_ERRORS) and error.errno != errno.ELOOP:
            raise
        return error


def remote_content(filesystem: pafs.FileSystem, path: str) -> bytes | OSError:
    """Return an object's content likewise."""
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read(MAX_BYTES + 1))
    except FILE_ERRORS as error:
        return error


def read_rows(listing: Listing, start: int, stop: int, photo: bool) -> Iterator[Decoded]:
    """Yield rows of Parquet files in pieces of any size."""
    bounds = listing.bounds
    for number in range(int(np.searchsorted(bounds, start, "right")) - 1, len(listing.names)):
        first, end = int(bounds[number]), int(bounds[number + 1])
        if first >= stop:
            return
        with open_parquet(listing.storage.fs, listing.file(number), listing.path(number)) as file:
            for cells in read_cells(file, listing.column, max(start - first, 0), min(stop, end) - first):
                yield decode_cells(cells, photo=photo)


def chunked(pieces: Iterator[Decoded], step: int) -> Iterator[Decoded]:
    """Cut and join pieces of any size into pieces of `step` images; the last one may be smaller."""
    held: list[Decoded] = []
    count = 0
    for pixels, errors in pieces:
        held.append((pixels, errors))
        count += len(errors)
        while count >= step:
            joined = join(held)
            yield joined[0][:step], joined[1][:step]
            held, count = [(joined[0][step:], joined[1][step:])], count - step
    if count:
        yield join(held)


def join(pieces: list[Decoded]) -> Decoded:
    """Return several pieces as one."""
    return np.concatenate([pixels for pixels, _ in pieces]), [error for _, errors in pieces for error in errors]
