"""The checkpoints of one run in the storage: list them, find the newest intact one, write new ones, remove old ones.

Imports torch, not Ray. A checkpoint is a folder named by epoch and step. Its manifest, written last, holds the sums of
all other files, so that what a crash, a full disk or a bad disk leaves behind is never taken for a checkpoint.
"""

import re
import threading
import time
from collections.abc import Callable

from fashion.storage import Storage
from fashion.training import checkpoint
from fashion.training.checkpoint import DamagedCheckpoint
from fashion.training.metrics import best_epoch
from fashion.training.run import TrainingRun

NAME = re.compile(r"epoch-(\d{4,9})(?:-step-(\d{6,9}))?")

Place = tuple[int, int]
"""Epochs done, and steps done of the next epoch: checkpoints are ordered by this."""


def name_of(epochs_done: int, step: int = 0) -> str:
    """Return `epoch-0003` for the end of epoch 3, and `epoch-0004-step-000150` for 150 steps later."""
    return f"epoch-{epochs_done + 1:04d}-step-{step:06d}" if step else f"epoch-{epochs_done:04d}"


def progress_of(name: str) -> Place | None:
    """Return how far a run was at the checkpoint `name`; None if `name` is not that of a checkpoint."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    epoch, step = int(match[1]), int(match[2] or 0)
    return (epoch - 1, step) if step else (epoch, 0)


class CheckpointManager:
    """Writes a run's checkpoints in a background thread, and keeps the best one and the `newest` ones.

    One process writes; any process may read. An old checkpoint is removed only after a newer one is written.
    """

    def __init__(self, storage: Storage, folder: tuple[str, ...], newest: int) -> None:
        """Manage the checkpoints in `folder`, given as the parts of a path below the root of `storage`.

        Keeps `newest` checkpoints besides that of the best epoch.
        """
        self._storage = storage
        self._folder = folder
        self._newest = newest
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0
        """Seconds that the latest checkpoint took to write."""

    def names(self) -> list[str]:
        """Return the names of all checkpoints, intact or not, oldest first."""
        places = {name: progress_of(name) for name in self._storage.list(*self._folder)}
        return sorted((name for name, place in places.items() if place), key=lambda name: places[name] or (0, 0))

    def reader(self, name: str) -> Callable[[str], bytes]:
        """Return the function `read_file` of the checkpoint `name`, as `checkpoint` and `TrainingRun.restore` take it.

        The function raises `DamagedCheckpoint` if the file is missing.
        """

        def read_file(file: str) -> bytes:
            try:
                return self._storage.read_bytes(*self._folder, name, file)
            except FileNotFoundError as error:
                raise DamagedCheckpoint(f"checkpoint file {file} is missing") from error

        return read_file

    def newest_whole(self) -> tuple[str | None, list[str]]:
        """Return the newest intact checkpoint, or None, and a line about each newer one that is damaged."""
        notes: list[str] = []
        for name in reversed(self.names()):
            try:
                checkpoint.check(self.reader(name))
            except DamagedCheckpoint as error:
                notes.append(f"checkpoint {name} is damaged: {error}")
            else:
                return name, notes
        return None, notes

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""
        self._storage.delete_folder(*self._folder, name)

    def save(self, run: TrainingRun) -> None:
        """Start to write a checkpoint of `run`; when it is written, remove those that are no longer needed.

        First waits for the previous checkpoint; raises `OSError` if that one could not be written.
        """
        self.wait()
        arguments = (name_of(run.epochs_done, run.step), run.encode(), name_of(best_epoch(run.history)))
        self._writing = threading.Thread(target=self._save, args=arguments, daemon=True)
        self._writing.start()

    def is_writing(self) -> bool:
        """Return whether a checkpoint is still being written."""
        return self._writing is not None and self._writing.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint in progress, if any, is written. Raises `OSError` if it could not be."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(self, name: str, files: dict[str, bytes], best: str) -> None:
        started = time.monotonic()
        try:
            # A folder of this name, left from before the run was resumed, must not mix its files with the new ones.
            self.remove(name)
            for file, content in files.items():
                self._storage.write_bytes(content, *self._folder, name, file)
            self.seconds = time.monotonic() - started
            kept = {best, *self.names()[-self._newest :]}
            for old in self.names():
                if old not in kept:
                    self.remove(old)
        except BaseException as error:  # raised again by `wait`
            self._error = error


class CheckpointTimer:
    """Decides when to write the next checkpoint, so that a crash loses at most `every_s` seconds of work.

    Only rank 0 asks. A crash while a checkpoint is being written loses the work since the previous one, so the time
    that writing takes counts as well.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self.restart()

    def restart(self) -> None:
        """Start counting from now, when a checkpoint of the present state is made."""
        self._saved = self._asked = time.monotonic()

    def is_due(self, seconds_to_write: float) -> bool:
        """Return whether a checkpoint must be made now, because one made at the next call would be written too late.

        Expects the next call after as many seconds as lie between the last call and this one.
        """
        now = time.monotonic()
        between, self._asked = now - self._asked, now
        return now + between + seconds_to_write - self._saved >= self._every_s
