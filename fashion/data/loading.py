"""Read prepared splits: into memory as arrays, or as a Ray Dataset."""

import hashlib
from typing import TYPE_CHECKING

import pyarrow as pa

from fashion.config import UserError, require
from fashion.data.manifest import DATA_FOLDER, Manifest
from fashion.data.rows import Split, from_table
from fashion.storage import Storage, read_parquet

if TYPE_CHECKING:
    import ray.data


def split_paths(storage: Storage, manifest: Manifest, split: str) -> list[str]:
    """Return the paths of a split's Parquet files, as `storage.fs` takes them, in the order of their rows."""
    return [storage.path(*DATA_FOLDER, split, name) for name in manifest.files[split]]


def load_split(storage: Storage, manifest: Manifest, split: str) -> Split:
    """Read a split into memory, rows in the order of the files. Raises `UserError` on a missing or damaged file."""
    tables: list[pa.Table] = []
    # `jobs.prepare` checks the manifest alone, so the user has to remove the whole folder.
    way_out = f"remove {storage.show(*DATA_FOLDER)} and prepare again"
    for name, sha256 in manifest.files[split].items():
        place = (*DATA_FOLDER, split, name)
        require(storage.exists(*place), f"{storage.show(*place)} is missing; {way_out}")
        data = storage.read_bytes(*place)
        require(hashlib.sha256(data).hexdigest() == sha256, f"{storage.show(*place)} is damaged; {way_out}")
        try:
            tables.append(read_parquet(data))
            from_table(tables[-1])  # a right sum does not prove right content: the manifest may be damaged as well
        except ValueError as error:
            raise UserError(f"{storage.show(*place)} is damaged ({error}); {way_out}") from error
    rows = from_table(pa.concat_tables(tables))
    found, promised = len(rows.labels), manifest.rows[split]
    require(found == promised, f"{storage.show(*DATA_FOLDER, split)} holds {found} rows, not {promised}; {way_out}")
    return rows


def open_dataset(storage: Storage, manifest: Manifest, split: str) -> "ray.data.Dataset":
    """Open a split, for streaming, as a Ray Dataset with the columns of `SCHEMA`, rows in the order of the files.

    By default Ray passes files on in whichever order they were read, and a prefix would hold other rows each time;
    so this turns on `preserve_order` for all Datasets of this process.
    """
    import ray.data

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return ray.data.read_parquet(split_paths(storage, manifest, split), filesystem=storage.fs)
