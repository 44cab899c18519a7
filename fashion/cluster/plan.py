"""The Ray cluster: connect to it, see what it holds, and refuse what it cannot run before anything starts."""

import logging
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from fashion.config import RAY_ENVIRONMENT, ScaleConfig, TrainConfig, require
from fashion.data.prepare import Manifest
from fashion.search.space import SearchConfig, SearchScale
from fashion.training import epoch as loop

# Weights and two moments in fp32 of the largest variant; a trial keeps the old one until the new one is whole.
CHECKPOINT_MB = 92
AVERAGE_MB = 31  # the weights once more, where an average of them is evaluated
# Memory of the process that a trial with workers of its own adds to them.
NESTED_TRIAL_BYTES = 1_000_000_000


def connect(num_cpus: int | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one here with token authentication and no dashboard.

    `num_cpus` gives a cluster that starts here so many logical CPUs in place of the machine's own number.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The workers run the environment that the driver runs; without this Ray would build it anew under `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if not ray.is_initialized():
        # Workers' output stays in Ray's log folder: what a person needs comes back as rows, results and exceptions.
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if os.environ.get("RAY_ADDRESS", "local") == "local":
            provide_token()
            options |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
            # Nobody reclaims this machine, so nobody need watch for it.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # Nor is its GCS ever started again: what misses it, as after the death of this process, may end soon.
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
            for name, value in RAY_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        ray.init(**options)
    quieten()


def quieten() -> None:
    """Keep Ray Data's and Ray Train's narration out of this process' output; warnings stay."""
    import ray.data  # takes 2 s, which a process that only evaluates is spared

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns that the bars are off, as was asked.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def provide_token() -> None:
    """Give a cluster that starts here a token of its own, unless the user has one.

    Ray 2.60 turns token authentication on for such a cluster by itself, and would write a token into the home folder.
    """
    has_file = (Path.home() / ".ray" / "auth_token").exists()
    if not has_file and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@dataclass(frozen=True)
class Plan:
    """What a run will occupy: the preflight prints it before anything starts."""

    num_workers: tuple[int, int]
    """Fewest and most workers."""
    use_gpu: bool
    cpus_per_worker: float
    threads_per_worker: int
    global_batch_size: int
    num_train_rows: int
    num_val_rows: int
    steps_per_epoch: int
    epochs: int
    precision: str
    cluster_cpus: float
    cluster_gpus: float
    num_nodes: int
    dataset: str
    """Name of the data and the start of its sum."""

    def resources_per_worker(self) -> dict[str, float]:
        """Return what Ray reserves for each worker."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1} if self.use_gpu else {})

    def lines(self) -> list[str]:
        """Return the plan in words, one fact a line."""
        low, high = self.num_workers
        workers = str(high) if low == high else f"{low} to {high}"
        each = f"{self.cpus_per_worker:g} CPU" + (" and 1 GPU" if self.use_gpu else "")
        return [
            f"cluster    {self.num_nodes} node(s), {self.cluster_cpus:g} CPUs, {self.cluster_gpus:g} GPUs",
            f"workers    {workers}, each {each}, {self.threads_per_worker} thread(s)",
            f"batch      {self.global_batch_size} rows a step, {self.global_batch_size // high} a worker",
            f"data       {self.dataset}, {self.num_train_rows} train and {self.num_val_rows} val rows",
            f"steps      {self.steps_per_epoch} an epoch, {self.epochs} epochs",
            f"precision  {self.precision}",
        ]


def make_plan(config: TrainConfig, scale: ScaleConfig, manifest: Manifest) -> Plan:
    """Fit a run to the live cluster; raises `UserError` with the numbers when it cannot be held."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    low, high = scale.worker_range
    use_gpu = scale.use_gpu == "yes" or (scale.use_gpu == "auto" and gpus >= high)
    require(
        not use_gpu or gpus >= low,
        f"--use-gpu yes needs {low} GPU(s), one for each worker, and the cluster has {gpus:g}; "
        "use --use-gpu auto, or fewer workers",
    )
    # Rows that stream from Ray Data need a CPU to be read with while the workers hold theirs.
    reserved = 1 if config.data_mode == "streaming" else 0
    needed = low * scale.cpus_per_worker + reserved
    require(
        needed <= cpus,
        f"--num-workers {scale.num_workers} needs {needed:g} CPUs ({low} x {scale.cpus_per_worker:g}"
        + (" + 1 to read rows" if reserved else "")
        + f") and the cluster has {cpus:g}; use fewer workers or a smaller --cpus-per-worker",
    )
    # A worker lives on one node.
    places = sum(worker_places(node, scale.cpus_per_worker, 0.0) for node in nodes)
    require(
        low <= places,
        f"--num-workers {scale.num_workers} of {scale.cpus_per_worker:g} CPUs do not fit: the cluster's "
        f"{len(nodes)} nodes hold {places}; use fewer workers or a smaller --cpus-per-worker",
    )
    num_val_rows = manifest.rows["val"] if config.hold_out_val else 0
    num_train_rows = manifest.rows["train"] + manifest.rows["val"] - num_val_rows
    rows = min(num_train_rows, config.max_train_rows or num_train_rows)
    return Plan(
        num_workers=(low, high),
        use_gpu=use_gpu,
        cpus_per_worker=scale.cpus_per_worker,
        threads_per_worker=scale.threads_per_worker,
        global_batch_size=config.global_batch_size,
        num_train_rows=rows,
        num_val_rows=num_val_rows,
        steps_per_epoch=config.steps_per_epoch(rows),
        epochs=config.last_epoch,
        precision=describe_precision(config.precision, use_gpu),
        cluster_cpus=cpus,
        cluster_gpus=gpus,
        num_nodes=len(nodes),
        dataset=f"{manifest.dataset} ({manifest.sha256[:12]})",
    )


@dataclass(frozen=True)
class SearchPlan:
    """What a search will occupy."""

    trial: Plan
    """One trial."""
    num_trials: int
    concurrent: int
    """Trials at a time."""
    gpus_per_trial: float
    rungs: list[int]
    judge_by: str
    max_epochs: int
    checkpoint_mb: int
    """Size of one checkpoint."""

    def process_resources(self) -> dict[str, float]:
        """Return what Ray reserves for a trial's own process: no CPU if its workers are processes of their own."""
        if self.trial.num_workers[0] > 1:
            return {"memory": NESTED_TRIAL_BYTES}
        return {"CPU": self.trial.cpus_per_worker} | ({"GPU": self.gpus_per_trial} if self.gpus_per_trial else {})

    def lines(self) -> list[str]:
        """Return the plan in words, one fact a line."""
        workers = self.trial.num_workers[0]
        each = f"{workers} worker(s) of {self.trial.cpus_per_worker:g} CPU"
        each += f" and {self.gpus_per_trial:g} GPU(s)" if self.gpus_per_trial else ""
        own = {line.split()[0]: line for line in self.trial.lines()}
        judged = ", ".join(str(rung) for rung in self.rungs)
        judged_by = "accuracy and loss" if self.judge_by == "both" else self.judge_by
        return [
            own["cluster"],
            f"trials     {self.num_trials}, {self.concurrent} at a time, each {each}, "
            f"{self.trial.threads_per_worker} thread(s)",
            f"epochs     {self.max_epochs} at most, judged after {judged} by {judged_by} of val",
            own["batch"],
            own["data"],
            own["precision"],
            f"disk       {2 * self.concurrent} checkpoints at most, of unfinished trials, about "
            f"{2 * self.concurrent * self.checkpoint_mb / 1000:.1f} GB",
        ]


def make_search_plan(config: SearchConfig, base: TrainConfig, scale: SearchScale, manifest: Manifest) -> SearchPlan:
    """Fit a search to the live cluster; raises `UserError` with the numbers when not even one trial fits."""
    workers = config.workers_per_trial
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_each = scale.gpus_per_trial / workers
    places = sum(worker_places(node, scale.cpus_per_worker, gpus_each) for node in nodes)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    require(
        places >= workers,
        f"--workers-per-trial {workers} with {scale.cpus_per_worker:g} CPUs and {gpus_each:g} GPUs each do not fit: "
        f"the cluster's {len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs hold {places}; lower one of them",
    )
    one = make_plan(
        base, ScaleConfig(num_workers=str(workers), cpus_per_worker=scale.cpus_per_worker, use_gpu="no"), manifest
    )
    use_gpu = scale.gpus_per_trial > 0
    concurrent = min(places // workers, config.num_samples)
    if workers > 1:
        memory = sum(int(node.get("memory", 0.0) / NESTED_TRIAL_BYTES) for node in nodes)
        concurrent = max(1, min(concurrent, memory))
    return SearchPlan(
        trial=replace(one, use_gpu=use_gpu, precision=describe_precision(base.precision, use_gpu)),
        num_trials=config.num_samples,
        concurrent=min(concurrent, scale.max_concurrent or concurrent),
        gpus_per_trial=scale.gpus_per_trial,
        rungs=config.rungs,
        judge_by=config.judge_by,
        max_epochs=config.max_epochs,
        checkpoint_mb=CHECKPOINT_MB + (AVERAGE_MB if base.ema_decay else 0),
    )


def worker_places(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers a node holds. The small term keeps ten of 0.1 CPU from missing a CPU by rounding."""
    by_cpu = int(node.get("CPU", 0.0) / cpus + 1e-9)
    return min(by_cpu, int(node.get("GPU", 0.0) / gpus + 1e-9)) if gpus else by_cpu


def describe_precision(precision: str, use_gpu: bool) -> str:
    """Return what `precision` comes to, in words; the workers settle it together once they run."""
    if precision != "auto":
        return precision
    if use_gpu:
        return "auto: bf16 on GPUs of capability 8.0 or more, else fp32"
    return f"auto: {loop.resolve_precision('auto', torch.device('cpu'))} on a CPU like this one"
