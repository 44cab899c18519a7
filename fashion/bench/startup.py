"""What row h of `jobs.bench` runs, each time in a fresh process: the job, or Ray's own trainer with an empty loop.

    python -m fashion.bench.startup job NOTES FLAGS-OF-JOBS.TRAIN
    python -m fashion.bench.startup bare NOTES NUM_WORKERS CPUS_PER_WORKER USE_GPU FOLDER

Both append lines "moment seconds since 1970" to the file NOTES, on this machine. The job is the command itself, of
which three functions are watched.
"""

import itertools
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch


def note(path: str, moment: str) -> None:
    """Append a moment to the notes; workers do it at the same time."""
    with open(path, "a") as file:
        file.write(f"{moment} {time.time()}\n")


def read_notes(text: str) -> dict[str, float]:
    """Return when each moment was reached, by the last of those that reached it."""
    moments: dict[str, float] = {}
    for line in text.splitlines():
        name, _, seconds = line.partition(" ")
        moments[name] = max(moments.get(name, 0.0), float(seconds))
    return moments


def run_job(path: str, flags: list[str]) -> None:
    """Run `jobs.train`, and note when its imports are done, Ray is there, the loop starts, and a first step is done."""
    from fashion.cluster import connection
    from fashion.distributed import trainer

    note(path, "imported")
    connect = connection.connect

    def watched_connect() -> None:
        connect()
        note(path, "connected")

    sys.argv = ["jobs.train", *flags]
    with (
        patch.object(connection, "connect", watched_connect),
        patch.object(trainer, "train_loop_per_worker", watch(path)),
    ):
        runpy.run_module("jobs.train", run_name="__main__", alter_sys=True)


def watch(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the training loop, which notes when it starts and when its first step is done."""

    def train_loop_per_worker(settings: dict[str, Any]) -> dict[str, Any]:
        from fashion.distributed import worker
        from fashion.training import loop

        note(path, "loop")
        train_step, steps = loop.train_step, itertools.count(1)

        def noted_step(*arguments: Any, **options: Any) -> None:
            train_step(*arguments, **options)
            if next(steps) == 1:
                note(path, "step")

        with patch.object(loop, "train_step", noted_step):
            return worker.train_loop_per_worker(settings)

    return train_loop_per_worker


def run_bare(path: str, num_workers: int, cpus: float, use_gpu: bool, folder: str) -> None:
    """Run Ray's `TorchTrainer` with a loop that only notes that it started, and Ray's own settings otherwise."""
    import ray
    import ray.train
    import ray.train.torch

    note(path, "imported")
    ray.init(log_to_driver=False)
    note(path, "connected")
    shape = ray.train.ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus})
    ray.train.torch.TorchTrainer(
        lambda: note(path, "loop"), scaling_config=shape, run_config=ray.train.RunConfig(storage_path=folder)
    ).fit()


def main(arguments: list[str]) -> None:
    """Run the one or the other."""
    kind, path, *rest = arguments
    if kind == "job":
        run_job(path, rest)
    else:
        num_workers, cpus, use_gpu, folder = rest
        run_bare(path, int(num_workers), float(cpus), use_gpu == "yes", folder)


if __name__ == "__main__":
    main(sys.argv[1:])
