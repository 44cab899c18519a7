"""The callback through which Ray Tune reports a trial's start, epochs and end: record, print, remove checkpoints.

Tune calls it from its event loop, which all trials of the search share: nothing here waits for the storage, or costs
more with more trials.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray.tune

from fashion.distributed import trainer
from fashion.distributed.trainers import Engine
from fashion.reports import schemas
from fashion.reports.tracking import TensorBoard
from fashion.search.scheduler import trial_name
from fashion.search.space import TRIAL
from fashion.search.trial import remove_workers
from fashion.search.trial_store import CHECKPOINTS, TrialStore
from fashion.storage import Storage
from fashion.training.metrics import NOTES, TIMES, Metrics

RECORDED_METRICS = {
    *("epoch", "lr", *schemas.PROCESS_COLUMNS),
    *(name for pair in TIMES.values() for name in pair),
    *(f"{split}_{figure}" for split in TIMES for figure in ("loss", "accuracy", "rows")),
}
"""Keys of a Tune result that are recorded: Tune adds many of its own to what a trial reports."""
MOST_PENDING = 1000
"""Most epochs and ends of trials that wait to be written for TensorBoard."""
FAILURES = {"diverged": "diverged", "refused": "error"}
"""Reason of a failure, the key that `trial.report_failure` puts into a result -> the trial's status."""


class SearchCallback(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Records trials in the trial store and prints a line per epoch; frees what a trial holds once it has ended."""

    def __init__(self, storage: Storage, search_id: str, store: TrialStore, engine: Engine | None) -> None:
        self._engine = engine
        self._storage = storage
        self._search_id = search_id
        self._store = store
        self._failures: dict[str, tuple[str, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its callbacks into a file that is never read here, and a thread has no copy."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that starts, or starts again after a crash."""
        point = trial.config
        self._store.start(point[TRIAL], {name: value for name, value in point.items() if name != TRIAL})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an epoch, or remember a failure until Tune says that the trial has ended."""
        name = trial_name(trial)
        for reason, status in FAILURES.items():
            if reason in result:
                self._failures[name] = (status, result[reason])
                return
        metrics: Metrics = {key: value for key, value in result.items() if key in RECORDED_METRICS}
        self._store.add_epoch(name, metrics, result["time_this_iter_s"])
        for note in result.get(NOTES, "").splitlines():
            print(f"{name}  {note}", flush=True)
        print(trial_line(self._store, name), flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that was stopped, ran its last epoch, or reported a failure."""
        name = trial_name(trial)
        is_complete = len(self._store.trials[name].history) >= self._store.config.max_epochs
        self._end(name, *self._failures.get(name, ("completed" if is_complete else "stopped", None)))
        forget_figures(trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remove the workers of a crashed trial, whose CPUs its second start needs."""
        remove_workers(self._engine, self._search_id, trial_name(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that Tune does not start again after a crash."""
        # The file that Tune has just written; `trial.get_error` reads the copy in the storage, which may come later.
        self._end(trial_name(trial), "error", trainer.summarise_error(Path(trial.error_file).read_text()))
        forget_figures(trial)

    def _end(self, name: str, status: str, error: str | None) -> None:
        remove_workers(self._engine, self._search_id, name)
        print(f"{name}  {status}" + (f": {error}" if error else ""), flush=True)
        # Only once the end is durable: a trial whose end is lost in a crash goes on from its checkpoint.
        self._store.end(name, status, error, then=partial(remove_checkpoint, self._storage, self._search_id, name))


def forget_figures(trial: Any) -> None:
    """Clear what Tune has summed up of each figure of a trial that ended, which nobody here asks it for.

    That is the least, greatest, mean and latest values of some thirty figures, most of what a trial costs the driver.
    """
    trial.metric_analysis.clear()
    trial.metric_n_steps.clear()


class Curves(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Writes each trial's figures for TensorBoard into its folder, in a thread of its own, which alone waits for the
    disk.
    """

    def __init__(self, storage: Storage, search_id: str) -> None:
        self._storage = storage
        self._search_id = search_id
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._writers: dict[str, TensorBoard] = {}
        """Of the trials that run. The thread alone uses them."""

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing, as `SearchCallback` does."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Have the figures of an epoch written."""
        figures = {name: value for name, value in result.items() if name in RECORDED_METRICS}
        self._submit(self._write, trial_name(trial), trial.config, figures)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Have a trial's file closed."""
        self._submit(self._close, trial_name(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Have the file of a crashed trial closed; it gets another one when it goes on."""
        self._submit(self._close, trial_name(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Have the file of a trial closed that does not go on."""
        self._submit(self._close, trial_name(trial))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
        while self._pending:
            self._pending.popleft().result()

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Have the thread do `work`; raise what earlier work has raised, and wait if too much is pending."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= MOST_PENDING):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(work, *arguments))

    def _write(self, name: str, point: dict[str, Any], figures: Metrics) -> None:
        if name not in self._writers:
            folder = self._storage.path(schemas.SEARCHES_FOLDER, self._search_id, name)
            settings = {key: value for key, value in point.items() if key != TRIAL}
            self._writers[name] = TensorBoard(folder, settings)
        self._writers[name].add_epoch(figures)

    def _close(self, name: str) -> None:
        if name in self._writers:
            self._writers.pop(name).close()


def remove_checkpoint(storage: Storage, search_id: str, name: str) -> None:
    """Remove the checkpoint of a trial that has ended.

    A worker may still be writing there, or the store refuse: the search goes on, and removes what is left at its end.
    """
    with contextlib.suppress(OSError):
        storage.delete_folder(schemas.SEARCHES_FOLDER, search_id, name, CHECKPOINTS)


def trial_line(store: TrialStore, name: str) -> str:
    """Return the line that is printed for a trial's latest epoch: its figures on val, its settings, the progress."""
    trial = store.trials[name]
    latest = trial.history[-1]
    settings = "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in trial.settings.items()
    )
    return (
        f"{name}  epoch {latest['epoch']}/{store.config.max_epochs}  val accuracy {latest['val_accuracy']:.4f} "
        f"loss {latest['val_loss']:.4f}  {settings}  ({store.num_ended} of {store.config.num_samples} trials ended)"
    )
