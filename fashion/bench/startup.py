"""The process that row h of `jobs.bench` starts for each repeat: the job, or Ray's own trainer with an empty loop.

    python -m fashion.bench.startup job FILE FLAGS-OF-JOBS.TRAIN
    python -m fashion.bench.startup bare FILE NUM_WORKERS CPUS_PER_WORKER USE_GPU FOLDER

Both record when they reach a moment: they append lines "moment seconds-since-1970" to the local FILE. The job is the
real command, with three of its functions patched to record moments. Imports the standard library only at its top: the
time for imports is one of the moments.
"""

import itertools
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch


def record_moment(path: str, moment: str) -> None:
    """Append `moment` and the current time to the file `path`; several processes may do so at the same time."""
    with open(path, "a") as file:
        file.write(f"{moment} {time.time()}\n")


def read_moments(text: str) -> dict[str, float]:
    """Return the time of each moment in seconds since 1970: that of the last process that reached it."""
    moments: dict[str, float] = {}
    for line in text.splitlines():
        name, _, seconds = line.partition(" ")
        moments[name] = max(moments.get(name, 0.0), float(seconds))
    return moments


def run_job(path: str, flags: list[str]) -> None:
    """Run `jobs.train`; record when imports are done, Ray is connected, the loop starts, and the first step ends."""
    from fashion.cluster import connection
    from fashion.distributed import trainer

    record_moment(path, "imported")
    connect = connection.connect

    def recording_connect() -> None:
        connect()
        record_moment(path, "connected")

    sys.argv = ["jobs.train", *flags]
    with (
        patch.object(connection, "connect", recording_connect),
        patch.object(trainer, "train_loop_per_worker", recording_train_loop(path)),
    ):
        runpy.run_module("jobs.train", run_name="__main__", alter_sys=True)


def recording_train_loop(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the job's training loop, which also records when it starts and when its first step ends."""

    def train_loop_per_worker(settings: dict[str, Any]) -> dict[str, Any]:
        from fashion.distributed import worker
        from fashion.training import loop

        record_moment(path, "loop")
        add, steps = loop.EpochRecord.add, itertools.count(1)

        def recorded_add(*arguments: Any) -> None:
            add(*arguments)
            if next(steps) == 1:
                record_moment(path, "step")

        with patch.object(loop.EpochRecord, "add", recorded_add):
            return worker.train_loop_per_worker(settings)

    return train_loop_per_worker


def run_bare(path: str, num_workers: int, cpus: float, use_gpu: bool, folder: str) -> None:
    """Run Ray's `TorchTrainer` with Ray's own settings and a loop that only records its start."""
    import ray
    import ray.train
    import ray.train.torch

    record_moment(path, "imported")
    ray.init(log_to_driver=False)
    record_moment(path, "connected")
    shape = ray.train.ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus})
    ray.train.torch.TorchTrainer(
        lambda: record_moment(path, "loop"), scaling_config=shape, run_config=ray.train.RunConfig(storage_path=folder)
    ).fit()


def main(arguments: list[str]) -> None:
    """Run the job, or Ray's trainer, as the first argument says."""
    kind, path, *rest = arguments
    if kind == "job":
        run_job(path, rest)
    else:
        num_workers, cpus, use_gpu, folder = rest
        run_bare(path, int(num_workers), float(cpus), use_gpu == "yes", folder)


if __name__ == "__main__":
    main(sys.argv[1:])
