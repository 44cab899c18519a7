"""Side-by-side measurements: both sides in the same processes, alternating; medians and spread."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train.torch import TorchTrainer

from fashion import cluster, data, fit, loop, report, trainer, worker
from fashion.config import ScaleConfig, TrainConfig
from fashion.storage import Storage


@dataclass(frozen=True)
class Measurement:
    """One row: rates of both sides per repeat, in `unit`, and the ratio that is aimed at."""

    row: str
    unit: str
    ours: list[float]
    reference: list[float]
    target: float
    threads: int

    def columns(self) -> dict[str, Any]:
        """Return the row of the `bench` table; the ratio is the median of the repeats' own ratios."""
        ratios = [ours / reference for ours, reference in zip(self.ours, self.reference, strict=True)]
        ratio = statistics.median(ratios)
        return {
            "row": self.row,
            "ours": statistics.median(self.ours),
            "reference": statistics.median(self.reference),
            "unit": self.unit,
            "ratio": ratio,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "repeats": len(ratios),
            "target": self.target,
            "met": ratio >= self.target,
            "hardware": report.hardware(),
            "threads": self.threads,
            "source_hash": report.source_hash(),
        } | report.versions()


def job_vs_step(storage: Storage, scale: ScaleConfig, repeats: int) -> Measurement:
    """Row b: the job's training loop (shard, shuffle, flips, metrics) against the same step on one pre-made batch.

    Both sides run under DDP in the same workers, so the exchange of gradients is in both.
    """
    steps = 25
    config = TrainConfig(epochs=1)
    scale.check_batch(config.global_batch_size)
    manifest = data.load_manifest(storage)
    plan = cluster.make_plan(config, scale, manifest)
    cuts = {split: data.cut_points(manifest.rows[split], *plan.num_workers) for split in ("train", "val")}
    settings = trainer.worker_settings(config, plan, manifest, cuts) | {"repeats": repeats, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        result = TorchTrainer(
            time_job_and_step,
            train_loop_config=settings,
            datasets=trainer.open_datasets(storage, manifest, config, cuts),
            dataset_config=ray.train.DataConfig(datasets_to_split=[]),
            scaling_config=trainer.scaling_config(plan),
            run_config=ray.train.RunConfig(
                storage_path=folder, logging_config=ray.train.LoggingConfig(log_level="WARNING")
            ),
        ).fit()
    assert result.return_value is not None, "rank 0 returned nothing"
    ours, reference = result.return_value
    threads = plan.threads_per_worker * plan.num_workers[1]
    return Measurement("b_job_vs_step", "images/s", ours, reference, 0.92, threads)


def time_job_and_step(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Run on every worker: alternate the real loop and the bare step; return images/s of all ranks, per repeat."""
    worker.prepare_process(settings["threads"])
    run = worker.start_run(settings)
    steps = settings["steps"]
    rows = steps * run.config.global_batch_size
    batches = [(image.clone(), label.clone()) for image, label in itertools.islice(run.rows.train_batches(1), 1)]
    ours: list[float] = []
    reference: list[float] = []
    time_steps(run, batches * 5)  # warm-up
    for repeat in range(settings["repeats"]):
        reference.append(rows / together(lambda: time_steps(run, batches * steps)))
        real = itertools.islice(run.rows.train_batches(repeat + 1), steps)
        ours.append(rows / together(lambda real=real: time_loop(run, real)))  # type: ignore[misc]
    return ours, reference


def together(work: Callable[[], None]) -> float:
    """Return the seconds that `work` takes from a common start to the last rank's end."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def time_steps(run: fit.Run, batches: list[loop.Batch]) -> None:
    """Forward, backward and update on each batch, and nothing else."""
    run.model.train()
    for images, labels in batches:
        with loop.autocast(run.precision, run.rank.device):
            logits = run.wrapped(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=run.config.label_smoothing)
        run.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        run.optimizer.step()


def time_loop(run: fit.Run, batches: Any) -> None:
    """The loop that a run trains with."""
    loop.train_one_epoch(
        run.wrapped,
        batches,
        run.optimizer,
        epoch=1,
        set_lr=lambda step: None,
        precision=run.precision,
        label_smoothing=run.config.label_smoothing,
        device=run.rank.device,
    )


ROWS: dict[str, Callable[[Storage, ScaleConfig, int], Measurement]] = {"b": job_vs_step}
