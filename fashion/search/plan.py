"""The plan of a search: how many trials run at a time on the live cluster, or a refusal with the numbers."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fashion.cluster.nodes import request_resources
from fashion.cluster.plan import (
    Node,
    Plan,
    describe_precision,
    gpu_kinds,
    live_nodes,
    places,
    plan_for,
    require_room,
    total,
)
from fashion.config import ScaleConfig, TrainConfig, require
from fashion.data.manifest import Manifest
from fashion.model.network import num_parameters
from fashion.search.space import SearchConfig, SearchScale

# Size of a checkpoint of the largest network (7,630,122 parameters): the weights and two moments, each in fp32.
CHECKPOINT_MB = 92
# The moving average of the weights, which a checkpoint holds as well if `ema_decay` is set.
EMA_MB = 31
# GPU memory of a trial, by its parts; estimates until a GPU has measured them (`peak_gpu_memory_bytes` of `runs`).
# What CUDA and its libraries take of a GPU for each process that uses it, in bytes.
GPU_PROCESS_BYTES = 700_000_000
# Weights, gradients and two moments, in fp32.
GPU_BYTES_PER_PARAMETER = 16
# What a training step keeps of each image for its backward pass, in fp32, by the tensors that autograd saves of the
# largest network, and as much again for what cuDNN takes while it computes.
GPU_BYTES_PER_IMAGE = 2 * 4_600_000
# An evaluation holds the widest two layers of a batch of this many images, in fp32.
GPU_EVALUATION_BYTES = 2 * 2000 * 64 * 28 * 28 * 4
# The rows, and an epoch of them as it is augmented: a byte a pixel, twice.
GPU_BYTES_PER_ROW = 2 * 28 * 28
# Memory of the kinds of GPUs that Ray names, in GB; of a kind that comes in two sizes, the smaller one.
GPU_GB = {"T4": 16, "L4": 24, "A10G": 24, "V100": 16, "P100": 16, "A100": 40, "A100-40G": 40, "A100-80G": 80}
GPU_GB |= {"H100": 80, "H200": 141, "L40S": 48, "B200": 180}
# Memory that Ray reserves for a trial's own process if its workers are other processes; it reserves no CPU then.
NESTED_TRIAL_BYTES = 1_000_000_000
SECONDS_BETWEEN_READS = 2.0


@dataclass(frozen=True)
class SearchPlan:
    """What a search will use of the cluster and of the storage; printed before the first trial starts."""

    trial: Plan
    """Plan of one trial."""
    num_trials: int
    concurrent: int
    """Most trials at a time."""
    gpus_per_trial: float
    rungs: list[int]
    """Epochs at which trials are judged."""
    judge_by: str
    """Figures of val that are compared at a rung: see `SearchConfig.judge_by`."""
    max_epochs: int
    checkpoint_mb: int
    """Size of one checkpoint, in MB."""
    idle_gpus: float = 0
    """GPUs of the cluster that the trials leave idle because they were given none."""
    gpu_mb: int = 0
    """Memory that a trial takes of a GPU, in MB, as estimated; 0 without GPUs."""
    refit: Plan | None = None
    """Plan of the run that trains the winner; None if there is none."""

    def process_resources(self) -> dict[str, float]:
        """Return the resources that Ray reserves for a trial's own process, workers in other processes not included."""
        if self.trial.num_workers[0] > 1:
            return {"memory": NESTED_TRIAL_BYTES}
        return {"CPU": self.trial.cpus_per_worker} | ({"GPU": self.gpus_per_trial} if self.gpus_per_trial else {})

    def lines(self) -> list[str]:
        """Return the lines of text that show the plan to the user."""
        workers = self.trial.num_workers[0]
        each = f"{workers} worker(s) of {self.trial.cpus_per_worker:g} CPU"
        each += f" and {self.gpus_per_trial:g} GPU(s)" if self.gpus_per_trial else ""
        trial_lines = {line.split()[0]: line for line in self.trial.lines()}
        rungs = ", ".join(str(rung) for rung in self.rungs)
        judged_by = "accuracy and loss" if self.judge_by == "both" else self.judge_by
        return [
            trial_lines["cluster"],
            f"trials     {self.num_trials}, {self.concurrent} at a time, each {each}, "
            f"{self.trial.threads_per_worker} thread(s)",
            f"epochs     {self.max_epochs} at most, judged after {rungs} by {judged_by} of val",
            trial_lines["batch"],
            trial_lines["data"],
            trial_lines["precision"],
            *self._gpu_lines(),
            # A trial keeps its old checkpoint until the new one is complete: two at a time.
            f"disk       {2 * self.concurrent} checkpoints at most, of unfinished trials, about "
            f"{2 * self.concurrent * self.checkpoint_mb / 1000:.1f} GB",
            *self._refit_lines(),
        ]

    def _gpu_lines(self) -> list[str]:
        if self.idle_gpus:
            idle = f"{self.idle_gpus:g} GPU(s) of the cluster stay idle"
            return [f"gpus       {idle}; --gpus-per-trial 1, or a fraction, uses them"]
        if not self.gpu_mb:
            return []
        shared = f", and may take {self.gpus_per_trial:g} of it" if self.gpus_per_trial < 1 else ""
        return [f"memory     a trial takes about {self.gpu_mb / 1000:.1f} GB of a GPU's memory{shared}"]

    def _refit_lines(self) -> list[str]:
        if self.refit is None:
            return []
        return [line.replace("workers   ", "refit     ") for line in self.refit.lines() if line.startswith("workers")]


def make_search_plan(
    config: SearchConfig, base: TrainConfig, scale: SearchScale, manifest: Manifest, refit: bool = False
) -> SearchPlan:
    """Return the plan of a search on the live cluster; raises `UserError` with the numbers if not one trial fits.

    With `refit` the run that trains the winner is planned as well, so that a search does not end in its refusal.
    """
    return search_plan_for(live_nodes(), config, base, scale, manifest, refit)


def search_plan_for(
    nodes: Sequence[Node],
    config: SearchConfig,
    base: TrainConfig,
    scale: SearchScale,
    manifest: Manifest,
    refit: bool = False,
) -> SearchPlan:
    """Return the plan of a search on a cluster of `nodes`, as `make_search_plan` does; it depends on nothing else."""
    workers = config.workers_per_trial
    gpus_each = scale.gpus_per_trial / workers
    held = places(nodes, scale.cpus_per_worker, gpus_each)
    cpus, gpus = total(nodes, "CPU"), total(nodes, "GPU")
    require_room(
        held >= workers,
        f"--workers-per-trial {workers} with {scale.cpus_per_worker:g} CPUs and {gpus_each:g} GPUs each do not fit: "
        f"the cluster's {len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs hold {held}; lower one of them",
        trial_bundles(config, scale),
    )
    use_gpu = scale.gpus_per_trial > 0
    one_trial = ScaleConfig(num_workers=str(workers), cpus_per_worker=scale.cpus_per_worker, use_gpu="no")
    # A fraction of a GPU is no GPU for a run: the trial's plan is one for CPUs, to which its GPU is added below.
    trial = plan_for(nodes, replace(base, precision="auto"), one_trial, manifest, "--workers-per-trial")
    require(use_gpu or base.precision != "tf32", "--precision tf32 needs --gpus-per-trial; take fp32, bf16 or auto")
    gpu_bytes = trial_gpu_bytes(base, trial, workers) if use_gpu else 0
    check_gpu_memory(nodes, scale, gpu_bytes)
    return SearchPlan(
        trial=replace(trial, use_gpu=use_gpu, precision=describe_precision(base.precision, use_gpu)),
        num_trials=config.num_samples,
        concurrent=max_trials(nodes, config, scale),
        gpus_per_trial=scale.gpus_per_trial,
        rungs=config.rungs,
        judge_by=config.judge_by,
        max_epochs=config.max_epochs,
        checkpoint_mb=CHECKPOINT_MB + (EMA_MB if base.ema_decay else 0),
        idle_gpus=0 if use_gpu else gpus,
        gpu_mb=round(gpu_bytes / 1e6),
        refit=plan_refit(nodes, base, scale, manifest) if refit else None,
    )


def plan_refit(nodes: Sequence[Node], base: TrainConfig, scale: SearchScale, manifest: Manifest) -> Plan:
    """Return the plan of the run that trains the winner on all rows: on GPUs if the trials use them, on one if need be.

    Raises `UserError` with the numbers if it does not fit.
    """
    on = ScaleConfig(
        num_workers=str(scale.refit_workers),
        cpus_per_worker=scale.cpus_per_worker,
        use_gpu="auto" if scale.gpus_per_trial else "no",
    )
    config = replace(base, hold_out_val=False, max_train_rows=0)
    return plan_for(nodes, config, on, manifest, "--refit takes --refit-workers; that")


def trial_gpu_bytes(base: TrainConfig, trial: Plan, workers: int) -> int:
    """Return the memory, in bytes, that a worker of a trial takes of its GPU; an estimate of its largest parts."""
    parameters = num_parameters(base.depth, base.padding)
    rows = (trial.num_train_rows + trial.num_val_rows) // workers
    return (
        GPU_PROCESS_BYTES
        + (GPU_BYTES_PER_PARAMETER + (4 if base.ema_decay else 0)) * parameters
        + max(GPU_BYTES_PER_IMAGE * base.global_batch_size // workers, GPU_EVALUATION_BYTES)
        + GPU_BYTES_PER_ROW * rows
    )


def check_gpu_memory(nodes: Sequence[Node], scale: SearchScale, needed: int) -> None:
    """Raise `UserError` if the trials that share a GPU need more than its memory, where Ray knows the kind of GPU."""
    known = {kind: GPU_GB[kind] for kind in gpu_kinds(nodes) if kind in GPU_GB}
    if not known or not 0 < scale.gpus_per_trial < 1:
        return
    kind = min(known, key=lambda kind: known[kind])
    share, least = known[kind] * scale.gpus_per_trial, needed / 1e9 / known[kind]
    require(
        least <= scale.gpus_per_trial,
        f"--gpus-per-trial {scale.gpus_per_trial:g} is {share:.1f} GB of a {kind} of {known[kind]} GB, and a trial "
        f"takes about {needed / 1e9:.1f} GB; take at least {min(1.0, math.ceil(100 * least) / 100):g}",
    )


def max_trials(nodes: Sequence[Node], config: SearchConfig, scale: SearchScale) -> int:
    """Return how many trials run at a time on nodes with these resources; at least one, which may wait for a node."""
    trials = min(
        places(nodes, scale.cpus_per_worker, scale.gpus_per_trial / config.workers_per_trial)
        // config.workers_per_trial,
        config.num_samples,
    )
    if config.workers_per_trial > 1:
        trials = min(trials, sum(int(node.get("memory", 0.0) / NESTED_TRIAL_BYTES) for node in nodes))
    return max(1, min(trials, scale.max_concurrent or trials))


def trial_bundles(config: SearchConfig, scale: SearchScale) -> list[Node]:
    """Return what Ray reserves for the workers of one trial."""
    each = {"CPU": scale.cpus_per_worker}
    if scale.gpus_per_trial:
        each["GPU"] = scale.gpus_per_trial / config.workers_per_trial
    return [each] * config.workers_per_trial


class TrialLimit:
    """How many trials may run at a time, on the cluster as it is now.

    Where an autoscaler starts nodes, it is asked for room for all trials that are left, and one trial more than fits
    waits for it.
    """

    def __init__(self, config: SearchConfig, scale: SearchScale, *, has_autoscaler: bool) -> None:
        self._config, self._scale, self._has_autoscaler = config, scale, has_autoscaler
        self._limit, self._read_at = 0, -math.inf
        self._asked = 0

    def __call__(self, num_left: int) -> int:
        """Return the number, read anew every `SECONDS_BETWEEN_READS`; `num_left` trials have not ended."""
        if time.monotonic() - self._read_at > SECONDS_BETWEEN_READS:
            self._limit, self._read_at = max_trials(live_nodes(), self._config, self._scale), time.monotonic()
            if self._has_autoscaler:
                self._limit = min(self._limit + 1, self._scale.max_concurrent or self._limit + 1)
                self.ask_for(min(num_left, self._scale.max_concurrent or num_left))
        return self._limit

    def ask_for(self, num_trials: int) -> None:
        """Ask the autoscaler for room for `num_trials` trials at a time; 0 asks for nothing any more."""
        if self._has_autoscaler and num_trials != self._asked:
            request_resources(trial_bundles(self._config, self._scale) * num_trials)
            self._asked = num_trials
