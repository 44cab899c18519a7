"""The plan of a run: workers, resources, batch and steps, fitted to the live cluster before anything starts."""

from dataclasses import dataclass

import torch

from fashion.cluster.nodes import NoRoom, live_nodes
from fashion.config import ScaleConfig, TrainConfig
from fashion.data.manifest import Manifest
from fashion.training import loop


@dataclass(frozen=True)
class Plan:
    """What a run will use of the cluster, and how it divides its data; jobs print it before anything starts."""

    num_workers: tuple[int, int]
    """Fewest and most workers; equal unless the run is elastic."""
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
    """Name of the data and the start of its SHA-256."""

    def resources_per_worker(self) -> dict[str, float]:
        """Return what Ray reserves for each worker, as `ScalingConfig` takes it."""
        return worker_resources(self.cpus_per_worker, self.use_gpu)

    def lines(self) -> list[str]:
        """Return the plan as text for the console, a line per topic."""
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
    """Return the plan of a run on the live cluster; raises `UserError` with the numbers if the cluster is too small."""
    nodes = live_nodes()
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    low, high = scale.worker_range
    use_gpu = scale.use_gpu == "yes" or (scale.use_gpu == "auto" and gpus >= high)
    if use_gpu and gpus < low:
        raise NoRoom(
            f"--use-gpu yes needs {low} GPU(s), one for each worker, and the cluster has {gpus:g}; "
            "use --use-gpu auto, or fewer workers",
            [worker_resources(scale.cpus_per_worker, use_gpu)] * low,
        )
    # Ray Data needs a CPU of its own to stream rows, while the workers occupy theirs.
    reserved = 1 if config.data_mode == "streaming" else 0
    needed = low * scale.cpus_per_worker + reserved
    bundles = [worker_resources(scale.cpus_per_worker, use_gpu)] * low + [{"CPU": 1.0}] * reserved
    if needed > cpus:
        raise NoRoom(
            f"--num-workers {scale.num_workers} needs {needed:g} CPUs ({low} x {scale.cpus_per_worker:g}"
            + (" + 1 to read rows" if reserved else "")
            + f") and the cluster has {cpus:g}; use fewer workers or a smaller --cpus-per-worker",
            bundles,
        )
    # A worker runs on one node: the nodes' spare parts of a worker's CPUs do not add up.
    places = sum(worker_places(node, scale.cpus_per_worker, 0.0) for node in nodes)
    if low > places:
        raise NoRoom(
            f"--num-workers {scale.num_workers} of {scale.cpus_per_worker:g} CPUs do not fit: the cluster's "
            f"{len(nodes)} nodes hold {places}; use fewer workers or a smaller --cpus-per-worker",
            bundles,
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


def worker_resources(cpus: float, use_gpu: bool) -> dict[str, float]:
    """Return what Ray reserves for a worker of `cpus` CPUs."""
    return {"CPU": cpus} | ({"GPU": 1.0} if use_gpu else {})


def worker_places(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers of `cpus` and `gpus` each fit on a node with the resources `node`."""
    # The small term keeps rounding from losing a worker: 0.3 / 0.1 is 2.9999999999999996.
    by_cpu = int(node.get("CPU", 0.0) / cpus + 1e-9)
    return min(by_cpu, int(node.get("GPU", 0.0) / gpus + 1e-9)) if gpus else by_cpu


def describe_precision(precision: str, use_gpu: bool) -> str:
    """Return `precision` for the plan, with what auto will probably resolve to: the workers decide when they run."""
    if precision != "auto":
        return precision
    if use_gpu:
        return "auto: bf16 on GPUs of capability 8.0 or more, else fp32"
    return f"auto: {loop.resolve_precision('auto', torch.device('cpu'))} on a CPU like this one"
