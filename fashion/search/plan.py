"""The plan of a search: how many trials run at a time and what each uses, fitted to the live cluster."""

from dataclasses import dataclass, replace

import ray

from fashion.cluster.plan import Plan, describe_precision, make_plan, worker_places
from fashion.config import ScaleConfig, TrainConfig, require
from fashion.data.manifest import Manifest
from fashion.search.space import SearchConfig, SearchScale

# A checkpoint holds the weights and two moments of the largest network in fp32.
CHECKPOINT_MB = 92
# With `ema_decay` it holds the weights' moving average as well.
EMA_MB = 31
# Memory of the process of a trial whose workers are processes of their own.
NESTED_TRIAL_BYTES = 1_000_000_000


@dataclass(frozen=True)
class SearchPlan:
    """What a search will use of the cluster; `jobs.tune` prints it before anything starts."""

    trial: Plan
    """The plan of one trial."""
    num_trials: int
    concurrent: int
    """Most trials at a time."""
    gpus_per_trial: float
    rungs: list[int]
    judge_by: str
    max_epochs: int
    checkpoint_mb: int
    """Size of one checkpoint, in 10**6 bytes."""

    def process_resources(self) -> dict[str, float]:
        """Return what Ray reserves for a trial's own process: no CPU if its workers are processes of their own."""
        if self.trial.num_workers[0] > 1:
            return {"memory": NESTED_TRIAL_BYTES}
        return {"CPU": self.trial.cpus_per_worker} | ({"GPU": self.gpus_per_trial} if self.gpus_per_trial else {})

    def lines(self) -> list[str]:
        """Return the plan as text for the console, a line per topic."""
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
    """Return the plan of a search on the live cluster; raises `UserError` with the numbers if no trial fits."""
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
    trial = make_plan(
        base, ScaleConfig(num_workers=str(workers), cpus_per_worker=scale.cpus_per_worker, use_gpu="no"), manifest
    )
    use_gpu = scale.gpus_per_trial > 0
    concurrent = min(places // workers, config.num_samples)
    if workers > 1:
        memory = sum(int(node.get("memory", 0.0) / NESTED_TRIAL_BYTES) for node in nodes)
        concurrent = max(1, min(concurrent, memory))
    return SearchPlan(
        trial=replace(trial, use_gpu=use_gpu, precision=describe_precision(base.precision, use_gpu)),
        num_trials=config.num_samples,
        concurrent=min(concurrent, scale.max_concurrent or concurrent),
        gpus_per_trial=scale.gpus_per_trial,
        rungs=config.rungs,
        judge_by=config.judge_by,
        max_epochs=config.max_epochs,
        checkpoint_mb=CHECKPOINT_MB + (EMA_MB if base.ema_decay else 0),
    )
