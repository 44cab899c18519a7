"""Timing in the workers of Ray Train: a worker group for the rows of `jobs.bench`, and the work that they time."""

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray.data
import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fashion.bench.measurement import Rates
from fashion.cluster.plan import make_plan
from fashion.config import ScaleConfig, TrainConfig
from fashion.data.manifest import load_manifest
from fashion.distributed import trainer
from fashion.distributed.lean_trainer import LeanTrainer
from fashion.storage import Storage
from fashion.training import loop
from fashion.training import run as fit
from fashion.training.batches import Batch


def in_workers(
    work: Callable[[dict[str, Any]], Rates],
    storage: Storage,
    config: TrainConfig,
    scale: ScaleConfig,
    told: dict[str, Any],
    datasets: dict[str, ray.data.Dataset] | None = None,
) -> tuple[Rates, int]:
    """Run `work(settings)` on every worker of a job; return rank 0's rates, and the threads of all workers.

    `settings` is what the workers of a run are told (`trainer.worker_settings`), and `told`.
    """
    scale.check_batch(config.global_batch_size)
    manifest = load_manifest(storage)
    plan = make_plan(config, scale, manifest)
    settings = trainer.worker_settings(storage, manifest, config, plan) | told
    return run_group(work, settings, trainer.scaling_config(plan), datasets), plan.threads_per_worker * max(
        plan.num_workers
    )


def run_group(
    work: Callable[[dict[str, Any]], Rates],
    settings: dict[str, Any],
    shape: ray.train.ScalingConfig,
    datasets: dict[str, ray.data.Dataset] | None = None,
) -> Rates:
    """Run `work(settings)` on a worker group of its own; return what rank 0 returns."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ray.train.LoggingConfig(log_level="WARNING")
        result = LeanTrainer(
            work,
            train_loop_config=settings,
            datasets=datasets or {},
            scaling_config=shape,
            run_config=ray.train.RunConfig(storage_path=folder, logging_config=quiet),
        ).fit()
    assert result.return_value is not None, "rank 0 returned nothing"
    rates: Rates = result.return_value
    return rates


def together(work: Callable[[], None]) -> float:
    """Return the seconds that `work` takes from a common start to the last rank's end."""
    dist.barrier()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started


def one_batch(run: fit.TrainingRun, steps: int) -> list[Batch]:
    """Return the same pre-made batch for each of `steps`."""
    return [next(iter(run.rows.train_batches(1)))] * steps


def time_steps(run: fit.TrainingRun, batches: list[Batch]) -> None:
    """Forward, backward and update on each batch, and nothing else."""
    run.wrapped.train()
    for images, labels in batches:
        with loop.autocast(run.precision, run.rank.device):
            logits = run.wrapped(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=run.config.label_smoothing)
        run.wrapped.zero_grad()
        torch.autograd.backward(loss)
        run.update()


def time_loop(run: fit.TrainingRun, batches: Iterator[Batch]) -> None:
    """The loop that a run trains with: its steps, and the synchronisation of the ranks between them."""
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
