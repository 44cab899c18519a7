"""One trial of a search, in its process of Ray Tune: trains there, or with workers of its own through Ray Train.

Either way it reports each epoch to Tune, with the same columns, and waits for the scheduler's decision. A trial that
resumes from a checkpoint reports its earlier epochs again, since the scheduler may not have judged all of them.
"""

from typing import Any

import ray
import ray.train
import ray.tune
import torch
from ray import PlacementGroupID
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get
from ray.train import UserCallback
from ray.util.placement_group import PlacementGroup

from fashion.config import TrainConfig, UserError
from fashion.distributed import ingest, worker
from fashion.distributed.lean_trainer import LeanTrainer
from fashion.reports.schemas import SEARCHES_FOLDER
from fashion.storage import open_storage
from fashion.training import sync
from fashion.training.checkpoint_manager import CheckpointManager, CheckpointTimer
from fashion.training.metrics import Metrics
from fashion.training.run import Rank, TrainingRun, peak_memory_bytes, without_ddp

TRIAL = "trial"
"""Key of a trial's name, such as `t0003`, among its settings. Tune's own ids change when a search is resumed."""
CHECKPOINTS = "checkpoints"
"""Folder of a trial's checkpoints, below that of the trial."""
METRIC = "val_accuracy"
"""Metric that Tune maximises."""


def train_trial(point: dict[str, Any], *, shared: dict[str, Any]) -> None:
    """Train the trial whose name, under `TRIAL`, and settings are in `point`; `shared` is the same for all trials.

    `shared` holds the settings of `worker.train_loop_per_worker` without `folder`, and `base`
    (`TrainConfig.to_dict()`), `search_id`, `workers_per_trial`, `checkpoint_every_s` and `use_gpu`; for several workers
    also `worker_settings` and `scaling`. See `search.shared_by_trials`.
    """
    settings = {name: value for name, value in point.items() if name != TRIAL}
    try:
        config = TrainConfig.from_dict(shared["base"] | settings)
    except UserError as error:
        # A second try would have the same settings, so this is a result and not a crash.
        report_failure(0, "refused", str(error))
        return
    train = train_in_process if shared["workers_per_trial"] == 1 else train_with_workers
    train(config, (SEARCHES_FOLDER, shared["search_id"], point[TRIAL], CHECKPOINTS), shared)


def report_failure(epoch: int, reason: str, message: str) -> None:
    """Report to Tune that the trial fails at `epoch`; `reason` is `refused` or `diverged`.

    The metric is the lowest value and not NaN: every comparison with NaN is false, so the scheduler would continue.
    """
    ray.tune.report({"epoch": epoch, METRIC: 0.0, reason: message})


def train_in_process(config: TrainConfig, folder: tuple[str, ...], shared: dict[str, Any]) -> None:
    """Train with one worker in this process, without DDP; `folder`, as parts of a path, holds its checkpoints."""
    worker.prepare_worker(shared["threads"])
    run = open_run(config, shared)
    manager = CheckpointManager(open_storage(shared["storage"]), folder, newest=1)
    latest, _ = manager.newest_whole()
    if latest:
        run.restore(manager.reader(latest))
    for metrics in run.history:
        report(run, metrics)
    timer = CheckpointTimer(shared["checkpoint_every_s"])
    try:
        for progress in run.train():
            if progress.metrics is None and not progress.is_sync_point:
                continue
            is_due = timer.is_due(progress.seconds_without_sync + manager.seconds)
            if run.synchronise(wants_save=is_due) if progress.is_sync_point else is_due:
                manager.save(run)
                # Tune may end the trial at its next report; a checkpoint still being written then would stay for ever.
                manager.wait()
                timer.restart()
            if progress.metrics is not None:
                report(run, progress.metrics)
    except sync.Diverged as error:
        report_failure(run.epochs_done + 1, "diverged", str(error))


def open_run(config: TrainConfig, shared: dict[str, Any]) -> TrainingRun:
    """Return a new run of one worker, with its rows from the object store."""
    rank = Rank(device=torch.device("cuda" if shared["use_gpu"] else "cpu"))
    return TrainingRun(config, ingest.open_shards(config, shared, rank), rank, without_ddp)


def report(run: TrainingRun, metrics: Metrics) -> None:
    """Report an epoch to Tune and wait for the scheduler's decision; does not return if it stops the trial."""
    ray.tune.report(run.process_columns() | metrics | {"peak_memory_bytes": peak_memory_bytes()})


def train_with_workers(config: TrainConfig, folder: tuple[str, ...], shared: dict[str, Any]) -> None:
    """Train with several workers: a Ray Train run whose controller, in this process, reports each epoch to Tune.

    Its workers look for checkpoints in `folder`, so a trial that starts again resumes from its latest one.
    """
    storage = open_storage(shared["storage"])
    result = LeanTrainer(
        worker.train_loop_per_worker,
        train_loop_config=shared["worker_settings"]
        | {"config": config.to_dict(), "trial": "/".join(folder[1:3]), "folder": folder},
        scaling_config=shared["scaling"],
        run_config=ray.train.RunConfig(
            name=folder[-1],
            storage_path=storage.path(*folder[:-1]),
            storage_filesystem=storage.fs,
            callbacks=[TuneReporter()],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    ).fit()
    returned = result.return_value
    assert returned is not None, "rank 0 returned nothing"
    if returned["diverged"]:
        report_failure(len(returned["history"]) + 1, "diverged", returned["diverged"])


class TuneReporter(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Reports each epoch to Tune and waits for the scheduler's decision.

    Ray's `TuneReportCallback` reports through an actor, for a controller in another process. A trial that ends within
    0.2 s of its last report can end before Tune reads that report, and the epoch is lost.
    """

    def after_report(self, run_context: Any, metrics: list[Metrics], checkpoint: Any) -> None:
        """Report a copy of rank 0's metrics: Tune adds to what it gets, and Ray Train stores the original."""
        ray.tune.report(dict(metrics[0]))


def remove_workers(search_id: str, trial_id: str) -> None:
    """Remove the placement group of a trial's workers, and so the workers; does nothing if there is none.

    Tune stops a trial by ending its process. The group would remain, and the next trial would wait for its CPUs for
    ever.
    """
    key = worker.placement_key(f"{search_id}/{trial_id}")
    binary = _internal_kv_get(key)
    if binary:
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(binary)))
        _internal_kv_del(key)
