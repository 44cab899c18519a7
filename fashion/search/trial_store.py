"""The trials of a search: what the event loop knows of them, and their rows in the tables `trials`, `epochs`, `runs`.

Imports neither Ray nor torch. A search resumes from the rows, and from the events in its journal that no row holds yet.
The event loop notes each event in memory (`TrialStore`); the journal's thread writes it, and now and then all rows
(`TrialTables`). Killed at any moment, a search has lost its newest events alone, and those happen again: a trial whose
start was lost starts anew with the same settings, unless TPE draws others; one whose last epochs or end were lost goes
on from its checkpoint, which is removed only when its end is durable, and reports the epochs of that again.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fashion.config import UserError, parse_object
from fashion.reports import schemas, tables
from fashion.reports.journal import Event, Journal, read_journal
from fashion.search.space import SearchConfig
from fashion.storage import Storage
from fashion.training.metrics import Metrics, checkpoint_score, epoch_rows, from_rows, summarise

ENDED = ("completed", "stopped", "diverged", "error")
"""Statuses of a trial that does not run again. The only other status is `running`."""
RUN_STATUS = {"stopped": "completed", "error": "failed"}
"""Trial status -> status in the `runs` table, where the two differ."""
CHECKPOINTS = "checkpoints"
"""Folder of a trial's checkpoints, below the trial's own folder."""
JOURNAL = "journal"
"""Folder of a search's journal, below the search's folder."""
LAST_SEGMENT = "journal_segment"
"""Key of a file's metadata: the number of the last segment of the journal whose events are in its rows."""
IDENTITY = "identity"
"""Key of a file's metadata: the `runs` columns of the process that wrote those events, as a JSON object."""


def name_of(number: int) -> str:
    """Return the name of trial `number`, counted from 0, such as `t0003`; it stays the same when the search resumes."""
    return f"t{number:04d}"


def run_id_of(search_id: str, trial_id: str) -> str:
    """Return the `run_id` of a trial's rows in all tables."""
    return f"{search_id}-{trial_id}"


@dataclass
class Trial:
    """A trial: its settings, and what it has reached so far."""

    trial_id: str
    settings: dict[str, Any]
    status: str = "running"
    error: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    wall_s: float = 0.0
    """Seconds spent in the epochs that it reported."""
    history: list[Metrics] = field(default_factory=list)
    """Metrics of each epoch, as `TrainingRun` gives them."""
    process: dict[str, Any] = field(default_factory=dict)
    """Those of the columns `schemas.PROCESS_COLUMNS` that its latest epoch gave."""

    @property
    def best(self) -> Metrics | None:
        """Metrics of the epoch with the best `checkpoint_score`; None before the first epoch."""
        return max(self.history, key=checkpoint_score, default=None)

    @property
    def score(self) -> float:
        """What trials are ranked by: `checkpoint_score` of the best epoch; -1 if the trial failed or has no epoch."""
        best = self.best
        return -1.0 if best is None or self.status in ("diverged", "error") else checkpoint_score(best)


def apply_event(trials: dict[str, Trial], event: Event) -> None:
    """Change `trials` as an event of the journal says. An epoch that is reported again replaces all later ones too.

    A trial's first end stands: Tune starts one again whose end is noted if a callback of another library fails then.
    """
    kind, name = event["event"], event["trial"]
    if name in trials and trials[name].status in ENDED:
        return
    if kind == "start":
        at = datetime.fromisoformat(event["at"])
        trials.setdefault(name, Trial(name, event["settings"], started_at=at))
        return
    trial = trials[name]
    if kind == "epoch":
        metrics = event["metrics"]
        del trial.history[int(metrics["epoch"]) - 1 :]
        trial.history.append(metrics)
        trial.process = event["process"]
        trial.wall_s += event["seconds"]
    else:
        assert kind == "end", event
        trial.status, trial.error = event["status"], event["error"]
        trial.finished_at = datetime.fromisoformat(event["at"])


class TrialTables:
    """The rows of a search's trials, a file per table. Once the journal has started, its thread alone uses it.

    Rows of trials that ended are kept as Arrow, and never made again.
    """

    def __init__(self, storage: Storage, search_id: str, config: SearchConfig, base: dict[str, Any]) -> None:
        """Read the rows; raises `UserError` if they are damaged. `base` holds the settings that are not searched."""
        self._storage, self._search_id, self._config, self._base = storage, search_id, config, base
        names = storage.list(schemas.REPORTS_FOLDER, "trials")
        known = {run_id_of(search_id, name_of(number)) for number in range(config.num_samples)}
        self._folders = [name for name in names if tables.owner(name) in known]
        """Folders of single trials, in which earlier versions kept their rows."""
        self.lacks_trials = False
        """Whether other tables have rows and `trials` has none: after a crash, its rows are in the journal."""
        self._rows = self._read_rows()
        self.last_segment, self._identity = self._read_metadata()
        self.found = self._read_trials()
        """All trials, as their rows have them."""
        ended = pa.array([run_id_of(search_id, name) for name, trial in self.found.items() if trial.status in ENDED])
        self._rows = {
            table: rows.filter(pc.is_in(rows["run_id"], ended.cast(pa.string()))) for table, rows in self._rows.items()
        }
        self._running = {
            name: replace(trial, history=list(trial.history))
            for name, trial in self.found.items()
            if trial.status not in ENDED
        }
        self._done = {name for name in self.found if name not in self._running}
        self._ended: list[tuple[Trial, dict[str, Any]]] = []

    @property
    def is_split(self) -> bool:
        """Whether an earlier version has left a file per trial, which the next `write` replaces."""
        return bool(self._folders)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read_rows(self) -> dict[str, pa.Table]:
        found = {
            table: tables.read_search_table(self._storage, table, self._search_id) for table in tables.SEARCH_TABLES
        }
        # `trials` is written last.
        missing = [table for table, rows in found.items() if rows is None and found["trials"] is not None]
        if missing:
            told = f"the table {missing[0]} has no file {self._search_id}.parquet, but trials has"
            raise UserError(f"{told}; restore it from a copy, or start another search")
        self.lacks_trials = found["trials"] is None and any(rows is not None for rows in found.values())
        if found["trials"] is None and self._folders:
            with ThreadPoolExecutor(tables.READERS) as pool:
                parts = list(pool.map(self._read_folder, self._folders))
            return {table: pa.concat_tables(part[table] for part in parts) for table in tables.SEARCH_TABLES}
        return {table: tables.in_file_schema(table, []) if rows is None else rows for table, rows in found.items()}

    def _read_metadata(self) -> tuple[int, dict[str, Any]]:
        metadata = self._rows["trials"].schema.metadata or {}
        try:
            return int(metadata.get(LAST_SEGMENT.encode(), 0)), parse_object(metadata.get(IDENTITY.encode(), b"{}"))
        except ValueError as error:
            told = f"the reports of {self._search_id} are damaged ({error}); start another search"
            raise UserError(told) from error

    def _read_folder(self, name: str) -> dict[str, pa.Table]:
        run_id, found = tables.owner(name), {}
        for table in tables.SEARCH_TABLES:
            rows = tables.read_table(self._storage, table, run_id)
            if not rows and table != "epochs":
                raise UserError(f"the reports of {run_id} are damaged ({table} has no row); start another search")
            found[table] = tables.in_file_schema(table, [{"run_id": run_id} | row for row in rows])
        return found

    def _read_trials(self) -> dict[str, Trial]:
        by_run: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows["epochs"].to_pylist():
            by_run.setdefault(row["run_id"], []).append(row)
        runs = {row["run_id"]: row for row in self._rows["runs"].to_pylist()}
        found = {}
        for row in sorted(self._rows["trials"].to_pylist(), key=lambda row: str(row["trial_id"])):
            run_id = row["run_id"]
            try:
                found[row["trial_id"]] = trial_from(row, runs[run_id], by_run.get(run_id, []))
            except (ValueError, KeyError, OverflowError) as error:
                raise UserError(f"the reports of {run_id} are damaged ({error}); start another search") from error
        return found

    # --- writing ------------------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Take in an event that is durable."""
        if event["event"] == "process":
            self._identity = event["identity"]
            return
        name = event["trial"]
        if name in self._done:
            return
        apply_event(self._running, event)
        if event["event"] == "end":
            self._ended.append((self._running.pop(name), self._identity))
            self._done.add(name)

    def write(self, last_segment: int) -> None:
        """Write all rows, which hold the events up to `last_segment`.

        The file of `trials` is the last one. If those before it are newer, reading it back does no harm: an event that
        a row holds already may be applied to it again.
        """
        metadata = {LAST_SEGMENT: str(last_segment), IDENTITY: json.dumps(self._identity)}

        def write(table: str) -> None:
            ended = self._make_rows(table, self._ended)
            self._rows[table] = pa.concat_tables([self._rows[table], ended]).combine_chunks()
            running = self._make_rows(table, [(trial, self._identity) for trial in self._running.values()])
            rows = pa.concat_tables([self._rows[table], running]).sort_by("run_id")
            tables.write_search_table(self._storage, table, self._search_id, rows, metadata)

        *others, last = tables.SEARCH_TABLES
        with ThreadPoolExecutor(len(others)) as pool:  # in an object store, each write waits for the network
            list(pool.map(write, others))
        write(last)
        self._ended = []
        with ThreadPoolExecutor(tables.READERS) as pool:
            list(pool.map(self._remove_folder, self._folders))
        self._folders = []

    def _remove_folder(self, name: str) -> None:
        for table in tables.SEARCH_TABLES:  # `trials` last: where it is, `__init__` looks for the others too
            self._storage.delete_folder(schemas.REPORTS_FOLDER, table, name)

    def _make_rows(self, table: str, trials: list[tuple[Trial, dict[str, Any]]]) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for trial, identity in trials:
            run_id = {"run_id": run_id_of(self._search_id, trial.trial_id)}
            if table == "epochs":
                rows += [run_id | row for metrics in trial.history for row in epoch_rows(metrics)]
            elif table == "runs":
                rows.append(run_id | identity | self._run_row(trial))
            else:
                rows.append(run_id | self._trial_row(trial))
        return tables.in_file_schema(table, rows)

    def _run_row(self, trial: Trial) -> dict[str, Any]:
        row = {
            "kind": "trial",
            "search_id": self._search_id,
            "status": RUN_STATUS.get(trial.status, trial.status),
            "error": trial.error,
            "started_at": trial.started_at,
            "finished_at": trial.finished_at,
            "wall_s": trial.wall_s,
            "config_json": json.dumps(self._base | trial.settings, sort_keys=True),
        }
        summary = summarise(trial.history, int(trial.best["epoch"])) if trial.best else {"epochs_done": 0}
        return row | {name: trial.process.get(name) for name in schemas.PROCESS_COLUMNS} | summary

    def _trial_row(self, trial: Trial) -> dict[str, Any]:
        epochs_done = len(trial.history)
        best = trial.best or {}
        columns = schemas.SCHEMAS["trials"]
        reached_rungs = [rung for rung in self._config.rungs if rung <= epochs_done]
        return {
            "search_id": self._search_id,
            "trial_id": trial.trial_id,
            "status": trial.status,
            "error": trial.error,
            **{name: tables.value_or_none(value, columns.field(name).type) for name, value in trial.settings.items()},
            "settings_json": json.dumps(trial.settings),
            "max_epochs": self._config.max_epochs,
            "epochs_done": epochs_done,
            "rung": reached_rungs[-1] if reached_rungs else None,
            "best_epoch": best.get("epoch"),
            "val_loss": best.get("val_loss"),
            "val_accuracy": best.get("val_accuracy"),
            "last_val_accuracy": trial.history[-1]["val_accuracy"] if trial.history else None,
            "wall_s": trial.wall_s,
        }


def trial_from(row: dict[str, Any], run: dict[str, Any], epochs: list[dict[str, Any]]) -> Trial:
    """Return the trial of its rows in `trials`, `runs` and `epochs`; raises `ValueError` if they are damaged.

    Epochs may be newer than the other rows, never older.
    """
    history = from_rows(epochs)
    if len(history) < (row["epochs_done"] or 0):
        raise ValueError(f"{row['epochs_done']} epochs are done, and {len(history)} are in the table epochs")
    return Trial(
        row["trial_id"],
        parse_object(row["settings_json"] or ""),
        row["status"],
        row["error"],
        run["started_at"],
        run["finished_at"],
        row["wall_s"] or 0.0,
        history,
        {name: run[name] for name in schemas.PROCESS_COLUMNS if run[name] is not None},
    )


class TrialStore:
    """All trials of one search: read from the reports and the journal at the start, noted as they change.

    In a `with` block events can be noted; at its end all of them are in the reports. The caller makes sure that only
    one process does so at a time: see `cluster.lock.NameLock`.
    """

    def __init__(
        self, storage: Storage, search_id: str, config: SearchConfig, identity: dict[str, Any], base: dict[str, Any]
    ) -> None:
        """Read the trials that the search has begun before; none if it is new. Writes nothing.

        `identity` holds the `runs` columns that all trials share, `base` the settings that are not searched. Raises
        `UserError` if the rows of a trial, or a segment of the journal, are damaged.
        """
        self.config = config
        self._storage, self._identity = storage, identity
        self._folder = (schemas.SEARCHES_FOLDER, search_id, JOURNAL)
        self._tables = TrialTables(storage, search_id, config, base)
        self.trials = self._tables.found
        events, self._last_segment = read_journal(storage, self._folder, self._tables.last_segment)
        if self._tables.lacks_trials and not events:
            told = f"the table trials has no file {search_id}.parquet, but others have"
            raise UserError(f"{told}; restore it from a copy, or start another search")
        for event in events:
            self._tables.apply(event)
            if event["event"] != "process":
                apply_event(self.trials, event)
        self.has_news = bool(events) or self._tables.is_split
        """Whether the reports lack something that was read."""
        self.num_ended = sum(trial.status in ENDED for trial in self.trials.values())
        self._journal: Journal | None = None

    def __enter__(self) -> "TrialStore":
        assert self._journal is None, "a store is written once"
        self._journal = Journal(self._storage, self._folder, self._last_segment, self._tables.apply, self._tables.write)
        self._put({"event": "process", "identity": self._identity})
        return self

    def __exit__(self, *error: object) -> None:
        """Write everything, also after an error: the search can be resumed then."""
        assert self._journal is not None
        self._journal.close()

    # --- what a resumed search asks -----------------------------------------------------------------------------------

    def unfinished(self) -> list[Trial]:
        """Return the trials that were started and have not ended, in the order of their numbers."""
        return [trial for trial in self.trials.values() if trial.status not in ENDED]

    def not_started(self) -> list[int]:
        """Return the numbers of the trials that were never started."""
        return [number for number in range(self.config.num_samples) if name_of(number) not in self.trials]

    def judged(self) -> Iterator[tuple[Trial, list[Metrics]]]:
        """Yield each trial with the epochs on which the scheduler has certainly decided, lowest trial number first.

        The last epoch of an unfinished trial may have been written just before a crash, before the scheduler decided;
        the trial reports that epoch again.
        """
        for trial in sorted(self.trials.values(), key=lambda trial: trial.trial_id):
            yield trial, trial.history if trial.status in ENDED else trial.history[:-1]

    def ranked(self) -> list[Trial]:
        """Return all trials, best first."""
        return sorted(self.trials.values(), key=lambda trial: (-trial.score, trial.trial_id))

    # --- events, in memory at once and in the storage soon ------------------------------------------------------------

    def start(self, trial_id: str, settings: dict[str, Any]) -> None:
        """Note that a trial runs, for the first time or again after a crash or on `--resume`."""
        self._note({"event": "start", "trial": trial_id, "at": now(), "settings": settings})

    def add_epoch(self, trial_id: str, metrics: Metrics, seconds: float) -> None:
        """Note an epoch, which took `seconds`. An epoch that is reported again replaces itself and all later ones."""
        process = {name: metrics[name] for name in schemas.PROCESS_COLUMNS if metrics.get(name) is not None}
        figures = {name: value for name, value in metrics.items() if name not in schemas.PROCESS_COLUMNS}
        self._note({"event": "epoch", "trial": trial_id, "metrics": figures, "process": process, "seconds": seconds})

    def end(self, trial_id: str, status: str, error: str | None = None, then: Callable[[], None] | None = None) -> None:
        """Note that a trial ended, with one of the statuses `ENDED`; `then()` is called once that is durable."""
        self.num_ended += trial_id in self.trials and self.trials[trial_id].status not in ENDED
        self._note({"event": "end", "trial": trial_id, "at": now(), "status": status, "error": error}, then)

    def _note(self, event: Event, then: Callable[[], None] | None = None) -> None:
        apply_event(self.trials, event)
        self._put(event, then)

    def _put(self, event: Event, then: Callable[[], None] | None = None) -> None:
        assert self._journal is not None, "events are noted in a `with` block"
        self._journal.put(event, then)


def now() -> str:
    """Return the time, in ISO 8601 and UTC."""
    return datetime.now(UTC).isoformat()
