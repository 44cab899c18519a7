"""What only a GPU can show; `make bench-gpu` runs these first. Skipped, with the reason, where torch sees none."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fashion.config import TrainConfig
from fashion.distributed.ddp import register_hook
from fashion.training import sync
from fashion.training.run import Rank, Shards, TrainingRun, WrappedModel, resident_batches, without_ddp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = TrainConfig(precision="fp32", epochs=1, global_batch_size=16, flip="random", shift=1, deterministic=True)


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def run_on(device: torch.device, config: TrainConfig, rank: int = 0, wrap: Any = without_ddp) -> TrainingRun:
    """Return a run of 20 steps at its start; its weights are those of the seed on either device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (320, 1, 28, 28), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, 10, (320,), generator=generator).to(device)
    train = resident_batches(config, images, labels, Rank(device=device), config.steps_per_epoch(320))
    shards = Shards(train, (images[:32], labels[:32]), 320, 32, 0.5, 0.29)
    run = TrainingRun(config, shards, Rank(rank, device=device), wrap)
    run.wrapped.train()
    return run


def after_steps(run: TrainingRun, steps: int) -> dict[str, Tensor]:
    for step, batch in zip(range(steps), run.shards.train_batches(1), strict=False):
        run.set_lr(step)
        run._take_step(batch)
    return {name: value.cpu() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["muon", "adam", "sgd"])
def test_two_steps_in_fp32_are_those_of_a_cpu(optimizer: Any) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    ours, expected = (after_steps(run_on(device, config), 2) for device in (GPU, CPU))
    # Muon moves weights by 0.02 of the peak learning rate's 1.5e-3, AdamW by the rate: rounding is far below either.
    assert all(torch.allclose(ours[name], expected[name], atol=2e-4) for name in expected)


def test_the_batches_are_those_of_a_cpu_to_the_bit() -> None:
    config = replace(CONFIG, erase=0.5, shift=2)
    for ours, expected in zip(*(run_on(device, config).shards.train_batches(2) for device in (GPU, CPU)), strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits_where_kernels_are_deterministic(precision: Any) -> None:
    config = replace(CONFIG, precision=precision, dropout_fc=0.2)
    one, two = (after_steps(run_on(GPU, config), 10) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_step_is_the_step(precision: Any) -> None:
    config = replace(CONFIG, precision=precision)
    graphed = run_on(GPU, replace(config, cuda_graph=True))
    ours, expected = after_steps(graphed, 20), after_steps(run_on(GPU, config), 20)
    assert graphed.notes == [], "nothing kept the step from being captured"
    assert all(torch.allclose(ours[name], expected[name], atol=1e-3) for name in expected)


@pytest.mark.parametrize("onto", [GPU, CPU])
def test_a_run_of_a_gpu_resumes_within_its_epoch_on_a_gpu_and_on_a_cpu(onto: torch.device) -> None:
    config = replace(CONFIG, dropout_fc=0.2)
    files: dict[str, bytes] = {}
    whole = run_on(GPU, config)
    for progress in whole.train():
        if progress.is_sync_point and whole.synchronise(wants_save=True) and not files:
            files = whole.encode()
    resumed = run_on(onto, config)
    resumed.restore(files.__getitem__)
    list(resumed.epochs())
    assert bool(resumed.notes) == (onto == CPU)
    if onto == GPU:
        expected = whole.model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_memory_of_the_gpu_is_reported() -> None:
    from fashion.model.device import peak_gpu_memory_bytes

    after_steps(run_on(GPU, CONFIG), 2)
    assert (peak_gpu_memory_bytes(GPU) or 0) > 16 * 7_001_194


def train_steps(rank: int, folder: str) -> None:
    """Train two ranks by NCCL, each on its own GPU and rows; they end with the same weights."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)

    def wrap(model: Any, optimizer: torch.optim.Optimizer, precision: str) -> WrappedModel:
        wrapped = DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=True)
        register_hook(wrapped, "nccl", torch.bfloat16)
        return wrapped, optimizer.step, "nccl"

    run = run_on(device, replace(CONFIG, seed=0, precision="bf16"), rank, wrap)
    after_steps(run, 5)
    assert sync.drifted_ranks(run.model, device) == []
    dist.destroy_process_group()


def test_two_ranks_of_nccl_keep_the_same_weights(tmp_path: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one GPU here, and two ranks of NCCL need two")
    torch.multiprocessing.spawn(train_steps, (str(tmp_path),), 2)
