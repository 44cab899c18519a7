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
from fashion.model.device import cpu_has_bf16, on_side_stream
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
    return cpu_has_bf16()


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return fp32, tf32 or bf16 for `precision`, the same on every rank.

    `auto` is bf16 only if all ranks have it in hardware, and tf32 is fp32 unless all have that.
    """
    if precision in ("fp32", "bf16"):
        return precision
    has_it = has_tf32(device) if precision == "tf32" else has_native_bf16(device)
    native = torch.tensor(int(has_it), device=device)
    if dist.is_initialized():
        dist.all_reduce(native, op=dist.ReduceOp.MIN)
    return ("tf32" if precision == "tf32" else "bf16") if native.item() else "fp32"


def has_tf32(device: torch.device) -> bool:
    """Return whether `device` computes TF32: CUDA capability >= 8.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context manager for a forward pass in `precision`: fp32, tf32 or bf16."""
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

    def add(self, loss: Tensor, unsmoothed: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step: its `loss` () in nats, the same without label smoothing, `logits` (B, 10) float32, `labels` (B,).

        The sums take the loss without label smoothing.
        """
        self.step += 1
        self._meter.add(unsmoothed * len(labels), logits, labels)
        self._sync_points.note(loss, self.step)

    def is_sync_point(self) -> bool:
        """Return whether all ranks must call `synchronise` after this step."""
        return self._sync_points.is_due_after(self.step)

    def synchronise(self, wants_save: bool, is_writing: bool = False) -> tuple[bool, bool]:
        """Return whether any rank wants to save and whether any is writing a checkpoint; raise `Diverged` on all ranks
        if any rank had a non-finite loss.
        """
        return self._sync_points.synchronise(self.step, wants_save, is_writing)

    def state(self, model: nn.Module) -> EpochState:
        """Return what this rank needs to resume here with the same bits."""
        own, spent = self._meter.own(), time.perf_counter() - self._started
        states = own_states(model, self._device)
        return EpochState(self.step, own.loss_sum, own.num_correct, own.num_rows, spent, self._data_wait_s, states)

    def result(self) -> EpochResult:
        """Return the epoch's sums over all ranks, and its times in seconds."""
        sums = self._meter.reduce()
        return EpochResult(sums, time.perf_counter() - self._started, largest(self._data_wait_s, self._device))


StepOutput = tuple[Tensor, Tensor, Tensor]
"""Loss () in nats, the loss without label smoothing (), and logits (B, 10) float32."""


def losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the mean loss () of `logits` (B, 10) in nats, and the same without label smoothing, which takes no
    gradient: both from one log-softmax.

    These are the bits of `F.cross_entropy`. That would compute the log-softmax twice, and with label smoothing look for
    labels that are to be ignored.
    """
    log_probabilities = logits.log_softmax(1)
    unsmoothed = F.nll_loss(log_probabilities, labels)
    if not label_smoothing:
        return unsmoothed, unsmoothed.detach()
    rows, classes = logits.shape
    uniform = log_probabilities.sum(1).neg().sum() / rows
    return (1 - label_smoothing) * unsmoothed + uniform * (label_smoothing / classes), unsmoothed.detach()


def compute_step(
    model: nn.Module, batch: Batch, update: Callable[[], object], *, precision: str, label_smoothing: float
) -> StepOutput:
    """Train `model` on one batch: forward, backward, then `update()`, the optimizer's step. Does not wait for a GPU."""
    images, labels = batch
    with autocast(precision, images.device):
        logits = model(images)
    logits = logits.float()
    loss, unsmoothed = losses(logits, labels, label_smoothing)
    model.zero_grad()
    torch.autograd.backward(loss)
    update()
    return loss.detach(), unsmoothed, logits.detach()


class GraphedStep:
    """Takes training steps on a GPU: the first ones as they come, later ones by replaying a CUDA graph of one step.

    A replay is one launch in place of a few hundred. Nothing that a step computes with may move: the batch is copied to
    where the graph reads it, and the learning rates are tensors (`optimizer.make_capturable`).
    """

    WARM_UP_STEPS = 11
    """Steps before the capture: torch asks for this many under DDP, which times itself during the first ten."""

    def __init__(
        self, compute: Callable[[Batch], StepOutput], say: Callable[[str], object], warm_up: int = WARM_UP_STEPS
    ) -> None:
        """Take steps by `compute(batch)`; call `say` with a line if these cannot be captured."""
        self._compute, self._say, self._steps_left = compute, say, warm_up
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._output: StepOutput | None = None
        self._has_failed = False

    def __call__(self, batch: Batch) -> StepOutput:
        """Take a step; what it returns is overwritten by the next one."""
        if self._has_failed:
            return self._compute(batch)
        if self._steps_left:
            self._steps_left -= 1
            with on_side_stream(batch[0].device):  # torch asks for this before a capture
                return self._compute(batch)
        if self._graph is None:
            try:
                self._capture(batch)
            except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self._say(f"--cuda-graph: a step cannot be captured ({reason}); steps are launched one by one")
                self._has_failed, self._graph, self._batch = True, None, None
                return self._compute(batch)
        assert self._graph is not None
        assert self._batch is not None
        assert self._output is not None
        for place, tensor in zip(self._batch, batch, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._output

    def _capture(self, batch: Batch) -> None:
        """Record a step, which computes nothing yet."""
        self._batch = batch[0].clone(), batch[1].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._compute(self._batch)
        self._graph = graph


def train_step(
    model: nn.Module,
    batch: Batch,
    update: Callable[[], object],
    record: EpochRecord,
    *,
    precision: str,
    label_smoothing: float,
) -> None:
    """Train `model` on one batch as `compute_step` does, and add the step to `record`."""
    output = compute_step(model, batch, update, precision=precision, label_smoothing=label_smoothing)
    with torch.no_grad():
        record.add(*output, batch[1])


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
