"""The training loop of every Ray Train worker: pull the shard, wrap in DDP, train, report, save, resume."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist

from fashion.cluster.connection import quieten
from fashion.config import TrainConfig
from fashion.distributed.callbacks import StepCounter
from fashion.distributed.ddp import wrap_in_ddp
from fashion.distributed.ingest import open_shards
from fashion.distributed.trainers import Engine
from fashion.distributed.watchdog import Watchdog
from fashion.model.device import peak_gpu_memory_bytes, peak_memory_bytes
from fashion.reports import provenance
from fashion.storage import Storage, open_storage
from fashion.training import sync
from fashion.training.checkpoint_manager import CheckpointManager, CheckpointTimer, progress_of
from fashion.training.metrics import NOTES, Metrics
from fashion.training.run import Rank, Shards, TrainingRun, WrapModel, prepare_process

# Newest checkpoints that are kept, besides that of the best epoch: if the newest one is damaged, the run resumes from
# the one before it.
CHECKPOINTS_TO_KEEP = 2
STACKS_FOLDER = "stacks"
# When one rank hangs, all do. Each waits this long for the others to write their stacks as well, before it ends.
SECONDS_FOR_OTHERS = 10.0


def train_loop_per_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one run to its end on this rank; return its history, its outcome, and `process_columns`.

    `settings` holds `config` (`TrainConfig.to_dict()`), `threads`, `pixel_mean`, `pixel_std`, `num_train_rows`, `rows`
    per split (`data.shards.StoredRows`), `show_bar`, `storage` and `folder` (where its checkpoints are), `faults`
    (`FaultConfig` as plain values), `engine` (`trainers.Engine`), and `trial`: the name of the trial that the run is,
    or an empty string. A trial that resumes from a checkpoint reports its earlier epochs again, for the scheduler to
    judge them. Every rank reports once per epoch.
    """
    prepare_worker(settings["threads"])
    storage, folder, faults = open_storage(settings["storage"]), tuple(settings["folder"]), settings["faults"]
    with Watchdog(faults["hang_timeout_s"], lambda stacks: write_stacks(storage, folder, stacks)) as watchdog:
        run = start_run(settings)
        manager = CheckpointManager(storage, folder, CHECKPOINTS_TO_KEEP)
        resumed_from, notes = restore_newest(run, manager)
        if settings["trial"]:
            publish_placement_group(settings["engine"], settings["trial"])
            for metrics in run.history:
                ray.train.report(process_columns(run) | metrics)
        diverged, report = None, EpochReport(manager)
        try:
            train(run, manager, report, settings, watchdog, notes)
        except sync.Diverged as error:
            # All ranks raise this together. It is a result: another try from the last checkpoint would diverge as well.
            diverged = str(error)
        report.send()
        manager.wait()
        return process_columns(run) | {"history": run.history, "diverged": diverged, "resumed_from": resumed_from}


def train(
    run: TrainingRun,
    manager: CheckpointManager,
    report: "EpochReport",
    settings: dict[str, Any],
    watchdog: Watchdog,
    notes: list[str],
) -> None:
    """Train the rest of `run`: save it when that is due, and report each epoch. The first report includes `notes`.

    Training goes on while an epoch's checkpoint is written, and the epoch is reported at the next synchronisation point
    after that, so that no crash can undo what was reported. The caller sends the last report.
    """
    timer = CheckpointTimer(settings["faults"]["checkpoint_every_s"])
    publish_step = step_publisher(settings, run)
    notice: Callable[[], str] = settings["engine"].preemption_notice
    answered = notice()  # the last one after which the run was saved
    for progress in run.train():
        watchdog.beat()
        publish_step(progress.epoch, progress.step)
        if progress.is_sync_point:
            is_due = run.rank.rank == 0 and timer.is_due(progress.seconds_without_sync + manager.seconds)
            is_told = notice() != answered  # asked for by all ranks, also where one of them saves anyway
            saves = run.synchronise(is_due or is_told, manager.is_writing())
            if not run.is_any_writing:
                report.send()
        else:
            saves = progress.metrics is not None
        if progress.metrics is not None:
            report.send()  # of the epoch before
        if saves:
            answered = notice()
            if run.rank.rank == 0:
                manager.save(run)
            timer.restart()
        if progress.metrics is not None:
            report.metrics = process_columns(run) | progress.metrics | {NOTES: "\n".join([*notes, *run.notes])}
            notes = []
            run.notes.clear()


class EpochReport:
    """The report of an epoch, which is held back until its checkpoint is written. All ranks send it together."""

    def __init__(self, manager: CheckpointManager) -> None:
        self._manager = manager
        self.metrics: Metrics | None = None
        """What is to be reported; None if nothing is."""

    def send(self) -> None:
        """Report the epoch that is held back, if there is one, once its checkpoint is written."""
        if self.metrics is not None:
            self._manager.wait()
            ray.train.report(self.metrics)
            self.metrics = None


def process_columns(run: TrainingRun) -> dict[str, Any]:
    """Return the `runs` columns that only the training processes know; all ranks call this together.

    Where ranks differ, as on unlike machines, `device` and `hardware` name each kind. Memory is of the largest rank.
    """
    columns, device = run.process_columns(), run.rank.device
    kinds: list[Any] = [(columns["device"], provenance.hardware())]
    if dist.is_initialized():
        kinds *= dist.get_world_size()
        dist.all_gather_object(kinds, kinds[0])
    gpu_bytes = peak_gpu_memory_bytes(device)
    return columns | {
        "device": "; ".join(sorted({kind for kind, _ in kinds})),
        "hardware": "; ".join(sorted({machine for _, machine in kinds})),
        "peak_memory_bytes": int(sync.largest(peak_memory_bytes(), device)),
        "peak_gpu_memory_bytes": None if gpu_bytes is None else int(sync.largest(gpu_bytes, device)),
    }


def step_publisher(settings: dict[str, Any], run: TrainingRun) -> Callable[[int, int], None]:
    """Return a function of (epoch, step) that publishes the step for the progress bar, if there is one, from rank 0."""
    if settings["show_bar"] and run.rank.rank == 0:
        return StepCounter(settings["engine"], ray.train.get_context().get_experiment_name(), run.steps)
    return lambda epoch, step: None


def write_stacks(storage: Storage, folder: tuple[str, ...], stacks: str) -> None:
    """Write the stacks of this hanging rank to a file; then wait, since the first rank to end stops the others."""
    context = ray.train.get_context()
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-rank-{context.get_world_rank():04d}.txt"
    storage.write_bytes(stacks.encode(), *folder, STACKS_FOLDER, name)
    time.sleep(SECONDS_FOR_OTHERS)


def prepare_worker(threads: int) -> None:
    """Set up a process that trains: silence Ray, keep freed memory, and compute with `threads` threads."""
    quieten()
    prepare_process(threads)


def publish_placement_group(engine: Engine, trial: str) -> None:
    """Publish the id of the placement group of a trial's workers, for `trial.remove_workers`."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "Ray Train puts its workers into a placement group"
    engine.put(placement_key(trial), group.id.binary())


def placement_key(trial: str) -> str:
    """Return the key of the id of a trial's placement group."""
    return f"placement/{trial}"


def start_run(settings: dict[str, Any], wrap: WrapModel = wrap_in_ddp) -> TrainingRun:
    """Return a new run on this rank, with its rows pulled; `wrap` puts the network under DDP by default."""
    config = TrainConfig.from_dict(settings["config"])
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    shards = open_shards(config, settings, rank)
    check_equal_steps(config, shards, rank)
    return TrainingRun(config, shards, rank, wrap)


def restore_newest(run: TrainingRun, manager: CheckpointManager) -> tuple[int | None, list[str]]:
    """Restore the newest intact checkpoint on all ranks; return its complete epochs and lines for the console.

    Returns None in place of the epochs if no checkpoint is intact. Rank 0 chooses for all ranks, and removes newer
    checkpoints, which are damaged.
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


def check_equal_steps(config: TrainConfig, shards: Shards, rank: Rank) -> None:
    """Assert that all ranks take equally many steps per epoch: otherwise DDP would wait for ever at its end."""
    steps = config.steps_per_epoch(shards.num_train_rows)
    most, fewest = sync.largest(steps, rank.device), -sync.largest(-steps, rank.device)
    assert most == fewest, ("ranks would take unequal numbers of steps", fewest, most)
    assert config.global_batch_size % rank.world_size == 0, (config.global_batch_size, rank.world_size)
