"""Callbacks of Ray Train: write the `epochs` rows while a run trains, print a line per epoch, feed the trackers.

Ray Train's controller runs in the driver, so its reports become rows and lines at once; the progress bar follows the
step that rank 0 publishes in Ray's key-value store. No extra process takes part.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.train import UserCallback

from fashion.reports import tables
from fashion.reports.progress import Step, epoch_line, last_line
from fashion.reports.tracking import MLflowRun, TensorBoard
from fashion.storage import Storage
from fashion.training.metrics import epoch_rows

SECONDS_BETWEEN_STEPS = 0.5


class EpochReporter(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Writes the `epochs` rows of a run after each report, the table's only writer, and says a line."""

    def __init__(self, storage: Storage, run_id: str, epochs: int, say: Callable[[str], None]) -> None:
        """Report a run whose last epoch is `epochs`; `say` is given the lines."""
        self._storage = storage
        self._run_id = run_id
        self._epochs = epochs
        self._say = say
        self._started = time.monotonic()
        self._here = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Add the epoch; a repeated or later one, left by a life of the run that was cut short, is replaced."""
        fresh = epoch_rows(metrics[0])
        epoch = fresh[0]["epoch"]
        earlier = tables.read_table(self._storage, "epochs", self._run_id)
        kept = [row for row in earlier if row["epoch"] < epoch]
        tables.write_table(self._storage, "epochs", self._run_id, kept + fresh)
        for note in metrics[0].get("notes", ()):
            self._say(note)
        self._here += 1
        left = (time.monotonic() - self._started) / self._here * (self._epochs - epoch)
        self._say(epoch_line(epoch, self._epochs, {row["split"]: row for row in fresh}, left))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Say what became of workers; whether they are started anew is Ray's to decide, and the run's row tells."""
        for rank, error in sorted(worker_exceptions.items()):
            self._say(f"worker {rank} failed: {last_line(error)}")


class StepCounter:
    """Rank 0's side of the bar: leaves (epoch, step, steps) in Ray's key-value store, twice a second at most."""

    def __init__(self, run_id: str, steps: int) -> None:
        self._key = step_key(run_id)
        self._steps = steps
        self._last = 0.0

    def __call__(self, epoch: int, step: int) -> None:
        """Publish the position if it is time."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_STEPS:
            self._last = now
            _internal_kv_put(self._key, json.dumps([epoch, step, self._steps]).encode(), overwrite=True)


def step_key(run_id: str) -> bytes:
    """Return the key under which rank 0 publishes its step."""
    return f"fashion/steps/{run_id}".encode()


def read_step(run_id: str) -> Step | None:
    """Return the step that rank 0 published last, None if there is none yet."""
    found = _internal_kv_get(step_key(run_id))
    if not found:
        return None
    epoch, step, steps = json.loads(found)
    return epoch, step, steps


class TrackingCallback(UserCallback):  # type: ignore[misc]
    """Hands each epoch's metrics to TensorBoard and MLflow."""

    def __init__(self, trackers: Sequence[TensorBoard | MLflowRun]) -> None:
        self._trackers = trackers

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Add an epoch: rank 0's metrics, which are the same on all ranks but for the times."""
        for tracker in self._trackers:
            tracker.add_epoch(metrics[0])
