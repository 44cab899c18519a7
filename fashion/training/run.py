"""One rank's training run, from the seed to the last epoch: `TrainingRun` and what it needs.

Imports torch, not Ray: a worker of Ray Train and a trial of a search iterate over the same generator.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fashion.config import TrainConfig
from fashion.model.device import keep_freed_memory, kind_of, reset_peak_memory, set_arithmetic
from fashion.model.network import FashionCNN, count_parameters, initialise, place
from fashion.training import checkpoint, loop, sync
from fashion.training.batches import Augmentation, Batch, plain_batches, shuffled_batches, stream_seed
from fashion.training.ema import start_ema, update_ema
from fashion.training.metrics import Metrics
from fashion.training.optimizer import build_optimizer, learning_rate, make_capturable, set_learning_rates

# A worker's memory peaks at the activations of an evaluation in fp32: 500 rows take 0.36 GiB more than 200, and are no
# faster on two cores.
EVAL_BATCH_SIZE = 250
# A GPU has memory to spare, and too little to do with 250 rows.
EVAL_BATCH_SIZE_ON_GPU = 2000
# Version of `progress.json` in a checkpoint.
PROGRESS_FORMAT = 5
# Versions that a run resumes from, and the key of the ranks' epoch states in each; it refuses any other one.
EPOCH_STATES = {4: "positions", PROGRESS_FORMAT: "epoch_states"}


@dataclass(frozen=True)
class Rank:
    """This process's rank among `world_size` processes that train together, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Shards:
    """One rank's shards of the training and val rows, and figures of all rows.

    `train_batches(epoch)` yields this rank's augmented batches of (images, labels); `val` holds its val images
    (N, 1, 28, 28) uint8 and labels (N,) int64. The numbers of rows are over all ranks; `pixel_mean` and `pixel_std` are
    those of the training split, in 0..1.
    """

    train_batches: Callable[[int], Iterator[Batch]]
    val: Batch
    num_train_rows: int
    num_val_rows: int
    pixel_mean: float
    pixel_std: float


WrappedModel = tuple[nn.Module, Callable[[], object], str]
"""The module whose forward pass is trained, the function that updates its weights, and how ranks exchange gradients:
the column `exchange` of the `runs` table.
"""
WrapModel = Callable[[nn.Module, torch.optim.Optimizer, str], WrappedModel]
"""Returns the `WrappedModel` of a network, its optimizer and the precision; all ranks call it together."""


def without_ddp(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> WrappedModel:
    """Return `model` as it is, a `WrapModel` for a process that trains by itself."""
    return model, optimizer.step, "none"


def prepare_process(threads: int) -> None:
    """Set up a process that computes: keep freed memory, and run `threads` threads, of which Ray's default is one."""
    keep_freed_memory()
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Progress:
    """How far a run is, after a step or after an epoch."""

    epoch: int
    step: int
    """Steps done of this epoch."""
    is_sync_point: bool = False
    """Whether every rank must call `TrainingRun.synchronise` now."""
    seconds_without_sync: float = 0.0
    """Expected seconds without a synchronisation point after this one: those of the evaluation, after the last step."""
    metrics: Metrics | None = None
    """The epoch's metrics, after an epoch; None after a step."""


class TrainingRun:
    """A run in progress on one rank: network, optimizer and history; the generator `train` advances it."""

    def __init__(self, config: TrainConfig, shards: Shards, rank: Rank, wrap: WrapModel) -> None:
        """Build the network, with weights that depend on the seed alone, so that all ranks start with the same ones.

        `wrap` puts the network under DDP, if several ranks train together.
        """
        self.config = config
        self.shards = shards
        self.rank = rank
        self.steps = config.steps_per_epoch(shards.num_train_rows)
        self.precision = loop.resolve_precision(config.precision, rank.device)
        reset_peak_memory(rank.device)
        set_arithmetic(self.precision, config.deterministic, rank.device)
        torch.manual_seed(stream_seed(config.seed, 0, 0, 1))
        self.model = place(build_model(config, shards.pixel_mean, shards.pixel_std), rank.device)
        self.evaluated = start_ema(self.model) if config.ema_decay else self.model
        """The network that is evaluated on val and that a checkpoint is chosen for: the moving average of the weights
        if `ema_decay` is set, else `model` itself.
        """
        self.optimizer = build_optimizer(config, self.model)
        self.notes: list[str] = []
        """Lines for the console on what is not as the user may expect; whoever prints them empties the list."""
        self._lr = 0.0
        uses_graph = config.cuda_graph and rank.device.type == "cuda"
        if uses_graph:
            make_capturable(self.optimizer, rank.device)
        elif config.cuda_graph:
            self.notes.append("--cuda-graph is for GPUs: on this device steps are launched one by one")
        self.wrapped, self.update, self.exchange = wrap(self.model, self.optimizer, self.precision)
        self._take_step: Callable[[Batch], loop.StepOutput] = self._compute_step
        if uses_graph:
            self._take_step = loop.GraphedStep(self._compute_step, self.notes.append)
        self.history: list[Metrics] = []
        """Metrics of each epoch so far, including those before the run was resumed."""
        self.epoch_states: list[sync.EpochState] = []
        """States of all ranks within an epoch: set between `synchronise` and the next step, and by `restore` until the
        run goes on; empty otherwise.
        """
        self.is_any_writing = False
        """Whether any rank was still writing a checkpoint at the last synchronisation point."""
        self._record: loop.EpochRecord | None = None
        """Record of the epoch in progress, at a synchronisation point until `synchronise` is called; else None."""

    @property
    def epochs_done(self) -> int:
        """Epochs trained so far."""
        return len(self.history)

    def process_columns(self) -> dict[str, Any]:
        """Return the columns of the `runs` table that only the training process knows: device, precision, and so on."""
        device = self.rank.device
        return {
            "num_parameters": count_parameters(self.model),
            "world_size": self.rank.world_size,
            "device": kind_of(device),
            "precision": self.precision,
            "threads_per_worker": torch.get_num_threads(),
            "exchange": self.exchange,
        }

    @property
    def step(self) -> int:
        """Steps done of the epoch in progress, where a checkpoint can be made within it; 0 between epochs."""
        return self.epoch_states[0].step if self.epoch_states else 0

    def encode(self) -> dict[str, bytes]:
        """Return a checkpoint of the run's present state, as file name -> content."""
        states = [dataclasses.asdict(state) for state in self.epoch_states]
        progress = {"format": PROGRESS_FORMAT, "history": self.history, "epoch_states": states} | self._made_on()
        return checkpoint.encode(self.evaluated, self.optimizer, progress, self._trained)

    def restore(self, read_file: Callable[[str], bytes]) -> None:
        """Restore the run from a checkpoint; `read_file(name)` returns the content of one of its files.

        Raises `checkpoint.DamagedCheckpoint`, and `checkpoint.OtherVersion` for a format that this code does not read.
        """
        progress = checkpoint.restore(read_file, self.evaluated, self.optimizer, self._check_progress, self._trained)
        self.history = progress["history"]
        self.epoch_states = sync.parse_epoch_states(progress[EPOCH_STATES[progress["format"]]])
        stored = {name: progress[name] for name in self._made_on() if name in progress}  # earlier versions have none
        here = {name: value for name, value in self._made_on().items() if name in stored}
        if stored != here:
            self.notes.append(
                f"the checkpoint was made on {' in '.join(stored.values())}, here is {' in '.join(here.values())}: "
                "weights, momenta and the order of rows go on, to the bit; rounding and the draws of dropout do not"
            )

    def _made_on(self) -> dict[str, str]:
        """Return what a checkpoint says of its device: a run that resumes on another one goes on with other bits."""
        return {"device": kind_of(self.rank.device), "precision": self.precision}

    @property
    def _trained(self) -> nn.Module | None:
        """The network that the optimizer updates, if another one is evaluated; else None."""
        return None if self.evaluated is self.model else self.model

    def _check_progress(self, progress: dict[str, Any]) -> None:
        """Raise `DamagedCheckpoint` or `OtherVersion` unless `encode` could have written `progress` for this run."""
        if progress.get("format") not in (4, PROGRESS_FORMAT):
            raise checkpoint.OtherVersion(
                f"the checkpoint has form {progress.get('format')} and this code reads 4 and {PROGRESS_FORMAT}"
            )
        figures = {"train_loss", "train_accuracy", "train_rows", "lr", "epoch_time_s", "data_wait_s"}
        figures |= {"val_loss", "val_accuracy", "val_rows", "val_time_s"} if self.shards.num_val_rows else set()
        history = progress.get("history")
        whole = isinstance(history, list) and all(
            isinstance(metrics, dict)
            and metrics.get("epoch") == epoch
            and all(type(metrics.get(name)) in (int, float) for name in figures)
            for epoch, metrics in enumerate(history, start=1)
        )
        if not whole:
            raise checkpoint.damaged(checkpoint.PROGRESS, "its history is not one of this run's epochs 1, 2, 3, ...")
        if not all(isinstance(progress.get(name, ""), str) for name in self._made_on()):
            raise checkpoint.damaged(checkpoint.PROGRESS, "its device is no text")
        try:
            states = sync.parse_epoch_states(progress[EPOCH_STATES[progress["format"]]])
            for state in states:
                if state.states:
                    sync.check_states(state.states, self.model)
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.damaged(checkpoint.PROGRESS, f"its epoch states: {error!r}") from error
        steps = {state.step for state in states}
        if states and not (len(steps) == 1 and 0 < min(steps) <= self.steps):
            raise checkpoint.damaged(checkpoint.PROGRESS, f"its ranks are at steps {sorted(steps)}")

    def train(self) -> Iterator[Progress]:
        """Train the remaining epochs; yield after every step and after every epoch.

        After a step that is a synchronisation point, every rank must call `synchronise` before it continues. The
        metrics of an epoch are the same on all ranks, except for the times. Raises `sync.Diverged` on all ranks
        together.
        """
        for epoch in range(self.epochs_done + 1, self.config.last_epoch + 1):
            record = self._start_epoch(epoch)
            yield from self._train_steps(epoch, record)
            metrics = self._train_metrics(epoch, record.result())
            sync.average_batch_norm_statistics(self.model)
            self._keep_ranks_together(epoch)
            if self.shards.num_val_rows:
                metrics |= self._evaluate(epoch)
            self.history.append(metrics)
            yield Progress(epoch, record.step, metrics=metrics)

    def epochs(self) -> Iterator[Metrics]:
        """Train the remaining epochs without checkpoints within an epoch; yield the metrics of each epoch."""
        for progress in self.train():
            if progress.is_sync_point:
                self.synchronise(wants_save=False)
            if progress.metrics is not None:
                yield progress.metrics

    def synchronise(self, wants_save: bool, is_writing: bool = False) -> bool:
        """Return whether to save the run now: whether any rank `wants_save`. All ranks call this together.

        If so, `encode` returns a checkpoint from which the run resumes within the epoch. `is_writing` says whether this
        rank still writes an earlier checkpoint; `is_any_writing`, afterwards, whether any does. Raises `sync.Diverged`
        on all ranks if any rank had a non-finite loss, so that the broken weights are not saved.
        """
        assert self._record is not None, "the run is not at a synchronisation point"
        record, self._record = self._record, None
        saves, self.is_any_writing = record.synchronise(wants_save, is_writing)
        if not saves:
            return False
        self.epoch_states = sync.gather_epoch_states(record.state(self.wrapped))
        return True

    def _start_epoch(self, epoch: int) -> loop.EpochRecord:
        """Return the record of an epoch: at its start, or at the step of the checkpoint that was restored."""
        start = sync.START
        if self.epoch_states:
            start = sync.own_epoch_state(self.epoch_states, self.rank.rank, self.rank.world_size)
            self.epoch_states = []
            # The learning rate of the last step taken, which the metrics report if no step of the epoch is left.
            self.set_lr((epoch - 1) * self.steps + start.step - 1)
        # Dropout draws from torch's global generator: seeded by epoch like all else, and differently on every rank.
        torch.manual_seed(
            stream_seed(self.config.seed, epoch, self.rank.rank, 2, *([start.step] if start.step else []))
        )
        if start.states:
            sync.restore_own_states(start.states, self.model, self.rank.device)
        return loop.EpochRecord(epoch, self.rank.device, start)

    def _train_steps(self, epoch: int, record: loop.EpochRecord) -> Iterator[Progress]:
        """Take the remaining steps of an epoch; the last one is a synchronisation point as well."""
        config, done = self.config, (epoch - 1) * self.steps
        self.wrapped.train()
        # Batches before the restored step are drawn and skipped, which advances the generators to where they were.
        batches = itertools.islice(self.shards.train_batches(epoch), record.step, None)
        for batch in record.timed(batches):
            self.set_lr(done + record.step)
            record.add(*self._take_step(batch), batch[1])
            if config.ema_decay:
                update_ema(self.evaluated, self.model, config.ema_decay, done + record.step)
            is_last = record.step == self.steps
            if is_last or record.is_sync_point():
                self._record = record
            # The evaluation after the last step has no synchronisation point; it takes as long as the previous one.
            yield Progress(epoch, record.step, self._record is not None, self._val_time_s() if is_last else 0.0)
            assert self._record is None, "every rank calls `synchronise` at a synchronisation point"
            self.epoch_states = []

    def _compute_step(self, batch: Batch) -> loop.StepOutput:
        smoothing = self.config.label_smoothing
        return loop.compute_step(self.wrapped, batch, self.update, precision=self.precision, label_smoothing=smoothing)

    def _keep_ranks_together(self, epoch: int) -> None:
        """Compare the ranks' weights after an epoch; where they differ, all ranks go on with those of rank 0."""
        drifted = sync.drifted_ranks(self.model, self.rank.device)
        if not drifted:
            return
        self.notes.append(
            f"after epoch {epoch} the weights of worker(s) {', '.join(map(str, drifted))} differed from worker 0's, as "
            "on unlike hardware; all go on with worker 0's"
        )
        weights = [*self.model.parameters(), *(self.evaluated.parameters() if self._trained is not None else ())]
        states = (self.optimizer.state[weight] for weight in self.model.parameters())
        sync.send_from_rank_0([*weights, *(value for state in states for _, value in sorted(state.items()))])

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
            "lr": self._lr,
            "epoch_time_s": trained.time_s,
            "data_wait_s": trained.data_wait_s,
        }

    def _evaluate(self, epoch: int) -> Metrics:
        started = time.perf_counter()
        # The bare network: DDP's forward would exchange buffers, and ranks have different numbers of val batches.
        on_cpu = self.rank.device.type == "cpu"
        batches = plain_batches(*self.shards.val, EVAL_BATCH_SIZE if on_cpu else EVAL_BATCH_SIZE_ON_GPU)
        val = loop.evaluate(
            self.evaluated, batches, precision=self.precision, device=self.rank.device, tta=self.config.tta
        )
        assert val.num_rows == self.shards.num_val_rows, (val.num_rows, self.shards.num_val_rows)
        if not math.isfinite(val.loss):
            # The last update of the epoch broke the weights, after the last check of the loss. The sums are over all
            # ranks, so all of them raise this.
            raise sync.Diverged(f"val loss is not finite after epoch {epoch}; lower --lr")
        times = {"val_time_s": time.perf_counter() - started}
        return {"val_loss": val.loss, "val_accuracy": val.accuracy, "val_rows": val.num_rows} | times

    def set_lr(self, step: int) -> None:
        """Set the learning rates of `step`, counted from 0 over the whole run."""
        config = self.config
        total = config.epochs * self.steps
        factor = learning_rate(config.schedule, 1.0, config.warmup_fraction, step, total)
        self._lr = set_learning_rates(self.optimizer, factor)


def build_model(config: TrainConfig, pixel_mean: float, pixel_std: float) -> FashionCNN:
    """Return the network of `config`, its weights drawn from torch's global generator.

    `pixel_mean` and `pixel_std`, in 0..1, are what it normalises pixels by.
    """
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
    """Return `train_batches(epoch)` over a shard that stays on the device; each epoch permutes the shard's rows."""
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
