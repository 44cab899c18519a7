"""A sharded optimizer for the workers of one host, which exchange gradients and weights through shared memory.

Loopback TCP copies every gradient four times through the kernel, on the cores that compute: 6 to 9 % of a step of two
one-threaded workers, against 3 to 4 % for one write and one read of shared memory. With plain DDP every rank updates
all weights; sharded (ZeRO's first stage, Rajbhandari et al. 2020, arXiv 1910.02054), each rank updates its part of
them, and reads the gradients of that part only.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fashion.training.optimizer import BLOCK_ROWS, state_names

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a file of a random name that only its owner may open
# Elements of a parameter that are averaged and updated at a time. Of 2**14 to 2**23 this is the fastest on Zen 4:
# smaller chunks take more calls, larger ones leave the caches between a copy and its sum.
CHUNK = 1 << 19
CACHE_LINE = 64


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` (excluded) of the parameter `weight` in the optimizer's parameter group `group`."""

    group: int
    weight: nn.Parameter
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        """Number of elements of the slice."""
        return (self.stop - self.start) * self.weight[0].numel()

    def of(self, tensor: Tensor) -> Tensor:
        """Return the slice of `tensor`, which has the parameter's shape."""
        return tensor[self.start : self.stop]


def slices_of(groups: Sequence[dict[str, Any]], rank: int, world_size: int) -> list[Slice]:
    """Return the slices that `rank` updates: of each of an optimizer's `groups`, about as many elements as other ranks.

    Muon orthogonalises blocks of rows, so its parameters are cut between blocks.
    """
    own = []
    for number, group in enumerate(groups):
        pieces = []
        for weight in group["params"]:
            rows = BLOCK_ROWS if group.get("muon") else max(1, CHUNK // weight[0].numel())
            starts = range(0, len(weight), rows)
            pieces += [Slice(number, weight, start, min(start + rows, len(weight))) for start in starts]
        loads = [0] * world_size
        for piece in sorted(pieces, key=lambda piece: -piece.num_elements):
            least = loads.index(min(loads))
            loads[least] += piece.num_elements
            if least == rank:
                own.append(piece)
    return own


class ShardedOptimizer:
    """Steps an optimizer under DDP: each rank updates its slices of the weights, in memory that all ranks share.

    Gradients are added in rank order and in float32, and each element is updated as `optimizer` would, so the weights
    have the same bits as if every rank updated all of them. Between steps the network and `optimizer` hold all weights
    and the whole state, on every rank. Gradients are exchanged as `dtype`: bfloat16 halves the bytes and rounds each
    rank's gradient once.
    """

    def __init__(self, memory: mmap.mmap, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._optimizer, self._nothing = optimizer, torch.zeros(1)
        arena = SharedArena(memory)
        self._state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for weight, names in state_by_parameter(optimizer).items():
            weight.data = arena.like(weight.data).copy_(weight.data)
            self._state[weight] = {name: arena.like(weight.data) for name, is_shaped in names.items() if is_shaped}
        num_elements = sum(weight.numel() for weight in self._state)
        self._slots = [arena.take(num_elements, dtype) for _ in range(self._world_size)]
        self._places: dict[nn.Parameter, int] = {}
        """The index in a slot at which a parameter's gradient starts."""
        pieces = slices_of(optimizer.param_groups, self._rank, self._world_size)
        self._own = [(piece, piece.of(piece.weight.data)) for piece in pieces]
        groups = [
            group | {"params": [part for piece, part in self._own if piece.group == number]}
            for number, group in enumerate(optimizer.param_groups)
        ]
        self._sharded = type(optimizer)(groups)  # type: ignore[call-arg]  # all kinds have defaults for what groups bring
        self._adopted: object = None
        """The state of `optimizer` that was last moved to shared memory; loading a checkpoint replaces that state."""

    @classmethod
    def open(cls, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> "ShardedOptimizer | None":
        """Return the sharded form of `optimizer`; all ranks of the process group call this together, before DDP.

        Returns None, on all ranks, if they cannot share memory: no /dev/shm, too little of it (containers often have
        64 MB), or ranks that do not see each other's files. The file is unlinked at once and ends with the processes.
        """
        path = [create(size_of(optimizer, dtype)) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(path)
        memory = map_file(path[0]) if path[0] else None
        opened = torch.tensor(int(memory is not None))
        dist.all_reduce(opened, op=dist.ReduceOp.MIN)
        if dist.get_rank() == 0 and path[0]:
            os.unlink(path[0])
        return cls(memory, optimizer, dtype) if memory is not None and opened.item() else None

    def hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Copy this rank's gradients to shared memory: a DDP communication hook, called with one bucket of them all."""
        gradient = bucket.buffer()
        self._slots[self._rank].copy_(gradient)
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        self._places = {weight: each.storage_offset() - gradient.storage_offset() for weight, each in pairs}
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradient)
        return done

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights with the mean gradient; overwrites the gradients. Raises `RuntimeError` if a rank ends."""
        if self._adopted is not self._optimizer.state:
            self._adopt()
        self._wait()  # until every rank has written its gradients, and computes with the weights no more
        for piece, part in self._own:
            part.grad = self._average(piece)
        for group, whole in zip(self._sharded.param_groups, self._optimizer.param_groups, strict=True):
            group["lr"] = whole["lr"]
        self._sharded.step()
        self._sharded.zero_grad()
        counts = [value for kept in self._optimizer.state.values() for value in kept.values() if value.ndim == 0]
        if counts:
            torch._foreach_add_(counts, 1)
        self._wait()  # until every rank has updated its weights

    def _wait(self) -> None:
        dist.all_reduce(self._nothing)  # a barrier that also fails if a rank has died

    def _average(self, piece: Slice) -> Tensor:
        """Return the mean gradient of `piece`; it overwrites this rank's own gradient."""
        assert piece.weight.grad is not None, "every parameter takes part in every step"
        gradient = piece.of(piece.weight.grad)
        start = self._places[piece.weight] + piece.start * piece.weight[0].numel()
        first, *others = (slot[start : start + piece.num_elements] for slot in self._slots)
        flat = gradient.as_strided((piece.num_elements,), (1,))
        flat.copy_(first)
        for each in others:
            flat.add_(each)
        flat.mul_(1.0 / self._world_size)
        return gradient

    def _adopt(self) -> None:
        """Move the optimizer's state, which is the same on all ranks, to shared memory; zeros if there is none yet."""
        state = self._adopted = self._optimizer.state
        for weight, names in state_by_parameter(self._optimizer).items():
            for name, is_shaped in names.items():
                if is_shaped and name in state[weight]:
                    self._state[weight][name].copy_(state[weight][name])
                state[weight].setdefault(name, torch.zeros(()))
            state[weight].update(self._state[weight])
        for piece, part in self._own:
            kept = state[piece.weight].items()
            self._sharded.state[part] = {name: piece.of(value) if value.ndim else value.clone() for name, value in kept}


def state_by_parameter(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, bool]]:
    """Return, for each parameter, the state that `optimizer` keeps of it: see `state_names`."""
    groups = zip(optimizer.param_groups, state_names(optimizer), strict=True)
    return {weight: names for group, names in groups for weight in group["params"]}


# --- memory -------------------------------------------------------------------------------------------------------


class SharedArena:
    """Allocates tensors in shared memory, at the same places on every rank that allocates in the same order.

    Each tensor has a storage of its own, so that `torch.save` writes that tensor alone.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory, self._used = memory, 0

    def take(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor (num_elements,) of zeros; the memory must be new."""
        start = self._used
        self._used += in_lines(num_elements * dtype.itemsize)
        return torch.frombuffer(self._memory, dtype=dtype, count=num_elements, offset=start)

    def like(self, tensor: Tensor) -> Tensor:
        """Return float32 zeros with the shape and strides of `tensor`, whose elements must be dense in memory."""
        return self.take(tensor.numel(), torch.float32).as_strided(tensor.shape, tensor.stride())


def in_lines(size: int) -> int:
    """Return `size` in bytes, rounded up to whole cache lines."""
    return -(-size // CACHE_LINE) * CACHE_LINE


def size_of(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> int:
    """Return the bytes that `ShardedOptimizer` needs: weights and state once, gradients once for every rank."""
    kept = state_by_parameter(optimizer)
    num_elements = sum(weight.numel() for weight in kept)
    floats = sum(in_lines(4 * weight.numel()) * (1 + sum(names.values())) for weight, names in kept.items())
    return floats + dist.get_world_size() * in_lines(num_elements * dtype.itemsize)


def create(size: int) -> str | None:
    """Create a file of `size` bytes in shared memory, all reserved; return its path, or None if there is no room.

    Without the reservation, writing to a full /dev/shm would kill the process with SIGBUS.
    """
    if not SHARED_MEMORY.is_dir() or not hasattr(os, "posix_fallocate"):
        return None
    try:
        handle, path = tempfile.mkstemp(prefix="fashion-", dir=SHARED_MEMORY)
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(handle)
    return path


def map_file(path: str) -> mmap.mmap | None:
    """Map the file `path` as shared memory; return None if this rank cannot open it."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(handle, 0)
    finally:
        os.close(handle)
