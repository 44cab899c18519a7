"""The checkpoints of one run in the storage: which there are, which is whole, which are kept. Knows torch, not Ray.

A folder is named by how far the run was, and every file in it has its sum in the manifest, which is written last: what
a kill, a full disk or a bad disk leaves is told from a checkpoint before anything of it is believed.
"""

import re
import threading
import time
from collections.abc import Callable

from fashion.storage import Storage
from fashion.training import checkpoint
from fashion.training import run as fit
from fashion.training.checkpoint import DamagedCheckpoint
from fashion.training.metrics import best_epoch

NAME = re.compile(r"epoch-(\d{4,9})(?:-step-(\d{6,9}))?")

Place = tuple[int, int]
"""Epochs done, and steps done of the next one: the order of checkpoints."""


def name_of(epochs_done: int, step: int = 0) -> str:
    """Return `epoch-0003` for the end of epoch 3, and `epoch-0004-step-000150` for 150 steps later."""
    return f"epoch-{epochs_done + 1:04d}-step-{step:06d}" if step else f"epoch-{epochs_done:04d}"


def progress_of(name: str) -> Place | None:
    """Return how far a run was, from the name of a checkpoint; None for the name of anything else."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    epoch, step = int(match[1]), int(match[2] or 0)
    return (epoch - 1, step) if step else (epoch, 0)


class CheckpointManager:
    """Writes a run's checkpoints, beside its training, and keeps the `newest` of them and the best.

    One process writes; any may read. A checkpoint goes only when a newer one is whole.
    """

    def __init__(self, storage: Storage, folder: tuple[str, ...], newest: int) -> None:
        """Keep them in `folder`, the parts of a path below the root of `storage`."""
        self._storage = storage
        self._folder = folder
        self._newest = newest
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0
        """How long the latest checkpoint took to write."""

    def names(self) -> list[str]:
        """Return the checkpoints that there are, whole or not, the oldest first."""
        found = {name: progress_of(name) for name in self._storage.list(*self._folder)}
        return sorted((name for name, place in found.items() if place), key=lambda name: found[name] or (0, 0))

    def reader(self, name: str) -> Callable[[str], bytes]:
        """Return `read_file` of the checkpoint `name`, as `checkpoint` and `fit.Run.restore` take it."""

        def read_file(file: str) -> bytes:
            try:
                return self._storage.read_bytes(*self._folder, name, file)
            except FileNotFoundError as error:
                raise DamagedCheckpoint(f"checkpoint file {file} is missing") from error

        return read_file

    def newest_whole(self) -> tuple[str | None, list[str]]:
        """Return the newest checkpoint that is whole, None if there is none, and a line for each damaged newer one."""
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

    def save(self, run: fit.TrainingRun) -> None:
        """Begin to write where `run` is, and remove what nobody will need once that is whole.

        The end of its best epoch is kept whatever comes after it. Waits for the checkpoint before; raises `OSError`
        where that one could not be written.
        """
        self.wait()
        told = (name_of(run.epochs_done, run.step), run.encode(), name_of(best_epoch(run.history)))
        self._writing = threading.Thread(target=self._save, args=told, daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Wait until what was begun is written. Raises `OSError` where it could not be."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(self, name: str, files: dict[str, bytes], best: str) -> None:
        started = time.monotonic()
        try:
            # Of an earlier life of the run, torn or of another course: a mixture of both would be neither.
            self.remove(name)
            for file, content in files.items():
                self._storage.write_bytes(content, *self._folder, name, file)
            self.seconds = time.monotonic() - started
            kept = {best, *self.names()[-self._newest :]}
            for old in self.names():
                if old not in kept:
                    self.remove(old)
        except BaseException as error:  # handed to whoever waits
            self._error = error


class CheckpointTimer:
    """Tells when a run is due to be saved, so that no kill costs more than `every_s` seconds; one process asks.

    A checkpoint counts from the moment whose state it holds, and only once it is written.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self.restart()

    def restart(self) -> None:
        """Say that the run is saved now."""
        self._saved = self._looked = time.monotonic()

    def is_due(self, seconds_to_write: float) -> bool:
        """Tell whether what begins to be written at the next look, as far away as the last one, would be too late."""
        now = time.monotonic()
        between, self._looked = now - self._looked, now
        return now + between + seconds_to_write - self._saved >= self._every_s
