"""The Parquet reports: schemas, atomic write, read, and what identifies a run (code, versions, hardware).

One file per table and run, `<storage>/reports/<table>/run_id=<id>/<table>.parquet`, or one for each split that was
evaluated, and one writer of a file at a time: the controller of Ray Train adds `epochs` while a run trains, its driver
writes the rest. Knows neither Ray nor torch.
"""

import functools
import hashlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from fashion.config import (
    CLASS_NAMES,
    NUM_CLASSES,
    TrainConfig,
    UserError,
    flag,
    parse_object,
    require,
)
from fashion.storage import Storage, read_parquet

SCHEMA_VERSION = 1
REPORTS_FOLDER = "reports"
RUNS_FOLDER = "runs"
SEARCHES_FOLDER = "searches"

_TIME = pa.timestamp("us", tz="UTC")

# Losses in nats per row, accuracies and shares as fractions, times in seconds, epochs counted from 1. `run_id` is the
# partition column of every table, so it is not in the files.
SCHEMAS: dict[str, pa.Schema] = {
    "runs": pa.schema(
        [
            ("kind", pa.string()),  # train, trial, refit or study
            ("search_id", pa.string()),
            ("status", pa.string()),  # running, completed, diverged, failed or interrupted
            ("error", pa.string()),
            ("started_at", _TIME),
            ("finished_at", _TIME),
            ("wall_s", pa.float64()),
            ("dataset", pa.string()),
            ("dataset_sha256", pa.string()),
            ("source_hash", pa.string()),
            ("preset", pa.string()),
            ("config_json", pa.string()),
            ("num_parameters", pa.int64()),
            ("world_size", pa.int32()),
            ("device", pa.string()),
            ("precision", pa.string()),
            ("threads_per_worker", pa.int32()),
            ("exchange", pa.string()),  # of gradients: none, shared memory, gloo or nccl
            ("data_mode", pa.string()),
            ("epochs_done", pa.int32()),
            ("best_epoch", pa.int32()),
            ("train_loss", pa.float64()),
            ("train_accuracy", pa.float64()),
            ("val_loss", pa.float64()),
            ("val_accuracy", pa.float64()),
            ("test_loss", pa.float64()),
            ("test_accuracy", pa.float64()),
            ("test_rows", pa.int64()),
            ("images_per_s", pa.float64()),
            ("peak_memory_bytes", pa.int64()),  # of the largest worker
            ("checkpoint", pa.string()),  # the chosen one, relative to the storage
            ("resumed_from", pa.int32()),  # epoch that the last life of the run started after; null if unbroken
            ("hardware", pa.string()),
            ("ray_version", pa.string()),
            ("torch_version", pa.string()),
        ]
    ),
    "epochs": pa.schema(
        [
            ("epoch", pa.int32()),
            ("split", pa.string()),
            ("loss", pa.float64()),
            ("accuracy", pa.float64()),
            ("rows", pa.int64()),
            ("lr", pa.float64()),
            ("epoch_time_s", pa.float64()),
            ("data_wait_s", pa.float64()),
            ("images_per_s", pa.float64()),
        ]
    ),
    "trials": pa.schema(
        [
            ("search_id", pa.string()),
            ("trial_id", pa.string()),  # t0000, t0001, ... in the order in which they were drawn
            ("status", pa.string()),  # running, completed, stopped, diverged or error
            ("error", pa.string()),
            ("lr", pa.float64()),
            ("dropout_conv", pa.float64()),
            ("dropout_fc", pa.float64()),
            ("weight_decay", pa.float64()),
            ("label_smoothing", pa.float64()),
            ("padding", pa.string()),
            ("depth", pa.string()),
            ("settings_json", pa.string()),  # all that was drawn
            ("max_epochs", pa.int32()),
            ("epochs_done", pa.int32()),
            ("rung", pa.int32()),  # epoch of the last rung that the trial reached; null before the first
            ("best_epoch", pa.int32()),
            ("val_loss", pa.float64()),  # of the best epoch
            ("val_accuracy", pa.float64()),
            ("last_val_accuracy", pa.float64()),
            ("wall_s", pa.float64()),  # all lives of the trial together
        ]
    ),
    "predictions": pa.schema(
        [
            ("split", pa.string()),
            ("index", pa.int32()),
            ("label", pa.uint8()),
            ("predicted", pa.uint8()),
            ("probabilities", pa.list_(pa.float32(), 10)),
            ("loss", pa.float32()),
        ]
    ),
    "classes": pa.schema(
        [
            ("split", pa.string()),
            ("label", pa.uint8()),
            ("name", pa.string()),
            ("precision", pa.float64()),
            ("recall", pa.float64()),
            ("f1", pa.float64()),
            ("support", pa.int64()),
        ]
    ),
    "bench": pa.schema(
        [
            ("row", pa.string()),  # letter and name, as b_job_vs_step
            ("ours", pa.float64()),  # medians over the repeats, in `unit`
            ("reference", pa.float64()),
            ("unit", pa.string()),
            ("ratio", pa.float64()),  # median of the repeats' own ratios, ours / reference
            ("ratio_min", pa.float64()),
            ("ratio_max", pa.float64()),
            ("repeats", pa.int32()),
            ("target", pa.float64()),  # none where nothing is aimed at
            ("met", pa.bool_()),
            ("hardware", pa.string()),
            ("threads", pa.int32()),
            ("torch_version", pa.string()),
            ("ray_version", pa.string()),
            ("source_hash", pa.string()),
        ]
    ),
    "study": pa.schema(
        [
            ("study_id", pa.string()),
            ("part", pa.string()),
            ("arm", pa.string()),
            ("baseline", pa.string()),  # the arm that this one is compared with; null for that one itself
            ("preset", pa.string()),
            ("settings_json", pa.string()),  # what differs from the preset
            ("seeds", pa.int32()),  # runs of the arm, with seeds 0, 1, ...
            ("epochs", pa.int32()),
            ("train_rows", pa.int64()),  # of an epoch
            ("val_accuracy", pa.float64()),  # means and standard deviations over the seeds, of each run's chosen epoch
            ("val_accuracy_std", pa.float64()),
            ("val_loss", pa.float64()),
            ("val_loss_std", pa.float64()),
            ("test_accuracy", pa.float64()),
            ("test_accuracy_std", pa.float64()),
            ("test_loss", pa.float64()),
            ("test_loss_std", pa.float64()),
            ("turning_epoch", pa.float64()),  # of the lowest val loss, the median over the seeds
            ("val_effect", pa.float64()),  # mean difference to the baseline's accuracy over pairs of equal seed
            ("val_effect_low", pa.float64()),  # its 95 % interval
            ("val_effect_high", pa.float64()),
            ("test_effect", pa.float64()),
            ("test_effect_low", pa.float64()),
            ("test_effect_high", pa.float64()),
            ("only_arm_right", pa.int64()),  # test images, both models of seed 0
            ("only_baseline_right", pa.int64()),
            ("mcnemar_p", pa.float64()),
            ("num_parameters", pa.int64()),
            ("precision", pa.string()),
            ("wall_s", pa.float64()),  # of all runs of the arm
            ("hardware", pa.string()),
            ("dataset_sha256", pa.string()),
            ("torch_version", pa.string()),
            ("ray_version", pa.string()),
            ("source_hash", pa.string()),
        ]
    ),
    "confusion": pa.schema(
        [("split", pa.string()), ("label", pa.uint8()), ("predicted", pa.uint8()), ("count", pa.int64())]
    ),
}

FACTS = (
    "num_parameters",
    "world_size",
    "device",
    "precision",
    "threads_per_worker",
    "exchange",
    "peak_memory_bytes",
)
"""Columns of `runs` that the process which trains knows and nobody else."""


def write_table(
    storage: Storage, table: str, run_id: str, rows: list[dict[str, Any]] | pa.Table, *, part: str = ""
) -> str:
    """Replace the rows of `run_id` in `table`, as a whole; return the file's path as a person would write it.

    With `part`, only the rows of that part: it has a file of its own, so that writers of other parts lose nothing.
    """
    place = (REPORTS_FOLDER, table, f"run_id={run_id}", f"{table}{f'-{part}' if part else ''}.parquet")
    storage.write_bytes(encode(table, rows), *place)
    return storage.show(*place)


def encode(table: str, rows: list[dict[str, Any]] | pa.Table) -> pa.Buffer:
    """Return rows of `table` as a Parquet file.

    A missing column becomes null; an unknown one raises `ValueError`, so that no measurement is dropped in silence.
    """
    schema = SCHEMAS[table]
    if isinstance(rows, list):
        unknown = sorted({key for row in rows for key in row} - set(schema.names))
        if unknown:
            raise ValueError(f"table {table} has no column {', '.join(unknown)}")
        rows = pa.Table.from_pylist(rows, schema=schema)
    content = rows.cast(schema).replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)})
    sink = pa.BufferOutputStream()
    pq.write_table(content, sink, compression="zstd")
    return sink.getvalue()


def read_table(storage: Storage, table: str, run_id: str) -> list[dict[str, Any]]:
    """Return the rows of one run as dictionaries; an empty list when there are none."""
    folder = (REPORTS_FOLDER, table, f"run_id={run_id}")
    names = [name for name in storage.list(*folder) if name.endswith(".parquet") and not name.startswith(".")]
    return [row for name in names for row in read_rows(storage, *folder, name)]


def read_rows(storage: Storage, *place: str) -> list[dict[str, Any]]:
    """Return the rows of one Parquet file of the table `place[1]`; raises `UserError` where it cannot be read."""
    try:
        table = in_schema(place[1], read_parquet(storage.read_bytes(*place)))
        rows: list[dict[str, Any]] = table.to_pylist()
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{storage.show(*place)} cannot be read ({reason}); see to the storage") from error
    except (ValueError, OverflowError) as error:  # a time may lie beyond the years that Python knows
        raise UserError(f"{storage.show(*place)} is damaged ({error}); remove it") from error
    return rows


def in_schema(table: str, rows: pa.Table) -> pa.Table:
    """Return rows with the columns of `table`, those that an older report lacks null, and no others.

    Raises `ValueError` if a column is there twice, or holds values of another type.
    """
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


def find_run(storage: Storage, run_id: str) -> dict[str, Any] | None:
    """Return the `runs` row of `run_id`, or None; raises `UserError` if the report is damaged."""
    rows = read_table(storage, "runs", run_id)
    return rows[0] if rows else None


def load_run(storage: Storage, run_id: str) -> dict[str, Any]:
    """Return the `runs` row of `run_id`; raises `UserError` naming the runs that exist."""
    row = find_run(storage, run_id)
    if row is None:
        known = list_runs(storage)
        names = f"there are {', '.join(known[-5:])}" if known else "there are none yet"
        raise UserError(f"--run-id {run_id} does not exist in {storage.uri}; {names}")
    return row


def list_runs(storage: Storage) -> list[str]:
    """Return the ids of all runs, sorted."""
    selector = pafs.FileSelector(storage.path(REPORTS_FOLDER, "runs"), allow_not_found=True)
    return sorted(info.base_name.removeprefix("run_id=") for info in storage.fs.get_file_info(selector))


def config_json(config: TrainConfig) -> str:
    """Return the settings as the `runs` table keeps them."""
    return json.dumps(config.to_dict(), sort_keys=True)


def stored_config(storage: Storage, run_id: str) -> TrainConfig:
    """Return the settings that a run was started with; raises `UserError` if it does not exist, or is damaged."""
    return config_of(storage, run_id, load_run(storage, run_id))


def config_of(storage: Storage, run_id: str, row: dict[str, Any]) -> TrainConfig:
    """Return the settings in the `runs` row `row`; raises `UserError` if it holds none."""
    try:
        return TrainConfig.from_dict(parse_object(row["config_json"] or ""))
    except ValueError as error:
        place = storage.show(REPORTS_FOLDER, "runs", f"run_id={run_id}")
        raise UserError(f"{place} is damaged: config_json cannot be used ({error}); start another run") from error


def differing_settings(storage: Storage, run_id: str, config: TrainConfig) -> list[str]:
    """Return each setting in which `config` differs from the stored run's, as a flag with both values."""
    stored = stored_config(storage, run_id).to_dict()
    asked = config.to_dict()
    return [f"{flag(name)} {asked[name]} (was {stored[name]})" for name in stored if asked[name] != stored[name]]


def check_same_config(storage: Storage, run_id: str, config: TrainConfig) -> None:
    """Raise `UserError` naming each setting in which `config` differs from the stored run's."""
    differing = differing_settings(storage, run_id, config)
    require(
        not differing,
        f"--resume {run_id} was given other settings: {', '.join(differing)}; leave them out, or start a new run",
    )


def check_new_run(storage: Storage, run_id: str) -> None:
    """Raise `UserError` if a run of that id has left anything in the storage."""
    taken = find_run(storage, run_id) is not None or storage.exists(RUNS_FOLDER, run_id)
    require(
        not taken, f"--run-id {run_id} exists already in {storage.uri}; add --resume to continue it, or name another"
    )


# --- rows of an evaluation ------------------------------------------------------------------------------------------


def confusion_matrix(labels: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return counts (10, 10): row is the label, column the prediction."""
    cells = labels.astype(np.int64) * NUM_CLASSES + predicted
    return np.bincount(cells, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def confusion_rows(matrix: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the rows of the `confusion` table, all 100 cells."""
    return [
        {"label": label, "predicted": predicted, "count": int(matrix[label, predicted])}
        for label in range(NUM_CLASSES)
        for predicted in range(NUM_CLASSES)
    ]


def class_rows(matrix: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the rows of the `classes` table; a share of nothing is 0."""
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(CLASS_NAMES):
        hits, support, claimed = int(matrix[label, label]), int(matrix[label].sum()), int(matrix[:, label].sum())
        precision, recall = hits / max(claimed, 1), hits / max(support, 1)
        f1 = 2 * hits / max(claimed + support, 1)
        rows.append(
            {"label": label, "name": name, "precision": precision, "recall": recall, "f1": f1, "support": support}
        )
    return rows


# --- what identifies a run ----------------------------------------------------------------------------------------


@functools.cache
def source_hash() -> str:
    """Return the SHA-256 over the project's Python files that run here: proves which code made a row."""
    package = Path(__file__).resolve().parents[1]
    folders = [package, package.parent / "jobs"]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(f"{path.relative_to(package.parent).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def warn_of_other_code(run_id: str, earlier: dict[str, Any]) -> None:
    """Say so on standard error if other code than this wrote a run's row: the row will name this code alone."""
    began, now = earlier["source_hash"], source_hash()
    if began not in (None, now):
        print(f"warning: run {run_id} was trained so far by other code ({began[:12]}, now {now[:12]})", file=sys.stderr)


def versions() -> dict[str, str]:
    """Return the installed versions that runs record, without importing the packages."""
    return {"ray_version": version("ray"), "torch_version": version("torch")}


def hardware() -> str:
    """Return the driver's processor and core count in words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in read_lines(cpuinfo) if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines, none if it does not exist."""
    return path.read_text().splitlines() if path.exists() else []
