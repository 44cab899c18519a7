"""Layers point one way: which module may load what, seen from a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.commands

# Heavy packages in the order in which layers may load them -> the modules that may load no later one.
LAYERS: dict[str, list[str]] = {
    "nothing": [
        "config",
        "ablation",
        "cluster",
        "data",
        "distributed",
        "inference",
        "model",
        "reports",
        "reports.page",
        "search",
        "training",
        "cli",
        "training.metrics",
        "search.space",
        "distributed.watchdog",
        "data.synthetic",
        "ablation.parts",
        "reports.console",
        "cluster.head",
        "reports.page.figures",
        "reports.page.drawing",
        "reports.page.html",
        "bench",
        "bench.peers",
        "bench.startup",
        "jobs.prepare",
        "jobs.train",
        "jobs.tune",
        "jobs.evaluate",
        "jobs.bench",
        "jobs.report",
        "jobs.study",
    ],
    "pyarrow": [
        "cluster.lock",
        "storage",
        "data.prepare",
        "reports.tables",
        "search.trial_store",
        "reports.page.sections",
        "bench.peer_keras",
    ],
    "torch": [
        "training.ema",
        "model.dropout",
        "model.network",
        "training.epoch",
        "training.optimizer",
        "model.winograd",
        "training.checkpoint",
        "distributed.shared_memory",
        "training.run",
        "training.checkpoint_manager",
        "bench.measurement",
        "bench.peer_ddp",
    ],
    "ray": [
        "bench.others",
        "bench.rows",
        "bench.steps",
        "bench.timing",
        "bench.trials",
        "cluster.plan",
        "ablation.statistics",
        "inference.evaluation",
        "inference.export",
        "distributed.interfaces",
        "cluster.preflight",
        "reports.progress",
        "search.search",
        "search.scheduler",
        "ablation.study",
        "distributed.lean_trainer",
        "reports.tracking",
        "distributed.trainer",
        "search.trial",
        "distributed.worker",
    ],
}
HEAVY = ("pyarrow", "plotly", "torch", "ray", "torchvision", "pandas", "scipy")


def qualified(name: str) -> str:
    return name if name.startswith("jobs.") else f"fashion.{name}"


def loaded_after(*layers: str) -> list[str]:
    """Return the heavy packages that a fresh interpreter has loaded after importing all modules of `layers`."""
    modules = [qualified(name) for layer in layers for name in LAYERS[layer]]
    code = f"import sys, {', '.join(modules)}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def imports_of(path: Path) -> set[str]:
    """Return the project's modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("fashion", "jobs")}


def test_a_layer_loads_only_what_it_may() -> None:
    assert loaded_after("nothing") == []
    assert loaded_after("nothing", "pyarrow") == ["pyarrow"]
    assert loaded_after("nothing", "pyarrow", "torch") == ["pyarrow", "torch"]


def test_every_module_has_its_layer() -> None:
    files = {path.relative_to(ROOT / "fashion").with_suffix("") for path in (ROOT / "fashion").rglob("*.py")}
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files} - {"__init__"}
    assert modules == {name for names in LAYERS.values() for name in names if not name.startswith("jobs.")}


def test_the_library_never_imports_a_job_and_jobs_never_each_other() -> None:
    for path in [*(ROOT / "fashion").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        assert not {name for name in imports_of(path) if name.startswith("jobs")}, path
