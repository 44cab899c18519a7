"""Reads and writes the Parquet tables of the reports.

A table has one file per run, `<storage>/reports/<table>/<run_id>/<table>.parquet`; the tables of an evaluation have one
per run and split, and the trials of a search share one, `<storage>/reports/<table>/<search_id>.parquet`. Every file has
the column `run_id`, so that one call reads a whole table in pandas, Polars and DuckDB alike: no reader needs to take it
from the name of a folder, and none mixes files that have it with folders that name it. Each file has one writer at a
time: the controller of Ray Train writes `epochs` while a run trains, the run's driver writes the rest.

Earlier versions named the folder `run_id=<run_id>` and left out the column; `open_reports` moves such files. Imports
neither Ray nor torch.
"""

import csv
import io
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from fashion.config import UserError, require
from fashion.reports.schemas import REPORTS_FOLDER, RUN_ID, SCHEMA_VERSION, SCHEMAS
from fashion.storage import Storage, open_storage, read_parquet

SMALL_TABLE_ROWS = 1000
"""Tables of fewer rows are written plainly."""
OLD_PREFIX = "run_id="
"""What earlier versions put before the run's id in the name of its folder."""
SUFFIX = ".parquet"
SEARCH_TABLES = ("epochs", "runs", "trials")
"""Tables in which the trials of a search share a file."""
READERS = 8
"""Threads that read or move files at a time: in an object store each file costs some waiting."""


def write_table(
    storage: Storage, table: str, run_id: str, rows: list[dict[str, Any]] | pa.Table, *, part: str = ""
) -> str:
    """Replace the rows of `run_id` in `table`; return the file's path in the form that messages show.

    With `part`, only the rows of that part (a split) are replaced. Each part has its own file, so writers of different
    parts cannot overwrite each other's rows.
    """
    path = (REPORTS_FOLDER, table, run_id, f"{table}{f'-{part}' if part else ''}{SUFFIX}")
    content = as_arrow(table, rows)
    storage.write_bytes(to_parquet(content.add_column(0, RUN_ID, pa.repeat(run_id, len(content)))), *path)
    return storage.show(*path)


def write_search_table(
    storage: Storage, table: str, search_id: str, rows: pa.Table, metadata: Mapping[str, str]
) -> None:
    """Replace the rows of all trials of a search in `table`, which have the column `run_id` first.

    The file's Arrow metadata holds `metadata` as well.
    """
    storage.write_bytes(to_parquet(rows, metadata), REPORTS_FOLDER, table, f"{search_id}{SUFFIX}")


def encode(table: str, rows: list[dict[str, Any]] | pa.Table) -> pa.Buffer:
    """Return rows of `table`, without the column `run_id`, as the content of a Parquet file; see `as_arrow`."""
    return to_parquet(as_arrow(table, rows))


def as_arrow(table: str, rows: list[dict[str, Any]] | pa.Table) -> pa.Table:
    """Return rows with exactly the columns of `table`; a missing one becomes null.

    An unknown column raises `ValueError`, so that no measurement is silently dropped.
    """
    schema = SCHEMAS[table]
    if isinstance(rows, list):
        unknown = sorted({key for row in rows for key in row} - set(schema.names))
        if unknown:
            raise ValueError(f"table {table} has no column {', '.join(unknown)}")
        rows = pa.Table.from_pylist(rows, schema=schema)
    return rows.cast(schema)


def in_file_schema(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows that have a `run_id` as in a file of `table`: `run_id` first, the other columns as by `as_arrow`."""
    run_ids = pa.array([row[RUN_ID.name] for row in rows], RUN_ID.type)
    others = [{name: value for name, value in row.items() if name != RUN_ID.name} for row in rows]
    return as_arrow(table, others).add_column(0, RUN_ID, run_ids)


def to_parquet(rows: pa.Table, metadata: Mapping[str, str] | None = None) -> pa.Buffer:
    """Return rows as the content of a Parquet file, whose Arrow metadata holds `schema_version` and `metadata`."""
    content = rows.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION), **(metadata or {})})
    # Of a few rows, dictionaries, statistics and compression take four times as long to write as the rows themselves.
    is_large = len(content) >= SMALL_TABLE_ROWS
    sink = pa.BufferOutputStream()
    pq.write_table(
        content,
        sink,
        compression="zstd" if is_large else "none",
        use_dictionary=is_large,
        write_statistics=is_large,
    )
    return sink.getvalue()


def read_table(storage: Storage, table: str, run_id: str) -> list[dict[str, Any]]:
    """Return the rows of one run as dictionaries without `run_id`; an empty list if there are none.

    Raises `UserError` if a file is damaged or cannot be read.
    """
    places: list[tuple[str, ...]] = []
    for folder in (run_id, f"{OLD_PREFIX}{run_id}"):
        if not places:
            path = (REPORTS_FOLDER, table, folder)
            places = [(*path, name) for name in parquet_names(storage, *path)]
    search_id = run_id.rpartition("-")[0]
    if not places and search_id and table in SEARCH_TABLES:
        places = [(REPORTS_FOLDER, table, f"{search_id}{SUFFIX}")]
    found = [row for place in places for row in run_rows(storage, run_id, *place)]
    return [{name: value for name, value in row.items() if name != RUN_ID.name} for row in found]


def run_rows(storage: Storage, run_id: str, *path: str) -> list[dict[str, Any]]:
    """Return the rows of a run in one file of the table `path[1]`, if that exists; raises as `read_table` does."""
    try:
        rows = read_file(storage, *path)
    except FileNotFoundError:
        return []
    return plain(storage, rows.filter(pc.equal(rows[RUN_ID.name], run_id)), *path)


def parquet_names(storage: Storage, *folder: str) -> list[str]:
    """Return the names of the Parquet files in a folder, sorted; an empty list if it does not exist."""
    return [name for name in storage.list(*folder) if name.endswith(SUFFIX) and not name.startswith(".")]


def read_search_table(storage: Storage, table: str, search_id: str) -> pa.Table | None:
    """Return the rows of a search's trials in `table`, `run_id` first, with the file's metadata; None without a file.

    Raises `UserError` if the file is damaged or cannot be read. Without it the search is lost, so it shall stay.
    """
    place = (REPORTS_FOLDER, table, f"{search_id}{SUFFIX}")
    try:
        return read_file(storage, *place, way_out="restore it from a copy, or start another search")
    except FileNotFoundError:
        return None


def plain(storage: Storage, rows: pa.Table, *path: str) -> list[dict[str, Any]]:
    """Return rows of the file at `path` as dictionaries; raises `UserError` for a value that Python cannot hold."""
    try:
        found: list[dict[str, Any]] = rows.to_pylist()
    except (ValueError, OverflowError) as error:  # Python's datetime cannot hold every Arrow timestamp
        raise UserError(f"{storage.show(*path)} is damaged ({error}); remove it") from error
    return found


def read_file(storage: Storage, *path: str, way_out: str = "remove it") -> pa.Table:
    """Return the rows of one file of the table `path[1]`, `run_id` first, in the table's schema.

    Raises `FileNotFoundError` if there is none, `UserError`, which ends with `way_out`, if it is damaged, and
    `UserError` if it cannot be read.
    """
    try:
        rows = read_parquet(storage.read_bytes(*path))
        return with_run_id(path[1], rows, owner(path[2]))
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{storage.show(*path)} cannot be read ({reason}); see to the storage") from error
    except ValueError as error:
        raise UserError(f"{storage.show(*path)} is damaged ({error}); {way_out}") from error


def owner(name: str) -> str:
    """Return the run whose rows lie under `name` in a table's folder; an empty text for a file of many runs."""
    return "" if name.endswith(SUFFIX) else name.removeprefix(OLD_PREFIX)


def with_run_id(table: str, rows: pa.Table, run_id: str) -> pa.Table:
    """Return `rows` with `run_id` first and then exactly the columns of `table`, as `in_schema` does.

    Without `run_id` the rows name their runs themselves. Raises `ValueError` if they do not.
    """
    if run_id:
        return in_schema(table, rows).add_column(0, RUN_ID, pa.repeat(run_id, len(rows)))
    found = [rows.column(k) for k, name in enumerate(rows.column_names) if name == RUN_ID.name]
    if len(found) != 1 or found[0].type != RUN_ID.type or found[0].null_count:
        raise ValueError(f"it has no column {RUN_ID.name} that names the run of each row")
    content = in_schema(table, rows).add_column(0, RUN_ID, found[0])
    return content.replace_schema_metadata(rows.schema.metadata)


def in_schema(table: str, rows: pa.Table) -> pa.Table:
    """Return `rows` with exactly the columns of `table`; a column that an older report lacks becomes null.

    Raises `ValueError` if a column occurs twice, or holds values of another type.
    """
    schema = SCHEMAS[table]
    if rows.column_names == [RUN_ID.name, *schema.names]:
        rows = rows.drop_columns(RUN_ID.name)
    if rows.schema.equals(schema):  # as nearly always, and 4 ms quicker than column by column
        return rows.replace_schema_metadata(schema.metadata)
    columns: list[pa.Array] = []
    for field in schema:
        found = [rows.column(k) for k, name in enumerate(rows.column_names) if name == field.name]
        if len(found) > 1:
            raise ValueError(f"it has the column {field.name} twice")
        if not found:
            columns.append(pa.nulls(len(rows), field.type))
            continue
        try:
            columns.append(found[0] if found[0].type == field.type else found[0].cast(field.type))
        except pa.ArrowException as error:
            raise ValueError(f"column {field.name} is of type {found[0].type}") from error
    return pa.Table.from_arrays(columns, schema=schema)


def open_reports(storage: Storage, *folders: str) -> None:
    """Raise `UserError` unless reports, and files in `folders`, can be written; move what earlier versions wrote.

    Polars and DuckDB cannot read files with the column `run_id` together with files without it. A damaged file stays
    where it is, with a warning: its reader says what to do.
    """
    storage.check_writable(*folders, REPORTS_FOLDER)
    with ThreadPoolExecutor(READERS) as pool:
        listed = zip(SCHEMAS, pool.map(lambda table: storage.list(REPORTS_FOLDER, table), SCHEMAS), strict=True)
        old = [(table, name) for table, names in listed for name in names if name.startswith(OLD_PREFIX)]
        for warning in pool.map(lambda place: move_old_files(storage, *place), old):
            if warning:
                print(f"warning: {warning}", file=sys.stderr)


def move_old_files(storage: Storage, table: str, folder: str) -> str:
    """Give a run's files of an earlier version the column `run_id`, and their folder its present name.

    Returns a warning, which is empty if all went well. Killed in between, it leaves files at both places; those at the
    present place are read. Two processes may do this at the same time.
    """
    run_id = owner(folder)
    for name in parquet_names(storage, REPORTS_FOLDER, table, folder):
        place = (REPORTS_FOLDER, table, folder, name)
        try:
            rows = read_parquet(storage.read_bytes(*place))
        except FileNotFoundError:
            continue  # another process has moved it
        except ValueError as error:
            return f"{storage.show(*place)} is damaged ({error}) and stays as it is"
        if RUN_ID.name not in rows.column_names:
            rows = rows.add_column(0, RUN_ID, pa.repeat(run_id, len(rows)))
        if not storage.exists(REPORTS_FOLDER, table, run_id, name):  # else its run has gone on since
            storage.write_bytes(to_parquet(rows), REPORTS_FOLDER, table, run_id, name)
    storage.delete_folder(REPORTS_FOLDER, table, folder)
    return ""


def write_csv(storage: Storage, folder: Path) -> list[Path]:
    """Write every table of the reports as `<table>.csv` in `folder`; return the files, each of which appears whole.

    `run_id` is the first column; a list, as of probabilities, becomes text in brackets, a moment ISO 8601 in UTC. Rows
    are in the order of `run_id`. Raises `UserError` if there are no reports, if `folder` cannot be made, or if a file
    is damaged.
    """
    found = {table: list_files(storage, table) for table in SCHEMAS}
    require(any(found.values()), f"{storage.show(REPORTS_FOLDER)} holds no reports to write as CSV; train a run first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--csv {folder} cannot be made ({error.strerror}); name another folder") from error
    written = open_storage(str(folder))
    written.check_writable()
    for table, places in found.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [RUN_ID.name, *SCHEMAS[table].names]
        writer.writerow(names)
        with ThreadPoolExecutor(READERS) as pool:
            parts = pool.map(lambda place: plain(storage, read_file(storage, *place), *place), places)
        for row in sorted((row for rows in parts for row in rows), key=lambda row: row[RUN_ID.name]):
            writer.writerow([as_text(row[name]) for name in names])
        written.write_bytes(text.getvalue().encode(), f"{table}.csv")
    return [folder / f"{table}.csv" for table in found]


def list_files(storage: Storage, table: str, *folder: str) -> list[tuple[str, ...]]:
    """Return the place of each Parquet file of a table, or of a folder in it, as parts below the root, sorted."""
    selector = pafs.FileSelector(storage.path(REPORTS_FOLDER, table, *folder), allow_not_found=True, recursive=True)
    found = [info for info in storage.fs.get_file_info(selector) if info.type == pafs.FileType.File]
    names = sorted(info.path for info in found if info.extension == SUFFIX[1:] and not info.base_name.startswith("."))
    return [tuple(name.removeprefix(f"{storage.root}/").split("/")) for name in names]


def as_text(value: Any) -> str:
    """Return a value of a report as a cell of a CSV file; a null is an empty cell."""
    if value is None:
        return ""
    return value.isoformat() if isinstance(value, datetime) else str(value)


def value_or_none(value: Any, column_type: pa.DataType) -> Any:
    """Return `value` if a column of `column_type` can hold it, else None."""
    try:
        return pa.scalar(value, column_type).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
