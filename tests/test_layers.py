"""Layers point one way: which package imports which, and what each may load, seen from a fresh interpreter."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.commands

# A package imports itself and what stands above it in this table, never what stands below. Beside each: what importing
# all of its modules may load besides what those above it may.
PACKAGES: dict[str, set[str]] = {
    "config": set(),
    "cli": set(),
    "storage": {"pyarrow"},
    "data": {"pyarrow"},
    "model": {"torch"},
    "training": set(),
    "reports": set(),
    "cluster": {"ray", "pandas"},
    "inference": set(),
    "distributed": set(),
    "search": {"scipy"},
    "ablation": set(),
    "bench": set(),
}
# `ray.train.v2` and `ray.experimental` are not what Ray's documentation names.
PRIVATE = re.compile("_[a-z].*|v2|experimental")
HEAVY = ("pyarrow", "plotly", "matplotlib", "torch", "ray", "torchvision", "pandas", "scipy")
# Modules of the packages above that others rely on to load quickly: commands import them before they parse.
LIGHT = ("fashion.search.space", "fashion.ablation.parts", "fashion.training.metrics", "fashion.cluster.head")


def modules_of(package: str) -> list[str]:
    """Return the dotted names of a package's modules."""
    place = ROOT / "fashion" / package
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def loaded_by(*groups: list[str]) -> list[set[str]]:
    """Return the heavy packages that a fresh interpreter has loaded after importing each group of modules in turn."""
    lines = ["import sys"]
    for modules in groups:
        lines += [f"import {name}" for name in modules]
        lines += [f"print(*[name for name in {HEAVY!r} if name in sys.modules])"]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def imports_of(path: Path) -> set[str]:
    """Return the project's modules that a file imports anywhere in it, for type checkers included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("fashion", "jobs")}


def packages_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("fashion.")}


def files_of(package: str) -> list[Path]:
    place = ROOT / "fashion" / package
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    allowed = set(list(PACKAGES)[: list(PACKAGES).index(package) + 1])
    for file in files_of(package):
        assert packages_of(imports_of(file)) <= allowed, file


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def late():\n    from fashion.bench import steps\n    import jobs.train\n")
    assert packages_of(imports_of(file)) == {"bench"}
    assert "jobs.train" in imports_of(file)


def test_a_package_loads_only_what_it_may() -> None:
    """The reports by themselves as well: who reads them needs neither Ray nor torch."""
    allowed: set[str] = set()
    for package, loaded in zip(PACKAGES, loaded_by(*map(modules_of, PACKAGES)), strict=True):
        allowed |= PACKAGES[package]
        assert loaded <= allowed, package
    assert loaded_by(modules_of("reports")) == [{"pyarrow"}]


def test_commands_and_what_they_need_to_parse_load_nothing_heavy() -> None:
    jobs = [f"jobs.{path.stem}" for path in sorted((ROOT / "jobs").glob("*.py")) if path.stem != "__init__"]
    assert loaded_by([*jobs, *LIGHT]) == [set()]


def test_every_package_has_its_layer_and_modules_have_their_size() -> None:
    top = {
        path.stem for path in (ROOT / "fashion").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert top - {"__init__"} == set(PACKAGES)
    assert len(list((ROOT / "fashion").glob("*.py"))) <= 6
    for folder in {path.parent for path in (ROOT / "fashion").rglob("*.py")} - {ROOT / "fashion"}:
        assert len(list(folder.glob("*.py"))) <= 9 + 1, folder  # and __init__
    for path in [*(ROOT / "fashion").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_functions_fit_a_screen_and_take_few_parameters() -> None:
    for path in [*(ROOT / "fashion").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                taken = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([name for name in taken if name not in ("self", "cls")]) <= 8, (path, node.name)
                assert (node.end_lineno or 0) - node.lineno < 60, (path, node.name)


def test_the_library_never_imports_a_job_and_jobs_never_each_other() -> None:
    for path in [*(ROOT / "fashion").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        assert not {name for name in imports_of(path) if name.startswith("jobs")}, path


def private_parts_of_ray(path: Path) -> set[str]:
    """Return what a file imports or reaches of Ray's private parts."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            first, *parts = name.split(".")
            if first == "ray" and any(PRIVATE.fullmatch(part) for part in parts):
                found.add(f"{node.lineno} {name}")
    return found


def test_private_parts_of_ray_stand_in_one_module_that_is_loaded_on_demand(tmp_path: Path) -> None:
    internals = ROOT / "fashion" / "distributed" / "ray_internals.py"
    others = {*(ROOT / "fashion").rglob("*.py"), *(ROOT / "jobs").glob("*.py")} - {internals}
    assert private_parts_of_ray(internals)
    assert {path.name: private_parts_of_ray(path) for path in others if private_parts_of_ray(path)} == {}
    # No module imports it at its top, so that it may fail to load under another Ray.
    for path in others:
        tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [top for top in tops if "ray_internals" in ast.unparse(top)], path
    file = tmp_path / "module.py"
    file.write_text(
        "import ray._raylet\ndef late():\n    from ray.train.v2 import api\n    ray._private.state.actors()\n"
    )
    assert len(private_parts_of_ray(file)) >= 3
