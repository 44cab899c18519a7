"""What ranks exchange besides gradients: they stop together on a non-finite loss, agree on when to save, and gather
what a checkpoint within an epoch needs of each rank.
"""

import base64
import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# At most this many steps lie between two synchronisation points: each one stalls a GPU, and costs little on a CPU.
MAX_STEPS_BETWEEN_SYNCS = {"cuda": 50, "cpu": 10}
# Fewer steps lie between them where these would take longer, since a run can be saved at these points only.
SECONDS_BETWEEN_SYNCS = 0.5


class Diverged(RuntimeError):
    """The loss was not finite; every rank raises this after the same step."""


@dataclass(frozen=True)
class EpochState:
    """How far one rank is within an epoch, and what it needs to resume there with the same bits.

    Checkpoints hold these as JSON under the key `epoch_states`, so the names of the fields are part of a file format.
    """

    step: int = 0
    """Steps done; at 0 the epoch is at its start, and the other fields have their defaults."""
    loss_sum: float = 0.0
    """This rank's own sums so far, as in `ClassificationSums`."""
    num_correct: int = 0
    num_rows: int = 0
    time_s: float = 0.0
    """Seconds spent in the epoch so far, of these `data_wait_s` waiting for data."""
    data_wait_s: float = 0.0
    states: tuple[str, ...] = ()
    """Base64 of what differs between ranks: see `own_states`. Empty if the number of workers has changed."""


START = EpochState()
"""The state of every rank at the start of an epoch."""


def parse_epoch_states(stored: Any) -> list[EpochState]:
    """Return the states of all ranks from the plain values that a checkpoint holds of them.

    Raises `TypeError` or `ValueError` for values of another form.
    """
    parsed = []
    for values in stored:
        epoch_state = EpochState(**values)
        for field in dataclasses.fields(EpochState):
            value, like = getattr(epoch_state, field.name), field.default
            if field.name != "states" and type(value) is not type(like):
                raise TypeError(f"{field.name} is {value!r}")
        states = tuple(epoch_state.states)
        for state in states:
            base64.b64decode(state, validate=True)
        parsed.append(dataclasses.replace(epoch_state, states=states))
    return parsed


class SyncPoints:
    """Synchronises ranks every few steps: stops all of them on a non-finite loss, and agrees on when to save.

    The points come after the same steps on all ranks. The slowest rank's time for a step decides how many steps lie
    between two of them.
    """

    NEVER = torch.iinfo(torch.int64).max
    """Stands for no step in a reduction that takes the smallest."""

    def __init__(self, epoch: int, step: int, device: torch.device) -> None:
        """Start after `step` steps of the epoch; the first point comes after the next one."""
        self._epoch = epoch
        self._first_bad_step = torch.full((), self.NEVER, device=device)
        self._limit = MAX_STEPS_BETWEEN_SYNCS.get(device.type, MAX_STEPS_BETWEEN_SYNCS["cuda"])
        self._last, self._next, self._since = step, step + 1, time.perf_counter()

    def note(self, loss: Tensor, step: int) -> None:
        """Record, without waiting for the device, whether the `loss` () of a step is finite."""
        bad = torch.where(torch.isfinite(loss.detach()), self.NEVER, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)

    def is_due_after(self, step: int) -> bool:
        """Return whether all ranks must call `synchronise` after this step."""
        return step == self._next

    def synchronise(self, step: int, wants_save: bool, is_writing: bool = False) -> tuple[bool, bool]:
        """Return whether any rank `wants_save`, and whether any `is_writing` a checkpoint.

        Raises `Diverged` on every rank if any rank had a non-finite loss.

        Costs one small all-reduce.
        """
        since, self._since = self._since, time.perf_counter()
        steps, self._last = max(step - self._last, 1), step
        # All are reduced by MIN: the first bad step, whether nobody wants to save, or writes, the slowest rank's time.
        own = [0 if wants_save else 1, 0 if is_writing else 1, -int((self._since - since) / steps * 1e6)]
        reduced = torch.stack([self._first_bad_step, *self._first_bad_step.new_tensor(own)])
        if dist.is_initialized():
            dist.all_reduce(reduced, op=dist.ReduceOp.MIN)
        bad_step, nobody_wants_save, nobody_writes, negative_step_us = reduced.tolist()
        if bad_step != self.NEVER:
            raise Diverged(f"loss is not finite at epoch {self._epoch}, step {bad_step}; lower --lr")
        steps_in_time = int(SECONDS_BETWEEN_SYNCS * 1e6) // max(-negative_step_us, 1)
        self._next = step + min(max(steps_in_time, 1), self._limit)
        return not nobody_wants_save, not nobody_writes


def own_states(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Return, as base64, what differs between ranks within an epoch: generators, and batch normalisation's statistics.

    Dropout draws from torch's generators. The order of rows and their augmentation have generators of their own; a run
    that resumes draws from these again, up to the step where it was saved.
    """
    tensors = [torch.get_rng_state()]
    tensors += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    tensors += [statistic.detach().cpu() for statistic in batch_norm_statistics(model)]
    return tuple(base64.b64encode(tensor.numpy().tobytes()).decode() for tensor in tensors)


@torch.no_grad()
def restore_own_states(states: Sequence[str], model: nn.Module, device: torch.device) -> None:
    """Restore on this rank what `own_states` returned on it, on a CPU or on a GPU.

    Of the generators it restores those that both devices have. The caller has seeded them: that of a GPU stays so in a
    run that was saved on a CPU.
    """
    check_states(states, model)
    contents = [torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for state in states]
    statistics = batch_norm_statistics(model)
    generators = contents[: len(contents) - len(statistics)]
    torch.set_rng_state(generators[0])
    if device.type == "cuda" and len(generators) > 1:
        torch.cuda.set_rng_state(generators[1], device)
    for statistic, content in zip(statistics, contents[len(generators) :], strict=True):
        statistic.copy_(content.view(statistic.dtype))


def check_states(states: Sequence[str], model: nn.Module) -> None:
    """Raise `ValueError` unless `states` are what `own_states` returns for a network like `model` on some device."""
    sizes = [len(base64.b64decode(state)) for state in states]
    of_statistics = [statistic.nbytes for statistic in batch_norm_statistics(model)]
    split = len(sizes) - len(of_statistics)
    # The generator of the CPU, and that of a GPU if the run was saved on one.
    whole = split in (1, 2) and sizes[0] == torch.get_rng_state().nbytes and sizes[split:] == of_statistics
    if not whole:
        raise ValueError(f"states have {sizes[:8]} bytes")


@torch.no_grad()
def drifted_ranks(model: nn.Module, device: torch.device) -> list[int]:
    """Return the ranks whose weights are not rank 0's, by the sum of the weights' bits; costs one small all-gather.

    Ranks compute the same update from the same gradients, but only on like hardware to the bit. Muon's products, for
    one, differ between kinds of GPUs and of CPUs, and nothing else brings the ranks back together.
    """
    if not dist.is_initialized():
        return []
    sums = [weight.detach().view(torch.int32).sum(dtype=torch.int64) for weight in model.parameters()]
    checksum = torch.stack(sums).sum().to(device)
    gathered = [torch.empty_like(checksum) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, checksum)
    first, *others = (int(each.item()) for each in gathered)
    return [rank for rank, other in enumerate(others, start=1) if other != first]


@torch.no_grad()
def send_from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` on all ranks with those of rank 0, in the same order."""
    for tensor in tensors:
        sent = tensor.contiguous()
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def gather_epoch_states(own: EpochState) -> list[EpochState]:
    """Return the states of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def own_epoch_state(epoch_states: Sequence[EpochState], rank: int, world_size: int) -> EpochState:
    """Return the state from which this rank resumes, given those of all ranks in the checkpoint.

    If the number of workers has changed since, rank 0 takes the sums of all ranks, and no rank gets `states`: they
    belong to another division of the rows.
    """
    if len(epoch_states) == world_size:
        return epoch_states[rank]
    first = epoch_states[0]
    if rank:
        return EpochState(step=first.step, time_s=first.time_s)
    return EpochState(
        step=first.step,
        loss_sum=math.fsum(each.loss_sum for each in epoch_states),
        num_correct=sum(each.num_correct for each in epoch_states),
        num_rows=sum(each.num_rows for each in epoch_states),
        time_s=first.time_s,
        data_wait_s=first.data_wait_s,
    )


def largest(value: float, device: torch.device) -> float:
    """Return the largest `value` over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of the batch normalisations; each rank's are those of its own rows."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    return [getattr(layer, name) for layer in layers for name in ("running_mean", "running_var")]


@torch.no_grad()
def average_batch_norm_statistics(model: nn.Module) -> None:
    """Set the batch-normalisation statistics of all ranks to their mean; does nothing in a network without any.

    Each rank's running mean and variance come from its own rows, but all ranks must evaluate the same network.
    """
    statistics = batch_norm_statistics(model)
    if not statistics or not dist.is_initialized():
        return
    mean = torch.cat(statistics) / dist.get_world_size()
    dist.all_reduce(mean)
    for tensor in statistics:
        tensor.copy_(mean[: len(tensor)])
        mean = mean[len(tensor) :]
