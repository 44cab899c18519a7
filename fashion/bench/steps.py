"""The rows of `jobs.bench` that this project's own workers measure: steps, the loop, batches, more workers."""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from fashion.bench.measurement import Measurement, Rates, alternate, inverse, step_flops
from fashion.bench.timing import in_workers, one_batch, run_group, time_loop, time_steps, together
from fashion.cluster import connection
from fashion.config import IMAGE_SIZE, ScaleConfig, TrainConfig
from fashion.data import manifest, splits
from fashion.distributed import ingest, worker
from fashion.storage import Storage
from fashion.training import run as fit
from fashion.training.batches import Batch

STEPS = 60
# Sides of the square matrices whose product is timed, the fastest of which is the limit, and operations per side.
PRODUCT_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PRODUCT_FLOPS = {"cpu": 1e11, "cuda": 1e14}

# --- a: the step against the arithmetic of the machine --------------------------------------------------------------


def step_vs_limit(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row a: the step alone (one pre-made batch, no exchange of gradients) in GFLOP/s, against products of square
    matrices in the same precision, in the same workers; all workers compute at a time, so all cores are busy.

    Of the step's operations only the network's are counted (`step_flops`); the optimizer's are what it costs.
    """
    rates, threads = in_workers(
        time_step_and_product, storage, TrainConfig(epochs=1), scale, {"repeats": repeats, "steps": STEPS}
    )
    return [Measurement("a_step_vs_limit", "GFLOP/s", rates["step"], rates["product"], 0.80, threads)]


def time_step_and_product(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate steps and matrix products; return GFLOP/s of all ranks, per repeat."""
    worker.prepare_process(settings["threads"])
    run = worker.start_run(settings, fit.alone)
    device = run.rank.device
    steps = settings["steps"]
    batches = one_batch(run, steps)
    flops = step_flops(run.model) * steps * run.config.global_batch_size
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32

    def product_rate(size: int) -> float:
        matrices = (torch.rand(size, size, device=device) - 0.5).to(dtype)
        count = max(1, round(PRODUCT_FLOPS[device.type] / (2 * size**3)))
        seconds = together(lambda: multiply(matrices, count))
        return 2 * size**3 * count * run.rank.world_size / seconds / 1e9

    sides: dict[str, Callable[[int], float]] = {
        "step": lambda repeat: flops / together(lambda: time_steps(run, batches)) / 1e9,
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
    """Row b: the job's training loop (shard, shuffle, flips, schedule, metrics, DDP) against the same step on one
    pre-made batch in the same workers: in plain PyTorch, without any exchange of gradients, and under DDP.
    """
    rates, threads = in_workers(
        time_job_and_step, storage, TrainConfig(epochs=1), scale, {"repeats": repeats, "steps": STEPS}
    )
    return [
        Measurement("b_job_vs_plain_step", "images/s", rates["job"], rates["plain"], 0.92, threads),
        Measurement("b_job_vs_ddp_step", "images/s", rates["job"], rates["ddp"], 0.97, threads),
    ]


def time_job_and_step(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate the real loop and the bare steps; return images/s of all ranks, per repeat."""
    worker.prepare_process(settings["threads"])
    run, plain = worker.start_run(settings), worker.start_run(settings, fit.alone)
    steps = settings["steps"]
    rows = steps * run.config.global_batch_size
    batches = one_batch(run, steps)
    sides: dict[str, Callable[[int], float]] = {
        "plain": lambda repeat: rows / together(lambda: time_steps(plain, batches)),
        "ddp": lambda repeat: rows / together(lambda: time_steps(run, batches)),
        "job": lambda repeat: rows / together(lambda: time_loop(run, first_batches(run, repeat, steps))),
    }
    return alternate(sides, settings["repeats"])


def first_batches(run: fit.TrainingRun, epoch: int, steps: int) -> "itertools.islice[Batch]":
    """Return the first `steps` batches of an epoch."""
    return itertools.islice(run.rows.train_batches(epoch), steps)


# --- d, g: rows on their way to the step ----------------------------------------------------------------------------


def ingest_vs_naive_ray(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row d: an epoch of the job's batches, nothing trained, against Ray Data as its guide shows it: Parquet read anew
    in each epoch, decoded in tasks, `iter_torch_batches` with a local shuffle buffer of ten batches.

    Both in the same workers, which take half a CPU each: what reads for Ray Data needs one as well.
    """
    config = TrainConfig(epochs=1)
    dataset = splits.open_dataset(storage, manifest.load_manifest(storage), "train").map_batches(decode)
    rates, threads = in_workers(
        time_resident_and_streamed,
        storage,
        config,
        replace(scale, cpus_per_worker=0.5),
        {"repeats": repeats},
        {"train": dataset},
    )
    return [Measurement("d_ingest_vs_naive_ray", "images/s", rates["resident"], rates["streamed"], 30.0, threads)]


def decode(batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Turn the images' bytes into (N, 1, 28, 28) uint8, and labels into (N,) int64."""
    pixels = np.frombuffer(b"".join(batch["image"]), np.uint8)
    return {"image": pixels.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE), "label": batch["label"].astype(np.int64)}


def time_resident_and_streamed(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate epochs of both kinds of batches; return images/s of all ranks, per repeat."""
    worker.prepare_process(settings["threads"])
    run = worker.start_run(settings)
    shard = ray.train.get_dataset_shard("train")
    batch_size = run.config.global_batch_size // run.rank.world_size

    def streamed(repeat: int) -> float:
        options = {"batch_size": batch_size, "local_shuffle_buffer_size": 10 * batch_size, "drop_last": True}
        batches = shard.iter_torch_batches(**options, local_shuffle_seed=repeat, device=run.rank.device)
        seconds = together(lambda: exhaust(batches))
        return run.rows.num_train_rows / seconds

    sides = {"resident": lambda repeat: batches_rate(run, repeat), "streamed": streamed}
    return alternate(sides, settings["repeats"])


def data_plane(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row g: the job's batches from shard to device, nothing trained, against a plain `index_select` of the same rows.

    Without flips it is what order, generator and indexing cost, with the default's flips what augmentation adds. No
    ratio is aimed at: a selection is a copy of memory, and row b says what is left of all this beside the step.
    """
    measured = []
    plain, default = TrainConfig(epochs=1, flip="none"), TrainConfig(epochs=1)
    for config, name in ((plain, "g_data_plane"), (default, "g_data_plane_with_flips")):
        rates, threads = in_workers(time_batches_and_selects, storage, config, scale, {"repeats": repeats})
        measured.append(Measurement(name, "images/s", rates["job"], rates["select"], 0.0, threads))
    return measured


def time_batches_and_selects(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate the job's batches and plain selections; return images/s of all ranks."""
    worker.prepare_process(settings["threads"])
    run = worker.start_run(settings)
    images, labels = ingest.pull_shard("train", settings, run.rank)
    size = run.config.global_batch_size // run.rank.world_size
    chosen = torch.randperm(len(labels))[: run.steps * size].to(run.rank.device).view(run.steps, size)

    def select() -> None:
        for _ in range(EPOCHS_A_SIDE):
            exhaust((images.index_select(0, index), labels.index_select(0, index)) for index in chosen)

    rows = EPOCHS_A_SIDE * run.steps * run.config.global_batch_size
    sides: dict[str, Callable[[int], float]] = {
        "job": lambda repeat: batches_rate(run, repeat),
        "select": lambda repeat: rows / together(select),
    }
    return alternate(sides, settings["repeats"])


EPOCHS_A_SIDE = 4  # one alone would be over in a tenth of a second


def batches_rate(run: fit.TrainingRun, repeat: int) -> float:
    """Return images/s, over all ranks, of the job's batches of a few epochs."""

    def work() -> None:
        for epoch in range(EPOCHS_A_SIDE):
            exhaust(run.rows.train_batches(1 + repeat * EPOCHS_A_SIDE + epoch))

    return EPOCHS_A_SIDE * run.steps * run.config.global_batch_size / together(work)


def exhaust(batches: Iterable[Any]) -> None:
    """Take all batches and do nothing with them."""
    for _ in batches:
        pass


# --- f: more workers ------------------------------------------------------------------------------------------------

WIDTHS = (2, 4, 8)
REPORTS = 4
# Of the time that one worker's report takes, what that of several may be longer by: most of it waits for Ray's look.
CONTROL_TARGET = 0.8


def scaling(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row f: images/s of two workers under DDP against twice that of one, each with the same pre-made batch; and how
    long a tiny model's epoch (one step and one report) takes 2, 4 and 8 workers, against one.

    The two workers are the same processes in all cases: one waits while the other trains alone. Aimed at is the
    efficiency with a worker's batch kept: what one worker would take alone, whatever the number of workers. The job
    keeps the global batch and halves a worker's; gradients stay as many, so they weigh twice as much beside the step.

    Cores share caches, memory and their clock, so two workers that exchange nothing are not twice as fast as one either
    (`_apart`). Beside those, `_of_ddp` says what the exchange costs, and waiting for each other.
    """
    alone = TrainConfig(epochs=1).global_batch_size
    threads = 2 * scale.threads_per_worker
    measured = []
    for name, each, target in (("f_efficiency_1_to_2", alone, 0.96), ("f_efficiency_half_batch", alone // 2, 0.0)):
        rates, _ = in_workers(
            time_one_and_two,
            storage,
            TrainConfig(epochs=1, global_batch_size=2 * each),
            replace(scale, num_workers="2"),
            {"repeats": repeats, "steps": STEPS // 2},
        )
        ones = [2 * rate for rate in rates["one"]]
        measured += [
            Measurement(name, "images/s", rates["two"], ones, target, threads),
            Measurement(f"{name}_apart", "images/s", rates["apart"], ones, 0.0, threads),
            Measurement(f"{name}_of_ddp", "images/s", rates["two"], rates["apart"], target, threads),
        ]
    share = min(1.0, ray.cluster_resources()["CPU"] / max(WIDTHS))
    times = {width: time_control(width, share, repeats) for width in (1, *WIDTHS)}
    return measured + [
        Measurement(f"f_control_{width}", "1/h", inverse(times[width]), inverse(times[1]), CONTROL_TARGET, width)
        for width in WIDTHS
    ]


def time_one_and_two(settings: dict[str, Any]) -> Rates:
    """Run on two workers: alternate steps of rank 0 alone, of both without exchange, and of both under DDP; return
    images/s, per repeat.
    """
    worker.prepare_process(settings["threads"])
    run, alone = worker.start_run(settings), worker.start_run(settings, fit.alone)
    assert run.rank.world_size == 2, run.rank.world_size
    batches = one_batch(run, settings["steps"])
    rows = settings["steps"] * run.config.global_batch_size // 2

    def one() -> None:
        if run.rank.rank == 0:
            time_steps(alone, batches)

    sides: dict[str, Callable[[int], float]] = {
        "one": lambda repeat: rows / together(one),
        "apart": lambda repeat: 2 * rows / together(lambda: time_steps(alone, batches)),
        "two": lambda repeat: 2 * rows / together(lambda: time_steps(run, batches)),
    }
    return alternate(sides, settings["repeats"])


def time_control(width: int, cpus: float, repeats: int) -> list[float]:
    """Return the seconds, per repeat, that an epoch of a tiny model takes `width` workers of `cpus` CPUs each."""
    shape = ray.train.ScalingConfig(num_workers=width, resources_per_worker={"CPU": cpus})
    return run_group(time_reports, {"repeats": repeats}, shape)["epoch"]


def time_reports(settings: dict[str, Any]) -> Rates:
    """Run on every worker: a step of a tiny model and a report are an epoch; return seconds an epoch, per repeat."""
    connection.quieten()
    fit.prepare_process(1)
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
