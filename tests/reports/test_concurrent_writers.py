"""Several runs write their reports at once while readers scan whole tables."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.dataset as dataset
import pytest
from conftest import ROOT

from fashion.reports import runs, schemas, tables
from fashion.storage import Storage

pytestmark = pytest.mark.slow

RUNS, EPOCHS = 8, 60

# What a run's driver writes: an `epochs` table that grows, its row again and again, and a table at the end.
WRITE = """
import sys, time
from fashion.reports import tables
from fashion.training.metrics import epoch_rows
from fashion.storage import open_storage

storage, run_id, epochs = open_storage(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rows = []
for epoch in range(1, epochs + 1):
    metrics = {"epoch": epoch, "lr": 0.1, "epoch_time_s": 1.0, "data_wait_s": 0.0, "val_time_s": 1.0}
    for split in ("train", "val"):
        metrics |= {f"{split}_loss": 1 / epoch, f"{split}_accuracy": 0.5, f"{split}_rows": 100}
    rows += epoch_rows(metrics)
    tables.write_table(storage, "epochs", run_id, rows)
    tables.write_table(storage, "runs", run_id, [{"status": "running", "epochs_done": epoch}])
    time.sleep(0.1)
tables.write_table(storage, "runs", run_id, [{"status": "completed", "epochs_done": epochs}])
"""


@pytest.fixture
def writers(storage: Storage) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Eight writing processes; the test begins when each has written a row."""
    started = [
        subprocess.Popen([sys.executable, "-c", WRITE, storage.uri, f"run-{number}", str(EPOCHS)], cwd=ROOT)
        for number in range(RUNS)
    ]
    deadline = time.monotonic() + 300
    while len(runs.list_runs(storage)) < RUNS:
        assert time.monotonic() < deadline, "the writers do not write"
        time.sleep(0.01)
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_readers_see_every_run_whole_while_eight_write(
    storage: Storage, writers: list[subprocess.Popen[bytes]]
) -> None:
    """Three readers: each sees a run's table before or after a write, never a part of it, never an older one again."""
    folder = Path(storage.path(schemas.REPORTS_FOLDER, "epochs"))
    seen = dict.fromkeys((f"run-{number}" for number in range(RUNS)), 0)
    scans = 0
    while any(process.poll() is None for process in writers):
        for table in (pd.read_parquet(folder), dataset.dataset(folder, partitioning="hive").to_table().to_pandas()):
            counts = table.groupby("run_id", observed=True)["epoch"].agg(["size", "max", "nunique"])
            assert set(counts.index) == set(seen)
            for run_id, (size, last, different) in zip(counts.index, counts.to_numpy(), strict=True):
                assert size == 2 * last == 2 * different, (run_id, size, last, different)
                assert last >= seen[run_id]
                seen[run_id] = int(last)
        assert {row["status"] for run_id in seen for row in tables.read_table(storage, "runs", run_id)} <= {
            "running",
            "completed",
        }
        scans += 1
    assert all(process.wait() == 0 for process in writers)
    assert scans >= 3, "they were read while they wrote"
    for run_id in seen:
        assert len(tables.read_table(storage, "epochs", run_id)) == 2 * EPOCHS
        assert runs.load_run(storage, run_id)["status"] == "completed"
    left = [path.name for path in folder.rglob("*") if path.is_file() and path.name != "epochs.parquet"]
    assert not left, "nothing half-written stays"
