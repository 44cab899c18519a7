"""The callback of a search on Ray Tune: records each trial, prints a line per epoch, removes checkpoints."""

from pathlib import Path
from typing import Any

import ray.tune

from fashion.distributed import trainer
from fashion.reports import schemas
from fashion.search.scheduler import trial_name
from fashion.search.trial import CHECKPOINTS, TRIAL, remove_workers
from fashion.search.trial_store import ENDED, TrialStore
from fashion.storage import Storage
from fashion.training.metrics import TIMES, Metrics

KEPT = {
    *("epoch", "lr", *schemas.PROCESS_COLUMNS),
    *(name for pair in TIMES.values() for name in pair),
    *(f"{split}_{figure}" for split in TIMES for figure in ("loss", "accuracy", "rows")),
}
"""Metrics that are kept of a trial's result; Tune adds many of its own."""


class SearchCallback(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Records trials in the trial store and prints their epochs and ends; removes ended trials' checkpoints."""

    def __init__(self, storage: Storage, search_id: str, store: TrialStore) -> None:
        self._storage = storage
        self._search_id = search_id
        self._store = store
        self._failures: dict[str, tuple[str, str]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial starts, or starts again after a crash."""
        settings = {name: value for name, value in trial.config.items() if name != TRIAL}
        self._store.start(trial.config[TRIAL], settings)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an epoch, or why a trial fails."""
        name = trial_name(trial)
        for reason, status in (("diverged", "diverged"), ("refused", "error")):
            if reason in result:
                self._failures[name] = (status, result[reason])
                return
        metrics: Metrics = {key: value for key, value in result.items() if key in KEPT}
        self._store.add_epoch(name, metrics, result["time_this_iter_s"])
        print(trial_line(self._store, name), flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the end of a trial that was stopped, ran its last epoch, or failed with a reason."""
        name = trial_name(trial)
        done = len(self._store.trials[name].history) >= self._store.config.max_epochs
        self._end(name, *self._failures.get(name, ("completed" if done else "stopped", None)))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Free the resources of a crashed trial, so that it can start again."""
        remove_workers(self._search_id, trial_name(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that crashed once more than it may."""
        # Tune has just written this file; `trial.get_error` reads its copy in the storage, which may be written later.
        self._end(trial_name(trial), "error", trainer.summarise_error(Path(trial.error_file).read_text()))

    def _end(self, name: str, status: str, error: str | None) -> None:
        self._store.end(name, status, error)
        print(f"{name}  {status}" + (f": {error}" if error else ""), flush=True)
        remove_workers(self._search_id, name)
        self._storage.delete_folder(schemas.SEARCHES_FOLDER, self._search_id, name, CHECKPOINTS)


def trial_line(store: TrialStore, name: str) -> str:
    """Return the line for the console about a trial's latest epoch."""
    trial = store.trials[name]
    latest = trial.history[-1]
    settings = "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in trial.settings.items()
    )
    ended = sum(each.status in ENDED for each in store.trials.values())
    return (
        f"{name}  epoch {latest['epoch']}/{store.config.max_epochs}  val accuracy {latest['val_accuracy']:.4f} "
        f"loss {latest['val_loss']:.4f}  {settings}  ({ended} of {store.config.num_samples} trials ended)"
    )
