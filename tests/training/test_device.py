"""What a GPU would do, seen on a CPU: fake tensors, counted operations, checkpoints as the other device writes them."""

import base64
import ctypes
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fashion.config import TrainConfig, UserError, preset
from fashion.model import device as device_module
from fashion.model.device import (
    keep_freed_memory,
    on_side_stream,
    peak_memory_bytes,
    reset_peak_memory,
    set_arithmetic,
    share_of_memory,
    to_device,
)
from fashion.training import batches, checkpoint, loop, sync
from fashion.training import run as run_module
from fashion.training.batches import Augmentation, Batch, shuffled_batches
from fashion.training.ema import update_ema
from fashion.training.optimizer import Muon, build_optimizer, make_capturable, set_learning_rates, state_names
from fashion.training.run import Rank, Shards, TrainingRun, build_model, resident_batches, without_ddp

GPU = torch.device("cuda", 0)
META = torch.device("meta")
CPU = torch.device("cpu")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
"""Parts of the names of operations that hand a value of the device to Python, which waits for the device."""


class Operations(TorchDispatchMode):
    """Records what torch computes: each operation's name, and whether it lets tensors cross devices or waits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.crossings: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        # A CPU's number without dimensions is an argument of a kernel; nothing is copied for it.
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.ndim]
        tensors += [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if len({each.device.type for each in tensors}) > 1:
            self.crossings.append(name)
        if any(part in name for part in READS):
            self.waits.append(name)
        if func.namespace == "aten" and not func.is_view:
            self.names.append(name)
        return out


def run_on(
    device: torch.device, config: TrainConfig, rows: int = 512, number: int = 0, world_size: int = 1
) -> TrainingRun:
    """Return a run at its start, on rows of one seed; of several ranks, each takes the rows that are its own."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 1, 28, 28), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, 10, (rows,), generator=generator).to(device)
    rank, own = Rank(number, world_size, device), slice(number, None, world_size)
    train = resident_batches(config, images[own], labels[own], rank, config.steps_per_epoch(rows))
    val = images[:32][own], labels[:32][own]
    return TrainingRun(config, Shards(train, val, rows, 32, 0.3, 0.35), rank, without_ddp)


def put(model: nn.Module, device: torch.device) -> nn.Module:
    """Put a fake network on `device`, in the layout of `network.place`: `Module.to` does not move fake tensors."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            moved = torch.empty(weight.shape, device=device).contiguous(memory_format=layout)
            setattr(module, name, nn.Parameter(moved))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, device=device))
    return model


EVERYTHING = {"flip": "random", "shift": 2, "erase": 0.5, "dropout_conv": 0.1, "dropout_fc": 0.1, "ema_decay": 0.99}


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"optimizer": "adam", "flip": "alternating"}])
def test_no_tensor_crosses_devices_in_a_step_after_the_first_and_nothing_waits(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device is torch's `meta`, which computes shapes alone and refuses to hand a value to Python."""
    monkeypatch.setattr(
        sys.modules[torch.optim.Optimizer.__module__], "_get_fused_kernels_supported_devices", lambda: ["meta", "cpu"]
    )
    config = TrainConfig(precision="fp32", epochs=1, **settings)
    run = run_on(META, config)
    record = loop.EpochRecord(1, META)
    run.wrapped.train()
    per_step: list[Operations] = []
    steps = record.timed(run.shards.train_batches(1))
    for _ in range(4):
        with Operations() as operations:
            batch = next(steps)
            run.set_lr(record.step)
            record.add(*run._take_step(batch), batch[1])
            update_ema(run.evaluated, run.model, 0.9, record.step)
        per_step.append(operations)
    assert per_step[0].crossings, "the epoch is sent once, before its first step"
    assert [step.crossings for step in per_step[1:]] == [[]] * 3
    assert [step.waits for step in per_step[1:]] == [[]] * 3


def test_a_copy_to_a_gpu_does_not_wait_for_what_the_gpu_still_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """From ordinary memory it would, and the wait would count as one for data."""
    pinned: list[Tensor] = []
    copies: list[bool] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                assert args[0] is pinned[-1], "it is copied from page-locked memory"
                copies.append((kwargs or {}).get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        rows = torch.zeros(3)
        with Copies():
            sent = to_device(rows, GPU)
    assert (sent.device, copies) == (GPU, [True])


def test_muon_on_a_gpu_takes_few_operations_and_a_cpu_keeps_its_blocks() -> None:
    """A hand count of the same on a GPU before was 227 launches."""

    def count(device: torch.device) -> int:
        with FakeTensorMode():
            model = put(build_model(TrainConfig(), 0.3, 0.35), device)
            optimizer = build_optimizer(TrainConfig(), model)
            for _ in range(2):
                for weight in model.parameters():
                    weight.grad = torch.empty_like(weight)
                operations = Operations()
                with operations:
                    optimizer.step()
            # The first step made the state.
            assert operations.crossings == operations.waits == []
            return len(operations.names)

    assert count(GPU) <= 60
    assert count(CPU) > 200


@pytest.mark.parametrize("depth", ["vgg", "deep"])
def test_muon_moves_all_blocks_together_as_it_moves_each_by_itself(depth: Any) -> None:
    config = TrainConfig(depth=depth)
    moved = []
    for together in (False, True):
        torch.manual_seed(0)
        model = build_model(config, 0.3, 0.35)
        optimizer = build_optimizer(config, model)
        assert isinstance(optimizer, Muon)
        group = next(group for group in optimizer.param_groups if group["muon"])
        for turn in range(3):
            generator = torch.Generator().manual_seed(turn)
            for weight in group["params"]:
                weight.grad = torch.randn(weight.shape, generator=generator) * 1e-3
            if together:
                with torch.no_grad():
                    optimizer._update_together(group["params"], group["lr"], group["weight_decay"])
            else:
                optimizer.step()
        moved.append([weight.detach().clone() for weight in group["params"]])
        counts = {float(optimizer.state[weight]["step"]) for weight in group["params"]}
        assert counts == {3.0}
    assert max(float((a - b).abs().max()) for a, b in zip(*moved, strict=True)) < 1e-6


@pytest.mark.parametrize("name", ["muon", "adam", "adamw", "sgd"])
def test_learning_rates_that_are_tensors_are_those_that_are_numbers(name: Any) -> None:
    """A captured step reads them from the device. In fp32, so not quite to the bit."""
    weights = []
    for captured in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 24 * 24, 10))
        optimizer = build_optimizer(TrainConfig(optimizer=name), net)
        if captured:
            make_capturable(optimizer, CPU)
            rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(3):
            for weight in net.parameters():
                weight.grad = torch.full_like(weight, 0.01 * (step + 1))
            assert set_learning_rates(optimizer, 0.5 / (step + 1)) == 1.5e-3 * 0.5 / (step + 1)
            optimizer.step()
        if captured:
            assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
        weights.append(torch.cat([weight.detach().flatten() for weight in net.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"flip": "random", "shift": 2, "erase": 0.5},
        {"flip": "alternating", "shift": 1},
        {"flip": "random"},
        {"erase": 0.2},
    ],
)
def test_an_epoch_that_is_drawn_at_once_has_the_bits_of_one_drawn_by_batches(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (103, 1, 28, 28), dtype=torch.uint8, generator=generator)

    def epoch() -> list[Batch]:
        keys = {"batch_size": 20, "num_steps": 5, "seed": 3, "epoch": 2, "rank": 1}
        return list(shuffled_batches(images, torch.arange(103), augmentation=Augmentation(**settings), **keys))

    by_batches = epoch()
    monkeypatch.setattr(batches, "is_drawn_at_once", lambda device: True)
    for one, other in zip(by_batches, epoch(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.3])
def test_both_losses_of_a_step_have_the_bits_of_torchs_cross_entropy(smoothing: float) -> None:
    logits = (3 * torch.randn(128, 10, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = torch.arange(128) % 10
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    loss, unsmoothed = loop.losses(logits, labels, smoothing)
    assert torch.equal(loss, expected)
    assert torch.equal(unsmoothed, F.cross_entropy(logits, labels))
    assert torch.equal(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))


# --- checkpoints of the other device --------------------------------------------------------------------------------

SMALL = TrainConfig(precision="fp32", epochs=1, global_batch_size=16, dropout_fc=0.3)
CUDA_GENERATOR = base64.b64encode(bytes(16)).decode()
"""The state of a GPU's generator: its seed and its offset."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved_within_epoch(run: TrainingRun) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """Train `run`; return a checkpoint from within its epoch, and its last weights."""
    files: dict[str, bytes] = {}
    for progress in run.train():
        if progress.is_sync_point and run.synchronise(wants_save=True) and not files:
            files = run.encode()
    return files, run.model.state_dict()


def edited(files: dict[str, bytes], edit: Callable[[dict[str, Any]], None]) -> Callable[[str], bytes]:
    """Return what reads `files` after `edit(progress)`."""
    progress = json.loads(files[checkpoint.PROGRESS])
    edit(progress)
    changed = {name: data for name, data in files.items() if name != checkpoint.MANIFEST}
    changed[checkpoint.PROGRESS] = json.dumps(progress).encode()
    return (changed | {checkpoint.MANIFEST: checkpoint.manifest_of(changed).encode()}).__getitem__


def as_a_gpu_writes_it(progress: dict[str, Any]) -> None:
    progress["device"] = "NVIDIA A10G"
    for state in progress["epoch_states"]:
        state["states"] = [state["states"][0], CUDA_GENERATOR, *state["states"][1:]]


def as_the_version_before_wrote_it(progress: dict[str, Any]) -> None:
    del progress["device"], progress["precision"]
    progress |= {"format": 4, "positions": progress.pop("epoch_states")}


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["vgg", "deep-bn"])
@pytest.mark.parametrize("edit", [as_a_gpu_writes_it, as_the_version_before_wrote_it])
def test_a_checkpoint_of_another_device_or_version_resumes_and_says_so(
    one_thread: None, depth: Any, edit: Callable[[dict[str, Any]], None]
) -> None:
    config = replace(SMALL, depth=depth)
    files, expected = saved_within_epoch(run_on(CPU, config, rows=48))
    resumed = run_on(CPU, config, rows=48)
    resumed.restore(edited(files, edit))
    assert resumed.step > 0
    list(resumed.epochs())
    # The generator of the CPU was restored, so that here even dropout draws the same.
    assert all(torch.equal(value, resumed.model.state_dict()[key]) for key, value in expected.items())
    if edit is as_a_gpu_writes_it:
        assert "the checkpoint was made on NVIDIA A10G in fp32, here is cpu in fp32" in resumed.notes[0]
        assert "rounding and the draws of dropout do not" in resumed.notes[0]
    else:
        assert not resumed.notes


def test_states_of_a_cpu_are_restored_on_a_gpu_without_a_generator_for_it() -> None:
    """The GPU's own generator was seeded by the caller; before, it was looked for in the next state."""
    model = nn.BatchNorm2d(3)
    torch.manual_seed(5)
    states = sync.own_states(model, CPU)
    drawn = torch.rand(3)
    with torch.no_grad():
        model.running_mean.fill_(7)
    sync.restore_own_states(states, model, GPU)
    assert torch.equal(torch.rand(3), drawn)
    assert (model.running_mean == 0).all()


def shorten(progress: dict[str, Any]) -> None:
    progress["epoch_states"][0]["states"] = [CUDA_GENERATOR]


def add_states(progress: dict[str, Any]) -> None:
    progress["epoch_states"][0]["states"] += [CUDA_GENERATOR] * 2


def number_the_device(progress: dict[str, Any]) -> None:
    progress["device"] = 7


@pytest.mark.parametrize("edit", [shorten, add_states, number_the_device])
def test_states_that_no_device_writes_are_damage(edit: Callable[[dict[str, Any]], None]) -> None:
    run = run_on(CPU, SMALL, rows=48)
    state = sync.EpochState(step=1, states=sync.own_states(run.model, CPU))
    run.epoch_states = [state]
    files = run.encode()
    with pytest.raises(checkpoint.DamagedCheckpoint):
        run.restore(edited(files, edit))


# --- settings of the device -----------------------------------------------------------------------------------------


@pytest.fixture
def settings_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    backends = torch.backends
    kept = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, backends.cudnn.benchmark
    reduced = backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    yield
    backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, backends.cudnn.benchmark = kept
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_fp32_is_fp32_in_all_kernels_of_a_gpu_and_tf32_has_its_name(settings_restored: None) -> None:
    for precision, kind in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        set_arithmetic(precision, False, GPU)
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == kind
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, "products of bf16 add in fp32"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_deterministic_kernels_are_asked_of_cudnn_and_cublas(settings_restored: None) -> None:
    set_arithmetic("bf16", True, CPU)
    assert not torch.are_deterministic_algorithms_enabled(), "a CPU repeats its bits anyway"
    set_arithmetic("bf16", True, GPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_arithmetic("bf16", False, GPU)
    assert not torch.are_deterministic_algorithms_enabled(), "the next run of the process did not ask for it"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_asks_for_the_arithmetic_of_its_settings(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(run_module, "set_arithmetic", lambda *settings: asked.append(settings))
    run_on(CPU, replace(SMALL, deterministic=deterministic), rows=48)
    assert asked == [("fp32", deterministic, CPU)]


def test_tf32_is_a_precision_of_new_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop.resolve_precision("tf32", CPU) == "fp32"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "has_tf32", lambda device: True)
        assert loop.resolve_precision("tf32", CPU) == "tf32", "the column says what is computed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not loop.has_tf32(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert loop.has_tf32(GPU)
    with pytest.raises(UserError, match="precision"):
        TrainConfig.from_dict(preset("default").to_dict() | {"precision": "tf64"})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not reset peaks")
def test_a_run_in_a_reused_process_does_not_carry_the_peak_of_the_one_before() -> None:
    block = torch.ones(50_000_000)  # 200 MB
    high = peak_memory_bytes()
    del block
    reset_peak_memory(CPU)
    assert peak_memory_bytes() < high - 100_000_000
    assert device_module.peak_gpu_memory_bytes(CPU) is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not reset peaks")
def test_a_run_forgets_the_peaks_of_its_process_when_it_begins() -> None:
    block = torch.ones(100_000_000)  # 400 MB, of which the run's own network takes little
    high = peak_memory_bytes()
    del block
    run_on(CPU, SMALL, rows=48)
    assert peak_memory_bytes() < high - 150_000_000


def check_peak_of_a_reused_process() -> None:
    keep_freed_memory()
    blocks = [torch.ones(250_000) for _ in range(300)]  # 300 MB in blocks of 1 MB, which glibc then keeps
    high = peak_memory_bytes()
    blocks.clear()
    reset_peak_memory(CPU)
    assert peak_memory_bytes() < high - 200_000_000, (peak_memory_bytes(), high)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="this system does not reset peaks, or its C library is not glibc",
)
def test_nor_the_memory_that_the_one_before_left_free() -> None:
    process = torch.multiprocessing.get_context("spawn").Process(target=check_peak_of_a_reused_process)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_peak_of_a_gpu_starts_without_what_torch_kept_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    reset_peak_memory(GPU)
    assert calls == ["empty", "reset"]


def test_the_peak_of_a_gpu_is_what_torch_has_held_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", {GPU: 7_000_000_000}.get)
    assert device_module.peak_gpu_memory_bytes(GPU) == 7_000_000_000


def test_a_side_stream_waits_for_the_present_one_and_that_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the waits, DDP would send weights that are still being written."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: Any = "side") -> None:
            self.name = "side" if isinstance(name, torch.device) else name

        def wait_stream(self, other: "Stream") -> None:
            events.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            events.append(f"on {self.name}")

        def __exit__(self, *error: object) -> None:
            events.append(f"off {self.name}")

    present = Stream("present")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    with on_side_stream(GPU):
        events.append("work")
    assert events == ["side waits for present", "on side", "work", "off side", "present waits for side"]
    with on_side_stream(CPU):
        pass
    assert len(events) == 5


@pytest.mark.parametrize("name", ["muon", "adam", "adamw", "sgd"])
def test_the_state_of_an_optimizer_with_learning_rates_on_a_gpu_is_known(name: Any) -> None:
    """What a checkpoint must hold is found on the CPU, where a rate on a GPU does not fit the parameters."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3))
    optimizer = build_optimizer(TrainConfig(optimizer=name), net)
    expected = state_names(optimizer)
    make_capturable(optimizer, META)
    assert state_names(optimizer) == expected


def test_a_step_that_cannot_be_captured_is_taken_as_it_comes() -> None:
    """Here there is no GPU to capture it on."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the capture succeeds: see the tests marked gpu")
    said: list[str] = []
    taken: list[Batch] = []

    def compute(batch: Batch) -> loop.StepOutput:
        taken.append(batch)
        return torch.zeros(()), torch.zeros(()), torch.zeros(1, 10)

    step = loop.GraphedStep(compute, said.append, warm_up=0)
    batch = torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    step(batch)
    step(batch)
    assert taken == [batch, batch], "each step is taken once"
    assert len(said) == 1
    assert said[0].startswith("--cuda-graph: a step cannot be captured (")


def test_a_graph_that_is_asked_for_on_a_cpu_is_a_line_and_changes_nothing() -> None:
    run = run_on(CPU, replace(SMALL, cuda_graph=True), rows=32)
    assert run.notes == ["--cuda-graph is for GPUs: on this device steps are launched one by one"]
    assert type(run.optimizer.param_groups[0]["lr"]) is float


# --- ranks ----------------------------------------------------------------------------------------------------------


def check_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    run = run_on(CPU, replace(SMALL, ema_decay=0.9), rows=32)
    for batch in itertools.islice(run.shards.train_batches(1), 2):
        run._compute_step(batch)
    run._keep_ranks_together(1)
    assert run.notes == [], "like ranks stay alike on the same rows"
    if rank == 1:
        with torch.no_grad():
            run.model.conv4.weight[0, 0, 0, 0] += 1e-7
            run.optimizer.state[run.model.conv4.weight]["momentum"] += 1
    assert sync.drifted_ranks(run.model, CPU) == [1]
    run._keep_ranks_together(1)
    assert "after epoch 1 the weights of worker(s) 1 differed from worker 0's" in run.notes[0]
    assert sync.drifted_ranks(run.model, CPU) == []
    momentum = run.optimizer.state[run.model.conv4.weight]["momentum"].sum()
    assert sync.largest(float(momentum), CPU) == -sync.largest(-float(momentum), CPU)
    # Without DDP each goes its own way, and the loop looks after every epoch.
    apart = run_on(CPU, SMALL, rows=32, number=rank, world_size=2)
    list(apart.epochs())
    assert sync.drifted_ranks(apart.model, CPU) == []
    assert [note.partition(",")[0] for note in apart.notes] == [
        "after epoch 1 the weights of worker(s) 1 differed from worker 0's"
    ]
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_have_drifted_apart_are_noticed_and_brought_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_ranks, (str(tmp_path),), 2)


def test_bf16_is_exchanged_in_builds_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP refuses torch's own hook there, and gradients go through gloo where memory cannot be shared."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    from fashion.distributed.ddp import register_hook

    monkeypatch.setattr(torch.version, "cuda", None)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="BF16"):
            DistributedDataParallel(nn.Linear(2, 2)).register_comm_hook(None, bf16_compress_hook)
        model = DistributedDataParallel(nn.Linear(2, 2))
        register_hook(model, "gloo", torch.bfloat16)
        model(torch.ones(1, 2)).sum().backward()
        assert torch.equal(model.module.weight.grad, torch.ones(2, 2))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", [torch.device("cuda"), torch.device("cuda", 2)])
def test_a_trials_share_of_memory_is_that_of_its_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's device has no number, and this function of torch alone wants one."""
    shares: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda share, number: shares.append((share, number)), raising=False
    )
    for share in (0.25, 0.0, 1.0, 2.0):
        share_of_memory(share, device)
    share_of_memory(0.25, CPU)
    assert shares == [(0.25, device.index or 0)]
