"""The data plane: get the archives, verify, parse, split, write Parquet; open a split as arrays or as a Ray Dataset.

Knows numpy and pyarrow; Ray and torchvision are imported only inside the functions that need them.
"""

import gzip
import hashlib
import itertools
import json
import re
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fashion.config import IMAGE_SIZE, NUM_CLASSES, UserError, build, parse_object, require
from fashion.data import synthetic
from fashion.storage import Storage, read_parquet

if TYPE_CHECKING:
    import ray.data

SPLITS = ("train", "val", "test")
PIXELS = IMAGE_SIZE * IMAGE_SIZE
DATA_FOLDER = ("data", "fashion-mnist")
FORMAT_VERSION = 1
ROWS_PER_FILE = 10_000
MAX_ROWS_PER_SPLIT = 100_000
PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
SHA256 = re.compile(r"[0-9a-f]{64}")
DOWNLOAD_TIMEOUT_S = 30.0  # of silence

# SHA-256 of the official archives; the same as in Keras' fashion_mnist loader.
ARCHIVES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
SCHEMA = pa.schema([("index", pa.int32()), ("label", pa.uint8()), ("image", pa.binary(PIXELS))])


class DownloadFailed(UserError):
    """No mirror gave the archives: the one failure that `make quickstart` goes on after, with the stand-in."""


@dataclass(frozen=True)
class Split:
    """Rows in memory: `images` (N, 28, 28) uint8, `labels` (N,) uint8, `index` (N,) int32 within the official file."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    index: NDArray[np.int32]


@dataclass(frozen=True)
class Manifest:
    """What `jobs.prepare` wrote, read back from `manifest.json`."""

    dataset: str
    """`fashion-mnist`, or `fashion-mnist-synthetic` for the stand-in."""
    sha256: str
    """Sum over the archives' sums, `val_rows` and `seed`: names the data, and how it was split, in every run."""
    seed: int
    val_rows: int
    rows: dict[str, int]
    """Rows per split."""
    class_counts: dict[str, list[int]]
    """Rows per class, per split."""
    pixel_mean: float
    """Mean pixel of the training split, in 0..1."""
    pixel_std: float
    """Standard deviation of the training split's pixels, in 0..1."""
    files: dict[str, dict[str, str]]
    """Per split: file name -> SHA-256 of its bytes."""
    archives: dict[str, str]
    """Archive name -> SHA-256."""
    format_version: int = FORMAT_VERSION

    @property
    def is_stand_in(self) -> bool:
        """Tell the drawn stand-in from Fashion-MNIST."""
        return self.dataset.endswith("synthetic")


# --- archives -> arrays -------------------------------------------------------------------------------------------


def read_idx(
    path: Path, *, magic: int, shape: tuple[int, ...], max_rows: int = MAX_ROWS_PER_SPLIT
) -> NDArray[np.uint8]:
    """Parse one gzip'd IDX file into (N, *shape) uint8.

    The header is judged before any row is read, so a lying header costs no memory. Raises `UserError` on a truncated
    or corrupt gzip, a wrong magic number, wrong sizes, an impossible count, missing or surplus bytes.
    """
    num_fields = 2 + len(shape)
    row_size = int(np.prod(shape, dtype=np.int64))
    try:
        with gzip.open(path, "rb") as stream:
            header = stream.read(4 * num_fields)
            require(len(header) == 4 * num_fields, f"{path.name}: header is cut short after {len(header)} bytes")
            found_magic, num_rows, *sizes = struct.unpack(f">{num_fields}I", header)
            require(found_magic == magic, f"{path.name}: magic number is {found_magic}, expected {magic}")
            require(tuple(sizes) == shape, f"{path.name}: image size is {tuple(sizes)}, expected {shape}")
            require(1 <= num_rows <= max_rows, f"{path.name}: promises {num_rows} rows, expected 1 to {max_rows}")
            body = stream.read(num_rows * row_size)
            surplus = len(stream.read(1))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path.name}: not a whole gzip file ({error}); fetch it again") from error
    require(
        len(body) == num_rows * row_size and not surplus,
        f"{path.name}: promises {num_rows} rows of {row_size} bytes but holds "
        f"{'more' if surplus else str(len(body)) + ' bytes'}",
    )
    return np.frombuffer(body, np.uint8).reshape(num_rows, *shape)


def read_pair(folder: Path, stem: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images (N, 28, 28) uint8 and labels (N,) uint8 of `train` or `t10k`; raises `UserError` if they disagree."""
    images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", magic=2051, shape=(IMAGE_SIZE, IMAGE_SIZE))
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", magic=2049, shape=())
    require(
        len(images) == len(labels), f"{stem}: {len(images)} images but {len(labels)} labels; the files do not match"
    )
    highest = int(labels.max())
    require(
        highest < NUM_CLASSES, f"{stem}-labels-idx1-ubyte.gz: holds label {highest}, expected 0 to {NUM_CLASSES - 1}"
    )
    return images, labels


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex; raises `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that or name another --source") from error


def check_archives(folder: Path, *, official: bool) -> dict[str, str]:
    """Return the archives' SHA-256 sums; raises `UserError` if one is missing or (when `official`) is another file."""
    missing = [name for name in ARCHIVES if not (folder / name).is_file()]
    require(not missing, f"--source {folder} lacks {', '.join(missing)}; it must hold the four Fashion-MNIST archives")
    sums = {name: file_sha256(folder / name) for name in ARCHIVES}
    wrong = [name for name in ARCHIVES if official and sums[name] != ARCHIVES[name]]
    if wrong:
        # A parser's complaint (truncated, wrong magic, ...) helps more than a sum that differs, so it goes first.
        read_pair(folder, "train")
        read_pair(folder, "t10k")
        raise UserError(
            f"{wrong[0]}: right format, but its SHA-256 {sums[wrong[0]][:12]}... is not the official "
            f"{ARCHIVES[wrong[0]][:12]}...; fetch it again"
        )
    return sums


@contextmanager
def archives_from(source: str) -> Iterator[tuple[Path, bool]]:
    """Yield (folder with the four archives, whether they must be the official ones) for any source."""
    if source in ("download", "auto"):
        with tempfile.TemporaryDirectory() as temporary:
            yield download(Path(temporary)), True
    elif source == "synthetic":
        with tempfile.TemporaryDirectory() as temporary:
            synthetic.write_archives(Path(temporary))
            yield Path(temporary), False
    else:
        folder = Path(source).expanduser()
        require(
            folder.is_dir(),
            f"--source {source} is neither auto, download, synthetic nor a folder with the four archives",
        )
        yield folder, True


def download(folder: Path) -> Path:
    """Fetch the archives through torchvision's mirrors into `folder`; return where they lie.

    Raises `DownloadFailed` naming the two other ways out when no mirror answers.
    """
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none: a silent mirror would be waited for forever
    try:
        FashionMNIST(str(folder), train=True, download=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; torchvision turns some into RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise DownloadFailed(
            f"Fashion-MNIST could not be downloaded ({reason}); pass --source DIR with the four archives "
            "(or set FASHION_MNIST_SOURCE), or --source synthetic for the drawn stand-in"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return folder / "FashionMNIST" / "raw"


# --- arrays -> splits -> Parquet ----------------------------------------------------------------------------------


def stratified_val_rows(labels: NDArray[np.uint8], val_rows: int, seed: int) -> NDArray[np.int64]:
    """Choose `val_rows` rows, equally many of each class (to within one), by seed; returns sorted row numbers."""
    generator = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for label in range(NUM_CLASSES):
        quota = val_rows // NUM_CLASSES + (label < val_rows % NUM_CLASSES)
        members = np.flatnonzero(labels == label)
        require(
            quota < len(members),
            f"--val-rows {val_rows} leaves no training row of class {label}, which has {len(members)}; take fewer",
        )
        chosen.append(generator.permutation(members)[:quota])
    return np.sort(np.concatenate(chosen))


def split_rows(folder: Path, val_rows: int, seed: int) -> dict[str, Split]:
    """Read the archives and cut them into train, val and test.

    Training rows are written in a seeded random order, so that any prefix is a random subset.
    """
    images, labels = read_pair(folder, "train")
    test_images, test_labels = read_pair(folder, "t10k")
    val = stratified_val_rows(labels, val_rows, seed)
    train = np.random.default_rng([seed, 1]).permutation(np.setdiff1d(np.arange(len(labels)), val))
    return {
        "train": Split(images[train], labels[train], train.astype(np.int32)),
        "val": Split(images[val], labels[val], val.astype(np.int32)),
        "test": Split(test_images, test_labels, np.arange(len(test_labels), dtype=np.int32)),
    }


def to_table(split: Split) -> pa.Table:
    """Turn arrays into a table of `SCHEMA`; images become 784-byte binaries without a copy per row."""
    rows = len(split.labels)
    buffer = pa.py_buffer(np.ascontiguousarray(split.images))
    images = pa.Array.from_buffers(pa.binary(PIXELS), rows, [None, buffer])
    return pa.Table.from_arrays([pa.array(split.index), pa.array(split.labels), images], schema=SCHEMA)


def from_table(table: pa.Table) -> Split:
    """Turn a table of `SCHEMA` back into arrays; raises `UserError` on another schema, on nulls or on wrong labels."""
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


def write_split(storage: Storage, name: str, split: Split) -> dict[str, str]:
    """Write one split as Parquet files of up to 10,000 rows; return file name -> SHA-256."""
    table = to_table(split)
    sums: dict[str, str] = {}
    for part, start in enumerate(range(0, len(table), ROWS_PER_FILE)):
        sink = pa.BufferOutputStream()
        pq.write_table(table.slice(start, ROWS_PER_FILE), sink, compression="zstd", use_dictionary=False)
        data = sink.getvalue()
        sha256 = hashlib.sha256(data).hexdigest()
        # The sum is in the name: two processes that prepare different splits at once never mix their files.
        file_name = f"part-{part:03d}-{sha256[:12]}.parquet"
        storage.write_bytes(data, *DATA_FOLDER, name, file_name)
        sums[file_name] = sha256
    return sums


def combined_sha256(sums: dict[str, str], val_rows: int, seed: int) -> str:
    """Return one sum that names archives and split: the SHA-256 of their sorted `name:value` lines."""
    parts = {**sums, "val_rows": str(val_rows), "seed": str(seed)}
    lines = "".join(f"{name}:{parts[name]}\n" for name in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


def prepare(
    storage: Storage, source: str, val_rows: int = 5000, seed: int = 0, *, replace_stand_in: bool = False
) -> tuple[Manifest, bool]:
    """Make the prepared data exist; return its manifest and whether it was written now.

    The manifest is written last, so a half-written folder is never taken for a finished one. Prepared data of another
    source, seed or split is refused with `UserError` rather than replaced: runs that used it would lose their `val`.
    With `replace_stand_in` a stand-in gives way to real data, once that is at hand and verified: it can be drawn again.
    """
    require(10 <= val_rows <= 50_000, f"--val-rows {val_rows} must lie between 10 and 50000")
    require(0 <= seed < 2**31, f"--seed {seed} must lie between 0 and {2**31 - 1}")
    existing = find_manifest(storage)
    if existing is not None and not (replace_stand_in and existing.is_stand_in and source != "synthetic"):
        check_same_request(storage, existing, source, val_rows, seed)
        return existing, False
    storage.check_writable("/".join(DATA_FOLDER))
    with archives_from(source) as (folder, official):
        sums = check_archives(folder, official=official)
        splits = split_rows(folder, val_rows, seed)
    if existing is not None:
        storage.delete_folder(*DATA_FOLDER)
    pixels = splits["train"].images.reshape(-1)
    counts = np.bincount(pixels, minlength=256).astype(np.float64) / pixels.size
    values = np.arange(256) / 255.0
    mean = float(counts @ values)
    manifest = Manifest(
        dataset="fashion-mnist" if official else "fashion-mnist-synthetic",
        sha256=combined_sha256(sums, val_rows, seed),
        seed=seed,
        val_rows=val_rows,
        rows={name: len(split.labels) for name, split in splits.items()},
        class_counts={n: np.bincount(s.labels, minlength=NUM_CLASSES).tolist() for n, s in splits.items()},
        pixel_mean=mean,
        pixel_std=float(np.sqrt(counts @ (values - mean) ** 2)),
        files={name: write_split(storage, name, split) for name, split in splits.items()},
        archives=sums,
    )
    data = json.dumps(vars(manifest), indent=2).encode()
    storage.write_bytes(data, *DATA_FOLDER, "manifest.json")
    return manifest, True


def check_same_request(storage: Storage, found: Manifest, source: str, val_rows: int, seed: int) -> None:
    """Raise `UserError` if prepared data is there but is not what was asked for."""
    place = storage.show(*DATA_FOLDER)
    way_out = f"name another --storage, or remove {place}"
    for name, asked, have in (("--val-rows", val_rows, found.val_rows), ("--seed", seed, found.seed)):
        require(asked == have, f"{place} was prepared with {name} {have}, not {asked}; {way_out}")
    if source != "auto":
        check_source(storage, found, source)


def check_source(storage: Storage, found: Manifest, source: str) -> None:
    """Raise `UserError` if the prepared data does not come from `source`; only `synthetic` accepts the stand-in."""
    place = storage.show(*DATA_FOLDER)
    if found.is_stand_in:
        require(
            source == "synthetic",
            f"{place} holds the drawn stand-in, not Fashion-MNIST; take it on purpose with --source synthetic, "
            "or name another --storage",
        )
    else:
        require(source != "synthetic", f"{place} holds {found.dataset}, not the stand-in; name another --storage")
    if source not in ("auto", "download", "synthetic"):
        with archives_from(source) as (folder, official):
            check_archives(folder, official=official)


def check_same_data(storage: Storage, found: Manifest, run: dict[str, Any]) -> None:
    """Raise `UserError` if a `runs` row was made on other data: with another split, `val` holds rows it trained on."""
    require(
        run.get("dataset_sha256") in (None, found.sha256),
        f"the data in {storage.show(*DATA_FOLDER)} is not what the run was trained on (another source, --seed or "
        "--val-rows); prepare it again as it was",
    )


# --- reading back -------------------------------------------------------------------------------------------------


def find_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of finished prepared data, None when there is none; raises `UserError` if it is damaged."""
    if not storage.exists(*DATA_FOLDER, "manifest.json"):
        return None
    place = storage.show(*DATA_FOLDER, "manifest.json")
    data = storage.read_bytes(*DATA_FOLDER, "manifest.json")
    try:
        manifest = build(Manifest, parse_object(data))
        check_manifest(manifest)
    except ValueError as error:
        raise UserError(
            f"{place} is damaged ({error}); remove {storage.show(*DATA_FOLDER)} and prepare again"
        ) from error
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise `UserError` on a manifest whose values cannot be; a file name must stay inside its folder."""
    require(manifest.format_version == FORMAT_VERSION, f"format {manifest.format_version}, expected {FORMAT_VERSION}")
    require(sorted(manifest.rows) == sorted(SPLITS) == sorted(manifest.files), "it does not name train, val and test")
    require(0 < manifest.pixel_std < 1 and 0 < manifest.pixel_mean < 1, "pixel mean or std outside 0..1")
    require(all(1 <= rows <= MAX_ROWS_PER_SPLIT for rows in manifest.rows.values()), f"rows {manifest.rows}")
    require(PLAIN_NAME.fullmatch(manifest.dataset) is not None, f"strange name {manifest.dataset!r}")
    require(SHA256.fullmatch(manifest.sha256) is not None, f"strange sum {manifest.sha256!r}")
    for split, files in manifest.files.items():
        require(bool(files), f"it names no file of {split}")
        for name in files:
            require(PLAIN_NAME.fullmatch(name) is not None and name.endswith(".parquet"), f"strange file name {name!r}")


def load_manifest(storage: Storage) -> Manifest:
    """Return the manifest; raises `UserError` naming the command to run when the data is not prepared."""
    manifest = find_manifest(storage)
    if manifest is None:
        raise UserError(f"no prepared data in {storage.uri}; run: python -m jobs.prepare --storage {storage.uri}")
    return manifest


def split_paths(storage: Storage, manifest: Manifest, split: str) -> list[str]:
    """Return the paths of a split's Parquet files in row order, as `storage.fs` takes them."""
    return [storage.path(*DATA_FOLDER, split, name) for name in manifest.files[split]]


def load_split(storage: Storage, manifest: Manifest, split: str) -> Split:
    """Read a split into memory in written order, its files' sums verified. Raises `UserError` on a damaged file."""
    tables: list[pa.Table] = []
    # Preparing looks at the manifest alone, so it has to go as well.
    way_out = f"remove {storage.show(*DATA_FOLDER)} and prepare again"
    for name, sha256 in manifest.files[split].items():
        place = (*DATA_FOLDER, split, name)
        require(storage.exists(*place), f"{storage.show(*place)} is missing; {way_out}")
        data = storage.read_bytes(*place)
        require(hashlib.sha256(data).hexdigest() == sha256, f"{storage.show(*place)} is damaged; {way_out}")
        try:
            tables.append(read_parquet(data))
            from_table(tables[-1])  # a sum that fits proves nothing about what was summed
        except ValueError as error:
            raise UserError(f"{storage.show(*place)} is damaged ({error}); {way_out}") from error
    rows = from_table(pa.concat_tables(tables))
    found, promised = len(rows.labels), manifest.rows[split]
    require(found == promised, f"{storage.show(*DATA_FOLDER, split)} holds {found} rows, not {promised}; {way_out}")
    return rows


def joined(*splits: Split) -> Split:
    """Return the rows of several splits, one after the other."""
    return Split(
        np.concatenate([split.images for split in splits]),
        np.concatenate([split.labels for split in splits]),
        np.concatenate([split.index for split in splits]),
    )


def open_dataset(storage: Storage, manifest: Manifest, split: str) -> "ray.data.Dataset":
    """Open a split as a Ray Dataset with the columns of `SCHEMA`, rows in written order.

    For rows that are streamed. The order is asked for: by default Ray hands on whichever file is read first, and a
    prefix would hold other rows each time.
    """
    import ray.data

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return ray.data.read_parquet(split_paths(storage, manifest, split), filesystem=storage.fs)


# --- shards -------------------------------------------------------------------------------------------------------


def shard_bounds(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the half-open row range of a rank; ranges of all ranks cover every row once and differ by at most one."""
    return num_rows * rank // world_size, num_rows * (rank + 1) // world_size


def cut_points(num_rows: int, min_workers: int, max_workers: int) -> list[int]:
    """Return sorted rows, 0 and `num_rows` included, where some allowed number of workers needs a cut.

    Cut there once, and every rank of every width finds its shard as a run of whole pieces.
    """
    cuts = {0, num_rows}
    for width in range(min_workers, max_workers + 1):
        cuts |= {shard_bounds(num_rows, rank, width)[0] for rank in range(width)}
    return sorted(cuts)


def pieces_of_shard(cuts: list[int], rank: int, world_size: int) -> list[int]:
    """Return which pieces (piece k is rows `cuts[k]` to `cuts[k + 1]`) make up a rank's shard."""
    start, stop = shard_bounds(cuts[-1], rank, world_size)
    assert {start, stop} <= set(cuts), (start, stop, cuts)
    return [k for k in range(len(cuts) - 1) if start <= cuts[k] and cuts[k + 1] <= stop]


def share_pieces(rows: Split, cuts: list[int]) -> "list[ray.ObjectRef]":
    """Put `rows` into the object store as a Ray Dataset, a block per piece between `cuts`; return the blocks.

    Ray Train's own split (`streaming_split(equal=True)`) drops rows, and hands blocks to whoever asks first; cut by
    row number, the same rank gets the same rows in every run. Workers pull their blocks as they are; Ray Data's own
    executor would start two actors, 8 s of CPU, for that one copy.
    """
    import ray.data

    table = to_table(rows)
    pieces = [table.slice(start, stop - start) for start, stop in itertools.pairwise(cuts)]
    # Of Ray's ways to make a Dataset, the one that starts no task.
    return list(ray.data.from_blocks(pieces).to_arrow_refs()) if pieces else []
