"""From the workers to the person: live `epochs` rows, a line per epoch, and a bar within the epoch on a terminal.

Ray Train's controller runs in the driver, so its reports become rows and lines at once; the bar follows the step
counter that rank 0 leaves in Ray's key-value store. No extra process takes part.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.train import UserCallback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fashion.reports import tables as report
from fashion.storage import Storage
from fashion.training.metrics import epoch_rows

SECONDS_BETWEEN_STEPS = 0.5
SECONDS_BETWEEN_LOOKS = 1.0


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
        earlier = report.read_table(self._storage, "epochs", self._run_id)
        kept = [row for row in earlier if row["epoch"] < epoch]
        report.write_table(self._storage, "epochs", self._run_id, kept + fresh)
        for note in metrics[0].get("notes", ()):
            self._say(note)
        self._here += 1
        left = (time.monotonic() - self._started) / self._here * (self._epochs - epoch)
        self._say(epoch_line(epoch, self._epochs, {row["split"]: row for row in fresh}, left))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Say what became of workers; whether they are started anew is Ray's to decide, and the run's row tells."""
        for rank, error in sorted(worker_exceptions.items()):
            self._say(f"worker {rank} failed: {last_line(error)}")


def last_line(error: BaseException | str) -> str:
    """Return an error's last line, at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


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


class Bar:
    """What a person sees within the `with` block: the lines that are said and, on a terminal, a bar of the epoch."""

    def __init__(self, run_id: str, epochs: int) -> None:
        """Show the run `run_id` of `epochs` epochs."""
        self._run_id = run_id
        self._epochs = epochs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._move, daemon=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(), transient=True, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task("starting workers", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        if not self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if not self._bar.disable:
            self._thread.join()
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bar, as it is: errors that it quotes hold brackets, which are no markup of rich."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _move(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
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
