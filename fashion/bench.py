"""Side-by-side measurements: both sides in the same processes, alternating; medians and spread."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.tune
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pyarrow import fs as pafs
from torch import nn

from fashion import cluster, data, fit, loop, report, search, trainer, trial, worker
from fashion.config import ScaleConfig, TrainConfig, require
from fashion.ledger import name_of
from fashion.space import SearchConfig, SearchScale
from fashion.storage import Storage, open_storage
from fashion.torch_trainer import Trainer


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


def job_vs_step(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row b: the job's training loop (shard, shuffle, flips, schedule, metrics, DDP) against the same step on one
    pre-made batch in the same workers: in plain PyTorch, without any exchange of gradients, and under DDP.
    """
    steps = 60
    config = TrainConfig(epochs=1)
    scale.check_batch(config.global_batch_size)
    manifest = data.load_manifest(storage)
    plan = cluster.make_plan(config, scale, manifest)
    settings = trainer.worker_settings(storage, manifest, config, plan) | {"repeats": repeats, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(
            time_job_and_step,
            train_loop_config=settings,
            scaling_config=trainer.scaling_config(plan),
            run_config=ray.train.RunConfig(
                storage_path=folder, logging_config=ray.train.LoggingConfig(log_level="WARNING")
            ),
        ).fit()
    assert result.return_value is not None, "rank 0 returned nothing"
    rates = result.return_value
    threads = plan.threads_per_worker * plan.num_workers[1]
    return [
        Measurement("b_job_vs_plain_step", "images/s", rates["job"], rates["plain"], 0.92, threads),
        Measurement("b_job_vs_ddp_step", "images/s", rates["job"], rates["ddp"], 0.97, threads),
    ]


def time_job_and_step(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Run on every worker: alternate the real loop and the bare steps; return images/s of all ranks, per repeat."""
    worker.prepare_process(settings["threads"])
    run = worker.start_run(settings)
    steps = settings["steps"]
    batches = [next(iter(run.rows.train_batches(1)))] * steps
    sides: dict[str, Callable[[int], None]] = {
        "plain": lambda repeat: time_steps(run, run.model, batches),
        "ddp": lambda repeat: time_steps(run, run.wrapped, batches),
        "job": lambda repeat: time_loop(run, itertools.islice(run.rows.train_batches(repeat), steps)),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(settings["repeats"] + 1):
        for name, side in sides.items():
            seconds = together(lambda side=side, repeat=repeat: side(repeat))  # type: ignore[misc]
            rates[name].append(steps * run.config.global_batch_size / seconds)
    return {name: values[1:] for name, values in rates.items()}  # the first of each side warms up


def together(work: Callable[[], None]) -> float:
    """Return the seconds that `work` takes from a common start to the last rank's end."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def time_steps(run: fit.Run, model: nn.Module, batches: list[loop.Batch]) -> None:
    """Forward, backward and update on each batch, and nothing else."""
    run.model.train()
    for images, labels in batches:
        with loop.autocast(run.precision, run.rank.device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=run.config.label_smoothing)
        run.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        run.optimizer.step()


def time_loop(run: fit.Run, batches: Iterator[loop.Batch]) -> None:
    """The loop that a run trains with."""
    loop.train_one_epoch(
        run.wrapped,
        batches,
        run.optimizer,
        epoch=1,
        set_lr=run.set_lr,
        precision=run.precision,
        label_smoothing=run.config.label_smoothing,
        device=run.rank.device,
    )


# --- a search's trials ----------------------------------------------------------------------------------------------


def trial_vs_loop(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row i: a one-worker trial against the bare loop over the same rows, process start aside; and its start against
    that of a trial whose function is empty.

    Trials run one at a time. A start is the time from the end of one trial to the begin of the next.
    """
    require(
        isinstance(storage.fs, pafs.LocalFileSystem), f"--storage {storage.uri}: row i needs a folder of this machine"
    )
    base = TrainConfig(max_train_rows=2048)
    point = json.dumps({"lr": base.lr, "dropout_conv": base.dropout_conv, "dropout_fc": base.dropout_fc})
    config = SearchConfig(num_samples=repeats + 1, max_epochs=2, grace_epochs=2, first=(point,) * (repeats + 1))
    one_at_a_time = SearchScale(max_concurrent=1, cpus_per_worker=scale.cpus_per_worker)
    with tempfile.TemporaryDirectory() as folder:
        scratch = open_storage(folder)
        Path(folder, "data").symlink_to(storage.path("data"))
        search.search(scratch, "bench", config, base, one_at_a_time, source="auto")
        runs = [report.load_run(scratch, f"bench-{name_of(number)}") for number in range(repeats + 1)]
    bare = bare_loops(storage, replace(base, epochs=2), one_at_a_time, repeats)
    trials = [run["wall_s"] for run in runs[1:]]
    starts = [(after["started_at"] - before["finished_at"]).total_seconds() for before, after in pairwise(runs)]
    threads = max(1, int(scale.cpus_per_worker))
    return [
        Measurement("i_loop_time_vs_trial_time", "1/h", inverse(trials), inverse(bare), 0.95, threads),
        Measurement(
            "i_empty_start_plus_1_s_vs_start",
            "1/h",
            inverse(starts),
            inverse([start + 1 for start in empty_starts(repeats)]),
            1.0,
            threads,
        ),
    ]


def inverse(seconds: list[float]) -> list[float]:
    """Turn durations into rates per hour, so that more is better."""
    return [3600 / each for each in seconds]


def bare_loops(storage: Storage, config: TrainConfig, scale: SearchScale, repeats: int) -> list[float]:
    """Return the seconds that `repeats` bare loops take, one after another in one process, after one that warms up."""
    manifest = data.load_manifest(storage)
    plan = cluster.make_search_plan(SearchConfig(max_epochs=config.epochs), config, scale, manifest)
    shared = search.shared_by_trials(storage, "bare", SearchConfig(), config, plan, manifest)
    looper = ray.remote(num_cpus=plan.trial.cpus_per_worker)(time_bare_loop)
    return list(ray.get(looper.remote(config.to_dict(), shared, repeats)))


def time_bare_loop(settings: dict[str, Any], shared: dict[str, Any], repeats: int) -> list[float]:
    """Run in a process of its own: what a trial does, without reports and checkpoints."""
    worker.prepare_process(shared["threads"])
    config = TrainConfig.from_dict(settings)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _metrics in trial.open_run(config, shared).epochs():
            pass
        times.append(time.perf_counter() - started)
    return times[1:]


class StartTimes(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Notes when Tune's trials start and end."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.ended: list[float] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note a start."""
        self.started.append(time.perf_counter())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note an end."""
        self.ended.append(time.perf_counter())


def empty_starts(repeats: int) -> list[float]:
    """Return the starts, in seconds, of Tune trials of an empty function, with Tune's own settings otherwise."""
    times = StartTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainable = ray.tune.with_resources(lambda config: {"done": True}, {"CPU": 1})
        tune_config = ray.tune.TuneConfig(num_samples=repeats + 1, max_concurrent_trials=1)
        run_config = ray.tune.RunConfig(storage_path=folder, callbacks=[times], verbose=0)
        ray.tune.Tuner(trainable, tune_config=tune_config, run_config=run_config).fit()
    return [after - before for before, after in zip(times.ended[:-1], times.started[1:], strict=True)]


ROWS: dict[str, Callable[[Storage, ScaleConfig, int], list[Measurement]]] = {"b": job_vs_step, "i": trial_vs_loop}
