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


class TrainingRun:
    """A run in progress: network, optimizer and history; `epochs()` advances it."""

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
        """Those of all ranks while the run pauses within an epoch, and before it goes on from there; else none."""

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
        """Steps done of the epoch within which the run pauses; 0 between epochs."""
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

    @staticmethod
    def ignore_step(epoch: int, step: int) -> None:
        """Do nothing: the observer of steps where nobody looks."""

    def epochs(
        self,
        on_step: Callable[[int, int], None] = ignore_step,
        wants_pause: Callable[[float], bool] = lambda seconds: False,
        on_pause: Callable[[], None] = lambda: None,
    ) -> Iterator[Metrics]:
        """Train what remains; after each epoch, yield its metrics, the same on all ranks but for the times.

        When any rank's `wants_pause(seconds)` says so, all ranks call `on_pause()` within an epoch; what `encode`
        returns there goes on from there. `seconds` are those for which there will be no other pause: the evaluation
        on val, as long as it took the last time. Raises `loop.Diverged` on all ranks together.
        """
        for epoch in range(self.epochs_done + 1, self.config.last_epoch + 1):
            metrics = self._train(epoch, on_step, wants_pause, on_pause)
            sync.average_statistics(self.model)
            if self.rows.num_val_rows:
                metrics |= self._evaluate(epoch)
            self.history.append(metrics)
            yield metrics

    def _val_time_s(self) -> float:
        return float(self.history[-1].get("val_time_s", 0.0)) if self.history else 0.0

    def _train(
        self,
        epoch: int,
        on_step: Callable[[int, int], None],
        wants_pause: Callable[[float], bool],
        on_pause: Callable[[], None],
    ) -> Metrics:
        config, device = self.config, self.rank.device
        begin = sync.EpochState()
        if self.positions:
            begin = sync.own_epoch_state(self.positions, self.rank.rank, self.rank.world_size)
            self.positions = []
            self.set_lr((epoch - 1) * self.steps + begin.step - 1)  # which stands if no step is left
        # Dropout draws from the global generator: keyed like the rest, and different on every rank.
        torch.manual_seed(stream_seed(config.seed, epoch, self.rank.rank, 2, *([begin.step] if begin.step else [])))
        if begin.states:
            sync.restore_own_states(begin.states, self.model, device)

        def after_step(step: int) -> None:
            if config.ema_decay:
                update_ema(self.evaluated, self.model, config.ema_decay, (epoch - 1) * self.steps + step)
            on_step(epoch, step)

        def pause(position: sync.EpochState) -> None:
            self.positions = sync.gathered(position)
            on_pause()
            self.positions = []

        trained = loop.train_one_epoch(
            self.wrapped,
            # What was trained on is drawn again and passed over, so that the generators are where they were.
            itertools.islice(self.rows.train_batches(epoch), begin.step, None),
            self.update,
            epoch=epoch,
            set_lr=lambda step: self.set_lr((epoch - 1) * self.steps + step - 1),
            precision=self.precision,
            label_smoothing=config.label_smoothing,
            device=device,
            on_step=after_step,
            begin=begin,
            wants_pause=lambda is_over: wants_pause(self._val_time_s() if is_over else 0.0),
            on_pause=pause,
        )
        expected = self.steps * config.global_batch_size
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
