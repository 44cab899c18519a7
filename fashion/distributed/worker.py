"""What runs on every worker of Ray Train: pull the shard, wrap in DDP, train, report, checkpoint, resume."""

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.experimental.internal_kv import _internal_kv_put
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fashion.cluster.plan import quieten
from fashion.config import TrainConfig
from fashion.data import prepare as data
from fashion.distributed.lean_trainer import reclaim_announced
from fashion.distributed.shared_memory import SharedUpdate
from fashion.distributed.watchdog import Watchdog
from fashion.reports.progress import StepCounter
from fashion.storage import Storage, open_storage
from fashion.training import epoch as loop
from fashion.training import run as fit
from fashion.training.checkpoint_manager import Keeper, Timer, place_of

STREAM_BUFFER_ROWS = 8192
# Besides that of the best epoch: one may turn out damaged, and the one before it costs less than the run.
CHECKPOINTS_TO_KEEP = 2
STACKS_FOLDER = "stacks"
# Ranks hang together, but they notice it within a look of each other.
SECONDS_FOR_OTHERS = 10.0


def train_loop_per_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one run to its end on this rank; return what only the workers know.

    `settings` holds `config` (`TrainConfig.to_dict()`), `threads`, `pixel_mean`, `pixel_std`, per split `cuts` and
    `tables` (references to the pieces between the cuts), `show_bar`, `storage` and `folder` (where its checkpoints
    are), `faults` (`FaultConfig` as plain values), and `trial`: the name of the trial that the run is, or an empty
    string. A trial that goes on from a checkpoint reports its earlier epochs anew, for the search to judge them.
    Reports once per epoch from every rank.
    """
    prepare_process(settings["threads"])
    storage, folder, faults = open_storage(settings["storage"]), tuple(settings["folder"]), settings["faults"]
    with Watchdog(faults["hang_timeout_s"], lambda stacks: leave_stacks(storage, folder, stacks)) as watchdog:
        run = start_run(settings)
        keeper = Keeper(storage, folder, CHECKPOINTS_TO_KEEP)
        resumed_from, notes = restore_newest(run, keeper)
        if settings["trial"]:
            note_placement_group(settings["trial"])
            for metrics in run.history:
                ray.train.report(run.facts() | metrics)
        diverged = None
        try:
            train(run, keeper, faults["checkpoint_every_s"], step_observers(settings, run, watchdog), notes)
        except loop.Diverged as error:
            # All ranks are here. It is a result and no accident: another try from the last checkpoint would end alike.
            diverged = str(error)
        keeper.wait()
        return run.facts() | {
            "history": run.history,
            "diverged": diverged,
            "peak_memory_bytes": int(loop.largest(fit.peak_memory_bytes(), run.rank.device)),
            "resumed_from": resumed_from,
        }


def train(
    run: fit.Run, keeper: Keeper, checkpoint_every_s: float, on_step: Callable[[int, int], None], notes: list[str]
) -> None:
    """Train what remains of `run`, saving it as often as asked; `notes` go to the person with the first report."""
    timer = Timer(checkpoint_every_s)
    answered = reclaim_announced()

    def wants_pause(seconds: float) -> bool:
        return (run.rank.rank == 0 and timer.is_due(seconds + keeper.seconds)) or reclaim_announced() != answered

    def save() -> None:
        nonlocal answered
        answered = reclaim_announced()
        if run.rank.rank == 0:
            keeper.save(run)
        timer.restart()

    for metrics in run.epochs(on_step, wants_pause, save):
        save()
        keeper.wait()  # what is reported stays done, whatever comes
        ray.train.report(run.facts() | metrics | {"notes": notes})
        notes = []


def step_observers(settings: dict[str, Any], run: fit.Run, watchdog: Watchdog) -> Callable[[int, int], None]:
    """Return what is told of each step: the watchdog, and on rank 0 the bar, if somebody sees it."""
    count = run.ignore_step
    if settings["show_bar"] and run.rank.rank == 0:
        count = StepCounter(ray.train.get_context().get_experiment_name(), run.steps)

    def on_step(epoch: int, step: int) -> None:
        watchdog.beat()
        count(epoch, step)

    return on_step


def leave_stacks(storage: Storage, folder: tuple[str, ...], stacks: str) -> None:
    """Write down where this rank hangs, then wait a little: the first to end takes the others with it."""
    context = ray.train.get_context()
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-rank-{context.get_world_rank():04d}.txt"
    storage.write_bytes(stacks.encode(), *folder, STACKS_FOLDER, name)
    time.sleep(SECONDS_FOR_OTHERS)


def prepare_process(threads: int) -> None:
    """Set up a process that trains: its output, its memory, and `threads` of computation."""
    quieten()
    fit.prepare_process(threads)


def note_placement_group(trial: str) -> None:
    """Leave a note of where a trial's workers live: see `trial.remove_workers`."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "Ray Train puts its workers into a placement group"
    _internal_kv_put(placement_key(trial), group.id.binary(), overwrite=True)


def placement_key(trial: str) -> bytes:
    """Return the key, in Ray's key-value store, of the id of a trial's placement group."""
    return f"fashion/placement/{trial}".encode()


def under_ddp(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> fit.Wrapped:
    """Return `model` under DDP if there is more than one worker, what moves its weights, and the way of gradients.

    No buffers are sent: they are constants, apart from statistics that are averaged once, before an evaluation. With
    bf16 arithmetic gradients are exchanged as bf16 too: half the bytes. On one host's CPUs they go through shared
    memory, in one bucket: nothing could be gained by sending some of them early, for the cores are busy. There, workers
    share out the update as well.
    """
    context = ray.train.get_context()
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "forward_sync_buffers": False}
    shared = None
    if 1 < context.get_world_size() == context.get_local_world_size() and ray.train.torch.get_device().type == "cpu":
        shared = SharedUpdate.open(optimizer, torch.bfloat16 if precision == "bf16" else torch.float32)
        if shared is not None:
            options["bucket_cap_mb"] = sum(parameter.nbytes for parameter in model.parameters()) / 2**20 + 1
    prepared: nn.Module = ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)
    if not isinstance(prepared, DistributedDataParallel):
        return prepared, optimizer.step, "none"
    if shared is not None:
        prepared.register_comm_hook(None, shared.hook)
        return prepared, shared.step, "shared memory"
    if precision == "bf16":
        prepared.register_comm_hook(None, bf16_compress_hook)
    return prepared, optimizer.step, dist.get_backend()


def start_run(settings: dict[str, Any], wrap: fit.Wrap = under_ddp) -> fit.Run:
    """Return the run at its very start, this rank's rows pulled and the network under DDP, or as `wrap` has it."""
    config = TrainConfig.from_dict(settings["config"])
    context = ray.train.get_context()
    rank = fit.Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    rows = open_rows(config, settings, rank)
    check_equal_steps(config, rows, rank)
    return fit.Run(config, rows, rank, wrap)


def restore_newest(run: fit.Run, keeper: Keeper) -> tuple[int | None, list[str]]:
    """Continue from the newest checkpoint that is whole; return the epoch that it was made in or after, and notes.

    Rank 0 chooses for all; damaged ones that are newer go, for the run takes another course from there.
    """
    chosen: list[Any] = [None]
    notes: list[str] = []
    if run.rank.rank == 0:
        chosen[0], notes = keeper.newest_whole()
        for name in keeper.names():
            if chosen[0] is None or (place_of(name) or (0, 0)) > (place_of(chosen[0]) or (0, 0)):
                keeper.remove(name)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, device=run.rank.device)
    if chosen[0] is None:
        return None, [*notes, "no checkpoint is whole: the run starts anew"] if notes else []
    run.restore(keeper.reader(chosen[0]))
    return run.epochs_done, [*notes, f"goes on from checkpoint {chosen[0]}"]


def check_equal_steps(config: TrainConfig, rows: fit.Rows, rank: fit.Rank) -> None:
    """Make sure that all ranks take the same number of steps: with unequal ones DDP would wait for ever at the end."""
    steps = config.steps_per_epoch(rows.num_train_rows)
    most, fewest = loop.largest(steps, rank.device), -loop.largest(-steps, rank.device)
    assert most == fewest, ("ranks would take unequal numbers of steps", fewest, most)
    assert config.global_batch_size % rank.world_size == 0, (config.global_batch_size, rank.world_size)


# --- rows ---------------------------------------------------------------------------------------------------------


def open_rows(config: TrainConfig, settings: dict[str, Any], rank: fit.Rank) -> fit.Rows:
    """Pull this rank's val rows, and its training rows or the means to stream them."""
    num_train_rows = settings["cuts"]["train"][-1]
    num_steps = config.steps_per_epoch(num_train_rows)
    train_batches: Callable[[int], Iterator[loop.Batch]]
    if config.data_mode == "streaming":
        train_batches = streaming_batches(config, rank, num_steps)
    else:
        images, labels = pull_shard("train", settings, rank)
        train_batches = fit.resident_batches(config, images, labels, rank, num_steps)
    return fit.Rows(
        train_batches=train_batches,
        val=pull_shard("val", settings, rank),
        num_train_rows=num_train_rows,
        num_val_rows=settings["cuts"]["val"][-1],
        pixel_mean=settings["pixel_mean"],
        pixel_std=settings["pixel_std"],
    )


def pull_shard(split: str, settings: dict[str, Any], rank: fit.Rank) -> loop.Batch:
    """Pull this rank's rows from the object store onto its device, once: (N, 1, 28, 28) uint8 and (N,) int64."""
    cuts = settings["cuts"][split]
    pieces = data.pieces_of_shard(cuts, rank.rank, rank.world_size)
    tables = list(as_tables(ray.get([settings["tables"][split][piece] for piece in pieces])))
    rows = data.from_table(pa.concat_tables(tables) if tables else data.SCHEMA.empty_table())
    start, stop = data.shard_bounds(cuts[-1], rank.rank, rank.world_size)
    assert len(rows.labels) == stop - start, (split, len(rows.labels), start, stop)
    return to_tensors(rows, rank.device)


def as_tables(batches: Iterable[Any]) -> Iterator[pa.Table]:
    """Yield Ray's batches as tables of `data.SCHEMA`, without the metadata that Ray adds."""
    for batch in batches:
        yield batch.select(data.SCHEMA.names).cast(data.SCHEMA)


def to_tensors(rows: data.Split, device: torch.device) -> loop.Batch:
    """Copy rows to `device` as images (N, 1, 28, 28) uint8 and labels (N,) int64."""
    images = torch.from_numpy(np.array(rows.images)).unsqueeze(1)
    return images.to(device), torch.from_numpy(rows.labels.astype(np.int64)).to(device)


def streaming_batches(config: TrainConfig, rank: fit.Rank, num_steps: int) -> Callable[[int], Iterator[loop.Batch]]:
    """Return `train_batches(epoch)` for rows that do not fit: read anew in each epoch, shuffled within a buffer.

    Ray's local shuffle buffer is not used: it yields short batches in mid-stream, and ranks with unequal steps hang.
    """
    shard = ray.train.get_dataset_shard("train")
    batch_size = config.global_batch_size // rank.world_size
    augmentation = loop.Augmentation(config.flip, config.shift, config.erase)

    def train_batches(epoch: int) -> Iterator[loop.Batch]:
        generator = torch.Generator().manual_seed(loop.stream_seed(config.seed, epoch, rank.rank, 0))
        tables = as_tables(shard.iter_batches(batch_size=STREAM_BUFFER_ROWS, batch_format="pyarrow"))
        steps = 0
        for images, labels, index in resliced(tables, batch_size, generator):
            steps += 1
            images, labels = images.to(rank.device), labels.to(rank.device)
            yield augmentation.apply(images, index, seed=config.seed, epoch=epoch, generator=generator), labels
        assert steps == num_steps, (steps, num_steps)

    return train_batches


def resliced(
    tables: Iterable[pa.Table], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield whole batches (images, labels, index) of rows shuffled within each table; a remainder joins the next."""
    rest: tuple[Tensor, ...] | None = None
    for table in tables:
        split = data.from_table(table)
        images, labels = to_tensors(split, torch.device("cpu"))
        fresh: tuple[Tensor, ...] = (images, labels, torch.from_numpy(split.index.astype(np.int64)))
        rows = fresh if rest is None else tuple(torch.cat(pair) for pair in zip(rest, fresh, strict=True))
        order = torch.randperm(len(rows[1]), generator=generator)
        whole = len(order) // batch_size * batch_size
        for chosen in order[:whole].view(-1, batch_size):
            yield rows[0][chosen], rows[1][chosen], rows[2][chosen]
        rest = tuple(column[order[whole:]] for column in rows)
