"""Plans of runs and searches on tables of nodes, as a user of such a cluster would expect them; nothing is started."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fashion.cluster.plan import Node, Plan, plan_for, worker_places
from fashion.config import ScaleConfig, TrainConfig, UserError
from fashion.data.manifest import Manifest
from fashion.model.network import FashionCNN
from fashion.search.plan import GPU_BYTES_PER_IMAGE, SearchPlan, search_plan_for
from fashion.search.space import SearchConfig, SearchScale

ROWS = {"train": 55_000, "val": 5_000, "test": 10_000}
MANIFEST = Manifest("fashion-mnist", "ab" * 32, 0, 5_000, ROWS, {}, 0.3, 0.35, {}, {})
IN_FP32 = TrainConfig(precision="fp32")
SEARCH = SearchConfig(num_samples=8)


def node(cpus: float, gpus: float = 0.0, kind: str = "") -> Node:
    resources = {"CPU": cpus, "memory": 32e9, "GPU": gpus, f"accelerator_type:{kind}": float(bool(kind))}
    return {name: amount for name, amount in resources.items() if amount}


def plan(nodes: list[Node], config: TrainConfig = IN_FP32, **scale: Any) -> Plan:
    return plan_for(nodes, config, ScaleConfig(**scale), MANIFEST)


def line(shown: Plan | SearchPlan, topic: str) -> str:
    return next(text for text in shown.lines() if text.startswith(topic))


CLUSTERS: dict[str, tuple[list[Node], dict[str, Any], tuple[int, int], bool]] = {
    # name: nodes, what is asked for, workers from and to, whether they have GPUs
    "no GPU": ([node(4)], {}, (2, 2), False),
    "no GPU, two nodes": ([node(1), node(1)], {}, (2, 2), False),
    "one GPU, the default of two workers": ([node(4, 1)], {}, (1, 1), True),
    "one GPU, a range from one": ([node(4, 1)], {"num_workers": "1:2"}, (1, 2), True),
    "one GPU, CPUs asked for": ([node(4, 1)], {"use_gpu": "no"}, (2, 2), False),
    "two GPUs on one node": ([node(8, 2)], {}, (2, 2), True),
    "two nodes of one GPU": ([node(0), node(4, 1, "A10G"), node(4, 1, "A10G")], {}, (2, 2), True),
    "three GPUs for four workers: three do not divide 128": ([node(8, 3)], {"num_workers": "4"}, (2, 2), True),
    "many CPUs beside one GPU": ([node(64), node(8, 1)], {"num_workers": "16"}, (1, 1), True),
    "eight GPUs and CPUs for four workers": ([node(4, 8)], {"num_workers": "8"}, (4, 4), True),
    "CPUs on one node, GPUs on another": ([node(16), node(4, 8)], {"num_workers": "4", "use_gpu": "yes"}, (4, 4), True),
    "a GPU on a node without a CPU": ([node(4), node(0, 1)], {}, (2, 2), False),
    "halves of GPUs": ([node(4, 0.5), node(4, 0.5)], {}, (2, 2), False),
    "unlike GPUs": ([node(4, 1, "A10G"), node(4, 1, "T4")], {"use_gpu": "yes"}, (2, 2), True),
    "half a GPU too many": ([node(4, 1.5)], {"num_workers": "2"}, (1, 1), True),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_plan_is_what_its_user_expects(name: str) -> None:
    nodes, asked, workers, on_gpus = CLUSTERS[name]
    found = plan(nodes, **asked)
    assert (found.num_workers, found.use_gpu) == (workers, on_gpus)
    says_why = "instead of" in line(found, "workers") or "no node has a whole GPU" in line(found, "workers")
    is_other = workers != ScaleConfig(**asked).worker_range
    has_idle_gpus = not on_gpus and found.cluster_gpus > 0 and asked.get("use_gpu") != "no"
    assert says_why == (is_other or has_idle_gpus), found.lines()


REFUSED: dict[str, tuple[list[Node], dict[str, Any], str]] = {
    "no GPU": (
        [node(4)],
        {"use_gpu": "yes"},
        r"--use-gpu yes needs 2 GPU\(s\), .* the cluster has 0; use --use-gpu auto",
    ),
    "one for two": ([node(4, 1)], {"use_gpu": "yes"}, r"needs 2 GPU\(s\), one for each worker, and the cluster has 1"),
    "GPUs where too few CPUs are": (
        [node(16), node(4, 8)],
        {"num_workers": "8", "use_gpu": "yes"},
        r"--num-workers 8 of 1 CPUs and 1 GPU do not fit: .* \(16 CPUs, 0 GPUs; 4 CPUs, 8 GPUs\) hold 4;",
    ),
    "halves": ([node(4, 0.5)] * 4, {"use_gpu": "yes"}, "do not fit: .* hold 0"),
    "CPUs in halves of a worker": ([node(1)] * 4, {"cpus_per_worker": 2}, "2 of 2 CPUs do not fit: .* hold 0"),
    "too few CPUs": ([node(1)], {}, "needs 2 CPUs .* the cluster has 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_never_fit_is_refused_with_the_numbers(name: str) -> None:
    nodes, asked, told = REFUSED[name]
    with pytest.raises(UserError, match=told):
        plan(nodes, **asked)


def test_streaming_leaves_a_cpu_free_on_one_node_beside_gpus_too() -> None:
    streaming = TrainConfig(precision="fp32", data_mode="streaming")
    assert plan([node(2, 2)], streaming).num_workers == (1, 1)
    assert plan([node(2, 2), node(1)], streaming).num_workers == (2, 2)
    with pytest.raises(UserError, match="hold 1 beside a CPU to read rows"):
        plan([node(2, 2)], streaming, use_gpu="yes")


def test_a_plan_names_the_gpus_and_says_that_unlike_ones_do_not_repeat_bits() -> None:
    mixed = [node(4, 1, "T4"), node(4, 1, "A10G")]
    assert "2 GPUs (A10G, T4)" in line(plan(mixed), "cluster")
    assert any("unlike GPUs" in text for text in plan(mixed).lines())
    assert not any("unlike GPUs" in text for text in plan(mixed, num_workers="1").lines())
    assert not any("unlike GPUs" in text for text in plan([node(4, 2, "T4")]).lines())


def test_tf32_is_refused_where_the_plan_has_no_gpu() -> None:
    assert plan([node(4, 2)], TrainConfig(precision="tf32")).precision == "tf32"
    with pytest.raises(UserError, match="--precision tf32 is arithmetic of GPUs"):
        plan([node(4)], TrainConfig(precision="tf32"))


def test_a_share_of_a_gpu_lies_within_one_gpu() -> None:
    assert worker_places(node(16, 2), 1, 0.4) == 4, "two on each, and none across both"
    assert worker_places(node(16, 1), 0.1, 0.1) == 10
    assert worker_places(node(16, 2), 1, 0.75) == 2


def search(nodes: list[Node], refit: bool = True, base: TrainConfig = IN_FP32, **scale: Any) -> SearchPlan:
    return search_plan_for(nodes, SEARCH, base, SearchScale(**scale), MANIFEST, refit)


def test_a_search_plans_its_refit_on_the_one_gpu_that_there_is() -> None:
    found = search([node(8, 1)], gpus_per_trial=0.25)
    assert found.concurrent == 4
    assert found.refit is not None
    assert (found.refit.num_workers, found.refit.use_gpu) == ((1, 1), True)
    assert "1, each 1 CPU and 1 GPU" in line(found, "refit")
    assert found.refit.num_train_rows == 60_000, "the winner is trained on val as well"
    assert search([node(8, 2)], gpus_per_trial=1).refit == replace(
        found.refit, num_workers=(2, 2), cluster_gpus=2, why_workers=""
    )


def test_a_refit_that_does_not_fit_is_refused_before_the_search() -> None:
    assert search([node(1)], refit=False).refit is None
    with pytest.raises(UserError, match="--refit takes --refit-workers; that 2 needs 2 CPUs"):
        search([node(1)])


def test_a_search_that_leaves_gpus_idle_says_so() -> None:
    assert "8 GPU(s) of the cluster stay idle; --gpus-per-trial 1" in line(search([node(16, 8)]), "gpus")
    for found in (search([node(16, 8)], gpus_per_trial=1), search([node(16)])):
        assert not any(text.startswith("gpus") for text in found.lines())


def test_a_search_counts_the_memory_of_trials_that_share_a_gpu() -> None:
    nodes = [node(64, 1, "T4")]
    found = search(nodes, gpus_per_trial=0.25)
    assert 1000 < found.gpu_mb < 4000
    assert f"about {found.gpu_mb / 1000:.1f} GB" in line(found, "memory")
    with pytest.raises(UserError, match=r"--gpus-per-trial 0.02 is 0.3 GB of a T4 of 16 GB, and a trial takes about"):
        search(nodes, gpus_per_trial=0.02)
    least = -(-100 * found.gpu_mb // 16_000) / 100
    assert search(nodes, gpus_per_trial=least).concurrent >= 4, "the share that the message names is enough"
    assert search([node(64)]).gpu_mb == 0


def test_the_memory_that_is_counted_for_an_image_holds_what_autograd_keeps_of_it() -> None:
    with torch.device("meta"):
        network = FashionCNN(pixel_mean=0.3, pixel_std=0.4, depth="deep-bn", dropout_conv=0.1, padding="learned")

    def kept(rows: int) -> int:
        tensors: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            return tensors.setdefault(id(tensor), tensor)

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.zeros(rows, 1, 28, 28, dtype=torch.uint8, device="meta"))
        return sum(tensor.nbytes for tensor in tensors.values())

    each = (kept(6) - kept(2)) / 4
    assert GPU_BYTES_PER_IMAGE / 4 < each <= GPU_BYTES_PER_IMAGE / 2
