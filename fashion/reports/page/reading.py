"""Reads the Parquet reports that the page shows: runs, their epochs, searches and studies."""

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import pyarrow as pa

from fashion.config import TrainConfig, UserError, require
from fashion.reports.page.content import Row, is_finite
from fashion.reports.schemas import SCHEMAS
from fashion.reports.tables import OLD_PREFIX, list_files, owner, with_run_id
from fashion.storage import Storage, read_parquet

TRIAL_COLUMNS = (
    *("search_id", "trial_id", "status", "error", "lr", "dropout_conv", "dropout_fc"),
    *("epochs_done", "rung", "best_epoch", "val_loss", "val_accuracy", "wall_s"),
)
# A file without these columns is refused as damaged. All other columns may be missing: older reports lack some.
REQUIRED_COLUMNS = {
    "epochs": {"epoch", "split", "loss", "accuracy"},
    "trials": {"search_id", "trial_id", "status"},
    "importance": {"search_id", "setting", "importance"},
    **{table: set(SCHEMAS[table].names) for table in ("predictions", "classes", "confusion", "study")},
}
NOT_SEARCHED = ("preset", "epochs", "seed")


@dataclass(frozen=True)
class Search:
    """The trials of one search, with their epochs (trial id -> rows) and their runs (trial id -> row)."""

    search_id: str
    trials: Sequence[Row]
    epochs: dict[str, list[Row]]
    runs: dict[str, Row]
    findings: Sequence[Row] = ()
    """The search's rows of `importance`, the most important setting first; none of a search that is not over."""

    @cached_property
    def best(self) -> Row | None:
        """The trial with the highest val accuracy among those that did not fail; None if there is none."""
        valid = [trial for trial in self.trials if trial["status"] not in ("diverged", "error")]
        scored = [trial for trial in valid if is_finite(trial["val_accuracy"])]
        return max(scored, key=lambda trial: float(trial["val_accuracy"]), default=None)

    @cached_property
    def max_epochs(self) -> int:
        """Epochs of a trial that is not stopped: the largest `max_epochs` or `epochs_done` of any trial."""
        recorded = [trial["max_epochs"] for trial in self.trials if trial.get("max_epochs")]
        return int(max([*recorded, *(trial["epochs_done"] or 0 for trial in self.trials)]))

    @cached_property
    def rungs(self) -> list[int]:
        """Epochs at which ASHA compared trials: all values of `rung`, the last rung that a trial reached."""
        return sorted({int(trial["rung"]) for trial in self.trials if trial["rung"]})


def spent_epochs(search: Search) -> tuple[int, int, int]:
    """Return three numbers of epochs: trained, needed by full trials, and saved by stopping trials early."""
    full = search.max_epochs
    spent = sum(trial["epochs_done"] or 0 for trial in search.trials)
    saved = sum(full - (trial["epochs_done"] or 0) for trial in search.trials if trial["status"] == "stopped")
    return spent, full * len(search.trials), saved


def searched_settings(trials: Sequence[Row]) -> list[str]:
    """Return the settings of `TrainConfig` whose values differ between the trials, lr and dropout first."""
    settings = [each.name for each in fields(TrainConfig) if each.name not in NOT_SEARCHED] + ["depth"]
    first = ["lr", "dropout_conv", "dropout_fc"]
    order = first + [name for name in settings if name not in first]
    return [name for name in order if len({trial[name] for trial in trials if trial.get(name) is not None}) > 1]


@dataclass(frozen=True)
class Reports:
    """Everything that the page shows. `runs` is sorted, best first, and holds trials only if they were asked for."""

    runs: list[Row]
    epochs: dict[str, list[Row]]
    """Run id -> rows of `epochs`."""
    searches: list[Search]
    studies: dict[str, list[Row]]
    """Study id -> rows of `study`."""


def load_reports(storage: Storage, run_ids: Sequence[str] = ()) -> Reports:
    """Read the reports, all or those of `run_ids` (ids of runs, searches or studies).

    Raises `UserError` if there are no reports, or none of one of `run_ids`.
    """
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
    searches = group_searches(trials, runs, epochs, read_rows(storage, "importance") if trials else [])
    studies = group_studies(read_rows(storage, "study"))
    check_exists(run_ids, runs, [*studies, *(search.search_id for search in searches)], storage)
    wanted = set(run_ids) or {*runs, *studies, *(search.search_id for search in searches)}
    shown_runs = [row for row in runs.values() if row["run_id"] in wanted and (run_ids or row["kind"] != "trial")]
    wanted |= {row["search_id"] for row in shown_runs if row["search_id"]}
    searches = [search for search in searches if search.search_id in wanted]
    studies = {study_id: rows for study_id, rows in studies.items() if study_id in wanted}
    return Reports(rank_runs(shown_runs, searches), epochs, searches, studies)


def read_rows(storage: Storage, table: str) -> list[Row]:
    """Return all rows of a table with their `run_id`; columns that an older report lacks are None."""
    return [row for rows in read_files(storage, table) for row in with_all_columns(table, rows)]


def read_run_rows(storage: Storage, table: str, run_id: str) -> list[Row]:
    """Return the rows of a table that lie in files of one run alone, as those of its evaluation do."""
    return [row for rows in read_files(storage, table, run_id) for row in with_all_columns(table, rows)]


def with_all_columns(table: str, rows: pa.Table) -> list[Row]:
    """Return rows as dictionaries with every column of the table; columns that the file lacks are None."""
    names = SCHEMAS[table].names if table in SCHEMAS else []
    blank = dict.fromkeys([*names, *(TRIAL_COLUMNS if table == "trials" else ())])
    return [blank | row for row in rows.to_pylist()]


def read_files(storage: Storage, table: str, run_id: str = "") -> list[pa.Table]:
    """Return the rows, `run_id` first, of each Parquet file of a table, or of one run's own files. Eight threads read.

    Raises `UserError` for a file that cannot be read, is damaged, or lacks columns.
    """
    folders = [(run_id,), (f"{OLD_PREFIX}{run_id}",)] if run_id else [()]
    places = [place for folder in folders for place in list_files(storage, table, *folder)]
    # `open_reports`, killed in between, leaves a file of an earlier version at its old place as well.
    moved = {(owner(place[2]), place[-1]) for place in places if not place[2].startswith(OLD_PREFIX)}
    stale = [each for each in places if each[2].startswith(OLD_PREFIX) and (owner(each[2]), each[-1]) in moved]

    def read(place: tuple[str, ...]) -> pa.Table:
        file = storage.show(*place)
        try:
            rows = read_parquet(storage.read_bytes(*place))
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} cannot be read ({reason}); see to the storage") from error
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); remove it or write it again") from error
        missing = ", ".join(sorted(REQUIRED_COLUMNS.get(table, set()) - set(rows.column_names)))
        require(not missing, f"{file} is damaged (it lacks {missing}); remove it or write it again")
        try:
            return with_run_id(table, rows, owner(place[2]))
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); remove it or write it again") from error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read, [place for place in places if place not in stale]))


def check_exists(asked: Sequence[str], runs: dict[str, Row], names: Sequence[str], storage: Storage) -> None:
    """Raise `UserError` if an id in `asked` is neither a run nor in `names`, the ids of searches and studies."""
    order = sorted(runs, key=lambda run_id: (runs[run_id]["kind"] == "trial", run_id))
    for run_id in asked:
        some = ", ".join([*names, *order][:8])
        require(run_id in {*names, *order}, f"--run-id {run_id} does not exist in {storage.uri}; there are {some}")


def fill_from_epochs(run: Row, epochs: Sequence[Row]) -> None:
    """Add the metrics of the best epoch so far to the row of a run that has none yet (running or interrupted)."""
    val = [row for row in epochs if row["split"] == "val" and is_finite(row["accuracy"])]
    if run["val_accuracy"] is not None or not val:
        return
    best = max(val, key=lambda row: float(row["accuracy"]))
    train = [row for row in epochs if row["split"] == "train" and row["epoch"] == best["epoch"]]
    run |= {"best_epoch": best["epoch"], "epochs_done": max(row["epoch"] for row in epochs)}
    for split, rows in (("val", [best]), ("train", train)):
        for row in rows:
            run |= {f"{split}_loss": row["loss"], f"{split}_accuracy": row["accuracy"]}


def group_searches(
    trials: Sequence[Row], runs: dict[str, Row], epochs: dict[str, list[Row]], findings: Sequence[Row]
) -> list[Search]:
    """Group trials by search, with the run and the epochs of each, and with what the search found."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for trial in trials:
        groups[str(trial["search_id"])].append(trial)
    run_ids = {*runs, *epochs}
    searches: list[Search] = []
    for search_id, rows in sorted(groups.items()):
        owners = {row["trial_id"]: run_id_of_trial(row, run_ids) for row in rows}
        searches.append(
            Search(
                search_id,
                rows,
                {trial: epochs.get(run_id, []) for trial, run_id in owners.items()},
                {trial: runs[run_id] for trial, run_id in owners.items() if run_id in runs},
                [row for row in findings if row["search_id"] == search_id],
            )
        )
    return searches


def group_studies(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by study."""
    studies: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        studies[str(row["study_id"])].append(row)
    return dict(studies)


def run_id_of_trial(trial: Row, run_ids: Collection[str]) -> str:
    """Return the run id of a trial: its id, its id with the search's before it, or else the row's `run_id`."""
    trial_id, search_id = str(trial["trial_id"]), str(trial["search_id"])
    names = [trial_id, f"{search_id}-{trial_id}", f"{search_id}_{trial_id}", f"{search_id}.{trial_id}"]
    return next((name for name in names if name in run_ids), str(trial["run_id"]))


def rank_runs(runs: Sequence[Row], searches: Sequence[Search]) -> list[Row]:
    """Sort runs: real data before stand-in data, then by val accuracy; a refit has that of the search's best trial.

    A refit's own val accuracy says nothing, since it trains on val too. Test accuracy must not choose: a run chosen by
    test accuracy could not be evaluated on test any more.
    """
    best_of_search = {search.search_id: search.best["val_accuracy"] for search in searches if search.best is not None}

    def key(row: Row) -> tuple[bool, float, str]:
        score: Any = best_of_search.get(row["search_id"]) if row["kind"] == "refit" else row["val_accuracy"]
        return is_stand_in(row), -float(score) if is_finite(score) else 1.0, str(row["run_id"])

    return sorted(runs, key=key)


def is_stand_in(row: Row) -> bool:
    """Return whether a run used the stand-in data, drawn images in place of Fashion-MNIST."""
    return str(row["dataset"]).endswith("synthetic")


def read_config(text: str | None) -> Row:
    """Parse a column of JSON settings, such as `config_json`; {} if it holds no JSON object."""
    try:
        config = json.loads(text or "{}")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}
