"""The trials of a search, kept in the tables `trials`, `epochs` and `runs`. Imports neither Ray nor torch.

A search resumes from these rows alone: they are written whenever a trial starts, reports an epoch, or ends, and each
table's file of a trial is replaced as a whole.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from fashion.config import UserError, parse_object
from fashion.reports import runs, schemas, tables
from fashion.search.space import SearchConfig
from fashion.storage import Storage
from fashion.training.metrics import Metrics, checkpoint_score, epoch_rows, from_rows, summarise

ENDED = ("completed", "stopped", "diverged", "error")
"""Statuses of a trial that does not run again. The only other status is `running`."""
RUN_STATUS = {"stopped": "completed", "error": "failed"}
"""Trial status -> status in the `runs` table, where the two differ."""


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
    wall_s: float = 0.0
    """Seconds spent in the epochs that it reported."""
    history: list[Metrics] = field(default_factory=list)
    """Metrics of each epoch, as `TrainingRun` gives them, with the columns `schemas.PROCESS_COLUMNS`."""

    @property
    def best(self) -> Metrics | None:
        """Metrics of the epoch with the best `checkpoint_score`; None before the first epoch."""
        return max(self.history, key=checkpoint_score, default=None)

    @property
    def score(self) -> float:
        """What trials are ranked by: `checkpoint_score` of the best epoch; -1 if the trial failed or has no epoch."""
        best = self.best
        return -1.0 if best is None or self.status in ("diverged", "error") else checkpoint_score(best)


class TrialStore:
    """All trials of one search: read from the reports at the start, written as they change.

    The caller makes sure that only one process writes at a time: see `cluster.lock.NameLock`.
    """

    def __init__(
        self, storage: Storage, search_id: str, config: SearchConfig, identity: dict[str, Any], base: dict[str, Any]
    ) -> None:
        """Read the trials that the search has begun before; none if it is new.

        `identity` holds the `runs` columns that all trials share, `base` the settings that are not searched. Raises
        `UserError` if the rows of a trial are damaged.
        """
        self.config = config
        self._storage = storage
        self._search_id = search_id
        self._identity = identity
        self._base = base
        folders = storage.list(schemas.REPORTS_FOLDER, "trials")
        names = [name_of(number) for number in range(config.num_samples)]
        self.trials = {name: self._read(name) for name in names if f"run_id={self._run_id(name)}" in folders}

    def _run_id(self, trial_id: str) -> str:
        return run_id_of(self._search_id, trial_id)

    def _read(self, trial_id: str) -> Trial:
        run_id = self._run_id(trial_id)
        run = runs.load_run(self._storage, run_id)
        try:
            row = tables.read_table(self._storage, "trials", run_id)[0]
            settings = parse_object(row["settings_json"] or "")
            history = from_rows(tables.read_table(self._storage, "epochs", run_id))
        except (ValueError, IndexError) as error:
            raise UserError(f"the reports of {run_id} are damaged ({error}); start another search") from error
        process_columns = {name: run[name] for name in schemas.PROCESS_COLUMNS}
        return Trial(
            trial_id,
            settings,
            row["status"],
            row["error"],
            run["started_at"],
            row["wall_s"] or 0.0,
            [process_columns | metrics for metrics in history],
        )

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

    # --- changes, each written at once --------------------------------------------------------------------------------

    def start(self, trial_id: str, settings: dict[str, Any]) -> None:
        """Record that a trial runs, for the first time or again after a crash or on `--resume`."""
        trial = self.trials.setdefault(trial_id, Trial(trial_id, settings, started_at=datetime.now(UTC)))
        self._write(trial)

    def add_epoch(self, trial_id: str, metrics: Metrics, seconds: float) -> None:
        """Record an epoch, which took `seconds`. An epoch that is reported again replaces itself and all later ones."""
        trial = self.trials[trial_id]
        trial.history = [*trial.history[: int(metrics["epoch"]) - 1], metrics]
        trial.wall_s += seconds
        rows = [row for each in trial.history for row in epoch_rows(each)]
        tables.write_table(self._storage, "epochs", self._run_id(trial_id), rows)
        self._write(trial)

    def end(self, trial_id: str, status: str, error: str | None = None) -> None:
        """Record that a trial ended, with one of the statuses `ENDED`."""
        trial = self.trials[trial_id]
        trial.status, trial.error = status, error
        self._write(trial)

    def _write(self, trial: Trial) -> None:
        """Write the trial's rows, that of `trials` last: `__init__` looks for trials there, and needs the other row."""
        tables.write_table(self._storage, "runs", self._run_id(trial.trial_id), [self._run_row(trial)])
        tables.write_table(self._storage, "trials", self._run_id(trial.trial_id), [self._trial_row(trial)])

    def _run_row(self, trial: Trial) -> dict[str, Any]:
        ended = trial.status in ENDED
        latest = trial.history[-1] if trial.history else {}
        row = {
            "kind": "trial",
            "search_id": self._search_id,
            "status": RUN_STATUS.get(trial.status, trial.status),
            "error": trial.error,
            "started_at": trial.started_at,
            "finished_at": datetime.now(UTC) if ended else None,
            "wall_s": trial.wall_s,
            "config_json": json.dumps(self._base | trial.settings, sort_keys=True),
        }
        process_columns = {name: latest.get(name) for name in schemas.PROCESS_COLUMNS}
        return (
            self._identity
            | row
            | process_columns
            | (summarise(trial.history, int(trial.best["epoch"])) if trial.best else {"epochs_done": 0})
        )

    def _trial_row(self, trial: Trial) -> dict[str, Any]:
        epochs_done = len(trial.history)
        best = trial.best or {}
        columns = schemas.SCHEMAS["trials"]
        reached_rungs = [rung for rung in self.config.rungs if rung <= epochs_done]
        return {
            "search_id": self._search_id,
            "trial_id": trial.trial_id,
            "status": trial.status,
            "error": trial.error,
            **{name: value_or_none(value, columns.field(name).type) for name, value in trial.settings.items()},
            "settings_json": json.dumps(trial.settings),
            "max_epochs": self.config.max_epochs,
            "epochs_done": epochs_done,
            "rung": reached_rungs[-1] if reached_rungs else None,
            "best_epoch": best.get("epoch"),
            "val_loss": best.get("val_loss"),
            "val_accuracy": best.get("val_accuracy"),
            "last_val_accuracy": trial.history[-1]["val_accuracy"] if trial.history else None,
            "wall_s": trial.wall_s,
        }


def value_or_none(value: Any, column_type: pa.DataType) -> Any:
    """Return `value` if a column of `column_type` can hold it, else None: the user may give anything in `--first`."""
    try:
        return pa.scalar(value, column_type).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
