"""The update shared out among ranks: the bits are those of every rank moving all, and nothing is left behind."""

import copy
import os
import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fashion.config import TrainConfig
from fashion.distributed import shared_memory
from fashion.distributed.ddp import mean_in_rank_order
from fashion.distributed.shared_memory import ShardedOptimizer, slices_of
from fashion.model import network as model_module
from fashion.model.eager import without_compiler
from fashion.training.optimizer import build_optimizer
from fashion.training.run import build_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shared_memory.SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm"),
]

WORLD_SIZE = 3
# A rank that is gone is noticed by its closed connections, not after this time, within which pytest ends the test.
LIMIT_S = 1800
OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
WIDTHS = (1, 2, 3, 8)


def join(rank: int, folder: str) -> None:
    """Make a process a rank of a gloo group that meets in `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=LIMIT_S))


def started(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network and its optimizer, the same on every rank: padding with a group of its own, weights of several
    pieces, and convolutions that Muon cuts.
    """
    config = TrainConfig(preset="smoke", optimizer=name, padding="learned")  # type: ignore[arg-type]  # of OPTIMIZERS
    torch.manual_seed(0)
    model = model_module.place(build_model(config, 0.3, 0.35), torch.device("cpu"))
    return model, build_optimizer(config, model)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, update: Callable[[], object], rank: int, turn: int
) -> None:
    """Take a step on rows that are this rank's, as the loop does."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * (1 + turn) / 2
    generator = torch.Generator().manual_seed(100 * turn + rank)
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8, generator=generator)
    loss = F.cross_entropy(model(images).float(), torch.randint(0, 10, (2,), generator=generator))
    model.zero_grad()
    torch.autograd.backward(loss)
    update()


def in_ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a network as the loop does, without torch's compiler."""
    with without_compiler():
        return DistributedDataParallel(model, **options)


def average_in_rank_order(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """What `ShardedOptimizer` says that it does, through sockets."""
    gradient = bucket.buffer()
    sent = [torch.empty_like(gradient, dtype=dtype) for _ in range(WORLD_SIZE)]
    dist.all_gather(sent, gradient.to(dtype))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(((sent[0].float() + sent[1]) + sent[2]) * (1.0 / WORLD_SIZE))
    return done


def check_on_every_rank(rank: int, folder: str) -> None:
    join(rank, folder)
    for name in OPTIMIZERS:
        check_steps(rank, name, torch.float32)
    check_steps(rank, "muon", torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        check_sockets(dtype, rank)
    check_ranks_that_cannot_share(rank)
    check_death(rank)


def check_steps(rank: int, name: str, dtype: torch.dtype) -> None:
    """Weights and state are those of every rank moving everything, while ranks dawdle, and after a load in between."""
    plain, plain_optimizer = started(name)
    wrapped = in_ddp(plain, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(dtype, average_in_rank_order)
    model, optimizer = started(name)
    shared = ShardedOptimizer.open(optimizer, dtype)
    assert shared is not None
    ours = in_ddp(model, gradient_as_bucket_view=True, bucket_cap_mb=30)
    ours.register_comm_hook(None, shared.hook)
    for turn in range(4):
        if turn == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(wrapped, plain_optimizer, plain_optimizer.step, rank, turn)
        time.sleep(random.random() * 0.02)
        step(ours, optimizer, shared.step, rank, turn)
        expected, found = dict(plain.named_parameters()), dict(model.named_parameters())
        assert all(torch.equal(found[key], expected[key]) for key in expected), (name, dtype, turn)
    expected_state, state = plain_optimizer.state_dict(), optimizer.state_dict()
    assert state["param_groups"] == expected_state["param_groups"]
    for index, kept in expected_state["state"].items():
        assert set(kept) == set(state["state"][index]), (name, index)
        assert all(torch.equal(kept[key], state["state"][index][key]) for key in kept), (name, dtype, index)
    moved, untouched = dict(model.named_parameters()), dict(started(name)[0].named_parameters())
    assert not any(torch.equal(moved[key], untouched[key]) for key in moved), "every parameter moved"


def check_sockets(dtype: torch.dtype, rank: int) -> None:
    """Ranks on several hosts, which share no memory, compute the same bits, in one bucket and in many."""
    nets = [started("adamw") for _ in range(3)]
    for (net, optimizer), hook, cap_mb in zip(
        nets, (average_in_rank_order, mean_in_rank_order, mean_in_rank_order), (30, 30, 1), strict=True
    ):
        wrapped = in_ddp(net, gradient_as_bucket_view=True, bucket_cap_mb=cap_mb)
        wrapped.register_comm_hook(dtype, hook)
        for turn in range(2):
            step(wrapped, optimizer, optimizer.step, rank, turn)
    expected, *others = [dict(net.named_parameters()) for net, _ in nets]
    for found in others:
        assert all(torch.equal(found[key], expected[key]) for key in expected), dtype


def check_ranks_that_cannot_share(rank: int) -> None:
    """No room, or one rank that does not see the file: all ranks do without it."""
    optimizer = torch.optim.SGD(nn.Linear(10, 10).parameters(), lr=0.1)
    real = shared_memory.size_of, shared_memory.map_file
    shared_memory.size_of = lambda optimizer, dtype: 1 << 50
    assert ShardedOptimizer.open(optimizer, torch.float32) is None, "no machine has that much"
    shared_memory.size_of = real[0]
    if rank == 1:
        shared_memory.map_file = lambda path: None
    assert ShardedOptimizer.open(optimizer, torch.float32) is None
    shared_memory.map_file = real[1]
    assert ShardedOptimizer.open(optimizer, torch.float32) is not None


def check_death(rank: int) -> None:
    """A rank that died is noticed at once, not after the time limit."""
    model, optimizer = started("muon")
    shared = ShardedOptimizer.open(optimizer, torch.float32)
    assert shared is not None
    wrapped = in_ddp(model, gradient_as_bucket_view=True, bucket_cap_mb=30)
    wrapped.register_comm_hook(None, shared.hook)
    step(wrapped, optimizer, shared.step, rank, 0)
    if rank == 2:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        step(wrapped, optimizer, shared.step, rank, 1)
    assert time.monotonic() - began < LIMIT_S / 10


def left_behind() -> list[Path]:
    return [path for path in shared_memory.SHARED_MEMORY.glob("fashion-*") if path.stat().st_uid == os.getuid()]


def test_ranks_of_one_host_share_the_update(tmp_path: Path) -> None:
    before = left_behind()
    torch.multiprocessing.spawn(check_on_every_rank, (str(tmp_path),), WORLD_SIZE)
    assert left_behind() == before


@pytest.mark.parametrize("world_size", WIDTHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_row_is_moved_by_one_rank(name: str, world_size: int) -> None:
    _, optimizer = started(name)
    ranks = [slices_of(optimizer.param_groups, rank, world_size) for rank in range(world_size)]
    for number, group in enumerate(optimizer.param_groups):
        own = [[piece for piece in pieces if piece.group == number] for pieces in ranks]
        for weight in group["params"]:
            rows = [
                row
                for pieces in own
                for piece in pieces
                if piece.weight is weight
                for row in range(piece.start, piece.stop)
            ]
            assert sorted(rows) == list(range(len(weight)))
        loads = [sum(piece.num_elements for piece in pieces) for pieces in own]
        largest = max(piece.num_elements for pieces in own for piece in pieces)
        assert max(loads) - min(loads) <= largest, (number, loads)
