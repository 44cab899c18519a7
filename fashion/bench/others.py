"""The rows of `jobs.bench` against other programs: torchrun, Keras, Ray's own trainer; and the time to an accuracy."""

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
from pyarrow import fs as pafs

from fashion.bench import startup
from fashion.bench.measurement import Measurement, Rates, alternate, inverse
from fashion.bench.peer_keras import ACCURACY
from fashion.bench.peers import (
    Peer,
    has_keras,
    job_flags,
    keras_command,
    plain_environment,
    require_keras,
    run_and_read,
    torchrun_command,
)
from fashion.bench.steps import STEPS, first_batches
from fashion.bench.timing import in_workers, time_loop, together
from fashion.config import RAY_ENVIRONMENT, ScaleConfig, TrainConfig, preset, require
from fashion.distributed import worker
from fashion.reports import runs
from fashion.storage import Storage, open_storage

ALLOWED_S = 3.0
"""What the job may take longer than an empty loop, from command to first step."""
PUBLISHED_ACCURACY = 0.9304
TIMES_SHORTER = 5.0
MORE_THAN_ENOUGH = 1.01
"""Keras is stopped after the epoch in which it has taken `TIMES_SHORTER` times as long as the job, and this more."""
KERAS_ENVIRONMENT = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

# --- c, e: images/s -------------------------------------------------------------------------------------------------


def job_vs_torchrun(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row c: the job's loop against DDP under torchrun with torchvision's dataset and a `DataLoader` (see `peer_ddp`),
    in fp32 as a user writes it, and in the job's precision with channels-last weights and a fused optimizer.

    Same network, batch, rows, workers and threads, one host; steady state, process starts aside. The peers wait while
    the job trains, and the other way round.
    """
    config = TrainConfig(epochs=1)
    command = torchrun_command(storage.uri, config.global_batch_size, max(scale.worker_range))
    told = {
        "repeats": repeats,
        "steps": STEPS,
        "peers": {"fp32": command, "same": [*command, "--tuned"]},
        "environment": {"OMP_NUM_THREADS": str(scale.threads_per_worker)},
    }
    rates, threads = in_workers(time_job_and_peers, storage, config, scale, told)
    return [
        Measurement("c_job_vs_torchrun_fp32", "images/s", rates["job"], rates["fp32"], 2.0, threads),
        Measurement("c_job_vs_torchrun_same", "images/s", rates["job"], rates["same"], 1.05, threads),
    ]


def job_vs_keras(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row e: the job's loop against Keras' `fit`, both on the published recipe (preset `seed`); see `peer_keras`.

    Keras is one process and takes the threads that TensorFlow chooses: all cores.
    """
    require_keras("e")
    config = replace(preset("seed"), epochs=1)
    told = {
        "repeats": repeats,
        "steps": STEPS,
        "peers": {"keras": keras_command(storage.uri, config.global_batch_size)},
        "environment": KERAS_ENVIRONMENT,
    }
    rates, threads = in_workers(time_job_and_peers, storage, config, scale, told)
    return [Measurement("e_job_vs_keras", "images/s", rates["job"], rates["keras"], 1.9, threads)]


def time_job_and_peers(settings: dict[str, Any]) -> Rates:
    """Run on every worker: alternate the job's loop and its peers, which rank 0 starts; return images/s, per repeat."""
    worker.prepare_process(settings["threads"])
    run = worker.start_run(settings)
    steps = settings["steps"]
    rows = steps * run.config.global_batch_size
    sides: dict[str, Callable[[int], float]] = {
        "job": lambda repeat: rows / together(lambda: time_loop(run, first_batches(run, repeat, steps)))
    }
    with ExitStack() as stack:
        for name, command in settings["peers"].items():
            precision = ["--precision", run.precision] if name == "same" else []
            peer = None
            if run.rank.rank == 0:
                peer = stack.enter_context(Peer(command + precision, plain_environment(**settings["environment"])))
            sides[name] = lambda repeat, peer=peer: ask(peer, steps)  # type: ignore[misc]
        return alternate(sides, settings["repeats"])


def ask(peer: Peer | None, steps: int) -> float:
    """Return a peer's images/s while all workers wait; only rank 0, which has the peer, knows them."""
    rate = peer.ask(steps) if peer is not None else math.nan
    dist.barrier()
    return rate


# --- h: start-up ----------------------------------------------------------------------------------------------------


def startup_vs_bare_trainer(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row h: from the command `jobs.train --preset smoke` to the end of its first step, against the start of an empty
    loop under Ray's own `TorchTrainer` plus 3 s; fresh processes in turns, the first of each to warm the file cache.

    And the parts: imports (Python's start included), connection to Ray, from there to the loop, and from the loop to
    the end of the first step, beside the 3 s. No ratio of parts is aimed at.
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

    whole = row(
        "h_startup",
        [each["step"] for each in job],
        [each["loop"] + ALLOWED_S for each in bare],
        1.0,
    )
    parts = (("h_import", "begun", "imported"), ("h_connect", "imported", "connected"), ("h_loop", "connected", "loop"))
    return [
        whole,
        *(row(name, lasted(job, start, end), lasted(bare, start, end), 0.0) for name, start, end in parts),
        row("h_first_step_vs_3_s", lasted(job, "loop", "step"), [ALLOWED_S] * len(job), 0.0),
    ]


def lasted(times: list[dict[str, float]], start: str, end: str) -> list[float]:
    """Return the seconds between two moments of each start."""
    return [each[end] - each[start] for each in times]


def start_job(storage: Storage, scale: ScaleConfig, run_id: str) -> dict[str, float]:
    """Run the job, its reports thrown away; return its moments in seconds since the command."""
    with scratch(storage) as folder:
        flags = job_flags(folder, scale, run_id, "--preset", "smoke", "--epochs", "1")
        return noted("job", Path(folder, "notes"), flags, {})


def start_bare(scale: ScaleConfig) -> dict[str, float]:
    """Run Ray's trainer as Ray is without this project's settings; return its moments in seconds since the command."""
    use_gpu = "yes" if scale.use_gpu == "yes" or (scale.use_gpu == "auto" and has_gpus(scale)) else "no"
    with tempfile.TemporaryDirectory() as folder:
        shape = [str(max(scale.worker_range)), str(scale.cpus_per_worker), use_gpu, folder]
        return noted("bare", Path(folder, "notes"), shape, {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"})


def has_gpus(scale: ScaleConfig) -> bool:
    """Tell whether the cluster has a GPU for each worker."""
    return bool(ray.cluster_resources().get("GPU", 0) >= max(scale.worker_range))


def noted(kind: str, notes: Path, arguments: list[str], settings: dict[str, str]) -> dict[str, float]:
    """Run `fashion.bench.startup` to its end; return its moments in seconds since the command, `begun` at 0 first."""
    environment = {key: value for key, value in os.environ.items() if key not in RAY_ENVIRONMENT} | settings
    begun = time.time()
    run_and_read([sys.executable, "-m", "fashion.bench.startup", kind, str(notes), *arguments], environment)
    return {"begun": 0.0} | {name: at - begun for name, at in startup.read_notes(notes.read_text()).items()}


@contextmanager
def scratch(storage: Storage) -> Iterator[str]:
    """Yield a folder that is a storage with the same data, and that goes with all reports."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(storage.path("data"))
        yield folder


def require_folder(storage: Storage, row: str) -> None:
    """Raise `UserError` unless the storage is a folder of this machine."""
    is_folder = isinstance(storage.fs, pafs.LocalFileSystem)
    require(is_folder, f"--storage {storage.uri}: row {row} needs a folder of this machine")


# --- j: time to the published accuracy ------------------------------------------------------------------------------


def time_to_accuracy(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row j: from the command `jobs.train` with the default preset to its end, evaluation on test and reports included,
    against the Keras script of the published recipe until its test accuracy is 0.9304, or five times as long.

    Once each, whatever `repeats` says: it takes most of an hour. A run of ours that misses the accuracy counts as a
    rate of 0; Keras missing it counts with the time that it took, which the true time is longer than. Without Keras
    the reference is NaN, and so is the ratio.
    """
    require_folder(storage, "j")
    with scratch(storage) as folder:
        begun = time.perf_counter()
        run_and_read([sys.executable, "-m", "jobs.train", *job_flags(folder, scale, "timed")], dict(os.environ))
        seconds = time.perf_counter() - begun
        accuracy = runs.load_run(open_storage(folder), "timed")["test_accuracy"]
    print(f"j: the job took {seconds:.0f} s to test accuracy {accuracy:.4f}")
    ours = inverse([seconds])[0] if accuracy >= PUBLISHED_ACCURACY else 0.0
    reference = (
        inverse([time_keras(storage, TIMES_SHORTER * MORE_THAN_ENOUGH * seconds)])[0] if has_keras() else math.nan
    )
    threads = scale.threads_per_worker * max(scale.worker_range)
    return [Measurement("j_time_to_accuracy", "1/h", [ours], [reference], TIMES_SHORTER, threads)]


def time_keras(storage: Storage, max_seconds: float) -> float:
    """Return the seconds that the Keras script takes until it ends; says what it reached."""
    until = ("--until", str(PUBLISHED_ACCURACY), "--max-seconds", str(max_seconds))
    begun = time.perf_counter()
    lines = run_and_read(keras_command(storage.uri, 128, *until), plain_environment(**KERAS_ENVIRONMENT))
    seconds = time.perf_counter() - begun
    reached = [float(line.removeprefix(ACCURACY)) for line in lines if line.startswith(ACCURACY)]
    print(f"j: Keras took {seconds:.0f} s and {len(reached)} epochs to test accuracy {reached[-1]:.4f}")
    return seconds
