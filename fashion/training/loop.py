"""One epoch of training and one evaluation over any batches; metrics as sums. Knows torch, not Ray, files or presets.

Under DDP every rank calls these functions with equally many training batches; sums are reduced over the ranks, so all
ranks return the same numbers.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fashion.config import require
from fashion.training.batches import Batch
from fashion.training.sync import START, EpochState, SyncPoints, largest, own_states


@dataclass(frozen=True)
class ClassificationSums:
    """Sums over rows, reduced over all ranks. Dividing once, here, is exact for ragged batches and shards."""

    loss_sum: float
    """Nats, without label smoothing."""
    num_correct: int
    num_rows: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per row."""
        return self.loss_sum / self.num_rows

    @property
    def accuracy(self) -> float:
        """Share of rows classified correctly, 0..1."""
        return self.num_correct / self.num_rows


class SumMeter:
    """Accumulates loss, hits and rows on the device, without synchronising with it."""

    def __init__(self, device: torch.device, begin: EpochState = START) -> None:
        # Loss in float64: a float32 sum over 60,000 rows loses the digits that reports compare.
        self._loss = torch.full((), begin.loss_sum, dtype=torch.float64, device=device)
        self._correct = torch.full((), begin.num_correct, dtype=torch.int64, device=device)
        self._rows = begin.num_rows

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: `loss_sum` () nats, `logits` (B, 10), `labels` (B,)."""
        self._loss += loss_sum.detach()
        self._correct += (logits.detach().argmax(1) == labels).sum()
        self._rows += len(labels)

    def own(self) -> ClassificationSums:
        """Return the sums of this rank alone."""
        return ClassificationSums(self._loss.item(), int(self._correct.item()), self._rows)

    def reduce(self) -> ClassificationSums:
        """Return the sums over all ranks."""
        sums = torch.stack([self._loss, self._correct.double(), torch.full_like(self._loss, self._rows)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss_sum, num_correct, num_rows = sums.tolist()
        return ClassificationSums(loss_sum, round(num_correct), round(num_rows))


AUTO_PRECISION = "FASHION_AUTO_PRECISION"
"""Environment variable: fp32 or bf16, what precision auto resolves to, in place of what the hardware has."""


def has_native_bf16(device: torch.device) -> bool:
    """Tell whether `device` has bf16 in hardware: CUDA capability >= 8.0; avx512_bf16 or amx_bf16 on a CPU.

    The environment variable `AUTO_PRECISION` overrides the hardware, so that one machine can compute as another one
    would. Raises `UserError` if it is set to anything but fp32 or bf16.
    """
    named = os.environ.get(AUTO_PRECISION, "")
    require(named in ("", "fp32", "bf16"), f"{AUTO_PRECISION}={named} must be fp32 or bf16, or not be set")
    if named:
        return named == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return fp32 or bf16 for `precision` (auto, fp32 or bf16), the same on every rank: bf16 only if all have it."""
    if precision != "auto":
        return precision
    native = torch.tensor(int(has_native_bf16(device)), device=device)
    if dist.is_initialized():
        dist.all_reduce(native, op=dist.ReduceOp.MIN)
    return "bf16" if native.item() else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the forward pass runs."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass(frozen=True)
class EpochResult:
    """One epoch of training: its sums over all ranks, this rank's time, and the slowest rank's wait for data."""

    sums: ClassificationSums
    time_s: float
    data_wait_s: float


class EpochRecord:
    """What one rank keeps of an epoch in progress: steps done, sums, times, and when the ranks synchronise next."""

    def __init__(self, epoch: int, device: torch.device, start: EpochState = START) -> None:
        """Begin with the epoch's first step, or go on from the state `start` that a checkpoint holds."""
        self.step = start.step
        """Steps done."""
        self._device = device
        self._meter = SumMeter(device, start)
        self._sync_points = SyncPoints(epoch, start.step, device)
        self._started = time.perf_counter() - start.time_s
        self._data_wait_s = start.data_wait_s

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield `batches`, adding up the seconds that they are waited for."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._data_wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, label_smoothing: float) -> None:
        """Add a step: its `loss` () in nats, `logits` (B, 10) float32 and `labels` (B,)."""
        self.step += 1
        plain = loss if label_smoothing == 0 else F.cross_entropy(logits, labels)
        self._meter.add(plain * len(labels), logits, labels)
        self._sync_points.note(loss, self.step)

    def is_sync_point(self) -> bool:
        """Tell whether all ranks call `synchronise` after this step."""
        return self._sync_points.are_due(self.step)

    def synchronise(self, wants_save: bool) -> bool:
        """Raise `Diverged` on all ranks if any saw a non-finite loss; else return whether any rank wants to save."""
        return self._sync_points.take(self.step, wants_save)

    def state(self, model: nn.Module) -> EpochState:
        """Return what this rank needs to go on from here with the same bits."""
        own, spent = self._meter.own(), time.perf_counter() - self._started
        states = own_states(model, self._device)
        return EpochState(self.step, own.loss_sum, own.num_correct, own.num_rows, spent, self._data_wait_s, states)

    def result(self) -> EpochResult:
        """Return the epoch's sums over all ranks, and its times in seconds."""
        sums = self._meter.reduce()
        return EpochResult(sums, time.perf_counter() - self._started, largest(self._data_wait_s, self._device))


def train_step(
    model: nn.Module,
    batch: Batch,
    update: Callable[[], object],
    record: EpochRecord,
    *,
    precision: str,
    label_smoothing: float,
) -> None:
    """Train `model` on one batch: forward, backward, then `update()`, which moves the weights; add it to `record`.

    Nothing waits for a GPU here.
    """
    images, labels = batch
    with autocast(precision, images.device):
        logits = model(images)
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    model.zero_grad()
    torch.autograd.backward(loss)
    update()
    with torch.no_grad():
        record.add(loss, logits, labels, label_smoothing)


def classify(model: nn.Module, images: Tensor, *, precision: str, device: torch.device, tta: str) -> Tensor:
    """Return float32 logits (B, 10) of `images` (B, 1, 28, 28) uint8, as every evaluation takes them.

    With `tta` flip, the mean of those of the images and of their mirror images, at twice the cost.
    """
    views = [images, images.flip(-1)] if tta == "flip" else [images]
    with autocast(precision, device):
        logits = [model(view).float() for view in views]
    return torch.stack(logits).mean(0)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, precision: str, device: torch.device, tta: str = "none"
) -> ClassificationSums:
    """Return the sums of `model` (not DDP-wrapped) over this and all other ranks' batches, in evaluation mode.

    Ranks may have different numbers of batches, none included: nothing is exchanged before the last row.
    """
    model.eval()
    meter = SumMeter(device)
    for images, labels in batches:
        logits = classify(model, images, precision=precision, device=device, tta=tta)
        meter.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    return meter.reduce()
