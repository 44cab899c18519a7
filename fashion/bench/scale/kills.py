"""Kill a search at random moments and resume it, again and again; compare what it ends with.

Trials report figures and write real checkpoints, and train nothing. One trial at a time, a search that was killed must
end as one that nobody killed: the same trials stop at the same epochs with the same bits, and the same one wins. With
several at a time, every trial must have ended, with each of its epochs once, at an epoch at which trials are judged.
Prints a table.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from fashion import cli
from fashion.bench.scale import reporting
from fashion.bench.scale.reporter import Reporter, reported
from fashion.cluster import connection
from fashion.config import require
from fashion.reports import tables
from fashion.search.space import TRIAL, SearchConfig
from fashion.search.trial_store import ENDED, Trial
from fashion.storage import Storage, open_storage

UNBROKEN = "unbroken"
LONGEST_S = 4.0
"""A search is killed within so many seconds of its first line."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `fashion.bench.scale.kills`."""

    storage: str = ""
    """Folder or URI in which the searches are kept, in a folder that is removed; by default a temporary folder."""
    kills: int = 20
    """Moments at which a search is killed."""
    per_search: int = 5
    """Of these, how many may hit the same search before it is left to end."""
    concurrent: int = 1
    """Trials at a time."""
    trials: int = 24
    """Trials of each search."""
    epochs: int = 9
    """Most epochs of a trial."""
    epoch_s: float = 0.1
    """Time that an epoch takes, in seconds."""
    seed: int = 0
    """Chooses the moments."""
    drive: str = ""
    """For the command's own use: run the search of this name, or go on with it, in this process."""

    def config(self) -> SearchConfig:
        """Return the settings of each search."""
        return SearchConfig(num_samples=self.trials, max_epochs=self.epochs)


def main(argv: Sequence[str]) -> None:
    """Kill and resume searches until there were enough kills; print how many of them ended as they must."""
    flags = cli.parse(Flags, argv, prog="python -m fashion.bench.scale.kills", description=__doc__ or "")
    require(flags.per_search >= 1, f"--per-search {flags.per_search} must be at least 1")
    if flags.drive:
        connection.connect()
        drive(open_storage(flags.storage), flags.drive, flags)
        return
    connection.connect(num_cpus=flags.concurrent)
    with tempfile.TemporaryDirectory() as folder, reporting.scratch(open_storage(flags.storage or folder)) as place:
        reporting.print_table([kill_all(place, flags)])


def drive(storage: Storage, search_id: str, flags: Flags) -> None:
    """Run a search, or go on with it."""
    reporter = Reporter(storage.uri, search_id, flags.epochs, flags.epoch_s, saves=True)
    trainable = reporting.trainable(reporter)
    reporting.run_search(storage, search_id, flags.config(), trainable, limit=lambda _: flags.concurrent)


def kill_all(storage: Storage, flags: Flags) -> dict[str, Any]:
    """Kill and resume searches; return the row of the table."""
    chance = random.Random(flags.seed)
    start_driver(storage, UNBROKEN, flags).wait()
    kills, searches, as_unbroken, whole = 0, 0, 0, 0
    while kills < flags.kills:
        search_id = f"killed-{searches}"
        for _ in range(min(flags.per_search, flags.kills - kills)):
            kills += kill_once(start_driver(storage, search_id, flags), chance.uniform(0, LONGEST_S))
        done = start_driver(storage, search_id, flags)
        done.wait()
        require(done.returncode == 0, f"the search {search_id} ended with exit code {done.returncode}")
        searches += 1
        as_unbroken += outcome(storage, search_id, flags) == outcome(storage, UNBROKEN, flags)
        whole += is_whole(storage, search_id, flags)
    return {
        "trials at a time": flags.concurrent,
        "kills": kills,
        "searches": searches,
        "ended as the unbroken one": as_unbroken,
        "every trial a row, each epoch once": whole,
    }


def start_driver(storage: Storage, search_id: str, flags: Flags) -> subprocess.Popen[str]:
    """Start a process that drives the search on the cluster of this one; return it once it has begun."""
    command = [sys.executable, "-m", "fashion.bench.scale.kills", "--drive", search_id, "--storage", storage.uri]
    for name in ("concurrent", "trials", "epochs", "epoch_s"):
        command += [f"--{name.replace('_', '-')}", str(getattr(flags, name))]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()  # of the first epoch that it hears of
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process


def kill_once(process: subprocess.Popen[str], after_s: float) -> bool:
    """Kill a driver after some seconds; return False if it has ended before."""
    time.sleep(after_s)
    is_alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return is_alive


def trials_of(storage: Storage, search_id: str, flags: Flags) -> list[Trial]:
    """Return the trials of a search, by name."""
    trials = reporting.trial_store(storage, search_id, flags.config()).trials
    return [trials[name] for name in sorted(trials)]


def outcome(storage: Storage, search_id: str, flags: Flags) -> list[tuple[Any, ...]]:
    """Return what became of each trial: name, settings, status, and the metrics of its epochs."""
    found = trials_of(storage, search_id, flags)
    return [(trial.trial_id, trial.settings, trial.status, trial.history) for trial in found]


def is_whole(storage: Storage, search_id: str, flags: Flags) -> bool:
    """Return whether every trial has ended in one row, with each epoch once and the figures that it reported.

    A trial that was stopped must have reached a rung, and one that completed its last epoch.
    """
    config, trials = flags.config(), trials_of(storage, search_id, flags)
    rows = tables.read_search_table(storage, "trials", search_id)
    if rows is None or len(rows) != flags.trials or len(trials) != flags.trials:
        return False
    for trial in trials:
        point = {TRIAL: trial.trial_id} | trial.settings
        history = [reported(point, epoch) for epoch in range(1, len(trial.history) + 1)]
        ends = [flags.epochs] if trial.status == "completed" else config.rungs
        if trial.status not in ENDED or trial.history != history or len(history) not in ends:
            return False
    return True


if __name__ == "__main__":
    cli.run(main)
