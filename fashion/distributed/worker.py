"""What runs on every worker of Ray Train: pull the shard, wrap in DDP, train, report, checkpoint, resume."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.experimental.internal_kv import _internal_kv_put

from fashion.cluster.connection import quieten
from fashion.config import TrainConfig
from fashion.distributed.callbacks import StepCounter
from fashion.distributed.ddp import wrap_in_ddp
from fashion.distributed.ingest import open_shards
from fashion.distributed.lean_trainer import reclaim_announced
from fashion.distributed.watchdog import Watchdog
from fashion.storage import Storage, open_storage
from fashion.training import sync
from fashion.training.checkpoint_manager import CheckpointManager, CheckpointTimer, progress_of
from fashion.training.run import Rank, Shards, TrainingRun, WrapModel, peak_memory_bytes, prepare_process

# Besides that of the best epoch: one may turn out damaged, and the one before it costs less than the run.
CHECKPOINTS_TO_KEEP = 2
STACKS_FOLDER = "stacks"
# Ranks hang together, but they notice it within a look of each other.
SECONDS_FOR_OTHERS = 10.0


def train_loop_per_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one run to its end on this rank; return what only the workers know.

    `settings` holds `config` (`TrainConfig.to_dict()`), `threads`, `pixel_mean`, `pixel_std`, per split `bounds`
    and `blocks` (see `data.shards`; blocks as references), `show_bar`, `storage` and `folder` (where its checkpoints
    are), `faults` (`FaultConfig` as plain values), and `trial`: the name of the trial that the run is, or an empty
    string. A trial that goes on from a checkpoint reports its earlier epochs anew, for the search to judge them.
    Reports once per epoch from every rank.
    """
    prepare_worker(settings["threads"])
    storage, folder, faults = open_storage(settings["storage"]), tuple(settings["folder"]), settings["faults"]
    with Watchdog(faults["hang_timeout_s"], lambda stacks: leave_stacks(storage, folder, stacks)) as watchdog:
        run = start_run(settings)
        manager = CheckpointManager(storage, folder, CHECKPOINTS_TO_KEEP)
        resumed_from, notes = restore_newest(run, manager)
        if settings["trial"]:
            note_placement_group(settings["trial"])
            for metrics in run.history:
                ray.train.report(run.process_columns() | metrics)
        diverged = None
        try:
            train(run, manager, settings, watchdog, notes)
        except sync.Diverged as error:
            # All ranks are here. It is a result and no accident: another try from the last checkpoint would end alike.
            diverged = str(error)
        manager.wait()
        return run.process_columns() | {
            "history": run.history,
            "diverged": diverged,
            "peak_memory_bytes": int(sync.largest(peak_memory_bytes(), run.rank.device)),
            "resumed_from": resumed_from,
        }


def train(
    run: TrainingRun, manager: CheckpointManager, settings: dict[str, Any], watchdog: Watchdog, notes: list[str]
) -> None:
    """Train what remains of `run`: save it when that is due, report each epoch. `notes` go with the first report."""
    timer = CheckpointTimer(settings["faults"]["checkpoint_every_s"])
    publish_step = step_publisher(settings, run)
    answered = reclaim_announced()
    for progress in run.train():
        watchdog.beat()
        publish_step(progress.epoch, progress.step)
        if progress.is_sync_point:
            is_due = run.rank.rank == 0 and timer.is_due(progress.seconds_without_sync + manager.seconds)
            saves = run.synchronise(wants_save=is_due or reclaim_announced() != answered)
        else:
            saves = progress.metrics is not None
        if saves:
            answered = reclaim_announced()
            if run.rank.rank == 0:
                manager.save(run)
            timer.restart()
        if progress.metrics is not None:
            manager.wait()  # what is reported stays done, whatever comes
            ray.train.report(run.process_columns() | progress.metrics | {"notes": notes})
            notes = []


def step_publisher(settings: dict[str, Any], run: TrainingRun) -> Callable[[int, int], None]:
    """Return what publishes each step for the progress bar, on rank 0 and if there is one; else it does nothing."""
    if settings["show_bar"] and run.rank.rank == 0:
        return StepCounter(ray.train.get_context().get_experiment_name(), run.steps)
    return lambda epoch, step: None


def leave_stacks(storage: Storage, folder: tuple[str, ...], stacks: str) -> None:
    """Write down where this rank hangs, then wait a little: the first to end takes the others with it."""
    context = ray.train.get_context()
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-rank-{context.get_world_rank():04d}.txt"
    storage.write_bytes(stacks.encode(), *folder, STACKS_FOLDER, name)
    time.sleep(SECONDS_FOR_OTHERS)


def prepare_worker(threads: int) -> None:
    """Set up a process that trains: its output, its memory, and `threads` of computation."""
    quieten()
    prepare_process(threads)


def note_placement_group(trial: str) -> None:
    """Leave a note of where a trial's workers live: see `trial.remove_workers`."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "Ray Train puts its workers into a placement group"
    _internal_kv_put(placement_key(trial), group.id.binary(), overwrite=True)


def placement_key(trial: str) -> bytes:
    """Return the key, in Ray's key-value store, of the id of a trial's placement group."""
    return f"fashion/placement/{trial}".encode()


def start_run(settings: dict[str, Any], wrap: WrapModel = wrap_in_ddp) -> TrainingRun:
    """Return the run at its very start, this rank's rows pulled and the network under DDP, or as `wrap` has it."""
    config = TrainConfig.from_dict(settings["config"])
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    rows = open_shards(config, settings, rank)
    check_equal_steps(config, rows, rank)
    return TrainingRun(config, rows, rank, wrap)


def restore_newest(run: TrainingRun, manager: CheckpointManager) -> tuple[int | None, list[str]]:
    """Continue from the newest checkpoint that is whole; return the epoch that it was made in or after, and notes.

    Rank 0 chooses for all; damaged ones that are newer go, for the run takes another course from there.
    """
    chosen: list[Any] = [None]
    notes: list[str] = []
    if run.rank.rank == 0:
        chosen[0], notes = manager.newest_whole()
        for name in manager.names():
            if chosen[0] is None or (progress_of(name) or (0, 0)) > (progress_of(chosen[0]) or (0, 0)):
                manager.remove(name)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, device=run.rank.device)
    if chosen[0] is None:
        return None, [*notes, "no checkpoint is whole: the run starts anew"] if notes else []
    run.restore(manager.reader(chosen[0]))
    return run.epochs_done, [*notes, f"goes on from checkpoint {chosen[0]}"]


def check_equal_steps(config: TrainConfig, rows: Shards, rank: Rank) -> None:
    """Make sure that all ranks take the same number of steps: with unequal ones DDP would wait for ever at the end."""
    steps = config.steps_per_epoch(rows.num_train_rows)
    most, fewest = sync.largest(steps, rank.device), -sync.largest(-steps, rank.device)
    assert most == fewest, ("ranks would take unequal numbers of steps", fewest, most)
    assert config.global_batch_size % rank.world_size == 0, (config.global_batch_size, rank.world_size)
