"""One trial of a search, in a process of Ray Tune: the training loop itself, or a Ray Train run with several workers.

Both report one epoch at a time, with the same keys, and wait for the scheduler's decision. A trial that resumes from a
checkpoint reports its earlier epochs again: the scheduler ignores those that it has judged, and judges the others.
"""

from typing import Any

import ray
import ray.train
import ray.tune
import torch
from ray import PlacementGroupID
from ray.train import UserCallback
from ray.util.placement_group import PlacementGroup

from fashion.config import TrainConfig, UserError
from fashion.distributed import ingest, worker
from fashion.distributed.trainers import Engine, run_config
from fashion.model.device import share_of_memory
from fashion.reports.schemas import SEARCHES_FOLDER
from fashion.search.space import TRIAL
from fashion.search.trial_store import CHECKPOINTS
from fashion.storage import open_storage
from fashion.training import sync
from fashion.training.checkpoint_manager import CheckpointManager, CheckpointTimer
from fashion.training.metrics import NOTES, Metrics
from fashion.training.run import Rank, TrainingRun, without_ddp

METRIC = "val_accuracy"
"""Metric that Tune's scheduler and searcher read. `scheduler.ASHA` puts another score in its place."""


def train_trial(point: dict[str, Any], *, shared: dict[str, Any]) -> None:
    """Run the trial whose name and settings `point` holds; `shared` holds what all trials of the search have in common.

    Keys of `shared`: `base` (`TrainConfig.to_dict()`), `storage` (its URI), `search_id`, `workers_per_trial`,
    `checkpoint_every_s`, `use_gpu`, `gpu_share` (the trial's GPUs, a fraction where trials share one), and the settings
    of `worker.train_loop_per_worker`. With several workers also `worker_settings` (the latter by themselves) and
    `scaling` (a `ScalingConfig`), and `engine` (`trainers.Engine`).
    """
    settings = {name: value for name, value in point.items() if name != TRIAL}
    try:
        config = TrainConfig.from_dict(shared["base"] | settings)
    except UserError as error:
        # Reported as a result, not raised: Tune would start a crashed trial again, with the same settings.
        report_failure(0, "refused", str(error))
        return
    run_trial = train_in_process if shared["workers_per_trial"] == 1 else train_with_workers
    run_trial(config, (SEARCHES_FOLDER, shared["search_id"], point[TRIAL], CHECKPOINTS), shared)


def report_failure(epoch: int, reason: str, message: str) -> None:
    """Report to Tune that the trial failed at `epoch`; `reason` is `diverged` or `refused`, a key of the result.

    The metric is 0, the worst value: a scheduler that compares with NaN never stops a trial.
    """
    ray.tune.report({"epoch": epoch, METRIC: 0.0, reason: message})


def train_in_process(config: TrainConfig, folder: tuple[str, ...], shared: dict[str, Any]) -> None:
    """Train with one worker, in this process, without Ray Train or DDP; save checkpoints in `folder` of the storage."""
    worker.prepare_worker(shared["threads"])
    run = open_run(config, shared)
    manager = CheckpointManager(open_storage(shared["storage"]), folder, newest=1)
    latest, notes = manager.newest_whole()
    run.notes += notes
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
                manager.wait()  # the trial may be over at its next report, and what is still written would stay
                timer.restart()
            if progress.metrics is not None:
                report(run, progress.metrics)
    except sync.Diverged as error:
        report_failure(run.epochs_done + 1, "diverged", str(error))


def open_run(config: TrainConfig, shared: dict[str, Any]) -> TrainingRun:
    """Return the run before its first step, its rows pulled from the object store."""
    rank = Rank(device=torch.device("cuda" if shared["use_gpu"] else "cpu"))
    share_of_memory(shared["gpu_share"], rank.device)
    return TrainingRun(config, ingest.open_shards(config, shared, rank), rank, without_ddp)


def report(run: TrainingRun, metrics: Metrics) -> None:
    """Report an epoch to Tune and wait for the scheduler's decision; does not return if that is to stop the trial."""
    notes = "\n".join(run.notes)
    run.notes.clear()
    ray.tune.report(worker.process_columns(run) | metrics | {NOTES: notes})


def train_with_workers(config: TrainConfig, folder: tuple[str, ...], shared: dict[str, Any]) -> None:
    """Train with several workers, as a Ray Train run; this process reports each epoch to Tune.

    When Tune starts the trial again, the run has the same name and folder, so that its workers resume from the latest
    checkpoint there.
    """
    storage = open_storage(shared["storage"])
    engine: Engine = shared["engine"]
    settings = {"config": config.to_dict(), "trial": "/".join(folder[1:3]), "folder": folder, "engine": engine}
    outcome = engine.train(
        worker.train_loop_per_worker,
        shared["worker_settings"] | settings,
        shared["scaling"],
        run_config(
            "WARNING",
            name=folder[-1],
            storage_path=storage.path(*folder[:-1]),
            storage_filesystem=storage.fs,
            callbacks=[TuneReporter()],
        ),
        {},
    )
    assert outcome is not None, "rank 0 returned nothing"
    if outcome["diverged"]:
        report_failure(len(outcome["history"]) + 1, "diverged", outcome["diverged"])


class TuneReporter(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Reports each epoch of a Ray Train run to Tune, and waits for the scheduler's decision.

    It is called in the trial's process, and the workers' controller waits for it. Ray's `TuneReportCallback` sends
    reports through an actor, which the trial reads every 0.2 s; if it ends before that, Tune misses the last epoch.
    """

    def after_report(self, run_context: Any, metrics: list[Metrics], checkpoint: Any) -> None:
        """Report a copy of rank 0's metrics: Tune adds keys to what it is given, and Ray Train saves the original."""
        ray.tune.report(dict(metrics[0]))


def remove_workers(engine: Engine | None, search_id: str, trial_id: str) -> None:
    """Remove the placement group of a trial's workers, and with it the workers; does nothing if there is none.

    Tune stops a trial by ending the trial's own process. The placement group would keep its CPUs, and the next trial
    would wait for them for ever. `engine` is None where trials have no workers.
    """
    if engine is None:
        return
    key = worker.placement_key(f"{search_id}/{trial_id}")
    binary = engine.get(key)
    if binary:
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(binary)))
        engine.delete(key)
