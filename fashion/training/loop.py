"""A training step, the record of an epoch, and an evaluation. Imports torch, neither Ray nor files nor presets.

Under DDP every rank takes equally many training steps; sums are reduced over the ranks, so all ranks get the same
figures.
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
    """Sums over rows. Dividing them once, here, gives exact means for batches and shards of unequal sizes."""

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
    """Sums up loss, correct predictions and rows on the device, without waiting for it."""

    def __init__(self, device: torch.device, start: EpochState = START) -> None:
        """Start with the sums of `start`."""
        # float64, since a float32 sum over 60,000 rows loses digits that reports compare.
        self._loss = torch.full((), start.loss_sum, dtype=torch.float64, device=device)
        self._correct = torch.full((), start.num_correct, dtype=torch.int64, device=device)
        self._rows = start.num_rows

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
"""Environment variable, fp32 or bf16: what precision auto resolves to, whatever the hardware has."""


def has_native_bf16(device: torch.device) -> bool:
    """Return whether `device` has bf16 in hardware: CUDA capability >= 8.0; avx512_bf16 or amx_bf16 on a CPU.

    The environment variable `AUTO_PRECISION` overrides the hardware, so that one machine can compute as another one
    would. Raises `UserError` if the variable is set to anything but fp32 or bf16.
    """
    override = os.environ.get(AUTO_PRECISION, "")
    require(override in ("", "fp32", "bf16"), f"{AUTO_PRECISION}={override} must be fp32 or bf16, or not be set")
    if override:
        return override == "bf16"
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
    """Return the context manager for a forward pass in `precision`, which is fp32 or bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass(frozen=True)
class EpochResult:
    """One epoch of training: sums over all ranks, this rank's seconds, and the longest wait for data of any rank."""

    sums: ClassificationSums
    time_s: float
    data_wait_s: float


class EpochRecord:
    """One rank's record of an epoch in progress: steps done, sums, times, and when ranks synchronise next."""

    def __init__(self, epoch: int, device: torch.device, start: EpochState = START) -> None:
        """Start with the epoch's first step, or resume at the state `start` of a checkpoint."""
        self.step = start.step
        """Steps done."""
        self._device = device
        self._meter = SumMeter(device, start)
        self._sync_points = SyncPoints(epoch, start.step, device)
        self._started = time.perf_counter() - start.time_s
        self._data_wait_s = start.data_wait_s

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield `batches`, and add up the seconds spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self._data_wait_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, label_smoothing: float) -> None:
        """Add a step: its `loss` () in nats, `logits` (B, 10) float32 and `labels` (B,).

        The sums take the loss without label smoothing, which is computed here if `loss` has it.
        """
        self.step += 1
        unsmoothed = loss if label_smoothing == 0 else F.cross_entropy(logits, labels)
        self._meter.add(unsmoothed * len(labels), logits, labels)
        self._sync_points.note(loss, self.step)

    def is_sync_point(self) -> bool:
        """Return whether all ranks must call `synchronise` after this step."""
        return self._sync_points.is_due_after(self.step)

    def synchronise(self, wants_save: bool) -> bool:
        """Return whether any rank wants to save; raise `Diverged` on all ranks if any rank had a non-finite loss."""
        return self._sync_points.synchronise(self.step, wants_save)

    def state(self, model: nn.Module) -> EpochState:
        """Return what this rank needs to resume here with the same bits."""
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
    """Train `model` on one batch: forward, backward, then `update()`, the optimizer's step; add the step to `record`.

    Does not wait for a GPU.
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
    """Return float32 logits (B, 10) of `images` (B, 1, 28, 28) uint8; every evaluation and prediction uses this.

    With test-time augmentation, `tta` flip, they are the mean over the images and their mirror images, at twice the
    cost.
    """
    views = [images, images.flip(-1)] if tta == "flip" else [images]
    with autocast(precision, device):
        logits = [model(view).float() for view in views]
    return torch.stack(logits).mean(0)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, precision: str, device: torch.device, tta: str = "none"
) -> ClassificationSums:
    """Evaluate `model`, which is not wrapped in DDP, on this rank's batches; return the sums over all ranks.

    Ranks may have different numbers of batches, or none: they exchange nothing before their last row. Leaves `model` in
    evaluation mode.
    """
    model.eval()
    meter = SumMeter(device)
    for images, labels in batches:
        logits = classify(model, images, precision=precision, device=device, tta=tta)
        meter.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    return meter.reduce()
