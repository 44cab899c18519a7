"""Reads and writes the Parquet tables of the reports.

A table has one file per run, `<storage>/reports/<table>/run_id=<id>/<table>.parquet`; the tables of an evaluation have
one per run and split. Each file has one writer at a time: the controller of Ray Train writes `epochs` while a run
trains, the run's driver writes the rest. Imports neither Ray nor torch.
"""

import csv
import io
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fashion.config import UserError, require
from fashion.reports.schemas import REPORTS_FOLDER, SCHEMA_VERSION, SCHEMAS
from fashion.storage import Storage, open_storage, read_parquet

SMALL_TABLE_ROWS = 1000
"""Tables of fewer rows are written plainly."""


def write_table(
    storage: Storage, table: str, run_id: str, rows: list[dict[str, Any]] | pa.Table, *, part: str = ""
) -> str:
    """Replace the rows of `run_id` in `table`; return the file's path in the form that messages show.

    With `part`, only the rows of that part (a split) are replaced. Each part has its own file, so writers of different
    parts cannot overwrite each other's rows.
    """
    path = (REPORTS_FOLDER, table, f"run_id={run_id}", f"{table}{f'-{part}' if part else ''}.parquet")
    storage.write_bytes(encode(table, rows), *path)
    return storage.show(*path)


def encode(table: str, rows: list[dict[str, Any]] | pa.Table) -> pa.Buffer:
    """Return rows of `table` as the content of a Parquet file.

    A missing column becomes null. An unknown column raises `ValueError`, so that no measurement is silently dropped.
    """
    schema = SCHEMAS[table]
    if isinstance(rows, list):
        unknown = sorted({key for row in rows for key in row} - set(schema.names))
        if unknown:
            raise ValueError(f"table {table} has no column {', '.join(unknown)}")
        rows = pa.Table.from_pylist(rows, schema=schema)
    content = rows.cast(schema).replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)})
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
    """Return the rows of one run as dictionaries; an empty list if there are none.

    Raises `UserError` if a file is damaged or cannot be read.
    """
    folder = (REPORTS_FOLDER, table, f"run_id={run_id}")
    names = [name for name in storage.list(*folder) if name.endswith(".parquet") and not name.startswith(".")]
    return [row for name in names for row in read_rows(storage, *folder, name)]


def read_rows(storage: Storage, *path: str) -> list[dict[str, Any]]:
    """Return the rows of one Parquet file of the table `path[1]`; raises `UserError` if the file cannot be read."""
    try:
        table = in_schema(path[1], read_parquet(storage.read_bytes(*path)))
        rows: list[dict[str, Any]] = table.to_pylist()
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{storage.show(*path)} cannot be read ({reason}); see to the storage") from error
    except (ValueError, OverflowError) as error:  # Python's datetime cannot hold every Arrow timestamp
        raise UserError(f"{storage.show(*path)} is damaged ({error}); remove it") from error
    return rows


def in_schema(table: str, rows: pa.Table) -> pa.Table:
    """Return `rows` with exactly the columns of `table`; a column that an older report lacks becomes null.

    Raises `ValueError` if a column occurs twice, or holds values of another type.
    """
    if rows.schema.equals(SCHEMAS[table]):  # as nearly always, and 4 ms quicker than column by column
        return rows.replace_schema_metadata(SCHEMAS[table].metadata)
    columns: list[pa.Array] = []
    for field in SCHEMAS[table]:
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
    return pa.Table.from_arrays(columns, schema=SCHEMAS[table])


def write_csv(storage: Storage, folder: Path) -> list[Path]:
    """Write every table of the reports as `<table>.csv` in `folder`; return the files, each of which appears whole.

    `run_id` is the first column; a list, as of probabilities, becomes text in brackets, a moment ISO 8601 in UTC. Rows
    are in the order of `run_id`. Raises `UserError` if there are no reports, if `folder` cannot be made, or if a file
    is damaged.
    """
    found = {table: storage.list(REPORTS_FOLDER, table) for table in SCHEMAS}
    tables = {
        table: [name.removeprefix("run_id=") for name in names if name.startswith("run_id=")]
        for table, names in found.items()
    }
    require(any(tables.values()), f"{storage.show(REPORTS_FOLDER)} holds no reports to write as CSV; train a run first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--csv {folder} cannot be made ({error.strerror}); name another folder") from error
    written = open_storage(str(folder))
    written.check_writable()
    for table, run_ids in tables.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = SCHEMAS[table].names
        writer.writerow(["run_id", *names])
        for run_id in run_ids:
            for row in read_table(storage, table, run_id):
                writer.writerow([run_id, *(as_text(row[name]) for name in names)])
        written.write_bytes(text.getvalue().encode(), f"{table}.csv")
    return [folder / f"{table}.csv" for table in tables]


def as_text(value: Any) -> str:
    """Return a value of a report as a cell of a CSV file; a null is an empty cell."""
    if value is None:
        return ""
    return value.isoformat() if isinstance(value, datetime) else str(value)
