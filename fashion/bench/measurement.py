"""How the rows of `jobs.bench` are measured: both sides take turns, most of them in one worker group of Ray Train."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray.data
import ray.train
import torch
import torch.distributed as dist

from fashion.cluster.plan import make_plan
from fashion.config import ScaleConfig, TrainConfig, require
from fashion.data.manifest import load_manifest
from fashion.distributed import trainer
from fashion.distributed.trainers import make_engine, run_config
from fashion.reports import provenance
from fashion.storage import Storage

Rates = dict[str, list[float]]
"""Per side of a comparison, its rate in each repeat."""


@dataclass(frozen=True)
class Measurement:
    """One row: the rates of both sides in each repeat, in `unit`, and the target of their ratio, 0 for none."""

    row: str
    unit: str
    ours: list[float]
    reference: list[float]
    target: float
    threads: int

    def columns(self) -> dict[str, Any]:
        """Return the row of the `bench` table; its ratio is the median of the ratios of the single repeats."""
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
            "target": self.target or None,
            "met": ratio >= self.target if self.target else None,
            "hardware": provenance.hardware(),
            "threads": self.threads,
            "source_hash": provenance.source_hash(),
        } | provenance.versions()


def inverse(seconds: list[float]) -> list[float]:
    """Turn durations into rates per hour, so that larger is better."""
    return [3600 / duration for duration in seconds]


def require_folder(storage: Storage, row: str) -> None:
    """Raise `UserError` unless the storage is a local folder, which the row `row` needs."""
    require(storage.is_folder, f"--storage {storage.uri}: row {row} needs a folder of this machine")


def alternate(sides: Mapping[str, Callable[[int], float]], repeats: int) -> Rates:
    """Call `side(repeat)`, which returns a rate, for each side in turn; return the rates of each side.

    Taking turns lets both sides see the same disturbances of the machine. There is one repeat more than `repeats`: the
    first warms up and is not returned.
    """
    rates: Rates = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            rates[name].append(side(repeat))
    return {name: values[1:] for name, values in rates.items()}


# --- in the workers of Ray Train --------------------------------------------------------------------------------------


def run_in_workers(
    work: Callable[[dict[str, Any]], Rates],
    storage: Storage,
    config: TrainConfig,
    scale: ScaleConfig,
    options: dict[str, Any],
    datasets: dict[str, ray.data.Dataset] | None = None,
) -> tuple[Rates, int]:
    """Run `work(settings)` on every worker; return rank 0's rates, and the number of threads of all workers together.

    `settings` are those that a run's workers get (`trainer.worker_settings`), and `options`.
    """
    scale.check_batch(config.global_batch_size)
    manifest = load_manifest(storage)
    plan = make_plan(config, scale, manifest)
    settings = (
        trainer.worker_settings(storage, manifest, config, plan, trainer.read_rows(storage, manifest, config)) | options
    )
    rates = run_group(work, settings, trainer.scaling_config(plan), datasets)
    return rates, plan.threads_per_worker * max(plan.num_workers)


def run_group(
    work: Callable[[dict[str, Any]], Rates],
    settings: dict[str, Any],
    shape: ray.train.ScalingConfig,
    datasets: dict[str, ray.data.Dataset] | None = None,
) -> Rates:
    """Run `work(settings)` on a new worker group; return what rank 0 returns."""
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine()
        rates: Rates | None = engine.train(
            work, settings | {"engine": engine}, shape, run_config("WARNING", storage_path=folder), datasets or {}
        )
    assert rates is not None, "rank 0 returned nothing"
    return rates


def time_all_ranks(work: Callable[[], None]) -> float:
    """Return the seconds from the common start of `work` on all ranks until the last rank has finished it."""
    dist.barrier()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started
