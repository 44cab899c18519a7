"""Callbacks of Ray Train: write the `epochs` rows while a run trains, print a line per epoch, feed the trackers.

They are called in the driver's process, whichever engine trains (see `trainers`). The progress bar reads the step that
rank 0 publishes.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.train import UserCallback

from fashion.distributed.trainers import Engine
from fashion.reports import tables
from fashion.reports.progress import Step, epoch_line, last_line
from fashion.reports.tracking import MLflowRun, TensorBoard
from fashion.storage import Storage
from fashion.training.metrics import NOTES, epoch_rows

SECONDS_BETWEEN_STEPS = 0.5


class EpochReporter(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Writes the `epochs` rows of a run after each report, as the only writer of these rows, and prints a line."""

    def __init__(self, storage: Storage, run_id: str, epochs: int, say: Callable[[str], None]) -> None:
        """Report on a run whose last epoch is `epochs`; calls `say` with each line for the console."""
        self._storage = storage
        self._run_id = run_id
        self._epochs = epochs
        self._say = say
        self._started = time.monotonic()
        self._epochs_here = 0
        """Epochs since this process started; a resumed run has earlier ones."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Write the rows of an epoch; they replace rows of this epoch and later ones, left from before a crash."""
        rows = epoch_rows(metrics[0])
        epoch = rows[0]["epoch"]
        earlier = tables.read_table(self._storage, "epochs", self._run_id)
        kept = [row for row in earlier if row["epoch"] < epoch]
        tables.write_table(self._storage, "epochs", self._run_id, kept + rows)
        for note in metrics[0].get(NOTES, "").splitlines():
            self._say(note)
        self._epochs_here += 1
        seconds_left = (time.monotonic() - self._started) / self._epochs_here * (self._epochs - epoch)
        self._say(epoch_line(epoch, self._epochs, {row["split"]: row for row in rows}, seconds_left))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Print why workers failed. Ray decides whether to restart them; the run's row records the outcome."""
        for rank, error in sorted(worker_exceptions.items()):
            self._say(f"worker {rank} failed: {last_line(error)}")


class StepCounter:
    """Publishes (epoch, step, steps) for the progress bar, from rank 0, twice a second."""

    def __init__(self, engine: Engine, run_id: str, steps: int) -> None:
        self._engine = engine
        self._key = step_key(run_id)
        self._steps = steps
        self._last = 0.0

    def __call__(self, epoch: int, step: int) -> None:
        """Publish the step, unless the last one was published less than `SECONDS_BETWEEN_STEPS` ago."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_STEPS:
            self._last = now
            self._engine.put(self._key, json.dumps([epoch, step, self._steps]).encode())


def step_key(run_id: str) -> str:
    """Return the key under which rank 0 publishes its step."""
    return f"steps/{run_id}"


def read_step(engine: Engine, run_id: str) -> Step | None:
    """Return the step that rank 0 published last, or None if there is none yet."""
    published = engine.get(step_key(run_id))
    if not published:
        return None
    epoch, step, steps = json.loads(published)
    return epoch, step, steps


class TrackingCallback(UserCallback):  # type: ignore[misc]
    """Passes each epoch's metrics to TensorBoard and MLflow."""

    def __init__(self, trackers: Sequence[TensorBoard | MLflowRun]) -> None:
        self._trackers = trackers

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Add rank 0's metrics of an epoch; those of other ranks differ in their times only."""
        for tracker in self._trackers:
            tracker.add_epoch(metrics[0])
