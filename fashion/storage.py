"""Where files live: a local folder or any URI that `pyarrow.fs` opens. Files appear whole or not at all."""

import contextlib
import os
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from fashion.config import UserError, require

# The first look at a store of the S3 kind. pyarrow's own patience, ten tries of growing length, is right in the middle
# of a run; a wrong address would cost a minute and a half of it, before the first word. These come to 40 s at most.
FIRST_LOOK = {
    "connect_timeout": 5.0,
    "request_timeout": 5.0,
    "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=5),
}

TRIES_TO_READ = 20

MAX_ROWS = 1_000_000
"""Rows that a Parquet file may promise: sixteen times what the largest of ours holds."""


@dataclass(frozen=True)
class Storage:
    """An opened storage root.

    `uri` is what Ray is given (an absolute path or a URI), `fs` and `root` are what pyarrow uses.
    """

    uri: str
    fs: pafs.FileSystem
    root: str

    def path(self, *parts: str) -> str:
        """Return the path of `parts` below the root, in the form that `fs` takes.

        Raises `UserError` if it would lead out of the storage: names come from flags, and from files handed over.
        """
        for part in parts:
            safe = part.isprintable() and ".." not in part.split("/")
            require(safe, f"{part!r} leads out of --storage {self.uri}, or is no name; a name holds a-z, 0-9, ._-")
        return "/".join((self.root, *parts))

    def show(self, *parts: str) -> str:
        """Return the same path as a person would write it."""
        base, mark, query = self.uri.partition("?")
        return "/".join((base.rstrip("/"), *parts)) + mark + query

    def exists(self, *parts: str) -> bool:
        """Tell whether a file or folder is there."""
        return bool(self.fs.get_file_info(self.path(*parts)).type != pafs.FileType.NotFound)

    def read_bytes(self, *parts: str) -> bytes:
        """Return a file's content, never a part of it. Raises `FileNotFoundError`."""
        path = self.path(*parts)
        for _ in range(TRIES_TO_READ):
            with self.fs.open_input_file(path) as stream:
                content = bytes(stream.read())
                if isinstance(self.fs, pafs.LocalFileSystem):
                    return content  # an open file stays what it was when another takes its place
                # As many bytes as the object had when it was opened: of a longer one that replaced it since, a part.
                with self.fs.open_input_file(path) as now:
                    if now.metadata() == stream.metadata():
                        return content
        raise OSError(f"{self.show(*parts)} was replaced during each of {TRIES_TO_READ} tries to read it")

    def write_bytes(self, data: bytes | pa.Buffer, *parts: str) -> None:
        """Write a file so that a reader sees the old content or the new one, never a part.

        A local file is written beside its place under a hidden name, synced and renamed; an object store makes an
        object visible only once it is complete.
        """
        path = self.path(*parts)
        if not isinstance(self.fs, pafs.LocalFileSystem):
            # In a thread, where no signal is heard: a stream that Ctrl-C leaves is closed on the way out, and to close
            # it is to complete the object, empty or cut off, in the place of the old one.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(write_object, self.fs, path, data).result()
            return
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    def list(self, *parts: str) -> list[str]:
        """Return the names in a folder, sorted; none if it does not exist."""
        selector = pafs.FileSelector(self.path(*parts), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def delete_folder(self, *parts: str) -> None:
        """Remove a folder with all that is in it; nothing happens if it does not exist."""
        if self.exists(*parts):
            self.fs.delete_dir(self.path(*parts))

    def check_writable(self, *folders: str) -> None:
        """Raise `UserError` unless files can be written in `folders` below the root, or in the root if none is named.

        A folder that does not exist yet counts as the nearest one above it. Leaves nothing behind, not even a folder;
        in an object store, at most the empty object by which pyarrow remembers that the root is one.
        """
        try:
            if isinstance(self.fs, pafs.LocalFileSystem):
                for folder in folders or ("",):
                    tempfile.TemporaryFile(dir=nearest_folder(Path(self.root, folder))).close()
            else:
                self.write_bytes(b"", ".writable")
                self.fs.delete_file(self.path(".writable"))
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--storage {self.uri} cannot be written ({reason}); name a folder that can be") from error


def write_object(filesystem: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    """Write an object of a store. Not with `pafs.copy_files`: pyarrow 26 keeps quiet about a failure at its end."""
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists.

    Raises `NotADirectoryError` if a file stands in the way, `PermissionError` if a folder may not be entered.
    """
    for place in (path, *path.parents):
        try:
            os.stat(f"{place}/.")  # the dot is looked up inside the folder
        except FileNotFoundError:
            continue
        return place
    raise FileNotFoundError(path)


def open_storage(uri: str) -> Storage:
    """Open `uri`, a local path or a URI; raises `UserError` if it is a file, closed or nothing that pyarrow knows.

    A store that refuses, or that does not answer, is one of those, and so is a bucket that does not exist. Nothing is
    created: see `Storage.check_writable`.
    """
    if "://" not in uri:
        path = Path(uri).expanduser().absolute()
        try:
            nearest_folder(path)
        except NotADirectoryError:
            blocked = next(place for place in (path, *path.parents) if place.exists())
            raise UserError(f"--storage {uri} cannot be a folder, {blocked} is a file; name another folder") from None
        except OSError as error:
            raise UserError(f"--storage {uri} cannot be entered ({error}); name a folder that can be") from error
        return Storage(uri=str(path), fs=pafs.LocalFileSystem(), root=str(path))
    scheme, _, rest = uri.partition("://")
    way_out = "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment of every node instead"
    holds_keys = scheme == "s3" and "@" in rest.partition("/")[0]
    require(not holds_keys, f"--storage holds keys, which would be read in logs and lists of processes; {way_out}")
    try:
        filesystem, root = pafs.FileSystem.from_uri(uri)
        root = root.rstrip("/")
        found = impatient(filesystem).get_file_info(root or "/")
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        way_out = "use a path, or a URI such as s3://..."
        if isinstance(error, OSError):
            way_out = "see to its address, the credentials and the server, or use a path"
        raise UserError(f"--storage {uri} cannot be opened ({reason}); {way_out}") from error
    if found.type == pafs.FileType.File:
        raise UserError(f"--storage {uri} is a file; name a folder")
    if isinstance(filesystem, pafs.S3FileSystem):
        require(root, f"--storage {uri} names no bucket; use s3://BUCKET/FOLDER")
        bucket = root.partition("/")[0]
        # In a bucket that is not there, whatever is looked for is merely missing: the first write would find it out.
        # Whoever may use no more than one folder of it is not told, and not refused for that.
        with contextlib.suppress(OSError):
            there = impatient(filesystem).get_file_info(bucket).type != pafs.FileType.NotFound
            require(there, f"--storage {uri} is in bucket {bucket}, which does not exist; make it, or name another")
    return Storage(uri=uri.rstrip("/"), fs=filesystem, root=root)


def impatient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """Return the same file system for the `FIRST_LOOK`; a URI has no words for patience."""
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    rebuild, (options,) = filesystem.__reduce__()  # what it is pickled as holds all that the URI said
    return rebuild(options | FIRST_LOOK)


def read_parquet(source: bytes | pa.NativeFile) -> pa.Table:
    """Return the rows of a Parquet file. Raises `ValueError` of one line if it is damaged.

    What it promises is judged before a row is read, so absurd metadata costs no memory.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)
        if file.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"it promises {file.metadata.num_rows} rows, more than {MAX_ROWS}")
        rows = file.read()
        rows.validate(full=True)  # lengths, offsets and UTF-8, on which whoever reads the rows relies
    except (pa.ArrowException, OSError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    return rows
