"""The epochs of one run, from seed to last epoch, over one rank's rows. Knows torch, not Ray: a worker of Ray Train and
a trial of a search drive the same generator.
"""

import ctypes
import dataclasses
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fashion.config import TrainConfig
from fashion.model.network import FashionCNN, count_parameters, initialise, place
from fashion.training import checkpoint, loop, sync
from fashion.training.batches import Augmentation, Batch, plain_batches, shuffled_batches, stream_seed
from fashion.training.ema import start_ema, update_ema
from fashion.training.metrics import Metrics
from fashion.training.optimizer import build_optimizer, learning_rate

# Activations of an evaluation in fp32 are the peak of a worker's memory: with 500, 0.36 GiB more than with 200, and no
# quicker on two cores.
EVAL_BATCH_SIZE = 250
PROGRESS_FORMAT = 4


@dataclass(frozen=True)
class Rank:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Shards:
    """What a rank trains on and evaluates.

    `train_batches(epoch)` yields this rank's batches of (images, labels); `val` holds its val images (N, 1, 28, 28)
    uint8 and labels (N,) int64; the totals are over all ranks.
    """

    train_batches: Callable[[int], Iterator[Batch]]
    val: Batch
    num_train_rows: int
    num_val_rows: int
    pixel_mean: float
    pixel_std: float


WrappedModel = tuple[nn.Module, Callable[[], object], str]
"""A network as it is trained, what moves its weights, and the way that gradients take: the column `exchange`."""
WrapModel = Callable[[nn.Module, torch.optim.Optimizer, str], WrappedModel]
"""Makes that of a network, its optimizer and the precision, on all ranks together."""


def alone(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> WrappedModel:
    """Let a process train by itself."""
    return model, optimizer.step, "none"


def prepare_process(threads: int) -> None:
    """Set up a process that computes: its memory, and `threads` of computation, of which Ray leaves it one."""
    keep_freed_memory()
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for reuse.

    By default it hands every large activation back to the kernel and faults it in again in the next step: 6 % of a
    step's time on two Zen 3 cores. The numbers are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)
        mallopt(-1, (1 << 31) - 1)


@dataclass(frozen=True)
class Progress:
    """How far a run is: after a step, or after an epoch, which then has metrics."""

    epoch: int
    step: int
    """Steps done of this epoch."""
    is_sync_point: bool = False
    """Whether every rank calls `TrainingRun.synchronise` now."""
    seconds_without_sync: float = 0.0
    """How long it will take at least to the next synchronisation point, if that is known."""
    metrics: Metrics | None = None


class TrainingRun:
    """A run in progress: network, optimizer and history; the generator `train` advances it."""

    def __init__(self, config: TrainConfig, rows: Shards, rank: Rank, wrap: WrapModel) -> None:
        """Build the network from the seed alone, so that all ranks start equal.

        `wrap` adds DDP, where several train together.
        """
        self.config = config
        self.rows = rows
        self.rank = rank
        self.steps = config.steps_per_epoch(rows.num_train_rows)
        self.precision = loop.resolve_precision(config.precision, rank.device)
        torch.manual_seed(stream_seed(config.seed, 0, 0, 1))
        self.model = place(build_model(config, rows.pixel_mean, rows.pixel_std), rank.device)
        self.evaluated = start_ema(self.model) if config.ema_decay else self.model
        """What is judged on val, chosen and loaded from a checkpoint: the average of the weights, or the network."""
        self.optimizer = build_optimizer(config, self.model)
        self.wrapped, self.update, self.exchange = wrap(self.model, self.optimizer, self.precision)
        self.history: list[Metrics] = []
        """Metrics of each epoch so far, earlier lives of the run included."""
        self.positions: list[sync.EpochState] = []
        """States of all ranks within an epoch, while a checkpoint is made there and before the run goes on from one."""
        self._record: loop.EpochRecord | None = None
        """That of the epoch in progress while the ranks are to synchronise."""

    @property
    def epochs_done(self) -> int:
        """Epochs trained so far."""
        return len(self.history)

    def facts(self) -> dict[str, Any]:
        """Return what this process knows of how it runs, in columns of the `runs` table."""
        device = self.rank.device
        return {
            "num_parameters": count_parameters(self.model),
            "world_size": self.rank.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "precision": self.precision,
            "threads_per_worker": torch.get_num_threads(),
            "exchange": self.exchange,
        }

    @property
    def step(self) -> int:
        """Steps done of the epoch within which a checkpoint is made; 0 between epochs."""
        return self.positions[0].step if self.positions else 0

    def encode(self) -> dict[str, bytes]:
        """Return a checkpoint's files."""
        positions = [dataclasses.asdict(position) for position in self.positions]
        progress = {"format": PROGRESS_FORMAT, "history": self.history, "positions": positions}
        return checkpoint.encode(self.evaluated, self.optimizer, progress, self._trained)

    def restore(self, read_file: Callable[[str], bytes]) -> None:
        """Continue from a checkpoint whose files `read_file(name)` gives.

        Raises `checkpoint.DamagedCheckpoint`, and `checkpoint.OtherVersion` for files that this code cannot read.
        """
        progress = checkpoint.restore(read_file, self.evaluated, self.optimizer, self._look_at, self._trained)
        self.history = progress["history"]
        self.positions = sync.epoch_states_from(progress["positions"])

    @property
    def _trained(self) -> nn.Module | None:
        """The network that the optimizer moves, if another one is evaluated."""
        return None if self.evaluated is self.model else self.model

    def _look_at(self, progress: dict[str, Any]) -> None:
        """Raise unless `progress` is one that `encode` could have written for this run."""
        if progress.get("format") != PROGRESS_FORMAT:
            raise checkpoint.OtherVersion(
                f"the checkpoint has form {progress.get('format')} and this code reads {PROGRESS_FORMAT}"
            )
        figures = {"train_loss", "train_accuracy", "train_rows", "lr", "epoch_time_s", "data_wait_s"}
        figures |= {"val_loss", "val_accuracy", "val_rows", "val_time_s"} if self.rows.num_val_rows else set()
        history = progress.get("history")
        whole = isinstance(history, list) and all(
            isinstance(metrics, dict)
            and metrics.get("epoch") == epoch
            and all(type(metrics.get(name)) in (int, float) for name in figures)
            for epoch, metrics in enumerate(history, start=1)
        )
        if not whole:
            raise checkpoint.damaged(checkpoint.PROGRESS, "its history is not one of this run's epochs 1, 2, 3, ...")
        try:
            positions = sync.epoch_states_from(progress["positions"])
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.damaged(checkpoint.PROGRESS, f"its positions: {error!r}") from error
        steps = {position.step for position in positions}
        if positions and not (len(steps) == 1 and 0 < min(steps) <= self.steps):
            raise checkpoint.damaged(checkpoint.PROGRESS, f"its ranks are at steps {sorted(steps)}")

    def train(self) -> Iterator[Progress]:
        """Train what remains, and yield after every step and after every epoch.

        After a step that is a synchronisation point every rank calls `synchronise` before it goes on. The metrics of an
        epoch are the same on all ranks but for the times. Raises `sync.Diverged` on all ranks together.
        """
        for epoch in range(self.epochs_done + 1, self.config.last_epoch + 1):
            record = self._start_epoch(epoch)
            yield from self._train_steps(epoch, record)
            metrics = self._train_metrics(epoch, record.result())
            sync.average_statistics(self.model)
            if self.rows.num_val_rows:
                metrics |= self._evaluate(epoch)
            self.history.append(metrics)
            yield Progress(epoch, record.step, metrics=metrics)

    def epochs(self) -> Iterator[Metrics]:
        """Train what remains without saving within epochs; yield the metrics of each epoch."""
        for progress in self.train():
            if progress.is_sync_point:
                self.synchronise(wants_save=False)
            if progress.metrics is not None:
                yield progress.metrics

    def synchronise(self, wants_save: bool) -> bool:
        """Return whether the run is to be saved now: whether any rank wants it to be. All ranks call this together.

        If so, `encode` returns a checkpoint from which the run goes on within the epoch. Raises `sync.Diverged` on all
        ranks if any saw a loss that is not finite: no checkpoint is made of what came of it.
        """
        assert self._record is not None, "the run is not at a synchronisation point"
        record, self._record = self._record, None
        if not record.synchronise(wants_save):
            return False
        self.positions = sync.gathered(record.state(self.wrapped))
        return True

    def _start_epoch(self, epoch: int) -> loop.EpochRecord:
        """Return the record of an epoch at its start, or where the checkpoint was made that the run goes on from."""
        start = sync.START
        if self.positions:
            start = sync.own_epoch_state(self.positions, self.rank.rank, self.rank.world_size)
            self.positions = []
            self.set_lr((epoch - 1) * self.steps + start.step - 1)  # which stands if no step is left
        # Dropout draws from the global generator: keyed like the rest, and different on every rank.
        torch.manual_seed(
            stream_seed(self.config.seed, epoch, self.rank.rank, 2, *([start.step] if start.step else []))
        )
        if start.states:
            sync.restore_own_states(start.states, self.model, self.rank.device)
        return loop.EpochRecord(epoch, self.rank.device, start)

    def _train_steps(self, epoch: int, record: loop.EpochRecord) -> Iterator[Progress]:
        """Take the steps of an epoch that are left; the last one is a synchronisation point as well."""
        config, done = self.config, (epoch - 1) * self.steps
        self.wrapped.train()
        # What was trained on is drawn again and passed over, so that the generators are where they were.
        batches = itertools.islice(self.rows.train_batches(epoch), record.step, None)
        for batch in record.timed(batches):
            self.set_lr(done + record.step)
            loop.train_step(
                self.wrapped,
                batch,
                self.update,
                record,
                precision=self.precision,
                label_smoothing=config.label_smoothing,
            )
            if config.ema_decay:
                update_ema(self.evaluated, self.model, config.ema_decay, done + record.step)
            is_last = record.step == self.steps
            if is_last or record.is_sync_point():
                self._record = record
            # After the last step the evaluation follows, within which nothing can be saved: as long as it took before.
            yield Progress(epoch, record.step, self._record is not None, self._val_time_s() if is_last else 0.0)
            assert self._record is None, "every rank calls `synchronise` at a synchronisation point"
            self.positions = []

    def _val_time_s(self) -> float:
        return float(self.history[-1].get("val_time_s", 0.0)) if self.history else 0.0

    def _train_metrics(self, epoch: int, trained: loop.EpochResult) -> Metrics:
        expected = self.steps * self.config.global_batch_size
        assert trained.sums.num_rows == expected, (trained.sums.num_rows, expected)
        return {
            "epoch": epoch,
            "train_loss": trained.sums.loss,
            "train_accuracy": trained.sums.accuracy,
            "train_rows": trained.sums.num_rows,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "epoch_time_s": trained.time_s,
            "data_wait_s": trained.data_wait_s,
        }

    def _evaluate(self, epoch: int) -> Metrics:
        started = time.perf_counter()
        # The bare network: DDP's forward would exchange buffers, and ranks have different numbers of val batches.
        batches = plain_batches(*self.rows.val, EVAL_BATCH_SIZE)
        val = loop.evaluate(
            self.evaluated, batches, precision=self.precision, device=self.rank.device, tta=self.config.tta
        )
        assert val.num_rows == self.rows.num_val_rows, (val.num_rows, self.rows.num_val_rows)
        if not math.isfinite(val.loss):
            # The last update of the epoch did it, after the loop's last look. The sums are those of all ranks.
            raise sync.Diverged(f"val loss is not finite after epoch {epoch}; lower --lr")
        times = {"val_time_s": time.perf_counter() - started}
        return {"val_loss": val.loss, "val_accuracy": val.accuracy, "val_rows": val.num_rows} | times

    def set_lr(self, step: int) -> None:
        """Set the learning rates of `step`, counted from 0 over the whole run."""
        config = self.config
        total = config.epochs * self.steps
        factor = learning_rate(config.schedule, 1.0, config.warmup_fraction, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def build_model(config: TrainConfig, pixel_mean: float, pixel_std: float) -> FashionCNN:
    """Return the network of `config`, weights drawn from torch's global generator."""
    model = FashionCNN(
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        dropout_conv=config.dropout_conv,
        dropout_fc=config.dropout_fc,
        padding=config.padding,
        depth=config.depth,
    )
    initialise(model, config.init)
    return model


def resident_batches(
    config: TrainConfig, images: Tensor, labels: Tensor, rank: Rank, num_steps: int
) -> Callable[[int], Iterator[Batch]]:
    """Return `train_batches(epoch)` over a shard that stays on the device: each epoch is a permutation of its index."""
    augmentation = Augmentation(config.flip, config.shift, config.erase)

    def train_batches(epoch: int) -> Iterator[Batch]:
        return shuffled_batches(
            images,
            labels,
            batch_size=config.global_batch_size // rank.world_size,
            num_steps=num_steps,
            augmentation=augmentation,
            seed=config.seed,
            epoch=epoch,
            rank=rank.rank,
        )

    return train_batches


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
