"""What one trial of a search runs in its process of Ray Tune: the training loop itself, or a `TorchTrainer` around it.

Both report an epoch at a time, with the same columns, and wait for the scheduler's word. A trial that goes on from a
checkpoint reports its earlier epochs again: the scheduler knows those that it judged, and judges those that it missed.
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
"""Key of a trial's own name, such as `t0003`, among its settings; Tune's ids differ from one life to the next."""
CHECKPOINTS = "checkpoints"
METRIC = "val_accuracy"


def train_trial(point: dict[str, Any], *, shared: dict[str, Any]) -> None:
    """Run the trial of `point`: its name and settings. `shared` is what all trials of the search have in common.

    `shared` holds `base` (`TrainConfig.to_dict()`), `storage` and `search_id`, `workers_per_trial`, and what
    `worker.train_loop_per_worker` is told; for one worker also `checkpoint_every_s` and `use_gpu`, for several
    `worker_settings` and `scaling`.
    """
    settings = {name: value for name, value in point.items() if name != TRIAL}
    try:
        config = TrainConfig.from_dict(shared["base"] | settings)
    except UserError as error:
        # No second try would find other settings, so it is a result and no crash.
        end_badly(0, "refused", str(error))
        return
    run_trial = train_here if shared["workers_per_trial"] == 1 else train_with_workers
    run_trial(config, (SEARCHES_FOLDER, shared["search_id"], point[TRIAL], CHECKPOINTS), shared)


def end_badly(epoch: int, reason: str, message: str) -> None:
    """Report that the trial is over at `epoch`, as the worst there is: not as NaN, which no comparison stops."""
    ray.tune.report({"epoch": epoch, METRIC: 0.0, reason: message})


def train_here(config: TrainConfig, folder: tuple[str, ...], shared: dict[str, Any]) -> None:
    """Train with one worker in this process: no other process, no DDP, the rows straight from the object store."""
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
                manager.wait()  # the trial may be over at its next report, and what is still written would stay
                timer.restart()
            if progress.metrics is not None:
                report(run, progress.metrics)
    except sync.Diverged as error:
        end_badly(run.epochs_done + 1, "diverged", str(error))


def open_run(config: TrainConfig, shared: dict[str, Any]) -> TrainingRun:
    """Return the run at its very start."""
    rank = Rank(device=torch.device("cuda" if shared["use_gpu"] else "cpu"))
    rows = ingest.open_rows(config, shared, rank)
    return TrainingRun(config, rows, rank, without_ddp)


def report(run: TrainingRun, metrics: Metrics) -> None:
    """Hand an epoch to Tune and wait; if the trial is stopped here, this does not return."""
    ray.tune.report(run.process_columns() | metrics | {"peak_memory_bytes": peak_memory_bytes()})


def train_with_workers(config: TrainConfig, folder: tuple[str, ...], shared: dict[str, Any]) -> None:
    """Train with several workers: a Ray Train run of its own, whose controller, in this process, tells Tune each epoch.

    Started again under the same name and place, its workers go on from the run's latest checkpoint by themselves.
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
    told = result.return_value
    assert told is not None, "rank 0 returned nothing"
    if told["diverged"]:
        end_badly(len(told["history"]) + 1, "diverged", told["diverged"])


class TuneReporter(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Hands each epoch to Tune and waits for the scheduler's word.

    Ray's `TuneReportCallback` goes through an actor, for a controller in another process. A trial that ends within
    0.2 s of its last report can end before that report is read, and Tune never hears of the epoch.
    """

    def after_report(self, run_context: Any, metrics: list[Metrics], checkpoint: Any) -> None:
        """Report what rank 0 reported: a copy, for Tune adds to it, and Ray Train keeps it beside the checkpoint."""
        ray.tune.report(dict(metrics[0]))


def remove_workers(search_id: str, trial_id: str) -> None:
    """Remove the placement group of a trial's workers, and with it the workers, if there are any.

    Tune stops a trial by ending its process; the group would stay, and the next trial wait for it for ever.
    """
    key = worker.placement_key(f"{search_id}/{trial_id}")
    binary = _internal_kv_get(key)
    if binary:
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(binary)))
        _internal_kv_del(key)
