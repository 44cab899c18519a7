"""One epoch of training and one evaluation over any batches; metrics as sums. Knows torch, not Ray, files or presets.

Under DDP every rank calls these functions with equally many training batches; sums are reduced over the ranks, so all
ranks return the same numbers.
"""

import base64
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Images (B, 1, 28, 28) uint8 and labels (B,) int64, on the model's device."""

# At most so many steps lie between two looks at the loss: a look stalls a GPU; on CPUs the value is there.
STEPS_BETWEEN_LOOKS = {"cuda": 50, "cpu": 10}
# Where steps are slow, looks come after so many seconds: it is at a look that a run is saved.
SECONDS_BETWEEN_LOOKS = 0.5

# Random erasing, Zhong et al. 2017, arXiv 1708.04896: a rectangle's share of the image, and its height over its width.
ERASED_AREA = (0.02, 0.4)
ERASED_RATIO = (0.3, 1 / 0.3)


class Diverged(RuntimeError):
    """The loss was not finite; every rank raises it at the same step."""


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


@dataclass(frozen=True)
class Position:
    """How far one rank is within an epoch, and what it needs to go on from there with the same bits."""

    step: int = 0
    """Steps done; at 0 the epoch is at its start, and the rest says nothing."""
    loss_sum: float = 0.0
    """This rank's own sums so far, as in `ClassificationSums`."""
    num_correct: int = 0
    num_rows: int = 0
    time_s: float = 0.0
    data_wait_s: float = 0.0
    states: tuple[str, ...] = ()
    """Base64 of what differs between ranks: see `own_states`; none if another rank's would not do."""


def positions_from(stored: Any) -> list[Position]:
    """Return the positions of all ranks from what `dataclasses.asdict` and JSON made of them.

    Raises `TypeError` or `ValueError` for anything else.
    """
    found = []
    for values in stored:
        position = Position(**values)
        for field in dataclasses.fields(Position):
            value, like = getattr(position, field.name), field.default
            if field.name != "states" and type(value) is not type(like):
                raise TypeError(f"{field.name} is {value!r}")
        states = tuple(position.states)
        for state in states:
            base64.b64decode(state, validate=True)
        found.append(dataclasses.replace(position, states=states))
    return found


class SumMeter:
    """Accumulates loss, hits and rows on the device, without synchronising with it."""

    def __init__(self, device: torch.device, begin: Position = Position()) -> None:
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


@dataclass(frozen=True)
class EpochResult:
    """One epoch of training: its sums, this rank's time, and the slowest rank's wait for data, in seconds."""

    sums: ClassificationSums
    time_s: float
    data_wait_s: float


def stream_seed(*key: int) -> int:
    """Turn a key such as (seed, epoch, rank, purpose) into a 63-bit seed; other keys give independent streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def has_native_bf16(device: torch.device) -> bool:
    """Tell whether `device` has bf16 in hardware: CUDA capability >= 8.0; avx512_bf16 or amx_bf16 on a CPU."""
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


def learning_rate(schedule: str, peak: float, warmup_fraction: float, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (0-based) of `total_steps`.

    `one-cycle` rises along a cosine from peak / 25 to the peak at `warmup_fraction`, then falls along a cosine to
    nearly 0 (Smith and Topin 2017, arXiv 1708.07120; the two phases and constants of torch's OneCycleLR). It is a pure
    function of the step, so a resumed run needs no schedule state.
    """
    if schedule == "constant":
        return peak
    start, end = peak / 25.0, peak / 25.0 / 1e4
    top = warmup_fraction * total_steps - 1.0
    last = total_steps - 1.0
    if step <= top:
        low, share = start, 1.0 - step / top if top > 0 else 0.0
    else:
        low, share = end, (step - top) / max(last - top, 1.0)
    return low + (peak - low) / 2.0 * (1.0 + math.cos(math.pi * share))


def augment(images: Tensor, flips: Tensor | None, shift: int, generator: torch.Generator) -> Tensor:
    """Flip and shift `images` (B, 1, 28, 28) uint8.

    `flips` (B,) bool says which rows to mirror; `shift` is the largest move in pixels, what moves in is background (0).
    """
    if flips is not None:
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
    if shift:
        rows, _, height, width = images.shape
        padded = F.pad(images, (shift, shift, shift, shift))
        moves = torch.randint(0, 2 * shift + 1, (2, rows, 1), generator=generator).to(images.device)
        down = (moves[0] + torch.arange(height, device=images.device)).view(rows, height, 1)
        right = (moves[1] + torch.arange(width, device=images.device)).view(rows, 1, width)
        row = torch.arange(rows, device=images.device).view(rows, 1, 1)
        images = padded[row, 0, down, right].unsqueeze(1)
    return images


def erase_rectangles(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Erase a rectangle in each of `images` (B, 1, 28, 28) uint8 with probability `share`.

    Area and ratio are drawn as in `ERASED_AREA` and `ERASED_RATIO`, the ratio on a logarithmic scale, so that tall and
    wide are equally likely; a side longer than the image ends at its border. What fits is put anywhere with equal
    probability. It is filled with random values, the fill that the paper settles on: no constant is there for the
    network to look for.
    """
    rows, _, height, width = images.shape
    chance, area, ratio, down, right = torch.rand(5, rows, generator=generator)
    low, high = ERASED_AREA
    pixels = (low + (high - low) * area) * (height * width)
    stretch = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** ratio
    tall = (pixels * stretch).sqrt().round().clamp(1, height) * (chance < share)  # without height nothing is erased
    wide = (pixels / stretch).sqrt().round().clamp(1, width)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    top, left, tall, wide = torch.stack([top, left, tall, wide]).to(images.device).view(4, rows, 1)
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (top <= row) & (row < top + tall), (left <= column) & (column < left + wide)
    inside = (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)
    # Eight pixels a draw.
    noise = torch.empty(-(-images.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    fill = noise.view(torch.uint8)[: images.numel()].view(images.shape).to(images.device)
    return torch.where(inside, fill, images)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images: `flip` none, random or alternating; `shift` in pixels; the share to `erase`."""

    flip: str = "none"
    shift: int = 0
    erase: float = 0.0

    def apply(self, images: Tensor, row: Tensor, *, seed: int, epoch: int, generator: torch.Generator) -> Tensor:
        """Return augmented `images` (B, 1, 28, 28); `row` (B,) are their positions in the shard.

        An alternating flip draws a coin per row once and turns it every epoch, so that two epochs show both views
        (Jordan 2024, arXiv 2404.00498).
        """
        flips = None
        if self.flip == "random":
            flips = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        elif self.flip == "alternating":
            # A multiplicative hash of the row: a coin per row that needs no table.
            coin = ((row + seed) * 2654435761 >> 16) & 1
            flips = ((coin + epoch) % 2 == 1).to(images.device)
        images = augment(images, flips, self.shift, generator)
        # What moves in is erased as well as the rest; without erasing nothing more is drawn.
        return erase_rectangles(images, self.erase, generator) if self.erase else images


def shuffled_batches(
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    num_steps: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    rank: int,
) -> Iterator[Batch]:
    """Yield `num_steps` augmented batches of `batch_size` rows in the order of (seed, epoch, rank).

    `images` (N, 1, 28, 28) uint8 and `labels` (N,) int64 are this rank's shard. Every row comes at most once.
    """
    assert num_steps * batch_size <= len(labels), (num_steps, batch_size, len(labels))
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch, rank, 0))
    order = torch.randperm(len(labels), generator=generator)[: num_steps * batch_size]
    for row in order.view(num_steps, batch_size):
        index = row.to(images.device)
        picked = augmentation.apply(images[index], row, seed=seed, epoch=epoch, generator=generator)
        yield picked, labels[index]


def plain_batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[Batch]:
    """Yield all rows in order, the last batch shorter."""
    for start in range(0, len(labels), batch_size):
        yield images[start : start + batch_size], labels[start : start + batch_size]


class Looks:
    """What all ranks look at together, every few steps: the loss, and whether any of them wishes for a pause.

    The ranks look after the same steps: how far apart those are follows from the slowest one's time between two looks.
    """

    NEVER = torch.iinfo(torch.int64).max

    def __init__(self, epoch: int, step: int, device: torch.device) -> None:
        """Begin after `step`; the first look comes after the next one."""
        self._epoch = epoch
        self._first_bad_step = torch.full((), self.NEVER, device=device)
        self._limit = STEPS_BETWEEN_LOOKS[device.type]
        self._last, self._next, self._since = step, step + 1, time.perf_counter()

    def note(self, loss: Tensor, step: int) -> None:
        """Note the `loss` () of a step, without waiting for it."""
        bad = torch.where(torch.isfinite(loss.detach()), self.NEVER, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)

    def are_due(self, step: int) -> bool:
        """Tell whether the ranks look after this step."""
        return step == self._next

    def take(self, step: int, wish: bool) -> bool:
        """Raise `Diverged` on every rank if any saw a loss that is not finite; else tell whether any has a wish.

        One small reduction.
        """
        since, self._since = self._since, time.perf_counter()
        steps, self._last = max(step - self._last, 1), step
        mine = [0 if wish else 1, -int((self._since - since) / steps * 1e6)]
        looked = torch.stack([self._first_bad_step, *self._first_bad_step.new_tensor(mine)])
        if dist.is_initialized():
            dist.all_reduce(looked, op=dist.ReduceOp.MIN)
        bad_step, nobody, microseconds = looked.tolist()
        if bad_step != self.NEVER:
            raise Diverged(f"loss is not finite at epoch {self._epoch}, step {bad_step}; lower --lr")
        fitting = int(SECONDS_BETWEEN_LOOKS * 1e6) // max(-microseconds, 1)
        self._next = step + min(max(fitting, 1), self._limit)
        return not nobody


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    update: Callable[[], object],
    *,
    epoch: int,
    set_lr: Callable[[int], None],
    precision: str,
    label_smoothing: float,
    device: torch.device,
    on_step: Callable[[int], None] = lambda step: None,
    begin: Position = Position(),
    wants_pause: Callable[[bool], bool] = lambda is_over: False,
    on_pause: Callable[[Position], None] = lambda position: None,
) -> EpochResult:
    """Train `model` on `batches`, those from `begin` on; return the epoch's sums in training mode and its times.

    `update()` moves the weights. `set_lr(step)` is called before each step with its 1-based number within the epoch,
    `on_step(step)` after it. The loss is looked at every few steps and at the end, in one small reduction. Raises
    `Diverged` on all ranks together; nothing is saved in between. If any rank's `wants_pause(is_over)` says so at a
    look, all ranks call `on_pause(position)`; `is_over` tells whether it is the one at the end.
    """
    model.train()
    meter = SumMeter(device, begin)
    looks = Looks(epoch, begin.step, device)
    started = time.perf_counter() - begin.time_s
    waited = begin.data_wait_s
    iterator = iter(batches)
    step = paused_at = begin.step

    def pause() -> None:
        nonlocal paused_at
        own, paused_at = meter.own(), step
        spent = time.perf_counter() - started
        states = own_states(model, device)
        on_pause(Position(step, own.loss_sum, own.num_correct, own.num_rows, spent, waited, states))

    while True:
        asked = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        images, labels = batch
        step += 1
        set_lr(step)
        with autocast(precision, device):
            logits = model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        model.zero_grad()
        torch.autograd.backward(loss)
        update()
        with torch.no_grad():
            plain = loss if label_smoothing == 0 else F.cross_entropy(logits, labels)
            meter.add(plain * len(labels), logits, labels)
            looks.note(loss, step)
        on_step(step)
        if looks.are_due(step) and looks.take(step, wants_pause(False)):
            pause()
    if looks.take(step, wants_pause(True)) and step != paused_at:
        pause()
    sums = meter.reduce()
    return EpochResult(sums, time.perf_counter() - started, largest(waited, device))


def own_states(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Return, as base64, what differs between ranks within an epoch: generators, and batch normalisation's statistics.

    Dropout draws from the generators of torch; the order of rows and their augmentation have generators of their own,
    which the next life of the run winds forward.
    """
    tensors = [torch.get_rng_state()]
    tensors += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    tensors += [statistic.detach().cpu() for statistic in statistics_of(model)]
    return tuple(base64.b64encode(tensor.numpy().tobytes()).decode() for tensor in tensors)


@torch.no_grad()
def restore_own_states(states: Sequence[str], model: nn.Module, device: torch.device) -> None:
    """Set what `own_states` returned on this rank."""
    contents = [bytearray(base64.b64decode(state)) for state in states]
    torch.set_rng_state(torch.frombuffer(contents.pop(0), dtype=torch.uint8))
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.frombuffer(contents.pop(0), dtype=torch.uint8), device)
    for statistic, content in zip(statistics_of(model), contents, strict=True):
        statistic.copy_(torch.frombuffer(content, dtype=statistic.dtype))


def gathered(position: Position) -> list[Position]:
    """Return the positions of all ranks, on every rank."""
    if not dist.is_initialized():
        return [position]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, position)
    return found


def own_position(positions: Sequence[Position], rank: int, world_size: int) -> Position:
    """Return the one of `positions` that this rank goes on from.

    Where the number of workers has changed, rank 0 takes the sums of all, and no rank's states would do.
    """
    if len(positions) == world_size:
        return positions[rank]
    first = positions[0]
    if rank:
        return Position(step=first.step, time_s=first.time_s)
    return Position(
        step=first.step,
        loss_sum=math.fsum(position.loss_sum for position in positions),
        num_correct=sum(position.num_correct for position in positions),
        num_rows=sum(position.num_rows for position in positions),
        time_s=first.time_s,
        data_wait_s=first.data_wait_s,
    )


def largest(value: float, device: torch.device) -> float:
    """Return the largest `value` over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def statistics_of(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of the batch normalisations, which each rank has of its own rows."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    return [getattr(layer, name) for layer in layers for name in ("running_mean", "running_var")]


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give all ranks the mean of their batch-normalisation statistics; nothing happens in a network without them.

    Each rank's running mean and variance come from its own rows, and all must evaluate the same network.
    """
    statistics = statistics_of(model)
    if not statistics or not dist.is_initialized():
        return
    mean = torch.cat(statistics) / dist.get_world_size()
    dist.all_reduce(mean)
    for tensor in statistics:
        tensor.copy_(mean[: len(tensor)])
        mean = mean[len(tensor) :]


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
