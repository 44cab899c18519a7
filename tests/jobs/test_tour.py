"""docs/tour.md from beginning to end: its commands and its Python, on a few hundred rows in place of the data set."""

import importlib
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT, call_job
from documents import Fence, fences_of, run_make

from fashion import cli
from fashion.storage import Storage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


def commands_of(fence: Fence, folder: Path) -> list[list[str]]:
    """Return what `make` would run for a block, in `folder` in place of the clone's."""
    found = []
    for line in fence.text.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "make", line
        code, printed = run_make(*words)
        assert code == 0, printed
        found += [shlex.split(each) for each in printed.splitlines() if each.startswith("echo jobs.")]
    return [[word.replace(str(ROOT), str(folder)) for word in words[1:]] for words in found]


def test_every_step_of_the_tour_works(
    tiny_storage: Storage, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_storage.root, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "DEFAULT_STORAGE", "./results")
    names: dict[str, Any] = {}
    ran = []
    for fence in fences_of((ROOT / "docs" / "tour.md").read_text()):
        if fence.language == "python":
            exec(compile(fence.text, f"docs/tour.md, line {fence.line}", "exec"), names)
            continue
        for module, *flags in commands_of(fence, tmp_path):
            # The tests' environment may name the real data, of which this storage holds none.
            source = ["--source", "auto"] if module in ("jobs.train", "jobs.tune") else []
            done = call_job(importlib.import_module(module).main, *flags, *source)
            assert done.returncode == 0, (module, flags, done.stderr)
            ran.append(module)
    assert ran == [f"jobs.{name}" for name in ("train", "report", "tune", "evaluate", "predict", "report")]
    assert set(pd.read_parquet("results/reports/runs")["run_id"]) >= {"mine", "again"}
    assert names["result"].row["status"] == "completed"
    # The storage that other tests write to as well may hold trials of theirs.
    assert names["trials"]["search_id"].value_counts()[["few", "more"]].tolist() == [4, 4]
    assert names["found"].probabilities.shape == (3, 10)
    assert len(names["predictions"]) == 200
    assert "Predictions on your images" in Path("results/report.html").read_text()
