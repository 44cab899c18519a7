"""Turn the rows of a source into Parquet: split them, stratified by class; write the files; write the manifest last."""

import hashlib
import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fashion.config import NUM_CLASSES, require
from fashion.data.manifest import DATA_FOLDER, Manifest, check_same_request, find_manifest
from fashion.data.rows import Split, to_table
from fashion.data.sources import Source, read_source
from fashion.storage import Storage

# Files of some 4 MB, several for the training rows, which Ray Data can then read in parallel.
ROWS_PER_FILE = 10_000


def stratified_val_rows(labels: NDArray[np.uint8], val_rows: int, seed: int) -> NDArray[np.int64]:
    """Draw `val_rows` row numbers, equally many of each class (to within one); returns them sorted, (val_rows,) int64.

    Raises `UserError` if a class would have no row left for training.
    """
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


def split_rows(source: Source, val_rows: int, seed: int) -> dict[str, Split]:
    """Split the rows of a source into train, val and test.

    Training rows are in a random order given by `seed`, so that any prefix is a random subset.
    """
    images, labels = source.train
    test_images, test_labels = source.test
    val = stratified_val_rows(labels, val_rows, seed)
    train = np.random.default_rng([seed, 1]).permutation(np.setdiff1d(np.arange(len(labels)), val))
    return {
        "train": Split(images[train], labels[train], train.astype(np.int32)),
        "val": Split(images[val], labels[val], val.astype(np.int32)),
        "test": Split(test_images, test_labels, np.arange(len(test_labels), dtype=np.int32)),
    }


def write_split(storage: Storage, name: str, split: Split) -> dict[str, str]:
    """Write one split as Parquet files of up to `ROWS_PER_FILE` rows; return file name -> SHA-256."""
    table = to_table(split)
    sums: dict[str, str] = {}
    for part, start in enumerate(range(0, len(table), ROWS_PER_FILE)):
        sink = pa.BufferOutputStream()
        pq.write_table(table.slice(start, ROWS_PER_FILE), sink, compression="zstd", use_dictionary=False)
        data = sink.getvalue()
        sha256 = hashlib.sha256(data).hexdigest()
        # The sum is part of the name, so that two processes that prepare different splits at once never mix files.
        file_name = f"part-{part:03d}-{sha256[:12]}.parquet"
        storage.write_bytes(data, *DATA_FOLDER, name, file_name)
        sums[file_name] = sha256
    return sums


def combined_sha256(sums: dict[str, str], val_rows: int, seed: int) -> str:
    """Return the SHA-256 that identifies archives and split: that of their sorted lines `name:value`."""
    parts = {**sums, "val_rows": str(val_rows), "seed": str(seed)}
    lines = "".join(f"{name}:{parts[name]}\n" for name in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


def pixel_statistics(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Return mean and standard deviation of all pixels of `images`, on a scale of 0..1, from their histogram."""
    pixels = images.reshape(-1)
    shares = np.bincount(pixels, minlength=256).astype(np.float64) / pixels.size
    values = np.arange(256) / 255.0
    mean = float(shares @ values)
    return mean, float(np.sqrt(shares @ (values - mean) ** 2))


def prepare(
    storage: Storage,
    source: str,
    val_rows: int = 5000,
    seed: int = 0,
    *,
    replace_stand_in: bool = False,
    tell: Callable[[str], None] = print,
) -> tuple[Manifest, bool]:
    """Prepare the data unless it is prepared already; return its manifest and whether it was written now.

    `tell` is given a line that says where the data was found, once it is written.

    The manifest is written last, so nobody takes a half-written folder for a finished one. Raises `UserError` where
    data of another source, seed or split is prepared, and does not replace it: runs that used it would lose their
    `val`. With `replace_stand_in`, real data replaces a stand-in, which can be drawn again; the stand-in is removed
    when the real data is at hand and verified.
    """
    require(10 <= val_rows <= 50_000, f"--val-rows {val_rows} must lie between 10 and 50000")
    require(0 <= seed < 2**31, f"--seed {seed} must lie between 0 and {2**31 - 1}")
    existing = find_manifest(storage)
    if existing is not None and not (replace_stand_in and existing.is_stand_in and source != "synthetic"):
        check_same_request(storage, existing, source, val_rows, seed)
        return existing, False
    storage.check_writable("/".join(DATA_FOLDER))
    read = read_source(source)
    splits = split_rows(read, val_rows, seed)
    if existing is not None:
        storage.delete_folder(*DATA_FOLDER)
    pixel_mean, pixel_std = pixel_statistics(splits["train"].images)
    manifest = Manifest(
        dataset="fashion-mnist" if read.official else "fashion-mnist-synthetic",
        sha256=combined_sha256(read.archives, val_rows, seed),
        seed=seed,
        val_rows=val_rows,
        rows={name: len(split.labels) for name, split in splits.items()},
        class_counts={n: np.bincount(s.labels, minlength=NUM_CLASSES).tolist() for n, s in splits.items()},
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        files={name: write_split(storage, name, split) for name, split in splits.items()},
        archives=read.archives,
        source=read.place,
    )
    data = json.dumps(vars(manifest), indent=2).encode()
    storage.write_bytes(data, *DATA_FOLDER, "manifest.json")
    for line in read.passed_over:
        tell(f"passed over: {line}")
    tell(f"taken: {read.place}")
    return manifest, True
