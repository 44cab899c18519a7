"""What ranks exchange besides gradients: stop together on a non-finite loss, agree on when to save, share state."""

import base64
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# At most so many steps lie between two looks at the loss: a look stalls a GPU; on CPUs the value is there.
MAX_STEPS_BETWEEN_SYNCS = {"cuda": 50, "cpu": 10}
# Where steps are slow, looks come after so many seconds: it is at a look that a run is saved.
SECONDS_BETWEEN_SYNCS = 0.5


class Diverged(RuntimeError):
    """The loss was not finite; every rank raises it at the same step."""


@dataclass(frozen=True)
class EpochState:
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


START = EpochState()
"""Of every rank at the start of an epoch."""


def epoch_states_from(stored: Any) -> list[EpochState]:
    """Return the positions of all ranks from what `dataclasses.asdict` and JSON made of them.

    Raises `TypeError` or `ValueError` for anything else.
    """
    found = []
    for values in stored:
        position = EpochState(**values)
        for field in dataclasses.fields(EpochState):
            value, like = getattr(position, field.name), field.default
            if field.name != "states" and type(value) is not type(like):
                raise TypeError(f"{field.name} is {value!r}")
        states = tuple(position.states)
        for state in states:
            base64.b64decode(state, validate=True)
        found.append(dataclasses.replace(position, states=states))
    return found


class SyncPoints:
    """What all ranks look at together, every few steps: the loss, and whether any of them wishes for a pause.

    The ranks look after the same steps: how far apart those are follows from the slowest one's time between two looks.
    """

    NEVER = torch.iinfo(torch.int64).max

    def __init__(self, epoch: int, step: int, device: torch.device) -> None:
        """Begin after `step`; the first look comes after the next one."""
        self._epoch = epoch
        self._first_bad_step = torch.full((), self.NEVER, device=device)
        self._limit = MAX_STEPS_BETWEEN_SYNCS[device.type]
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
        fitting = int(SECONDS_BETWEEN_SYNCS * 1e6) // max(-microseconds, 1)
        self._next = step + min(max(fitting, 1), self._limit)
        return not nobody


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


def gathered(position: EpochState) -> list[EpochState]:
    """Return the positions of all ranks, on every rank."""
    if not dist.is_initialized():
        return [position]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, position)
    return found


def own_epoch_state(positions: Sequence[EpochState], rank: int, world_size: int) -> EpochState:
    """Return the one of `positions` that this rank goes on from.

    Where the number of workers has changed, rank 0 takes the sums of all, and no rank's states would do.
    """
    if len(positions) == world_size:
        return positions[rank]
    first = positions[0]
    if rank:
        return EpochState(step=first.step, time_s=first.time_s)
    return EpochState(
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
