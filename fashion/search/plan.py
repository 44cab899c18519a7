"""The plan of a search: how many trials run at a time on the live cluster, or a refusal with the numbers."""

import math
import time
from dataclasses import dataclass, replace

from fashion.cluster.nodes import NoRoom, live_nodes, request_resources
from fashion.cluster.plan import Plan, describe_precision, make_plan, worker_places
from fashion.config import ScaleConfig, TrainConfig
from fashion.data.manifest import Manifest
from fashion.search.space import SearchConfig, SearchScale

# Size of a checkpoint of the largest network (7,630,122 parameters): the weights and two moments, each in fp32.
CHECKPOINT_MB = 92
# The moving average of the weights, which a checkpoint holds as well if `ema_decay` is set.
EMA_MB = 31
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
            # A trial keeps its old checkpoint until the new one is complete: two at a time.
            f"disk       {2 * self.concurrent} checkpoints at most, of unfinished trials, about "
            f"{2 * self.concurrent * self.checkpoint_mb / 1000:.1f} GB",
        ]


def make_search_plan(config: SearchConfig, base: TrainConfig, scale: SearchScale, manifest: Manifest) -> SearchPlan:
    """Return the plan of a search on the live cluster; raises `NoRoom` with the numbers if not one trial fits."""
    workers = config.workers_per_trial
    nodes = live_nodes()
    gpus_each = scale.gpus_per_trial / workers
    places = num_places(nodes, config, scale)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    if places < workers:
        raise NoRoom(
            f"--workers-per-trial {workers} with {scale.cpus_per_worker:g} CPUs and {gpus_each:g} GPUs each do not "
            f"fit: the cluster's {len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs hold {places}; "
            "lower one of them",
            trial_bundles(config, scale),
        )
    trial = make_plan(
        base, ScaleConfig(num_workers=str(workers), cpus_per_worker=scale.cpus_per_worker, use_gpu="no"), manifest
    )
    use_gpu = scale.gpus_per_trial > 0
    return SearchPlan(
        trial=replace(trial, use_gpu=use_gpu, precision=describe_precision(base.precision, use_gpu)),
        num_trials=config.num_samples,
        concurrent=max_trials(nodes, config, scale),
        gpus_per_trial=scale.gpus_per_trial,
        rungs=config.rungs,
        judge_by=config.judge_by,
        max_epochs=config.max_epochs,
        checkpoint_mb=CHECKPOINT_MB + (EMA_MB if base.ema_decay else 0),
    )


def num_places(nodes: list[dict[str, float]], config: SearchConfig, scale: SearchScale) -> int:
    """Return how many workers of trials fit on nodes with these resources at a time."""
    gpus_each = scale.gpus_per_trial / config.workers_per_trial
    return sum(worker_places(node, scale.cpus_per_worker, gpus_each) for node in nodes)


def max_trials(nodes: list[dict[str, float]], config: SearchConfig, scale: SearchScale) -> int:
    """Return how many trials run at a time on nodes with these resources; at least one, which may wait for a node."""
    trials = min(num_places(nodes, config, scale) // config.workers_per_trial, config.num_samples)
    if config.workers_per_trial > 1:
        trials = min(trials, sum(int(node.get("memory", 0.0) / NESTED_TRIAL_BYTES) for node in nodes))
    return max(1, min(trials, scale.max_concurrent or trials))


def trial_bundles(config: SearchConfig, scale: SearchScale) -> list[dict[str, float]]:
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
