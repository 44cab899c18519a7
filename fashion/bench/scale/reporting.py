"""Searches whose trials report figures and train nothing, on the project's own Tuner, scheduler and trial store."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.tune
from pyarrow import fs as pafs

from fashion.bench.scale.reporter import Reporter, report_epochs
from fashion.config import TrainConfig
from fashion.distributed.trainers import Engine
from fashion.reports import schemas
from fashion.search import search
from fashion.search.callbacks import Curves, SearchCallback
from fashion.search.sampler import pending_points
from fashion.search.space import SearchConfig
from fashion.search.trial_store import TrialStore
from fashion.storage import Storage


def trainable(reporter: Reporter, cpus: float = 1.0) -> Any:
    """Return what Tune runs for each trial, in a process that takes `cpus` logical CPUs."""
    return ray.tune.with_resources(ray.tune.with_parameters(report_epochs, reporter=reporter), {"CPU": cpus})


class TimedCallback(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Calls a `SearchCallback`, and measures the time which that takes of Tune's event loop."""

    def __init__(self, callback: SearchCallback) -> None:
        self._callback = callback
        self.seconds: dict[str, list[float]] = {}
        """Name of a method -> the duration of each call, in seconds."""

    def _call(self, name: str, arguments: dict[str, Any]) -> None:
        started = time.perf_counter()
        getattr(self._callback, name)(**arguments)
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def on_trial_start(self, **arguments: Any) -> None:
        """Pass on the start of a trial."""
        self._call("on_trial_start", arguments)

    def on_trial_result(self, **arguments: Any) -> None:
        """Pass on the report of an epoch."""
        self._call("on_trial_result", arguments)

    def on_trial_complete(self, **arguments: Any) -> None:
        """Pass on the end of a trial."""
        self._call("on_trial_complete", arguments)

    def on_trial_recover(self, **arguments: Any) -> None:
        """Pass on the crash of a trial that is started again."""
        self._call("on_trial_recover", arguments)

    def on_trial_error(self, **arguments: Any) -> None:
        """Pass on the crash of a trial that is not."""
        self._call("on_trial_error", arguments)


@dataclass(frozen=True)
class Outcome:
    """A finished search of reporting trials: its store, the time of `Tuner.fit` and of closing the store, in seconds,
    and the seconds of each call of the callback.
    """

    store: TrialStore
    seconds: float
    callback: dict[str, list[float]]

    def ms_per_call(self, name: str) -> float:
        """Return the mean duration of the callback's calls of `name`, in milliseconds."""
        calls = self.callback.get(name, [])
        return 1000 * sum(calls) / len(calls) if calls else 0.0


def trial_store(storage: Storage, search_id: str, config: SearchConfig) -> TrialStore:
    """Return the trial store of a search of reporting trials."""
    base = TrainConfig(epochs=config.max_epochs)
    return TrialStore(storage, search_id, config, {"dataset": "none", "source_hash": "none"}, base.to_dict())


def run_search(
    storage: Storage,
    search_id: str,
    config: SearchConfig,
    trainable: Any,
    limit: Callable[[int], int],
    *,
    keeps: bool = True,
    engine: Engine | None = None,
    others: Sequence[ray.tune.Callback] = (),
) -> Outcome:
    """Run a search, or go on with one, as `search.search` does; without `keeps`, Tune runs alone and keeps nothing.

    `engine` trains trials of several workers; `others` are callbacks in addition to the search's own.
    """
    store = trial_store(storage, search_id, config)
    if store.trials:
        search.remove_checkpoints(storage, search_id, store)
    points = pending_points(store)
    if not keeps:
        started = time.perf_counter()
        search.build_tuner(storage, search_id, store, points, trainable, limit, []).fit()
        return Outcome(store, time.perf_counter() - started, {})
    callback = TimedCallback(SearchCallback(storage, search_id, store, engine))
    callbacks: list[ray.tune.Callback] = [callback, *others]
    if storage.is_folder:
        callbacks.append(Curves(storage, search_id))
    started = time.perf_counter()
    with store, search.storage_of_tune(storage) as place:
        if points:
            search.build_tuner(place, search_id, store, points, trainable, limit, callbacks).fit()
    seconds = time.perf_counter() - started
    search.remove_checkpoints(storage, search_id, store)
    return Outcome(store, seconds, callback.seconds)


@contextmanager
def scratch(storage: Storage) -> Iterator[Storage]:
    """Give a storage in a new folder of `storage`, which is gone afterwards; of an object store, in the same bucket."""
    name = f"scale-{uuid.uuid4().hex[:8]}"
    try:
        yield Storage(storage.show(name), storage.fs, storage.path(name))
    finally:
        storage.delete_folder(name)


def num_files(storage: Storage, folder: str) -> int:
    """Return the number of files below a folder of the storage."""
    selector = pafs.FileSelector(storage.path(folder), allow_not_found=True, recursive=True)
    return sum(info.type == pafs.FileType.File for info in storage.fs.get_file_info(selector))


def read_seconds(storage: Storage, table: str) -> float:
    """Return the time in which pandas reads a whole table, in seconds."""
    started = time.perf_counter()
    pq.read_table(storage.path(schemas.REPORTS_FOLDER, table), filesystem=storage.fs).to_pandas()
    return time.perf_counter() - started


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows with equal keys as a table for `docs/benchmarks.md`."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names)
            + " |"
        )
