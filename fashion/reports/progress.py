"""Shows a run's progress on the console: a line per epoch and, on a terminal, a bar within the epoch."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_UPDATES = 1.0

Step = tuple[int, int, int]
"""The epoch, the steps done in it, and the steps per epoch."""


def last_line(error: BaseException | str) -> str:
    """Return an error's last line, at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


class ProgressBar:
    """A context manager that prints lines and, on a terminal, a bar of the current epoch below them."""

    def __init__(self, epochs: int, read_step: Callable[[], Step | None] = lambda: None) -> None:
        """Show a run of `epochs` epochs. The bar calls `read_step` every second; before the first step that is None."""
        self._epochs = epochs
        self._read_step = read_step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._update, daemon=True)
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
        """Print a line above the bar, unformatted: rich would take brackets in quoted errors for its markup."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _update(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_UPDATES):
            now = self._read_step()
            if now is not None:
                epoch, step, steps = now
                self._bar.update(self._task, description=f"epoch {epoch}/{self._epochs}", completed=step, total=steps)


def epoch_line(epoch: int, epochs: int, rows: dict[str, dict[str, Any]], left_s: float) -> str:
    """Return the line for one epoch; `rows` are its `epochs` rows by split, `left_s` the estimated seconds left."""
    train = rows["train"]
    metrics = [f"{split} loss {row['loss']:.4f} accuracy {row['accuracy']:.4f}" for split, row in sorted(rows.items())]
    return (
        f"epoch {epoch}/{epochs}  {'  '.join(metrics)}  "
        f"{train['images_per_s']:.0f} images/s  {left_s // 60:.0f} min {left_s % 60:.0f} s left"
    )


class ImageProgress:
    """A context manager that shows how many images are done: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, seconds_between_lines: float = 10.0) -> None:
        """Show the work on `total` images."""
        self._total, self._between = total, seconds_between_lines
        self._done, self._unreadable = 0, 0
        columns = (BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(), transient=True, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task("starting workers", total=total)
        self._told = time.monotonic()
        self._started: float | None = None
        self._first = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, images: int, unreadable: int) -> None:
        """Count `images` that are done now, of which `unreadable` could not be read."""
        now = time.monotonic()
        self._done, self._unreadable = self._done + images, self._unreadable + unreadable
        if self._started is None:  # the rate leaves out the time in which workers start
            self._started, self._first = now, self._done
        line = images_line(self._done, self._total, self._unreadable, self._done - self._first, now - self._started)
        self._bar.update(self._task, description=line, completed=self._done)
        if self._bar.disable and (now - self._told >= self._between or self._done == self._total):
            print(line, flush=True)
            self._told = now


def images_line(done: int, total: int, unreadable: int, timed: int, seconds: float) -> str:
    """Return the line for `done` of `total` images; the rate is that of `timed` images in `seconds`, if any."""
    parts = [f"{done:,} of {total:,} images"]
    if timed and seconds > 0:
        rate = timed / seconds
        left_s = (total - done) / rate
        parts += [f"{rate:.0f} images/s", f"{left_s // 60:.0f} min {left_s % 60:.0f} s left"]
    return "  ".join(parts + ([f"{unreadable:,} could not be read"] if unreadable else []))
