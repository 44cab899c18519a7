"""The rows of `jobs.bench` on the job's own parts: training step, training loop, batches, and number of workers."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fashion.bench.measurement import (
    Measurement,
    Rates,
    alternate,
    inverse,
    run_group,
    run_in_workers,
    time_all_ranks,
)
from fashion.cluster import connection
from fashion.config import IMAGE_SIZE, ScaleConfig, TrainConfig
from fashion.data import loading, manifest
from fashion.distributed import ingest, worker
from fashion.storage import Storage
from fashion.training import loop
from fashion.training.batches import Batch
from fashion.training.run import TrainingRun, prepare_process, without_ddp

STEPS = 60  # training steps of a side in each repeat
# Rows d and g: epochs of batches in each repeat; a single epoch would last less than 0.1 s.
EPOCHS_PER_REPEAT = 4
# Row a: sizes of the square matrices whose products are timed (the fastest is the limit), and operations per size.
PRODUCT_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PRODUCT_FLOPS = {"cpu": 1e11, "cuda": 1e14}

# --- a: the step against the arithmetic of the machine --------------------------------------------------------------


def step_vs_limit(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row a: the training step alone (one batch made beforehand, no exchange of gradients) in GFLOP/s, against products
    of square matrices in the same precision and the same workers. All workers compute at once, so all cores are busy.

    Only the network's operations are counted (`step_flops`); the time of the step includes the optimizer's.
    """
    rates, threads = run_in_workers(
        time_step_and_product, storage, TrainConfig(epochs=1), scale, {"repeats": repeats, "steps": STEPS}
    )
    return [Measurement("a_step_vs_limit", "GFLOP/s", rates["step"], rates["product"], 0.80, threads)]


def time_step_and_product(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate steps and matrix products; return GFLOP/s of all ranks, per repeat."""
    worker.prepare_worker(settings["threads"])
    run = worker.start_run(settings, without_ddp)
    device = run.rank.device
    steps = settings["steps"]
    batches = repeat_batch(run, steps)
    flops = step_flops(run.model) * steps * run.config.global_batch_size
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32

    def product_rate(size: int) -> float:
        matrices = (torch.rand(size, size, device=device) - 0.5).to(dtype)
        count = max(1, round(PRODUCT_FLOPS[device.type] / (2 * size**3)))
        seconds = time_all_ranks(lambda: multiply(matrices, count))
        return 2 * size**3 * count * run.rank.world_size / seconds / 1e9

    sides: dict[str, Callable[[int], float]] = {
        "step": lambda repeat: flops / time_all_ranks(lambda: time_steps(run, batches)) / 1e9,
        "product": lambda repeat: max(product_rate(size) for size in PRODUCT_SIZES[device.type]),
    }
    return alternate(sides, settings["repeats"])


def multiply(matrix: Tensor, count: int) -> None:
    """Multiply `matrix` (n, n) with itself `count` times."""
    product = torch.empty_like(matrix)
    for _ in range(count):
        torch.mm(matrix, matrix, out=product)


# --- b: the loop against the step -----------------------------------------------------------------------------------


def job_vs_step(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row b: the job's training loop (shard, shuffle, flips, schedule, metrics, DDP) against the bare training step on
    one batch made beforehand, in the same workers: in plain PyTorch, without exchange of gradients, and under DDP.
    """
    rates, threads = run_in_workers(
        time_job_and_step, storage, TrainConfig(epochs=1), scale, {"repeats": repeats, "steps": STEPS}
    )
    return [
        Measurement("b_job_vs_plain_step", "images/s", rates["job"], rates["plain"], 0.92, threads),
        Measurement("b_job_vs_ddp_step", "images/s", rates["job"], rates["ddp"], 0.97, threads),
    ]


def time_job_and_step(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate the job's loop and bare steps; return images/s of all ranks, per repeat."""
    worker.prepare_worker(settings["threads"])
    run, plain = worker.start_run(settings), worker.start_run(settings, without_ddp)
    steps = settings["steps"]
    rows = steps * run.config.global_batch_size
    batches = repeat_batch(run, steps)
    sides: dict[str, Callable[[int], float]] = {
        "plain": lambda repeat: rows / time_all_ranks(lambda: time_steps(plain, batches)),
        "ddp": lambda repeat: rows / time_all_ranks(lambda: time_steps(run, batches)),
        "job": lambda repeat: rows / time_all_ranks(lambda: time_loop(run, first_batches(run, repeat, steps))),
    }
    return alternate(sides, settings["repeats"])


def first_batches(run: TrainingRun, epoch: int, steps: int) -> "itertools.islice[Batch]":
    """Return the first `steps` batches of an epoch."""
    return itertools.islice(run.shards.train_batches(epoch), steps)


# --- d, g: batches, nothing trained ---------------------------------------------------------------------------------


def ingest_vs_naive_ray(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row d: an epoch of the job's batches, nothing trained, against Ray Data as its guide shows it: Parquet read again
    in each epoch, decoded in tasks, `iter_torch_batches` with a local shuffle buffer of ten batches.

    Both sides run in the same workers, which reserve half a CPU each, because Ray Data's read tasks need CPUs too.
    """
    config = TrainConfig(epochs=1)
    dataset = loading.open_dataset(storage, manifest.load_manifest(storage), ["train"]).map_batches(decode)
    rates, threads = run_in_workers(
        time_resident_and_streamed,
        storage,
        config,
        replace(scale, cpus_per_worker=0.5),
        {"repeats": repeats},
        {"train": dataset},
    )
    return [Measurement("d_ingest_vs_naive_ray", "images/s", rates["resident"], rates["streamed"], 30.0, threads)]


def decode(batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the batch with images (N, 1, 28, 28) uint8, decoded from bytes, and labels (N,) int64."""
    pixels = np.frombuffer(b"".join(batch["image"]), np.uint8)
    return {"image": pixels.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE), "label": batch["label"].astype(np.int64)}


def time_resident_and_streamed(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate epochs of both kinds of batches; return images/s of all ranks, per repeat."""
    worker.prepare_worker(settings["threads"])
    run = worker.start_run(settings)
    shard = ray.train.get_dataset_shard("train")
    batch_size = run.config.global_batch_size // run.rank.world_size

    def streamed(repeat: int) -> float:
        options = {"batch_size": batch_size, "local_shuffle_buffer_size": 10 * batch_size, "drop_last": True}
        batches = shard.iter_torch_batches(**options, local_shuffle_seed=repeat, device=run.rank.device)
        seconds = time_all_ranks(lambda: consume(batches))
        return run.shards.num_train_rows / seconds

    sides = {"resident": lambda repeat: batches_rate(run, repeat), "streamed": streamed}
    return alternate(sides, settings["repeats"])


def data_plane(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row g: the job's batches from shard to device, nothing trained, against a plain `index_select` of the same rows.

    Without flips, the row shows what the shuffled order, the generator and the indexing cost; with the default's flips,
    also the augmentation. There is no target: `index_select` merely copies memory, and row b shows how little of this
    remains beside the training step.
    """
    measured = []
    plain, default = TrainConfig(epochs=1, flip="none"), TrainConfig(epochs=1)
    for config, name in ((plain, "g_data_plane"), (default, "g_data_plane_with_flips")):
        rates, threads = run_in_workers(time_batches_and_selects, storage, config, scale, {"repeats": repeats})
        measured.append(Measurement(name, "images/s", rates["job"], rates["select"], 0.0, threads))
    return measured


def time_batches_and_selects(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate the job's batches and plain selections; return images/s of all ranks."""
    worker.prepare_worker(settings["threads"])
    run = worker.start_run(settings)
    images, labels = ingest.pull_shard("train", settings, run.rank)
    size = run.config.global_batch_size // run.rank.world_size
    chosen = torch.randperm(len(labels))[: run.steps * size].to(run.rank.device).view(run.steps, size)

    def select() -> None:
        for _ in range(EPOCHS_PER_REPEAT):
            consume((images.index_select(0, index), labels.index_select(0, index)) for index in chosen)

    rows = EPOCHS_PER_REPEAT * run.steps * run.config.global_batch_size
    sides: dict[str, Callable[[int], float]] = {
        "job": lambda repeat: batches_rate(run, repeat),
        "select": lambda repeat: rows / time_all_ranks(select),
    }
    return alternate(sides, settings["repeats"])


def batches_rate(run: TrainingRun, repeat: int) -> float:
    """Return the images/s of all ranks for the job's batches of a few epochs, nothing trained."""

    def take_batches() -> None:
        for epoch in range(EPOCHS_PER_REPEAT):
            consume(run.shards.train_batches(1 + repeat * EPOCHS_PER_REPEAT + epoch))

    return EPOCHS_PER_REPEAT * run.steps * run.config.global_batch_size / time_all_ranks(take_batches)


def consume(batches: Iterable[Any]) -> None:
    """Iterate over all batches and do nothing with them."""
    for _ in batches:
        pass


# --- f: more workers ------------------------------------------------------------------------------------------------

WORKER_COUNTS = (2, 4, 8)
REPORTS = 4
# An epoch of several workers may take 1 / 0.8 times as long as that of one. Most of it is waiting until Ray Train's
# controller polls for reports.
CONTROL_TARGET = 0.8


def scaling(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row f: images/s of two workers under DDP against twice those of one worker, with one batch made beforehand; and
    how long an epoch of a tiny model (one step and one report) takes with 2, 4 and 8 workers, against one.

    The two workers are the same processes in all cases: one waits while the other trains by itself. The target is for
    weak scaling, where the batch of each worker is the same for any number of workers. The job instead keeps the global
    batch (`_half_batch`): each worker's step is half as long, and the exchange of gradients takes as long as before.

    Two workers that exchange nothing are not twice as fast as one either (`_apart`), because cores share resources such
    as memory. `_of_ddp` compares DDP with them: it shows what exchanging gradients and waiting for each other cost.
    """
    full = TrainConfig(epochs=1).global_batch_size
    threads = 2 * scale.threads_per_worker
    measured = []
    for name, batch_size, target in (("f_efficiency_1_to_2", full, 0.96), ("f_efficiency_half_batch", full // 2, 0.0)):
        rates, _ = run_in_workers(
            time_one_and_two,
            storage,
            TrainConfig(epochs=1, global_batch_size=2 * batch_size),
            replace(scale, num_workers="2"),
            {"repeats": repeats, "steps": STEPS // 2},
        )
        ones = [2 * rate for rate in rates["one"]]
        measured += [
            Measurement(name, "images/s", rates["two"], ones, target, threads),
            Measurement(f"{name}_apart", "images/s", rates["apart"], ones, 0.0, threads),
            Measurement(f"{name}_of_ddp", "images/s", rates["two"], rates["apart"], target, threads),
        ]
    cpus = min(1.0, ray.cluster_resources()["CPU"] / max(WORKER_COUNTS))
    times = {count: time_control(count, cpus, repeats) for count in (1, *WORKER_COUNTS)}
    return measured + [
        Measurement(f"f_control_{count}", "1/h", inverse(times[count]), inverse(times[1]), CONTROL_TARGET, count)
        for count in WORKER_COUNTS
    ]


def time_one_and_two(settings: dict[str, Any]) -> Rates:
    """Run on two workers: alternate steps of rank 0 alone, of both without exchange of gradients, and of both under
    DDP; return images/s, per repeat.
    """
    worker.prepare_worker(settings["threads"])
    run, plain = worker.start_run(settings), worker.start_run(settings, without_ddp)
    assert run.rank.world_size == 2, run.rank.world_size
    batches = repeat_batch(run, settings["steps"])
    rows = settings["steps"] * run.config.global_batch_size // 2

    def one() -> None:
        if run.rank.rank == 0:
            time_steps(plain, batches)

    sides: dict[str, Callable[[int], float]] = {
        "one": lambda repeat: rows / time_all_ranks(one),
        "apart": lambda repeat: 2 * rows / time_all_ranks(lambda: time_steps(plain, batches)),
        "two": lambda repeat: 2 * rows / time_all_ranks(lambda: time_steps(run, batches)),
    }
    return alternate(sides, settings["repeats"])


def time_control(num_workers: int, cpus: float, repeats: int) -> list[float]:
    """Return the seconds, per repeat, of an epoch of a tiny model on `num_workers` workers with `cpus` CPUs each."""
    shape = ray.train.ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": cpus})
    return run_group(time_reports, {"repeats": repeats}, shape)["epoch"]


def time_reports(settings: dict[str, Any]) -> Rates:
    """Run on every worker: time epochs of one step of a tiny model and one report; return seconds per epoch."""
    connection.quieten()
    prepare_process(1)
    model = ray.train.torch.prepare_model(nn.Linear(8, 1))
    inputs = torch.ones(4, 8, device=ray.train.torch.get_device())

    def epochs(repeat: int) -> float:
        started = time.perf_counter()
        for epoch in range(REPORTS):
            torch.autograd.backward(model(inputs).sum())
            ray.train.report({"epoch": repeat * REPORTS + epoch})
        if dist.is_initialized():
            dist.barrier()
        return (time.perf_counter() - started) / REPORTS

    return alternate({"epoch": epochs}, settings["repeats"])


# --- what the rows time -----------------------------------------------------------------------------------------------


def repeat_batch(run: TrainingRun, steps: int) -> list[Batch]:
    """Return a list with the same batch `steps` times."""
    return [next(iter(run.shards.train_batches(1)))] * steps


def time_steps(run: TrainingRun, batches: list[Batch]) -> None:
    """Train on each of `batches` with nothing but forward pass, backward pass and optimizer step."""
    run.wrapped.train()
    for images, labels in batches:
        with loop.autocast(run.precision, run.rank.device):
            logits = run.wrapped(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=run.config.label_smoothing)
        run.wrapped.zero_grad()
        torch.autograd.backward(loss)
        run.update()


def time_loop(run: TrainingRun, batches: Iterator[Batch]) -> None:
    """Train on `batches` with the loop that the job trains with."""
    run.wrapped.train()
    record = loop.EpochRecord(1, run.rank.device)
    for batch in record.timed(batches):
        run.set_lr(record.step)
        loop.train_step(
            run.wrapped,
            batch,
            run.update,
            record,
            precision=run.precision,
            label_smoothing=run.config.label_smoothing,
        )
        if record.is_sync_point():
            record.synchronise(wants_save=False)
    record.synchronise(wants_save=False)
    record.result()


def step_flops(model: nn.Module) -> int:
    """Return the floating-point operations, multiplications and additions, of a training step for one image.

    Each output of a convolution or a linear layer is the dot product of a filter, or of a row of weights, with as many
    inputs: 2 x (number of weights in it) operations. The gradients of the layer's weights and of its inputs take as
    many each; the first layer needs no gradient of its inputs (Goodfellow et al. 2016, Deep Learning, section 6.5).
    Layers without weights (ReLU, pooling, the loss) are left out, as in `torch.utils.flop_counter`; a test compares the
    two.
    """
    layers: list[int] = []

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        weight: Any = layer.weight
        layers.append(2 * output.numel() * weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    device = next(model.parameters()).device
    with torch.no_grad():
        model(torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device))
    for hook in hooks:
        hook.remove()
    return 3 * sum(layers) - layers[0]
