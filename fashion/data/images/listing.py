"""Lists a user's images: PNG and JPEG files, or rows of Parquet files, in a fixed order and held compactly.

A million names take some 50 MB: they are Arrow arrays, never a list of Python objects.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs as pafs

from fashion.config import UserError, require
from fashion.data.images.columns import holds_pixels, image_column, open_parquet
from fashion.data.images.globs import ALL_BELOW, Glob, glob_of_uri, unescaped
from fashion.storage import Storage, open_storage, with_limits

IMAGE_SUFFIXES = (b".png", b".jpg", b".jpeg")
TABLE_SUFFIXES = (b".parquet",)
WILDCARDS = re.compile(r"[*?\[]")
# A question mark begins the query of a URI.
WILDCARDS_OF_URI = re.compile(r"[*\[]")
CHUNK_FILES = 10_000

File = tuple[bytes, int, int]
"""Path below the root, size in bytes, time of the last change in ns since 1970."""


@dataclass(frozen=True)
class Listing:
    """A user's images, numbered from 0: files in the order of their names, or rows of Parquet files likewise."""

    storage: Storage
    """The folder below which all files lie."""
    kind: Literal["files", "rows"]
    """Whether an image is a file, or a row of a Parquet file."""
    names: pa.LargeBinaryArray
    """Paths below the folder, as bytes: a file system may hold names that are no text."""
    digest: str
    """SHA-256 of names, sizes and times of the last change."""
    num_others: int
    """Files in the folder of another kind, which are not read."""
    column: str = ""
    """Column of the Parquet files that holds the images."""
    bounds: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    """File k of kind `rows` holds the images numbered from `bounds[k]` up to, not including, `bounds[k + 1]`."""
    holds_pixels: bool = False
    """Whether the column holds 28 x 28 pixels, and no image files."""
    longest_group: int = 0
    """Rows of the largest row group of the Parquet files, which are read from their beginning."""
    glob: Glob | None = None
    """What the files below the folder were found by; None if a file was named."""

    def __len__(self) -> int:
        return len(self.names) if self.kind == "files" else int(self.bounds[-1])

    def file(self, number: int) -> str:
        """Return the path of file `number` in the form that the storage's file system takes."""
        return f"{self.storage.root.rstrip('/')}/{os.fsdecode(self.names[number].as_py())}"

    def path(self, number: int) -> str:
        """Return the path of file `number` as reports show it; bytes that are no UTF-8 are escaped."""
        base = self.storage.uri.partition("?")[0] if "://" in self.storage.uri else self.storage.uri
        path: bytes = os.fsencode(base.rstrip("/")) + b"/" + self.names[number].as_py()
        return path.decode("utf-8", "backslashreplace")


def list_images(images: str, column: str = "") -> Listing:
    """List what `images` names: a file, a folder and all below it, or a glob, each a local path or a URI.

    In a folder, PNG and JPEG files are told by the ends of their names, and names that begin with a dot are passed
    over; a file that is named, or that a glob matches, may have any name. Links to folders are not followed. A glob
    knows `*`, `?` (not in a URI), `[...]`, and `**` for any number of folders.

    `column` is for Parquet files: the column that holds the images, by default the one that can.

    Raises `UserError` if nothing is there, if images and Parquet files are mixed, or if a Parquet file cannot be read.
    """
    found = find_files(images)
    storage, is_named = found.storage, found.is_named
    arrays: dict[str, list[pa.Array]] = {"names": [], "sizes": [], "times": []}
    kinds = {"files": 0, "rows": 0, "others": 0}
    pending: list[File] = []
    for each in found.files:
        suffix = os.path.splitext(each[0])[1].lower()
        kind = "rows" if suffix in TABLE_SUFFIXES else "files" if is_named or suffix in IMAGE_SUFFIXES else "others"
        kinds[kind] += 1
        if kind != "others":
            pending.append(each)
        if len(pending) == CHUNK_FILES:
            flush(pending, arrays)
    flush(pending, arrays)
    if not kinds["files"] + kinds["rows"]:
        what = "file" if is_named else "PNG, JPEG or Parquet file"
        raise UserError(f"--images {images} holds no {what}; name others")
    require(
        not (kinds["files"] and kinds["rows"]),
        f"--images {images} holds {kinds['files']} images and {kinds['rows']} Parquet files; name one kind by a glob",
    )
    names, sizes, times = (pa.concat_arrays(arrays[name]) for name in ("names", "sizes", "times"))
    digest = digest_of(storage, names, sizes, times)
    if kinds["files"]:
        require(not column, f"--column {column} is for Parquet files, and --images {images} holds none; leave it out")
        return Listing(storage, "files", names, digest, kinds["others"], glob=found.glob)
    return list_rows(Listing(storage, "rows", names, digest, kinds["others"], glob=found.glob), column)


def list_rows(listing: Listing, column: str) -> Listing:
    """Return a listing of Parquet files with their rows counted, and the column found; raises `UserError`."""
    counts, longest, pixels = [], 0, set()
    for number in range(len(listing.names)):
        place = listing.path(number)
        with open_parquet(listing.storage.fs, listing.file(number), place) as file:
            column = image_column(file.schema_arrow, column, place)
            pixels.add(holds_pixels(file.schema_arrow.field(column).type))
            counts.append(file.metadata.num_rows)
            groups = range(file.metadata.num_row_groups)
            longest = max(longest, *(file.metadata.row_group(each).num_rows for each in groups), 0)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    require(bool(bounds[-1]), f"--images {listing.path(0)} holds no rows; name another")
    return replace(listing, column=column, bounds=bounds, holds_pixels=all(pixels), longest_group=longest)


def flush(pending: list[File], arrays: dict[str, list[pa.Array]]) -> None:
    """Move files from a list of Python objects into Arrow arrays."""
    types = {"names": pa.large_binary(), "sizes": pa.int64(), "times": pa.int64()}
    for place, (name, kind) in enumerate(types.items()):
        arrays[name].append(pa.array([each[place] for each in pending], kind))
    pending.clear()


def digest_of(storage: Storage, *arrays: pa.Array) -> str:
    """Return the SHA-256 of Arrow arrays that begin at their buffers' starts, and of where the files lie."""
    sha256 = hashlib.sha256(storage.uri.encode("utf-8", "surrogateescape"))
    for array in arrays:
        for buffer in array.buffers():
            if buffer is not None:
                sha256.update(buffer)
    return sha256.hexdigest()


@dataclass(frozen=True)
class NamedFiles:
    """What `images` names: a folder, and files below it."""

    storage: Storage
    files: Iterator[File]
    glob: Glob | None
    """What finds them, None if one file was named."""
    is_named: bool
    """Whether each of them is named, as it is by a glob, and may be of any kind."""


def find_files(images: str) -> NamedFiles:
    """Return the folder and the files that `images` names; raises `UserError`.

    Names in a URI are escaped, `%20` for a blank; those of the files are as the file system holds them.
    """
    require(bool(images), "--images is empty; name a file, a folder, a glob or a URI")
    base, mark, query = split_uri(images)
    wildcards = WILDCARDS_OF_URI if "://" in images else WILDCARDS
    # A URI with brackets is none: what looks like a glob is one. Of a path, it may be the name of a file.
    is_glob = wildcards.search(base) is not None
    kind = pafs.FileType.NotFound if is_glob and "://" in images else kind_of(images)
    if kind == pafs.FileType.Directory:
        storage = open_storage(base + mark + query, "--images")
        return NamedFiles(storage, walk(storage, ALL_BELOW), ALL_BELOW, is_named=False)
    folder, _, name = base.rpartition("/")
    if kind != pafs.FileType.NotFound:
        storage = open_storage((folder or "/") + mark + query, "--images")
        name = unescaped(name) if "://" in images else name
        return NamedFiles(storage, one_file(storage, os.fsencode(name)), None, is_named=True)
    require(is_glob, f"--images {images} does not exist; name a file, a folder, a glob or a URI")
    parts = base.split("/")
    first = next(number for number, part in enumerate(parts) if wildcards.search(part))
    folder, pattern = "/".join(parts[:first]) or "/", "/".join(parts[first:])
    storage = open_storage(folder + mark + query, "--images")
    glob = glob_of_uri(pattern) if "://" in images else Glob(pattern)
    return NamedFiles(storage, walk(storage, glob), glob, is_named=True)


def split_uri(images: str) -> tuple[str, str, str]:
    """Return path, question mark and query of a URI; an absolute path and empty texts for a local path."""
    if "://" in images:
        base, mark, query = images.partition("?")
        return base.rstrip("/"), mark, query
    return os.path.abspath(os.path.expanduser(images)), "", ""


def kind_of(images: str) -> pafs.FileType:
    """Return what lies at a local path or a URI; raises `UserError` if it cannot be asked."""
    if "://" not in images:
        path = os.path.abspath(os.path.expanduser(images))
        if os.path.isdir(path):
            return pafs.FileType.Directory
        return pafs.FileType.File if os.path.exists(path) else pafs.FileType.NotFound
    try:
        filesystem, path = pafs.FileSystem.from_uri(images)
        return with_limits(filesystem).get_file_info(path).type
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--images {images} cannot be opened ({reason}); see to its address and the server") from error


def one_file(storage: Storage, name: bytes) -> Iterator[File]:
    """Yield the one file `name` of a folder."""
    if storage.is_folder:
        yield from stated(os.fsencode(storage.root), b"", [name])
        return
    info = storage.fs.get_file_info(f"{storage.root}/{os.fsdecode(name)}")
    yield name, info.size, info.mtime_ns or 0


def walk(storage: Storage, glob: Glob) -> Iterator[File]:
    """Yield the files below a folder that a glob matches, in a fixed order."""
    if storage.is_folder:
        yield from walk_local(os.fsencode(storage.root), b"", glob)
        return
    selector = pafs.FileSelector(storage.root or "/", allow_not_found=True, recursive=glob.is_deep)
    infos = storage.fs.get_file_info(selector)
    prefix = len(storage.root.rstrip("/")) + 1
    for info in sorted(infos, key=lambda each: each.path):
        name = info.path[prefix:].encode()
        if info.type == pafs.FileType.File and glob.matches(name):
            yield name, info.size, info.mtime_ns or 0


def walk_local(root: bytes, below: bytes, glob: Glob) -> Iterator[File]:
    """Yield the files of a folder that a glob matches by name, then those of the folders that it leads into."""
    files: list[bytes] = []
    folders: list[bytes] = []
    place = os.path.join(root, below)
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders += [path] if glob.enters(path) else []
                elif glob.matches(path):
                    files.append(entry.name)
    except FileNotFoundError:
        return  # the folder of a glob that is not there, or one that was removed meanwhile
    except PermissionError as error:
        raise UserError(f"--images: {os.fsdecode(place)} cannot be entered ({error.strerror}); leave it out") from error
    yield from stated(root, below, sorted(files))
    for path in sorted(folders):
        yield from walk_local(root, path, glob)


def stated(root: bytes, below: bytes, names: list[bytes]) -> Iterator[File]:
    """Yield files of one folder with size and time; both are 0 of a link that leads nowhere. Pipes are left out."""
    for name in names:
        try:
            found = os.stat(os.path.join(root, below, name))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                raise
            yield os.path.join(below, name), 0, 0
            continue
        if stat.S_ISREG(found.st_mode):
            yield os.path.join(below, name), found.st_size, found.st_mtime_ns
