"""Measure how busy a search keeps a cluster of many places, some of which disappear once and come back.

The cluster's nodes are Ray nodes on this machine with logical CPUs, and training is a sleep, so that only placement
counts: what share of the time the places are taken by a trial, and used by one that is in an epoch, and whether every
trial ends. To start a trial of several workers is work for this machine, which is not used meanwhile. Prints a table.
"""

import concurrent.futures
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
import ray.tune
from ray.cluster_utils import Cluster

from fashion import cli
from fashion.bench.scale import growth, reporting
from fashion.bench.scale.reporter import Reporter, metrics_of
from fashion.cluster import connection
from fashion.config import require
from fashion.distributed import worker
from fashion.distributed.trainers import make_engine, run_config
from fashion.reports.schemas import SEARCHES_FOLDER
from fashion.search.plan import NESTED_TRIAL_BYTES, TrialLimit
from fashion.search.space import TRIAL, SearchConfig, SearchScale
from fashion.search.trial import TuneReporter
from fashion.search.trial_store import CHECKPOINTS, ENDED
from fashion.storage import Storage, open_storage

SEARCH_ID = "placed"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `fashion.bench.scale.placement`."""

    nodes: int = 8
    """Nodes of the cluster."""
    cpus: int = 8
    """Logical CPUs of each node."""
    workers: int = 1
    """Workers of each trial, with one logical CPU each."""
    trials: int = 384
    """Trials of the search: enough that some are left to start when the nodes are back."""
    epochs: int = 3
    """Most epochs of a trial."""
    epoch_s: float = 20.0
    """Time that an epoch takes, in seconds: long against the start of a process on this machine."""
    lose_after_s: float = 70.0
    """How many seconds after all places are taken a third of the nodes is removed; 0 for never."""
    lost_for_s: float = 60.0
    """After how many more seconds as many nodes are added."""

    @property
    def third(self) -> int:
        """How many nodes are lost: a third, rounded up."""
        return math.ceil(self.nodes / 3)


@dataclass
class Usage:
    """When trials were in an epoch, when all places were taken, and when the cluster lost nodes and had them again."""

    places: int
    epochs: list[tuple[float, float]] = field(default_factory=list)
    taken: list[tuple[float, float]] = field(default_factory=list)
    """From the start of each trial to its end, or to the loss of its node."""
    started: dict[str, float] = field(default_factory=dict)
    """When each trial that runs has started."""
    began: dict[str, float] = field(default_factory=dict)
    """When each trial began the epoch that it is in."""
    last_start: float = 0.0
    full_at: float = 0.0
    lost_at: float = 0.0
    back_at: float = 0.0

    def share(self, times: list[tuple[float, float]], start: float, end: float, places: int) -> float:
        """Return the share of `places` places that `times`, `epochs` or `taken`, fill from `start` to `end`."""
        used = sum(max(0.0, min(end, last) - max(start, first)) for first, last in times)
        return used / (places * (end - start)) if end > start else float("nan")


class Watcher(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Notes each epoch of a trial, which has just ended when it is reported."""

    def __init__(self, usage: Usage, epoch_s: float) -> None:
        self._usage, self._epoch_s = usage, epoch_s

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the latest start: from then on, places stay empty because no trial is left. One that starts again was in
        an epoch until its node was lost.
        """
        usage, now = self._usage, time.monotonic()
        if trial.trial_id in usage.began:
            usage.epochs.append((usage.began[trial.trial_id], usage.lost_at))
        usage.began[trial.trial_id] = usage.started[trial.trial_id] = usage.last_start = now
        if len(usage.began) == usage.places:
            usage.full_at = now

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note an epoch. One that a restarted trial reports again took no time."""
        now = time.monotonic()
        if result["time_this_iter_s"] >= self._epoch_s / 2:
            self._usage.epochs.append((now - self._epoch_s, now))
        self._usage.began[trial.trial_id] = now

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a place is free."""
        self._free(trial, time.monotonic())

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial has lost its place with a node; Tune finds that out later."""
        self._free(trial, self._usage.lost_at or time.monotonic())

    def _free(self, trial: Any, now: float) -> None:
        """Note when a trial's place was free; one that could not even start has had none."""
        self._usage.taken.append((self._usage.started.pop(trial.trial_id, now), now))


def main(argv: Sequence[str]) -> None:
    """Start the cluster, run the search, remove and add nodes meanwhile; print what was used and how trials ended."""
    flags = cli.parse(Flags, argv, prog="python -m fashion.bench.scale.placement", description=__doc__ or "")
    places = flags.nodes * flags.cpus // flags.workers
    require(flags.trials >= places, f"--trials {flags.trials} must be at least {places}, a trial for each place")
    require(flags.nodes >= 3, f"--nodes {flags.nodes} must be at least 3: a third of them is removed")
    connection.provide_token()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=flags.cpus, wait=False) for _ in range(flags.nodes)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    connection.quieten()
    cluster.wait_for_nodes()
    usage = Usage(places)
    # Nodes are changed in the main thread: to add one sets the process's handler of a signal.
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(1) as pool:
        search = pool.submit(measure, open_storage(folder), flags, usage)
        change_nodes(cluster, nodes, flags, usage, search)
        row = search.result()
    reporting.print_table([row])
    ray.shutdown()
    cluster.shutdown()


def change_nodes(
    cluster: Cluster, nodes: list[Any], flags: Flags, usage: Usage, search: concurrent.futures.Future[Any]
) -> None:
    """Remove a third of the nodes when all have been in use for a while, at once and without a warning, and add as many
    later, unless the search is over before.
    """
    while not usage.full_at and not concurrent.futures.wait([search], 0.5).done:
        pass
    if not flags.lose_after_s or concurrent.futures.wait([search], flags.lose_after_s).done:
        return
    gone = nodes[: flags.third]
    usage.lost_at = time.monotonic()
    for node in gone:
        cluster.remove_node(node, allow_graceful=False)
    if concurrent.futures.wait([search], flags.lost_for_s).done:
        return
    for _ in gone:
        cluster.add_node(num_cpus=flags.cpus, wait=False)
    usage.back_at = time.monotonic()


def measure(storage: Storage, flags: Flags, usage: Usage) -> dict[str, Any]:
    """Run the search; return the row of the table."""
    config = SearchConfig(num_samples=flags.trials, max_epochs=flags.epochs, workers_per_trial=flags.workers)
    limit = TrialLimit(config, SearchScale(), has_autoscaler=False)
    engine = make_engine() if flags.workers > 1 else None
    reporter = Reporter(storage.uri, SEARCH_ID, flags.epochs, flags.epoch_s, saves=True, engine=engine)
    trainable = reporting.trainable(reporter) if flags.workers == 1 else trainable_with_workers(reporter, flags)
    with growth.unseen():
        done = reporting.run_search(
            storage, SEARCH_ID, config, trainable, limit, engine=engine, others=[Watcher(usage, flags.epoch_s)]
        )
    left = (flags.nodes - flags.third) * flags.cpus // flags.workers
    places, full, end = usage.places, usage.full_at, usage.last_start
    was_lost = usage.lost_at > 0

    def shares(name: str, times: list[tuple[float, float]]) -> dict[str, float]:
        while_lost = usage.share(times, usage.lost_at, min(usage.back_at or end, end), left) if was_lost else math.nan
        return {
            f"share {name} before the loss": usage.share(times, full, usage.lost_at or end, places),
            f"share {name} while nodes were lost": while_lost,
            f"share {name} after": usage.share(times, usage.back_at or end, end, places),
        }

    trials = list(done.store.trials.values())
    return {
        "places": places,
        "workers per trial": flags.workers,
        "trials": len(trials),
        "ended": sum(trial.status in ENDED for trial in trials),
        "of these error": sum(trial.status == "error" for trial in trials),
        "s": done.seconds,
        "s until all places were used": full - min(first for first, _ in usage.epochs),
        **shares("used", usage.epochs),
        **shares("taken", usage.taken),
    }


# --- trials of several workers ----------------------------------------------------------------------------------------


def trainable_with_workers(reporter: Reporter, flags: Flags) -> Any:
    """Return what Tune runs for each trial of several workers, whose own process takes no CPU."""
    trainable = ray.tune.with_parameters(train_with_workers, reporter=reporter, workers=flags.workers)
    return ray.tune.with_resources(trainable, {"memory": NESTED_TRIAL_BYTES})


def train_with_workers(point: dict[str, Any], *, reporter: Reporter, workers: int) -> None:
    """Run a trial as `trial.train_with_workers` does, with workers that sleep."""
    storage = open_storage(reporter.uri)
    assert reporter.engine is not None, "trials of several workers have one"
    place = storage.path(SEARCHES_FOLDER, SEARCH_ID, point[TRIAL])
    reporter.engine.train(
        sleep_and_report,
        {"point": point, "reporter": reporter},
        ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config("WARNING", name=CHECKPOINTS, storage_path=place, callbacks=[TuneReporter()]),
        {},
    )


def sleep_and_report(settings: dict[str, Any]) -> None:
    """Sleep and report on each worker of a trial."""
    reporter, point = settings["reporter"], settings["point"]
    if ray.train.get_context().get_world_rank() == 0:
        worker.publish_placement_group(reporter.engine, f"{SEARCH_ID}/{point[TRIAL]}")
    for epoch in range(1, reporter.max_epochs + 1):
        time.sleep(reporter.epoch_s)
        ray.train.report(metrics_of(point, epoch))


if __name__ == "__main__":
    cli.run(main)
