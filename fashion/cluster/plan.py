"""The plan of a run: workers, resources, batch and steps, fitted to the live cluster before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fashion.config import ScaleConfig, TrainConfig, UserError, require
from fashion.data.manifest import Manifest
from fashion.training import loop

Node = dict[str, float]
"""Resources of a node as Ray names them, such as CPU, GPU, memory (in bytes), and accelerator_type:A10G."""
ACCELERATOR = "accelerator_type:"
# Keeps rounding from losing a worker: 0.3 / 0.1 is 2.9999999999999996.
ROUNDING = 1e-9


class NoRoom(UserError):
    """The cluster, as it is now, is too small; `bundles` are the resources that would do, one for each process."""

    def __init__(self, message: str, bundles: list[Node]) -> None:
        super().__init__(message)
        self.bundles = bundles


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
    gpu_kinds: tuple[str, ...] = ()
    """Kinds of GPUs in the cluster, as Ray names them."""
    why_workers: str = ""
    """Why the workers are not those that were asked for; empty if they are."""

    def resources_per_worker(self) -> dict[str, float]:
        """Return what Ray reserves for each worker, as `ScalingConfig` takes it."""
        return worker_resources(self.cpus_per_worker, self.use_gpu)

    def lines(self) -> list[str]:
        """Return the plan as text for the console, a line per topic."""
        low, high = self.num_workers
        workers = str(high) if low == high else f"{low} to {high}"
        each = f"{self.cpus_per_worker:g} CPU" + (" and 1 GPU" if self.use_gpu else "")
        gpus = f"{self.cluster_gpus:g} GPUs" + (f" ({', '.join(self.gpu_kinds)})" if self.gpu_kinds else "")
        unlike = self.use_gpu and len(self.gpu_kinds) > 1 and high > 1
        return [
            f"cluster    {self.num_nodes} node(s), {self.cluster_cpus:g} CPUs, {gpus}",
            f"workers    {workers}, each {each}, {self.threads_per_worker} thread(s)"
            + (f" ({self.why_workers})" if self.why_workers else ""),
            *(["           on unlike GPUs the bits of a run depend on which ones it gets"] if unlike else []),
            f"batch      {self.global_batch_size} rows a step, {self.global_batch_size // high} a worker",
            f"data       {self.dataset}, {self.num_train_rows} train and {self.num_val_rows} val rows",
            f"steps      {self.steps_per_epoch} an epoch, {self.epochs} epochs",
            f"precision  {self.precision}",
        ]


def make_plan(config: TrainConfig, scale: ScaleConfig, manifest: Manifest) -> Plan:
    """Return the plan of a run on the live cluster; raises `UserError` with the numbers if the cluster is too small."""
    return plan_for(live_nodes(), config, scale, manifest)


def live_nodes() -> list[Node]:
    """Return the resources of each node of the cluster that is alive."""
    import ray  # not at the top: to plan for a table of nodes takes no Ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def plan_for(
    nodes: Sequence[Node], config: TrainConfig, scale: ScaleConfig, manifest: Manifest, flag: str = "--num-workers"
) -> Plan:
    """Return the plan of a run on a cluster of `nodes`; raises `UserError` with the numbers if they are too small.

    It depends on nothing else, so a test may give any table of nodes. Messages call the number of workers `flag`.
    """
    # Ray Data needs a CPU of its own to stream rows, while the workers occupy theirs.
    reserved = 1 if config.data_mode == "streaming" else 0
    workers = choose_workers(nodes, scale, config.global_batch_size, reserved, flag)
    require(
        workers.use_gpu or config.precision != "tf32",
        "--precision tf32 is arithmetic of GPUs, and this run is planned for CPUs; take fp32, bf16 or auto",
    )
    num_val_rows = manifest.rows["val"] if config.hold_out_val else 0
    num_train_rows = manifest.rows["train"] + manifest.rows["val"] - num_val_rows
    rows = min(num_train_rows, config.max_train_rows or num_train_rows)
    return Plan(
        num_workers=(workers.low, workers.high),
        use_gpu=workers.use_gpu,
        cpus_per_worker=scale.cpus_per_worker,
        threads_per_worker=scale.threads_per_worker,
        global_batch_size=config.global_batch_size,
        num_train_rows=rows,
        num_val_rows=num_val_rows,
        steps_per_epoch=config.steps_per_epoch(rows),
        epochs=config.last_epoch,
        precision=describe_precision(config.precision, workers.use_gpu),
        cluster_cpus=total(nodes, "CPU"),
        cluster_gpus=total(nodes, "GPU"),
        num_nodes=len(nodes),
        dataset=f"{manifest.dataset} ({manifest.sha256[:12]})",
        gpu_kinds=gpu_kinds(nodes),
        why_workers=workers.why,
    )


@dataclass(frozen=True)
class Workers:
    """The choice between CPUs and GPUs: fewest and most workers, and why they are others than asked for, if so."""

    low: int
    high: int
    use_gpu: bool
    why: str = ""


def choose_workers(nodes: Sequence[Node], scale: ScaleConfig, batch_size: int, reserved: int, flag: str) -> Workers:
    """Return the workers that `scale` asks for, on GPUs where it wants or may have them; else raise `UserError`.

    `auto` prefers one GPU to any number of CPUs, and so takes fewer workers than asked for where there are too few GPUs
    for them: as many as hold a GPU each and divide `batch_size`. `reserved` CPUs stay free on one node.
    """
    (low, high), cpus = scale.worker_range, scale.cpus_per_worker
    on_gpus = places(nodes, cpus, 1.0, reserved)
    if scale.use_gpu == "no" or (scale.use_gpu == "auto" and not on_gpus):
        gpus = total(nodes, "GPU")
        why = "" if scale.use_gpu == "no" or not gpus else f"no node has a whole GPU and {cpus:g} CPUs for a worker"
        require_cpus(nodes, scale, reserved, flag)
        return Workers(low, high, use_gpu=False, why=why)
    if scale.use_gpu == "yes":
        require_gpus(nodes, scale, reserved, flag)
    if on_gpus >= low:
        return Workers(low, high, use_gpu=True)
    width = max(width for width in range(1, on_gpus + 1) if batch_size % width == 0)
    why = f"instead of {low} on CPUs, for the GPU(s) of the cluster hold {on_gpus}; --use-gpu no takes CPUs"
    return Workers(width, width, use_gpu=True, why=why)


def worker_resources(cpus: float, use_gpu: bool) -> Node:
    """Return what Ray reserves for a worker of `cpus` CPUs."""
    return {"CPU": cpus} | ({"GPU": 1.0} if use_gpu else {})


def require_room(condition: bool, message: str, bundles: list[Node]) -> None:
    """Raise `NoRoom(message, bundles)` unless `condition` holds."""
    if not condition:
        raise NoRoom(message, bundles)


def require_gpus(nodes: Sequence[Node], scale: ScaleConfig, reserved: int, flag: str) -> None:
    """Raise `NoRoom` unless the nodes hold the workers that `scale` asks for, each with a GPU."""
    (low, _), gpus, cpus = scale.worker_range, total(nodes, "GPU"), scale.cpus_per_worker
    bundles = [worker_resources(cpus, use_gpu=True)] * low + [{"CPU": 1.0}] * reserved
    require_room(
        gpus >= low,
        f"--use-gpu yes needs {low} GPU(s), one for each worker, and the cluster has {gpus:g}; "
        "use --use-gpu auto, or fewer workers",
        bundles,
    )
    held = places(nodes, cpus, 1.0, reserved)
    # A worker's CPUs and its GPU come from one node: what is left of two nodes does not add up.
    require_room(
        held >= low,
        f"{flag} {scale.num_workers} of {cpus:g} CPUs and 1 GPU do not fit: the cluster's {len(nodes)} node(s) "
        f"({describe_nodes(nodes)}) hold {held}{' beside a CPU to read rows' if reserved else ''}; "
        "use fewer workers, a smaller --cpus-per-worker, or --use-gpu auto",
        bundles,
    )


def require_cpus(nodes: Sequence[Node], scale: ScaleConfig, reserved: int, flag: str) -> None:
    """Raise `NoRoom` unless the nodes hold the workers that `scale` asks for, on CPUs."""
    (low, _), cpus = scale.worker_range, total(nodes, "CPU")
    needed = low * scale.cpus_per_worker + reserved
    bundles = [worker_resources(scale.cpus_per_worker, use_gpu=False)] * low + [{"CPU": 1.0}] * reserved
    require_room(
        needed <= cpus,
        f"{flag} {scale.num_workers} needs {needed:g} CPUs ({low} x {scale.cpus_per_worker:g}"
        + (" + 1 to read rows" if reserved else "")
        + f") and the cluster has {cpus:g}; use fewer workers or a smaller --cpus-per-worker",
        bundles,
    )
    held = places(nodes, scale.cpus_per_worker, 0.0, reserved)
    # A worker runs on one node: the nodes' spare parts of a worker's CPUs do not add up.
    require_room(
        low <= held,
        f"{flag} {scale.num_workers} of {scale.cpus_per_worker:g} CPUs do not fit: the cluster's "
        f"{len(nodes)} nodes hold {held}; use fewer workers or a smaller --cpus-per-worker",
        bundles,
    )


def total(nodes: Sequence[Node], kind: str) -> float:
    """Return how much of a resource all nodes have together."""
    return sum(node.get(kind, 0.0) for node in nodes)


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Return the CPUs and GPUs of each node, at most eight of them."""
    each = [f"{node.get('CPU', 0.0):g} CPUs, {node.get('GPU', 0.0):g} GPUs" for node in nodes]
    return "; ".join([*each[:8], "..."] if len(each) > 8 else each)


def gpu_kinds(nodes: Sequence[Node]) -> tuple[str, ...]:
    """Return the kinds of GPUs in the cluster as Ray names them, such as A10G; empty if it knows none."""
    named = {key.partition(":")[2] for node in nodes if node.get("GPU") for key in node if key.startswith(ACCELERATOR)}
    return tuple(sorted(named))


def places(nodes: Sequence[Node], cpus: float, gpus: float, reserved: float = 0.0) -> int:
    """Return how many workers of `cpus` and `gpus` the nodes hold, while one node keeps `reserved` CPUs free."""
    own = [worker_places(node, cpus, gpus) for node in nodes]
    if not reserved:
        return sum(own)
    left = [node | {"CPU": node.get("CPU", 0.0) - reserved} for node in nodes]
    lost = [
        fits - worker_places(rest, cpus, gpus) for fits, rest in zip(own, left, strict=True) if rest["CPU"] >= -ROUNDING
    ]
    return sum(own) - min(lost) if lost else 0


def worker_places(node: Node, cpus: float, gpus: float) -> int:
    """Return how many workers of `cpus` and `gpus` each fit on a node with the resources `node`.

    A GPU is shared in equal parts only: two workers of 0.4 fit on each, and none across two of them.
    """
    by_cpu = int(node.get("CPU", 0.0) / cpus + ROUNDING)
    if not gpus:
        return by_cpu
    available = node.get("GPU", 0.0)
    if gpus >= 1:
        return min(by_cpu, int(available / gpus + ROUNDING))
    whole, rest = divmod(available, 1.0)
    return min(by_cpu, int(whole) * int(1 / gpus + ROUNDING) + int(rest / gpus + ROUNDING))


def describe_precision(precision: str, use_gpu: bool) -> str:
    """Return `precision` for the plan, with what auto will probably resolve to: the workers decide when they run."""
    if precision != "auto":
        return precision
    if use_gpu:
        return "auto: bf16 on GPUs of capability 8.0 or more, else fp32"
    return f"auto: {loop.resolve_precision('auto', torch.device('cpu'))} on a CPU like this one"
