"""Prepared splits read back: as arrays, or as a Ray Dataset."""

import hashlib
from typing import TYPE_CHECKING

import pyarrow as pa

from fashion.config import UserError, require
from fashion.storage import Storage, read_parquet

if TYPE_CHECKING:
    import ray.data
from fashion.data.manifest import DATA_FOLDER, Manifest
from fashion.data.rows import Split, from_table


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


def open_dataset(storage: Storage, manifest: Manifest, split: str) -> "ray.data.Dataset":
    """Open a split as a Ray Dataset with the columns of `SCHEMA`, rows in written order.

    For rows that are streamed. The order is asked for: by default Ray hands on whichever file is read first, and a
    prefix would hold other rows each time.
    """
    import ray.data

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return ray.data.read_parquet(split_paths(storage, manifest, split), filesystem=storage.fs)
