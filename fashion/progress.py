"""From the workers to the person: live `epochs` rows, a line per epoch, and a bar within the epoch on a terminal.

The controller of Ray Train writes the rows as the epochs are reported; the driver watches that table and the step
counter that rank 0 leaves in Ray's key-value store. No extra process takes part.
"""

import json
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

import ray
import ray.exceptions
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.train import UserCallback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fashion import report
from fashion.config import UserError
from fashion.metrics import epoch_rows
from fashion.storage import Storage

SECONDS_BETWEEN_STEPS = 0.5
SECONDS_BETWEEN_LOOKS = 1.0


class EpochsWriter(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Writes the `epochs` rows of a run after each report; runs in Ray Train's controller, the table's only writer."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage = storage
        self._run_id = run_id

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Add the epoch; a repeated or later one, left by a life of the run that was cut short, is replaced."""
        fresh = metrics[0]
        earlier = report.read_table(self._storage, "epochs", self._run_id)
        kept = [row for row in earlier if row["epoch"] < fresh["epoch"]]
        report.write_table(self._storage, "epochs", self._run_id, kept + epoch_rows(fresh))


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
    """Return the key under which a run's position is left."""
    return f"fashion/steps/{run_id}".encode()


class Watcher:
    """The driver's side: within its `with` block, prints a line for each new epoch and, on a terminal, a bar."""

    def __init__(self, storage: Storage, run_id: str, epochs: int) -> None:
        self._storage = storage
        self._run_id = run_id
        self._epochs = epochs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        # Epoch -> its time: an epoch that is repeated after a resume has another one and is shown again.
        self._shown = {row["epoch"]: row["epoch_time_s"] for row in report.read_table(storage, "epochs", run_id)}
        self._started = time.monotonic()
        self._here = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(), transient=True, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task("starting workers", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def _watch(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(SECONDS_BETWEEN_LOOKS)
            try:
                self._show_new_epochs()
                if not stopping:
                    self._move_bar()
            except (OSError, UserError, ray.exceptions.RayError) as error:
                # Progress is worth a complaint, not a run: storage that fails for good stops the run by itself.
                self._bar.console.print(f"progress cannot be shown just now: {error}", highlight=False)

    def _show_new_epochs(self) -> None:
        rows = report.read_table(self._storage, "epochs", self._run_id)
        by_epoch: dict[int, dict[str, dict[str, Any]]] = {}
        for row in rows:
            by_epoch.setdefault(row["epoch"], {})[row["split"]] = row
        times = {epoch: splits["train"]["epoch_time_s"] for epoch, splits in by_epoch.items()}
        for epoch in sorted(epoch for epoch, time_s in times.items() if self._shown.get(epoch) != time_s):
            self._shown[epoch] = times[epoch]
            self._here += 1
            spent = time.monotonic() - self._started
            left = spent / self._here * (self._epochs - epoch)
            self._bar.console.print(
                epoch_line(epoch, self._epochs, by_epoch[epoch], left), highlight=False, soft_wrap=True
            )

    def _move_bar(self) -> None:
        if self._bar.disable or not ray.is_initialized():
            return
        position = _internal_kv_get(step_key(self._run_id))
        if position:
            epoch, step, steps = json.loads(position)
            self._bar.update(self._task, description=f"epoch {epoch}/{self._epochs}", completed=step, total=steps)


def epoch_line(epoch: int, epochs: int, rows: dict[str, dict[str, Any]], left_s: float) -> str:
    """Return the line for one epoch from its rows by split; `left_s` is the estimated rest in seconds."""
    train = rows["train"]
    figures = [f"{split} loss {row['loss']:.4f} accuracy {row['accuracy']:.4f}" for split, row in sorted(rows.items())]
    return (
        f"epoch {epoch}/{epochs}  {'  '.join(figures)}  "
        f"{train['images_per_s']:.0f} images/s  {left_s // 60:.0f} min {left_s % 60:.0f} s left"
    )
