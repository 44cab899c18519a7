"""Gradients through shared memory: the same mean on every rank, however long each takes, and nothing left behind."""

import os
import random
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fashion import exchange
from fashion.exchange import SharedMemoryExchange

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not exchange.SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm"),
]

WORLD_SIZE = 3
# Not a whole number of chunks, and several of them.
NUM_ELEMENTS = 3 * exchange.CHUNK + 1001


def join(rank: int, folder: str) -> None:
    """Make a process a rank of a gloo group that meets in `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))


def gradient_of(rank: int, turn: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * turn + rank))


def check_on_every_rank(rank: int, folder: str) -> None:
    join(rank, folder)
    check_means(rank)
    check_ddp(rank)
    check_ranks_that_cannot_share(rank)
    check_death(rank)


def check_means(rank: int) -> None:
    """Of buckets of any size, one after another, while ranks dawdle."""
    for dtype in (torch.float32, torch.bfloat16):
        shared = SharedMemoryExchange.open(NUM_ELEMENTS, dtype)
        assert shared is not None
        for turn in range(12):
            size = (NUM_ELEMENTS, 1, exchange.CHUNK)[turn % 3]
            gradient = gradient_of(rank, turn, size)
            time.sleep(random.random() * 0.02)
            shared.average(gradient)
            sent = [gradient_of(other, turn, size).to(dtype).float() for other in range(WORLD_SIZE)]
            expected = (sent[0] + sent[1] + sent[2]) * (1.0 / WORLD_SIZE)
            assert torch.equal(gradient, expected), (dtype, turn)


def check_ddp(rank: int) -> None:
    """A step under DDP with this exchange is the step with DDP's own."""
    gradients = []
    for shared in (None, SharedMemoryExchange.open(10_000, torch.float32)):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 2)))
        if shared is not None:
            model.register_comm_hook(None, shared.hook)
        for turn in range(3):
            model.zero_grad()
            model(gradient_of(rank, turn, 100).view(5, 20)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        assert theirs is not None and ours is not None
        assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def check_ranks_that_cannot_share(rank: int) -> None:
    """No room, or one rank that does not see the file: all ranks do without it."""
    real = exchange.create, exchange.map_file
    assert SharedMemoryExchange.open(1 << 50, torch.float32) is None, "no machine has that much"
    if rank == 1:
        exchange.map_file = lambda path: None
    assert SharedMemoryExchange.open(10, torch.float32) is None
    exchange.create, exchange.map_file = real
    assert SharedMemoryExchange.open(10, torch.float32) is not None


def check_death(rank: int) -> None:
    """A rank that died is noticed at once, not after the time limit of a minute."""
    shared = SharedMemoryExchange.open(NUM_ELEMENTS, torch.float32)
    assert shared is not None
    gradient = torch.ones(NUM_ELEMENTS)
    shared.average(gradient)
    if rank == 2:
        os._exit(0)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        shared.average(gradient)
    assert time.monotonic() - started < 30


def left_behind() -> list[Path]:
    return [path for path in exchange.SHARED_MEMORY.glob("fashion-*") if path.stat().st_uid == os.getuid()]


def test_ranks_of_one_host_average_their_gradients(tmp_path: Path) -> None:
    before = left_behind()
    torch.multiprocessing.spawn(check_on_every_rank, (str(tmp_path),), WORLD_SIZE)
    assert left_behind() == before
