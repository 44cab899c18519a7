"""Reports read and grouped for the page: runs, epochs, searches, studies."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from fashion.config import UserError, require
from fashion.reports.page.figures import Row, finite
from fashion.reports.page.search_figures import Search
from fashion.reports.schemas import REPORTS_FOLDER, SCHEMAS
from fashion.reports.tables import in_schema
from fashion.storage import Storage, read_parquet

TRIAL_COLUMNS = (
    *("search_id", "trial_id", "status", "error", "lr", "dropout_conv", "dropout_fc"),
    *("epochs_done", "rung", "best_epoch", "val_loss", "val_accuracy", "wall_s"),
)

# Without these columns a file is of no use; all others may be missing.
NEEDED = {
    "epochs": {"epoch", "split", "loss", "accuracy"},
    "trials": {"search_id", "trial_id", "status"},
    **{table: set(SCHEMAS[table].names) for table in ("predictions", "classes", "confusion", "study")},
}


@dataclass(frozen=True)
class Reports:
    """What the page is made of; `runs` without the trials, best first."""

    runs: list[Row]
    epochs: dict[str, list[Row]]
    """Run id -> rows of `epochs`."""
    searches: list[Search]
    studies: dict[str, list[Row]]
    """Study id -> rows of `study`."""


def read_rows(storage: Storage, table: str) -> list[Row]:
    """Return all rows of a table with their `run_id`; columns that an older report lacks are None."""
    return [row for run_id, rows in read_files(storage, table) for row in filled(table, run_id, rows)]


def filled(table: str, run_id: str, rows: pa.Table) -> list[Row]:
    """Turn rows into dictionaries with every column of the table."""
    names = SCHEMAS[table].names if table in SCHEMAS else []
    blank = dict.fromkeys([*names, *(TRIAL_COLUMNS if table == "trials" else ())])
    return [blank | {"run_id": run_id} | row for row in rows.to_pylist()]


def read_files(storage: Storage, table: str, run_id: str = "") -> list[tuple[str, pa.Table]]:
    """Return (run id, rows) of each file of a table, or of one run's files; eight at a time."""
    folder = [REPORTS_FOLDER, table, *([f"run_id={run_id}"] if run_id else [])]
    selector = pafs.FileSelector(storage.path(*folder), allow_not_found=True, recursive=True)
    found = sorted(info.path for info in storage.fs.get_file_info(selector) if info.type == pafs.FileType.File)
    paths = [path for path in found if path.endswith(".parquet") and not Path(path).name.startswith(".")]

    def read(path: str) -> tuple[str, pa.Table]:
        owner = next((part[7:] for part in path.split("/") if part.startswith("run_id=")), "")
        place = path.removeprefix(f"{storage.root}/")
        file = storage.show(place)
        try:
            rows = read_parquet(storage.read_bytes(place))
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} cannot be read ({reason}); see to the storage") from error
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); remove it or write it again") from error
        missing = ", ".join(sorted(NEEDED.get(table, set()) - set(rows.column_names)))
        require(not missing, f"{file} is damaged (it lacks {missing}); remove it or write it again")
        try:
            return owner, in_schema(table, rows)
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); remove it or write it again") from error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read, paths))


def load_reports(storage: Storage, run_ids: Sequence[str] = ()) -> Reports:
    """Read runs, epochs and trials; raises `UserError` when there is nothing, or not what was asked for."""
    runs = {row["run_id"]: row for row in read_rows(storage, "runs")}
    trials = read_rows(storage, "trials")
    way_out = f"train first: python -m jobs.train --storage {storage.uri}"
    require(bool(runs or trials), f"--storage {storage.uri} holds no reports; {way_out}")
    epochs: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(storage, "epochs"):
        if isinstance(row["epoch"], int):
            epochs[row["run_id"]].append(row)
    for run_id, row in runs.items():
        fill_from_epochs(row, epochs.get(run_id, []))
    searches, studies = group_searches(trials, runs, epochs), group_studies(read_rows(storage, "study"))
    check_known(run_ids, runs, [*studies, *(search.search_id for search in searches)], storage)
    wanted = set(run_ids) or {*runs, *studies, *(search.search_id for search in searches)}
    shown_runs = [row for row in runs.values() if row["run_id"] in wanted and (run_ids or row["kind"] != "trial")]
    wanted |= {row["search_id"] for row in shown_runs if row["search_id"]}
    searches = [search for search in searches if search.search_id in wanted]
    studies = {study_id: rows for study_id, rows in studies.items() if study_id in wanted}
    return Reports(ranked(shown_runs, searches), epochs, searches, studies)


def check_known(asked: Sequence[str], runs: dict[str, Row], names: Sequence[str], storage: Storage) -> None:
    """Raise `UserError` if what was asked for is no run and not in `names` (searches, studies); it names some."""
    order = sorted(runs, key=lambda run_id: (runs[run_id]["kind"] == "trial", run_id))
    for run_id in asked:
        some = ", ".join([*names, *order][:8])
        require(run_id in {*names, *order}, f"--run-id {run_id} does not exist in {storage.uri}; there are {some}")


def fill_from_epochs(run: Row, epochs: Sequence[Row]) -> None:
    """Give a run that has no figures of its own yet (running, interrupted) those of its best epoch so far."""
    val = [row for row in epochs if row["split"] == "val" and finite(row["accuracy"])]
    if run["val_accuracy"] is not None or not val:
        return
    best = max(val, key=lambda row: float(row["accuracy"]))
    train = [row for row in epochs if row["split"] == "train" and row["epoch"] == best["epoch"]]
    run |= {"best_epoch": best["epoch"], "epochs_done": max(row["epoch"] for row in epochs)}
    for split, rows in (("val", [best]), ("train", train)):
        for row in rows:
            run |= {f"{split}_loss": row["loss"], f"{split}_accuracy": row["accuracy"]}


def group_searches(trials: Sequence[Row], runs: dict[str, Row], epochs: dict[str, list[Row]]) -> list[Search]:
    """Group trials by search and find each one's run and epochs."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for trial in trials:
        groups[str(trial["search_id"])].append(trial)
    searches: list[Search] = []
    for search_id, rows in sorted(groups.items()):
        owners = {row["trial_id"]: run_of(row, [*runs, *epochs]) for row in rows}
        searches.append(
            Search(
                search_id,
                rows,
                {trial: epochs.get(run_id, []) for trial, run_id in owners.items()},
                {trial: runs[run_id] for trial, run_id in owners.items() if run_id in runs},
            )
        )
    return searches


def group_studies(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows of studies, which come part by part, by study."""
    studies: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        studies[str(row["study_id"])].append(row)
    return dict(studies)


def run_of(trial: Row, run_ids: Sequence[str]) -> str:
    """Return the run id of a trial: its own id, or that after the search's, or the row's `run_id`."""
    trial_id, search_id = str(trial["trial_id"]), str(trial["search_id"])
    names = [trial_id, f"{search_id}-{trial_id}", f"{search_id}_{trial_id}", f"{search_id}.{trial_id}"]
    return next((name for name in names if name in run_ids), str(trial["run_id"]))


def ranked(runs: Sequence[Row], searches: Sequence[Search]) -> list[Row]:
    """Sort runs: real data before the stand-in, then by val accuracy; a refit has that of the trial that won.

    Test accuracy does not decide: what was chosen by it could no longer be judged by it. A refit trains on val too.
    """
    won = {search.search_id: search.best["val_accuracy"] for search in searches if search.best is not None}

    def key(row: Row) -> tuple[bool, float, str]:
        score: Any = won.get(row["search_id"]) if row["kind"] == "refit" else row["val_accuracy"]
        return is_stand_in(row), -float(score) if finite(score) else 1.0, str(row["run_id"])

    return sorted(runs, key=key)


def is_stand_in(row: Row) -> bool:
    """Tell whether a run used the drawn images in place of Fashion-MNIST."""
    return str(row["dataset"]).endswith("synthetic")


def table_of(storage: Storage, table: str, run_id: str) -> list[Row]:
    """Return one run's rows of a table."""
    return [row for owner, rows in read_files(storage, table, run_id) for row in filled(table, owner, rows)]
