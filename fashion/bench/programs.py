"""The rows of `jobs.bench` that compare the job with other programs: torchrun, Keras, and Ray's own trainer."""

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from fashion.bench import startup
from fashion.bench.measurement import (
    Measurement,
    Rates,
    alternate,
    inverse,
    require_folder,
    run_in_workers,
    time_all_ranks,
)
from fashion.bench.reference_keras import ACCURACY
from fashion.bench.reference_process import (
    ReferenceProcess,
    environment_without_ray,
    has_keras,
    job_flags,
    keras_command,
    require_keras,
    run_and_read,
    torchrun_command,
)
from fashion.bench.steps import STEPS, first_batches, time_loop
from fashion.config import RAY_ENVIRONMENT, ScaleConfig, TrainConfig, preset, require
from fashion.distributed import worker
from fashion.reports import runs
from fashion.storage import Storage, open_storage

ALLOWED_S = 3.0
"""Row h: seconds that the job may take longer than an empty loop, from the command to the end of the first step."""
PUBLISHED_ACCURACY = 0.9304
TARGET_SPEEDUP = 5.0
SPEEDUP_MARGIN = 1.01
"""Row j stops Keras after the epoch in which it passes `TARGET_SPEEDUP` times this margin times the job's duration."""
KERAS_ENVIRONMENT = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

# --- c, e: images/s -------------------------------------------------------------------------------------------------


def job_vs_torchrun(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row c: the job's loop against DDP under torchrun with torchvision's dataset and a `DataLoader`, in fp32 as a user
    writes it, and in the job's precision with channels-last weights and a fused optimizer; see `reference_ddp`.

    Both sides have the same network, batch size, rows, workers and threads, on one host. The start of processes is not
    timed. Each side waits while the other trains.
    """
    config = TrainConfig(epochs=1)
    command = torchrun_command(storage.uri, config.global_batch_size, max(scale.worker_range))
    options = {
        "repeats": repeats,
        "steps": STEPS,
        "commands": {"fp32": command, "same": [*command, "--tuned"]},
        "environment": {"OMP_NUM_THREADS": str(scale.threads_per_worker)},
    }
    rates, threads = run_in_workers(time_job_and_references, storage, config, scale, options)
    return [
        Measurement("c_job_vs_torchrun_fp32", "images/s", rates["job"], rates["fp32"], 2.0, threads),
        Measurement("c_job_vs_torchrun_same", "images/s", rates["job"], rates["same"], 1.05, threads),
    ]


def job_vs_keras(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row e: the job's loop against Keras' `fit`, both on the published recipe (preset `seed`); see `reference_keras`.

    Keras is one process, with as many threads as TensorFlow chooses: one per core.
    """
    require_keras("e")
    config = replace(preset("seed"), epochs=1)
    options = {
        "repeats": repeats,
        "steps": STEPS,
        "commands": {"keras": keras_command(storage.uri, config.global_batch_size)},
        "environment": KERAS_ENVIRONMENT,
    }
    rates, threads = run_in_workers(time_job_and_references, storage, config, scale, options)
    return [Measurement("e_job_vs_keras", "images/s", rates["job"], rates["keras"], 1.9, threads)]


def time_job_and_references(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate the job's loop and the reference programs, which rank 0 starts.

    Returns images/s for each repeat.
    """
    worker.prepare_worker(settings["threads"])
    run = worker.start_run(settings)
    steps = settings["steps"]
    rows = steps * run.config.global_batch_size
    sides: dict[str, Callable[[int], float]] = {
        "job": lambda repeat: rows / time_all_ranks(lambda: time_loop(run, first_batches(run, repeat, steps)))
    }
    with ExitStack() as stack:
        for name, command in settings["commands"].items():
            precision = ["--precision", run.precision] if name == "same" else []
            reference = None
            if run.rank.rank == 0:
                environment = environment_without_ray(**settings["environment"])
                reference = stack.enter_context(ReferenceProcess(command + precision, environment))
            sides[name] = lambda repeat, reference=reference: measure(reference, steps)  # type: ignore[misc]
        return alternate(sides, settings["repeats"])


def measure(reference: ReferenceProcess | None, steps: int) -> float:
    """Return the images/s of a reference program while all workers wait; NaN on all ranks but 0, which started it."""
    rate = reference.measure(steps) if reference is not None else math.nan
    dist.barrier()
    return rate


# --- h: start-up ----------------------------------------------------------------------------------------------------


def startup_vs_bare_trainer(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row h: the time from the command `jobs.train --preset smoke` to the end of its first step, against the time to
    the start of an empty loop under Ray's own `TorchTrainer` plus 3 s. Each repeat starts new processes; the first
    warms the file cache.

    Further rows show the phases: imports (with the start of Python), connection to Ray, from there to the loop, and
    from the loop to the end of the first step (beside the 3 s). They have no targets.
    """
    require_folder(storage, "h")
    times: dict[str, list[dict[str, float]]] = {"job": [], "bare": []}
    for repeat in range(repeats + 1):
        times["job"].append(start_job(storage, scale, f"startup-{repeat}"))
        times["bare"].append(start_bare(scale))
    job, bare = times["job"][1:], times["bare"][1:]
    threads = scale.threads_per_worker * max(scale.worker_range)

    def row(name: str, ours: list[float], reference: list[float], target: float) -> Measurement:
        return Measurement(name, "1/h", inverse(ours), inverse(reference), target, threads)

    whole = row("h_startup", [each["step"] for each in job], [each["loop"] + ALLOWED_S for each in bare], 1.0)
    phases = (
        ("h_import", "started", "imported"),
        ("h_connect", "imported", "connected"),
        ("h_loop", "connected", "loop"),
    )
    return [
        whole,
        *(row(name, durations(job, start, end), durations(bare, start, end), 0.0) for name, start, end in phases),
        row("h_first_step_vs_3_s", durations(job, "loop", "step"), [ALLOWED_S] * len(job), 0.0),
    ]


def durations(times: list[dict[str, float]], start: str, end: str) -> list[float]:
    """Return the seconds between the moments `start` and `end` in each of `times`."""
    return [moments[end] - moments[start] for moments in times]


def start_job(storage: Storage, scale: ScaleConfig, run_id: str) -> dict[str, float]:
    """Run the job and discard its reports; return its moments in seconds since the command."""
    with scratch(storage) as folder:
        flags = job_flags(folder, scale, run_id, "--preset", "smoke", "--epochs", "1")
        return run_and_read_moments("job", Path(folder, "moments"), flags, {})


def start_bare(scale: ScaleConfig) -> dict[str, float]:
    """Run Ray's trainer without this project's settings; return its moments in seconds since the command."""
    use_gpu = "yes" if scale.use_gpu == "yes" or (scale.use_gpu == "auto" and has_gpus(scale)) else "no"
    with tempfile.TemporaryDirectory() as folder:
        shape = [str(max(scale.worker_range)), str(scale.cpus_per_worker), use_gpu, folder]
        ray_default = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
        return run_and_read_moments("bare", Path(folder, "moments"), shape, ray_default)


def has_gpus(scale: ScaleConfig) -> bool:
    """Tell whether the cluster has a GPU for each worker."""
    return bool(ray.cluster_resources().get("GPU", 0) >= max(scale.worker_range))


def run_and_read_moments(kind: str, file: Path, arguments: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Run `fashion.bench.startup`, which records moments in `file`; return them in seconds since the command.

    The moment `started`, 0, is that of the command. `variables` are added to the environment.
    """
    environment = {key: value for key, value in os.environ.items() if key not in RAY_ENVIRONMENT} | variables
    started = time.time()
    run_and_read([sys.executable, "-m", "fashion.bench.startup", kind, str(file), *arguments], environment)
    return {"started": 0.0} | {name: at - started for name, at in startup.read_moments(file.read_text()).items()}


@contextmanager
def scratch(storage: Storage) -> Iterator[str]:
    """Yield a temporary storage with the same data; it is removed with all reports in it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(storage.path("data"))
        yield folder


# --- j: time to the published accuracy ------------------------------------------------------------------------------


def time_to_accuracy(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row j: the time of the command `jobs.train` with the default preset, evaluation on test and reports included,
    against the time of the Keras script of the published recipe until its test accuracy is 0.9304. Keras is stopped
    when it takes five times as long as the job.

    Each side runs once, whatever `repeats` is, because the row takes most of an hour. If the job misses the accuracy,
    its rate counts as 0. If Keras misses it, the time until it was stopped counts, which is less than the true one.
    Without Keras, the reference and the ratio are NaN.
    """
    require_folder(storage, "j")
    with scratch(storage) as folder:
        started = time.perf_counter()
        run_and_read([sys.executable, "-m", "jobs.train", *job_flags(folder, scale, "timed")], dict(os.environ))
        seconds = time.perf_counter() - started
        accuracy = runs.load_run(open_storage(folder), "timed")["test_accuracy"]
    print(f"j: the job took {seconds:.0f} s to test accuracy {accuracy:.4f}")
    ours = inverse([seconds])[0] if accuracy >= PUBLISHED_ACCURACY else 0.0
    reference = (
        inverse([time_keras(storage, TARGET_SPEEDUP * SPEEDUP_MARGIN * seconds)])[0] if has_keras() else math.nan
    )
    threads = scale.threads_per_worker * max(scale.worker_range)
    return [Measurement("j_time_to_accuracy", "1/h", [ours], [reference], TARGET_SPEEDUP, threads)]


def job_on_gpus(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row k: the command `jobs.train` with the default preset on GPUs, from command to last report, three figures of
    it: its rate, 0 if it misses the published accuracy; images/s; and the memory of the fullest GPU.

    Beside each stands the same with `--cuda-graph`. Each side runs once, whatever `repeats` is.
    """
    require_folder(storage, "k")
    require(
        ray.cluster_resources().get("GPU", 0) >= 1, "--rows k needs a GPU, and the cluster has none; leave the row out"
    )
    found = {}
    for name, options in (("graph", ("--cuda-graph",)), ("plain", ())):
        with scratch(storage) as folder:
            started = time.perf_counter()
            flags = job_flags(folder, scale, "timed", *options)
            run_and_read([sys.executable, "-m", "jobs.train", *flags], dict(os.environ))
            row = runs.load_run(open_storage(folder), "timed")
            rate = inverse([time.perf_counter() - started])[0]
        print(f"k: {name}: {row['wall_s']:.0f} s to test accuracy {row['test_accuracy']:.4f} on {row['device']}")
        reached = rate if row["test_accuracy"] >= PUBLISHED_ACCURACY else 0.0
        found[name] = {"time": reached, "speed": row["images_per_s"], "memory": row["peak_gpu_memory_bytes"] / 1e9}
    threads = scale.threads_per_worker * max(scale.worker_range)
    units = {"time": "1/h", "speed": "images/s", "memory": "GB"}
    return [
        Measurement(f"k_{name}_plain_vs_graph", unit, [found["plain"][name]], [found["graph"][name]], 0.0, threads)
        for name, unit in units.items()
    ]


def time_keras(storage: Storage, max_seconds: float) -> float:
    """Return the seconds that the Keras script takes until it ends; print the accuracy that it reached."""
    until = ("--until", str(PUBLISHED_ACCURACY), "--max-seconds", str(max_seconds))
    started = time.perf_counter()
    lines = run_and_read(keras_command(storage.uri, 128, *until), environment_without_ray(**KERAS_ENVIRONMENT))
    seconds = time.perf_counter() - started
    reached = [float(line.removeprefix(ACCURACY)) for line in lines if line.startswith(ACCURACY)]
    print(f"j: Keras took {seconds:.0f} s and {len(reached)} epochs to test accuracy {reached[-1]:.4f}")
    return seconds
