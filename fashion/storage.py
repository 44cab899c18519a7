"""Reads and writes files in a local folder, or at any URI that `pyarrow.fs` opens.

Readers see a file's old content or its new one, never a part.
"""

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

# Limits for the first request to an S3 store. By default pyarrow makes ten attempts of growing length, which is right
# in the middle of a run; at its start, a wrong address would cost a minute and a half before any message. These limits
# come to 40 s at most.
FIRST_REQUEST_LIMITS = {
    "connect_timeout": 5.0,
    "request_timeout": 5.0,
    "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=5),
}

READ_ATTEMPTS = 20

MAX_ROWS = 1_000_000
"""Most rows that a Parquet file of at most as many bytes may declare; a longer file may declare a row per byte.

A row of any table here takes more than a byte, so what was written here is read at any size.
"""


@dataclass(frozen=True)
class Storage:
    """An opened storage root.

    Ray is given `uri`, an absolute path or a URI; pyarrow uses `fs` and `root`.
    """

    uri: str
    fs: pafs.FileSystem
    root: str
    flag: str = "--storage"
    """The flag that named it, for messages."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder that this machine sees as its own, and not an object store."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Return the path of `parts` below the root, in the form that `fs` takes.

        Raises `UserError` if the path would lead out of the storage: names come from flags and from others' files.
        """
        for part in parts:
            safe = part.isprintable() and ".." not in part.split("/")
            require(safe, f"{part!r} leads out of {self.flag} {self.uri}, or is no name; a name holds a-z, 0-9, ._-")
        return "/".join((self.root, *parts))

    def show(self, *parts: str) -> str:
        """Return the path of `parts` in the form in which users write it, for messages."""
        base, mark, query = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return "/".join((base.rstrip("/"), *parts)) + mark + query

    def exists(self, *parts: str) -> bool:
        """Tell whether a file or folder is there."""
        return bool(self.fs.get_file_info(self.path(*parts)).type != pafs.FileType.NotFound)

    def read_bytes(self, *parts: str) -> bytes:
        """Return a file's whole content.

        Raises `FileNotFoundError`, and `OSError` if others replace the file during each of `READ_ATTEMPTS` attempts.
        """
        path = self.path(*parts)
        with contextlib.ExitStack() as streams:
            stream = streams.enter_context(self.fs.open_input_file(path))
            for _ in range(READ_ATTEMPTS):
                content = bytes(stream.read())
                if self.is_folder:
                    return content  # a local file that is open keeps its content when another replaces it
                # The stream reads as many bytes as the object had when it was opened. If a longer object has replaced
                # it since, these are a part of that one.
                now = streams.enter_context(self.fs.open_input_file(path))
                if now.metadata() == stream.metadata():
                    return content
                stream = now
        raise OSError(f"{self.show(*parts)} was replaced during each of {READ_ATTEMPTS} tries to read it")

    def write_bytes(self, data: bytes | pa.Buffer, *parts: str) -> None:
        """Write a file so that a reader sees the old content or the new one, never a part.

        A local file is written under a hidden name in the same folder, synced and renamed; an object store makes an
        object visible only when it is complete.
        """
        path = self.path(*parts)
        if not self.is_folder:
            # In a thread, which Ctrl-C does not interrupt. An exception would close the stream, and closing it
            # completes the object: an empty or truncated one would replace the old one.
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
        """Return the names in a folder, sorted; an empty list if it does not exist."""
        selector = pafs.FileSelector(self.path(*parts), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def delete_folder(self, *parts: str) -> None:
        """Remove a folder and its content, if it exists."""
        if self.exists(*parts):
            self.fs.delete_dir(self.path(*parts))

    def empty_folder(self, *parts: str) -> None:
        """Remove all that is in a folder, if it exists, and leave it: in an object store that takes fewer requests."""
        self.fs.delete_dir_contents(self.path(*parts), missing_dir_ok=True)

    def check_writable(self, *folders: str) -> None:
        """Raise `UserError` unless files can be written in `folders` below the root, or in the root if none is named.

        For a folder that does not exist yet, the nearest one above it is checked. Leaves nothing behind, not even a
        folder; in an object store, at most the empty object with which pyarrow marks the root as a folder.
        """
        try:
            if self.is_folder:
                for folder in folders or ("",):
                    tempfile.TemporaryFile(dir=nearest_folder(Path(self.root, folder))).close()
            else:
                self.write_bytes(b"", ".writable")
                self.fs.delete_file(self.path(".writable"))
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.flag} {self.uri} cannot be written ({reason}); name a folder that can be"
            ) from error


def write_object(filesystem: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    """Write an object. `pafs.copy_files` of pyarrow 26 would not report a failure at the end of the copy."""
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists.

    Raises `NotADirectoryError` if `path` leads through a file, `PermissionError` if a folder may not be entered.
    """
    for place in (path, *path.parents):
        try:
            os.stat(f"{place}/.")  # with the dot, this fails for files, and for folders that may not be entered
        except FileNotFoundError:
            continue
        return place
    raise FileNotFoundError(path)


def open_storage(uri: str, flag: str = "--storage") -> Storage:
    """Open `uri`, a local path or a URI that the flag `flag` gave. Creates nothing; `Storage.check_writable` tests for
    write access.

    Raises `UserError` if `uri` is a file, may not be entered or is unknown to pyarrow, if an object store refuses or
    does not answer, or if the bucket does not exist.
    """
    if "://" not in uri:
        path = Path(uri).expanduser().absolute()
        try:
            nearest_folder(path)
        except NotADirectoryError:
            blocked = next(place for place in (path, *path.parents) if place.exists())
            raise UserError(f"{flag} {uri} cannot be a folder, {blocked} is a file; name another folder") from None
        except OSError as error:
            raise UserError(f"{flag} {uri} cannot be entered ({error}); name a folder that can be") from error
        return Storage(uri=str(path), fs=pafs.LocalFileSystem(), root=str(path), flag=flag)
    scheme, _, rest = uri.partition("://")
    way_out = "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment of every node instead"
    holds_keys = scheme == "s3" and "@" in rest.partition("/")[0]
    require(not holds_keys, f"{flag} holds keys, which would be read in logs and lists of processes; {way_out}")
    try:
        filesystem, root = pafs.FileSystem.from_uri(with_single_requests(uri) if scheme == "s3" else uri)
        root = root.rstrip("/")
        found = with_limits(filesystem).get_file_info(root or "/")
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        way_out = "use a path, or a URI such as s3://..."
        if isinstance(error, OSError):
            way_out = "see to its address, the credentials and the server, or use a path"
        raise UserError(f"{flag} {uri} cannot be opened ({reason}); {way_out}") from error
    if found.type == pafs.FileType.File:
        raise UserError(f"{flag} {uri} is a file; name a folder")
    if isinstance(filesystem, pafs.S3FileSystem):
        require(root, f"{flag} {uri} names no bucket; use s3://BUCKET/FOLDER")
        bucket = root.partition("/")[0]
        # In a missing bucket every object merely counts as not found, and the first write would fail. A user who may
        # access only one folder of the bucket gets an error here, which says nothing about the bucket.
        with contextlib.suppress(OSError):
            there = with_limits(filesystem).get_file_info(bucket).type != pafs.FileType.NotFound
            require(there, f"{flag} {uri} is in bucket {bucket}, which does not exist; make it, or name another")
    return Storage(uri=uri.rstrip("/"), fs=filesystem, root=root, flag=flag)


def with_single_requests(uri: str) -> str:
    """Return an `s3://` URI by which pyarrow writes a small object in one request, and not in three."""
    if "allow_delayed_open=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def with_limits(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """Return the same file system with `FIRST_REQUEST_LIMITS`, which a URI cannot express."""
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    rebuild, (options,) = filesystem.__reduce__()  # its pickled form holds all options that came from the URI
    return rebuild(options | FIRST_REQUEST_LIMITS)


def read_parquet(source: bytes | pa.NativeFile) -> pa.Table:
    """Return the rows of a Parquet file. Raises `ValueError` of one line if it is damaged.

    The declared number of rows is checked before any row is read, so absurd metadata costs no memory.
    """
    try:
        stream = pa.BufferReader(source) if isinstance(source, bytes) else source
        file = pq.ParquetFile(stream)
        limit = max(MAX_ROWS, stream.size())
        if file.metadata.num_rows > limit:
            raise ValueError(f"it promises {file.metadata.num_rows} rows, more than {limit}")
        rows = file.read()
        rows.validate(full=True)  # checks lengths, offsets and UTF-8, on which readers of the rows rely
    except (pa.ArrowException, OSError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    return rows
