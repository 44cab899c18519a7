"""Read prepared splits: as a Ray Dataset that the cluster reads, or into the memory of this process."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from fashion.config import NUM_CLASSES, UserError, require
from fashion.data.manifest import DATA_FOLDER, Manifest
from fashion.data.rows import SCHEMA, Split, from_table
from fashion.data.shards import StoredRows
from fashion.storage import Storage, open_storage, read_parquet

if TYPE_CHECKING:
    import ray.data


def way_out(storage: Storage) -> str:
    """Return what a user can do about a damaged file: `jobs.prepare` checks the manifest alone, so the folder goes."""
    return f"remove {storage.show(*DATA_FOLDER)} and prepare again"


class VerifiedFiles(pafs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """Files of a manifest, read only; a file's path is its split and its name, such as `train/part-000.parquet`.

    Short paths keep what a user's folder is called away from Ray Data, which takes `#` and `?` in a path for those of a
    URL. Opening a file reads it whole (some 4 MB), and raises `UserError` if it is missing or has another SHA-256 than
    the manifest says.
    """

    def __init__(self, uri: str, sums: dict[str, str]) -> None:
        self.uri, self.sums = uri, sums
        self._storage: Storage | None = None

    @classmethod
    def of(cls, storage: Storage, manifest: Manifest, splits: list[str]) -> "VerifiedFiles":
        """Return the files of `splits`; the keys of `sums` are their paths, in the order of their rows."""
        sums = {f"{split}/{name}": sha256 for split in splits for name, sha256 in manifest.files[split].items()}
        return cls(storage.uri, sums)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri, self.sums)

    @property
    def storage(self) -> Storage:
        """The storage, opened in the process that reads."""
        if self._storage is None:
            self._storage = open_storage(self.uri)
        return self._storage

    def read(self, path: str) -> bytes:
        """Return the content of a file; raises `UserError` if it is missing or damaged."""
        place = (*DATA_FOLDER, *path.split("/"))
        try:
            data = self.storage.read_bytes(*place)
        except FileNotFoundError:
            raise UserError(self.missing(path)) from None
        if hashlib.sha256(data).hexdigest() != self.sums[path]:
            raise UserError(f"{self.storage.show(*place)} is damaged; {way_out(self.storage)}")
        return data

    def missing(self, path: str) -> str:
        """Return the message for a file that is not there."""
        return f"{self.storage.show(*DATA_FOLDER, path)} is missing; {way_out(self.storage)}"

    def open_input_file(self, path: str) -> pa.NativeFile:
        data = self.read(path)
        try:
            check_content(data)
        except ValueError as error:  # Arrow's own are of this kind as well
            place, reason = self.storage.show(*DATA_FOLDER, path), " ".join(str(error).split())[:200]
            raise UserError(f"{place} is damaged ({reason}); {way_out(self.storage)}") from error
        return pa.BufferReader(data)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        """Return the files' types and sizes; raises `UserError` if one is missing."""
        places = [self.storage.path(*DATA_FOLDER, *path.split("/")) for path in paths]
        infos = self.storage.fs.get_file_info(places)
        for path, info in zip(paths, infos, strict=True):
            require(info.is_file, self.missing(path))
        return [pafs.FileInfo(path, info.type, size=info.size) for path, info in zip(paths, infos, strict=True)]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        inside = selector.base_dir.rstrip("/")
        return self.get_file_info([path for path in self.sums if path.startswith(f"{inside}/")])

    def get_type_name(self) -> str:
        return "verified"

    def normalize_path(self, path: str) -> str:
        return path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifiedFiles) and (self.uri, self.sums) == (other.uri, other.sums)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # `sums` may change

    def refuse(self, *arguments: Any, **settings: Any) -> Any:
        """Refuse what would change a file."""
        raise PermissionError("prepared data is only read")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = refuse
    delete_file = move = copy_file = open_output_stream = open_append_stream = refuse


def check_content(data: bytes) -> None:
    """Raise `ValueError` unless a Parquet file has the columns of `SCHEMA` and labels that can be, whatever its sum.

    Whoever hands over prepared data makes the sums. The images are looked at where they are pulled.
    """
    file = pq.ParquetFile(pa.BufferReader(data))
    require(file.schema_arrow.equals(SCHEMA), f"it has columns {file.schema_arrow.names}, expected {SCHEMA.names}")
    labels = file.read(columns=["label"])["label"]
    require(not labels.null_count and bool((labels.to_numpy() < NUM_CLASSES).all()), "it holds a label above 9 or none")


def open_dataset(storage: Storage, manifest: Manifest, splits: Sequence[str]) -> "ray.data.Dataset":
    """Open `splits`, one after the other, as a Ray Dataset with the columns of `SCHEMA`, rows in their files' order.

    Ray Data reads the files in tasks in the cluster, a block per file, and verifies each file's sum as it reads.

    By default Ray passes files on in whichever order they were read, and a prefix would hold other rows each time; so
    this turns on `preserve_order` for all Datasets of this process. It also chooses the reader of Ray Data that starts
    no actors: the newer one starts 32 of them to read the footers of files.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    if hasattr(context, "use_datasource_v2"):  # Ray 2.57 and later have both
        context.use_datasource_v2 = False
    files = VerifiedFiles.of(storage, manifest, list(splits))
    # A block that is lost with its node is read again while workers occupy all CPUs, so a task asks for none. But no
    # more of them run at a time than there are CPUs, since each is a process.
    num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    limits: dict[str, Any] = {"num_cpus": 0, "concurrency": min(num_cpus, len(files.sums))}
    with telling_damage(storage):
        return ray.data.read_parquet(
            list(files.sums),
            filesystem=pafs.PyFileSystem(files),
            schema=SCHEMA,
            partitioning=None,
            override_num_blocks=len(files.sums),
            **limits,
        )


def read_splits(storage: Storage, manifest: Manifest, splits: Sequence[str]) -> dict[str, StoredRows]:
    """Read `splits` into the cluster's object store, in one execution of Ray Data; this process gets references alone.

    Call this before workers occupy the cluster's CPUs: to open a file for its metadata, Ray Data takes half a CPU.
    Raises `UserError` if a file is missing or damaged.
    """
    with telling_damage(storage):
        dataset = open_dataset(storage, manifest, splits).materialize()
    # One part per block: its number of rows is known without a task.
    blocks = dataset.split(dataset.num_blocks())
    references = [reference for block in blocks for reference in block.to_arrow_refs()]
    rows = StoredRows.of_blocks(references, [block.count() for block in blocks])
    check_num_rows(storage, splits, len(rows), sum(manifest.rows[split] for split in splits))
    ends = itertools.accumulate(manifest.rows[split] for split in splits)
    return {split: rows.part(end - manifest.rows[split], end) for split, end in zip(splits, ends, strict=True)}


def verify_files(storage: Storage, manifest: Manifest, split: str) -> None:
    """Read every file of a split in the cluster and verify it, keeping no row.

    For rows that are streamed later: raises `UserError` if a file is missing or damaged.
    """
    with telling_damage(storage):
        counts = open_dataset(storage, manifest, [split]).map_batches(count, batch_size=None, batch_format="pyarrow")
        found = sum(batch["rows"].sum() for batch in counts.iter_batches(batch_size=None))
    check_num_rows(storage, [split], int(found), manifest.rows[split])


def count(block: pa.Table) -> pa.Table:
    """Return the number of rows of a block, in a column `rows`."""
    return pa.table({"rows": [len(block)]})


@contextlib.contextmanager
def telling_damage(storage: Storage) -> Iterator[None]:
    """Raise what a task of Ray found wrong with a file as a `UserError` of this process, without the traceback."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        for cause in causes(error):
            if isinstance(cause, UserError):
                raise UserError(last_line(cause).removeprefix("fashion.config.UserError: ")) from None
            if isinstance(cause, pa.ArrowException):
                place = storage.show(*DATA_FOLDER)
                raise UserError(f"{place} is damaged ({last_line(cause)[:200]}); {way_out(storage)}") from None
        raise


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and what caused it: in another process, as Ray wraps it, or in this one."""
    seen: BaseException | None = error
    while seen is not None:
        yield getattr(seen, "cause", None) or seen
        seen = seen.__cause__


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text: before it, Ray puts the traceback of the task."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


def load_split(storage: Storage, manifest: Manifest, split: str) -> Split:
    """Read a split into memory, rows in the order of the files. Raises `UserError` on a missing or damaged file."""
    tables: list[pa.Table] = []
    files = VerifiedFiles.of(storage, manifest, [split])
    for path in files.sums:
        data = files.read(path)
        try:
            tables.append(read_parquet(data))
            from_table(tables[-1])  # a right sum does not prove right content: the manifest may be damaged as well
        except ValueError as error:
            raise UserError(f"{storage.show(*DATA_FOLDER, path)} is damaged ({error}); {way_out(storage)}") from error
    rows = from_table(pa.concat_tables(tables))
    check_num_rows(storage, [split], len(rows.labels), manifest.rows[split])
    return rows


def check_num_rows(storage: Storage, splits: Sequence[str], found: int, promised: int) -> None:
    """Raise `UserError` unless the files of `splits` hold as many rows as the manifest says."""
    place = storage.show(*DATA_FOLDER, *splits) if len(splits) == 1 else storage.show(*DATA_FOLDER)
    require(found == promised, f"{place} holds {found} rows, not {promised}; {way_out(storage)}")
