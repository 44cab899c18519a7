"""Progress of a run on the console: a line per epoch and, on a terminal, a bar within the epoch."""

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_UPDATES = 1.0

Step = tuple[int, int, int]
"""Epoch, step within it, and steps of an epoch."""


def last_line(error: BaseException | str) -> str:
    """Return an error's last line, at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


class ProgressBar:
    """Within its `with` block, prints lines and, on a terminal, a bar of the current epoch below them."""

    def __init__(self, epochs: int, read_step: Callable[[], Step | None] = lambda: None) -> None:
        """Show a run of `epochs` epochs; `read_step` is asked every second how far it is, None before the start."""
        self._epochs = epochs
        self._read_step = read_step
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
        while not self._stop.wait(SECONDS_BETWEEN_UPDATES):
            found = self._read_step()
            if found:
                epoch, step, steps = found
                self._bar.update(self._task, description=f"epoch {epoch}/{self._epochs}", completed=step, total=steps)


def epoch_line(epoch: int, epochs: int, rows: dict[str, dict[str, Any]], left_s: float) -> str:
    """Return the line for one epoch from its rows by split; `left_s` is the estimated rest in seconds."""
    train = rows["train"]
    figures = [f"{split} loss {row['loss']:.4f} accuracy {row['accuracy']:.4f}" for split, row in sorted(rows.items())]
    return (
        f"epoch {epoch}/{epochs}  {'  '.join(figures)}  "
        f"{train['images_per_s']:.0f} images/s  {left_s // 60:.0f} min {left_s % 60:.0f} s left"
    )
