"""The trials of a search, stored in the reports: a row per trial, its epochs, its run. Imports neither Ray nor torch.

A search needs these rows alone to resume. They are written when a trial starts, reports an epoch, and ends.
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
RUN_STATUS = {"stopped": "completed", "error": "failed"}
"""A trial's status as the `runs` table names it, where that table has another name."""


def name_of(number: int) -> str:
    """Return the name, as `t0003`, of trial `number`, counted from 0; it stays the same when a search is resumed."""
    return f"t{number:04d}"


def run_id_of(search_id: str, trial_id: str) -> str:
    """Return the `run_id` of a trial's rows in all tables."""
    return f"{search_id}-{trial_id}"


@dataclass
class Trial:
    """The settings, status and epochs of a trial."""

    trial_id: str
    settings: dict[str, Any]
    status: str = "running"
    error: str | None = None
    started_at: datetime | None = None
    wall_s: float = 0.0
    history: list[Metrics] = field(default_factory=list)
    """Metrics of each epoch, as `TrainingRun` yields them, with its `process_columns`."""

    @property
    def best(self) -> Metrics | None:
        """Metrics of the best epoch, or None before the first epoch."""
        return max(self.history, key=checkpoint_score, default=None)

    @property
    def score(self) -> float:
        """The score by which trials are ranked, higher is better; -1 for failed trials and those without an epoch."""
        best = self.best
        return -1.0 if best is None or self.status in ("diverged", "error") else checkpoint_score(best)


class TrialStore:
    """All trials of one search: reads them from the reports at the start, and writes each one when it changes.

    Only one process may write at a time.
    """

    def __init__(
        self, storage: Storage, search_id: str, config: SearchConfig, identity: dict[str, Any], base: dict[str, Any]
    ) -> None:
        """Read the trials that the search has started so far. Raises `UserError` if their reports are damaged.

        `identity` holds the `runs` columns that all trials share, `base` the settings that are not searched.
        """
        self.config = config
        self._storage = storage
        self._search_id = search_id
        self._identity = identity
        self._base = base
        present = storage.list(schemas.REPORTS_FOLDER, "trials")
        names = [name_of(number) for number in range(config.num_samples)]
        self.trials = {name: self._read(name) for name in names if f"run_id={self._run_id(name)}" in present}

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
        columns = {name: run[name] for name in schemas.PROCESS_COLUMNS}
        return Trial(
            trial_id,
            settings,
            row["status"],
            row["error"],
            run["started_at"],
            row["wall_s"] or 0.0,
            [columns | metrics for metrics in history],
        )

    # --- reading ------------------------------------------------------------------------------------------------------

    def unfinished(self) -> list[Trial]:
        """Return the trials that have started and not ended, by number."""
        return [trial for trial in self.trials.values() if trial.status not in ENDED]

    def not_started(self) -> list[int]:
        """Return the numbers of the trials that have not started."""
        return [number for number in range(self.config.num_samples) if name_of(number) not in self.trials]

    def judged(self) -> Iterator[tuple[Trial, list[Metrics]]]:
        """Yield each trial, by name, with the epochs that the scheduler has certainly judged.

        The last epoch of an unfinished trial may have been written before it was judged: the trial reports it again.
        """
        for trial in sorted(self.trials.values(), key=lambda trial: trial.trial_id):
            yield trial, trial.history if trial.status in ENDED else trial.history[:-1]

    def ranked(self) -> list[Trial]:
        """Return all trials, best first."""
        return sorted(self.trials.values(), key=lambda trial: (-trial.score, trial.trial_id))

    # --- writing ------------------------------------------------------------------------------------------------------

    def start(self, trial_id: str, settings: dict[str, Any]) -> None:
        """Record that a trial starts, for the first time or again."""
        trial = self.trials.setdefault(trial_id, Trial(trial_id, settings, started_at=datetime.now(UTC)))
        self._write(trial)

    def add_epoch(self, trial_id: str, metrics: Metrics, seconds: float) -> None:
        """Record an epoch that took `seconds`; an epoch reported again replaces the earlier one and all after it."""
        trial = self.trials[trial_id]
        trial.history = [*trial.history[: int(metrics["epoch"]) - 1], metrics]
        trial.wall_s += seconds
        rows = [row for each in trial.history for row in epoch_rows(each)]
        tables.write_table(self._storage, "epochs", self._run_id(trial_id), rows)
        self._write(trial)

    def end(self, trial_id: str, status: str, error: str | None = None) -> None:
        """Record how a trial ended; `status` is one of `ENDED`."""
        trial = self.trials[trial_id]
        trial.status, trial.error = status, error
        self._write(trial)

    def _write(self, trial: Trial) -> None:
        """Write the rows in `runs` and then in `trials`, where a resumed search looks for its trials."""
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
        columns = {name: latest.get(name) for name in schemas.PROCESS_COLUMNS}
        return (
            self._identity
            | row
            | columns
            | (summarise(trial.history, int(trial.best["epoch"])) if trial.best else {"epochs_done": 0})
        )

    def _trial_row(self, trial: Trial) -> dict[str, Any]:
        epochs_done = len(trial.history)
        best = trial.best or {}
        columns = schemas.SCHEMAS["trials"]
        reached = [rung for rung in self.config.rungs if rung <= epochs_done]
        return {
            "search_id": self._search_id,
            "trial_id": trial.trial_id,
            "status": trial.status,
            "error": trial.error,
            **{name: fitting(columns.field(name).type, value) for name, value in trial.settings.items()},
            "settings_json": json.dumps(trial.settings),
            "max_epochs": self.config.max_epochs,
            "epochs_done": epochs_done,
            "rung": reached[-1] if reached else None,
            "best_epoch": best.get("epoch"),
            "val_loss": best.get("val_loss"),
            "val_accuracy": best.get("val_accuracy"),
            "last_val_accuracy": trial.history[-1]["val_accuracy"] if trial.history else None,
            "wall_s": trial.wall_s,
        }


def fitting(kind: pa.DataType, value: Any) -> Any:
    """Return `value` if a column of type `kind` can hold it, else None: settings from `--first` may be of any type."""
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
