"""The trial store: events in any order of crashes, rows of two layouts, one call that reads them; no Ray needed."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from fashion.config import TrainConfig, UserError
from fashion.reports import journal, runs, schemas, tables
from fashion.reports.page import reading
from fashion.search.space import SearchConfig
from fashion.search.trial_store import Trial, TrialStore, name_of, run_id_of
from fashion.storage import Storage, open_storage
from fashion.training import metrics as metric

CONFIG = SearchConfig(num_samples=4, max_epochs=3)
BASE = TrainConfig(epochs=3).to_dict()


def open_store(storage: Storage, config: SearchConfig = CONFIG, source_hash: str = "now") -> TrialStore:
    return TrialStore(storage, "s", config, {"dataset": "fashion-mnist", "source_hash": source_hash}, BASE)


def epoch(number: int, accuracy: float) -> dict[str, Any]:
    """Metrics of one epoch, as a trial reports them."""
    figures = {"loss": 1.0 - accuracy, "accuracy": accuracy, "rows": 100}
    both = {f"{split}_{name}": value for split in ("train", "val") for name, value in figures.items()}
    times = {"epoch_time_s": 2.0, "data_wait_s": 0.0, "val_time_s": 1.0, "val_wait_s": 0.0}
    return {"epoch": number, "lr": 1e-3, "world_size": 1, "device": "cpu"} | both | times


def test_rows_turn_into_metrics_and_back() -> None:
    history = [epoch(1, 0.5), epoch(2, 0.75)]
    rows = [row for metrics in history for row in metric.epoch_rows(metrics)]
    bare = [{key: value for key, value in each.items() if key not in ("world_size", "device")} for each in history]
    assert metric.from_rows(rows) == bare


def write_few(store: TrialStore) -> None:
    """A trial that was stopped, one that goes on, one that diverged."""
    store.start("t0000", {"lr": 0.1, "dropout_fc": 0.2})
    store.add_epoch("t0000", epoch(1, 0.6), 3.0)
    store.add_epoch("t0000", epoch(2, 0.5), 3.0)
    store.end("t0000", "stopped")
    store.start("t0001", {"lr": 0.2})
    store.add_epoch("t0001", epoch(1, 0.7), 3.0)
    store.start("t0002", {"lr": 0.3})
    store.end("t0002", "diverged", "loss is not finite")


def test_a_trial_store_is_read_back_as_it_was_written(storage: Storage) -> None:
    with open_store(storage) as store:
        write_few(store)
    again = open_store(storage)
    assert again.trials == store.trials
    assert (again.num_ended, again.has_news) == (2, False)
    assert [trial.trial_id for trial in again.unfinished()] == ["t0001"]
    assert again.not_started() == [3]
    assert [trial.trial_id for trial in again.ranked()] == ["t0001", "t0000", "t0002"]
    judged = {trial.trial_id: len(history) for trial, history in again.judged()}
    assert judged == {"t0000": 2, "t0001": 0, "t0002": 0}, "an unfinished trial's last epoch may not have been judged"


def test_rows_of_a_trial(storage: Storage) -> None:
    with open_store(storage) as store:
        store.start("t0000", {"lr": 0.1, "padding": 7})
        store.add_epoch("t0000", epoch(1, 0.6), 3.0)
        store.add_epoch("t0000", epoch(2, 0.5), 3.0)
        store.add_epoch("t0000", epoch(2, 0.55), 3.0)  # reported again after a crash
        store.end("t0000", "error", "RuntimeError: boom")
    [row] = tables.read_table(storage, "trials", "s-t0000")
    assert list(row) == schemas.SCHEMAS["trials"].names
    assert (row["search_id"], row["trial_id"], row["status"], row["error"]) == (
        "s",
        "t0000",
        "error",
        "RuntimeError: boom",
    )
    assert (row["lr"], row["padding"], row["settings_json"]) == (0.1, None, '{"lr": 0.1, "padding": 7}')
    assert (row["epochs_done"], row["rung"], row["best_epoch"], row["max_epochs"]) == (2, 1, 1, 3)
    assert (row["val_accuracy"], row["last_val_accuracy"], row["wall_s"]) == (0.6, 0.55, 9.0)
    run = runs.load_run(storage, "s-t0000")
    assert (run["kind"], run["status"], run["search_id"], run["epochs_done"]) == ("trial", "failed", "s", 2)
    assert (run["device"], run["world_size"]) == ("cpu", 1)
    assert run["started_at"] <= run["finished_at"] <= datetime.now(UTC)
    rows = tables.read_table(storage, "epochs", "s-t0000")
    assert [(each["epoch"], each["split"]) for each in rows] == [(1, "train"), (1, "val"), (2, "train"), (2, "val")]
    with pytest.raises(UserError, match=r"--run-id s-t0009 does not exist .* there are s-t0000"):
        runs.load_run(storage, "s-t0009")


def test_a_thousand_trials_are_few_files_that_are_read_quickly(storage: Storage) -> None:
    config = replace(CONFIG, num_samples=1000)
    with open_store(storage, config) as store:
        for number in range(1000):
            store.start(name_of(number), {"lr": 0.1})
            for count in (1, 2, 3):
                store.add_epoch(name_of(number), epoch(count, number / 1000), 3.0)
            store.end(name_of(number), "completed")
    files = [path for path in Path(storage.root).rglob("*") if path.is_file()]
    assert len(files) == 3
    started = time.perf_counter()
    again = open_store(storage, config)
    assert time.perf_counter() - started < 3.0
    assert again.ranked()[0].trial_id == "t0999"
    assert len(pd.read_parquet(storage.path("reports", "epochs"))) == 6000
    assert len(reading.load_reports(storage).searches[0].trials) == 1000


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("trials", [{"settings_json": None}]),
        ("trials", [{"settings_json": "[1]"}]),
        ("runs", []),
        ("epochs", []),
        ("epochs", [{"epoch": 1, "split": "other", "loss": 1.0}]),
        ("epochs", [row | {"epoch": 2} for row in metric.epoch_rows(epoch(1, 0.5))]),
    ],
)
def test_damaged_rows_of_a_trial_are_refused(storage: Storage, table: str, rows: list[dict[str, Any]]) -> None:
    with open_store(storage) as store:
        store.start("t0000", {"lr": 0.1})
        store.add_epoch("t0000", epoch(1, 0.5), 3.0)
    named = [{"run_id": "s-t0000"} | ({"trial_id": "t0000"} if table == "trials" else {}) | row for row in rows]
    tables.write_search_table(storage, table, "s", tables.in_file_schema(table, named), {})
    with pytest.raises(UserError, match="the reports of s-t0000 are damaged"):
        open_store(storage)


@pytest.mark.parametrize("table", tables.SEARCH_TABLES)
def test_a_search_without_one_of_its_files_is_not_begun_anew(storage: Storage, table: str) -> None:
    with open_store(storage) as store:
        write_few(store)
    Path(storage.path("reports", table, "s.parquet")).unlink()
    with pytest.raises(
        UserError, match=rf"the table {table} has no file s.parquet, but .*; restore it from a copy, or"
    ):
        open_store(storage)


def test_the_first_end_of_a_trial_stands(storage: Storage) -> None:
    """A callback of another library fails after the end is noted: Tune starts the trial again."""
    with open_store(storage) as store:
        write_few(store)
        for status in ("completed", "error"):
            store.start("t0000", {"lr": 0.1, "dropout_fc": 0.2})
            store.add_epoch("t0000", epoch(1, 0.9), 3.0)
            store.end("t0000", status)
        assert store.num_ended == 2
    again = open_store(storage)
    assert again.trials == store.trials
    assert again.trials["t0000"].status == "stopped"
    assert len(again.trials["t0000"].history) == 2


def test_a_file_whose_rows_name_no_run_is_refused(storage: Storage) -> None:
    with open_store(storage) as store:
        write_few(store)
    path = Path(storage.path("reports", "runs", "s.parquet"))
    pq.write_table(pq.read_table(path).drop_columns("run_id"), path)
    told = r"reports/runs/s.parquet is damaged \(it has no column run_id that names the run of each row\); "
    for read in (
        lambda: open_store(storage),
        lambda: runs.find_run(storage, "s-t0000"),
        lambda: runs.list_runs(storage),
        lambda: reading.load_reports(storage),
    ):
        with pytest.raises(UserError, match=told):
            read()


# --- crashes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WatchedStorage(Storage):
    """A storage that is copied before each of its changes, as a crash at that moment would leave it."""

    copies: Path = Path()
    taken: list[Path] = field(default_factory=list)
    one: threading.Lock = field(default_factory=threading.Lock)

    def _copy(self) -> None:
        target = self.copies / str(len(self.taken))
        shutil.copytree(self.root, target) if Path(self.root).exists() else target.mkdir(parents=True)
        self.taken.append(target)

    def write_bytes(self, data: bytes | pa.Buffer, *parts: str) -> None:
        """Write as `Storage` does."""
        with self.one:
            self._copy()
            super().write_bytes(data, *parts)

    def delete_folder(self, *parts: str) -> None:
        """Delete as `Storage` does, one file after the other."""
        folder = Path(self.path(*parts))
        with self.one:
            for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
                if path.is_file():
                    self._copy()
                    path.unlink()
            super().delete_folder(*parts)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the journal write each event by itself, and compact after each second one."""
    monkeypatch.setattr(journal, "LINGER_S", 0.0)
    monkeypatch.setattr(journal, "MAX_SEGMENTS", 2)


CALLS: list[tuple[Any, ...]] = [
    ("start", "t0000", {"lr": 0.1}),
    ("start", "t0001", {"lr": 0.2}),
    *[
        ("add_epoch", f"t000{trial}", epoch(count, 0.1 * count + trial / 7), 3.0)
        for count in (1, 2)
        for trial in (0, 1)
    ],
    ("end", "t0001", "stopped"),
    ("start", "t0002", {"lr": 0.3}),
    ("add_epoch", "t0000", epoch(2, 0.33), 3.0),  # after a crash of the trial
    ("add_epoch", "t0000", epoch(3, 0.4), 3.0),
    ("end", "t0000", "completed"),
    ("end", "t0002", "diverged", "loss is not finite"),
    ("start", "t0003", {"lr": 0.4}),
    ("add_epoch", "t0003", epoch(1, 0.7), 3.0),
]


def call(store: TrialStore, calls: list[tuple[Any, ...]]) -> None:
    for name, *arguments in calls:
        getattr(store, name)(*arguments)
        queue = store._journal and store._journal._queue
        while queue and store._journal and store._journal._error is None:
            time.sleep(0.001)  # so that each event is a segment


def without_times(trials: dict[str, Trial]) -> list[Trial]:
    return [replace(trial, started_at=None, finished_at=None) for _, trial in sorted(trials.items())]


def states(tmp_path: Path) -> Iterator[list[Trial]]:
    """Yield the trials after each number of calls."""
    for count in range(len(CALLS) + 1):
        with open_store(open_storage(str(tmp_path / f"after-{count}"))) as store:
            call(store, CALLS[:count])
        yield without_times(store.trials)


def report_of(storage: Storage) -> list[Any]:
    """Return the rows of all tables, without times."""
    found = []
    for table in tables.SEARCH_TABLES:
        rows = pq.read_table(storage.path("reports", table, "s.parquet")).to_pylist()
        found.append([{key: value for key, value in row.items() if not key.endswith("_at")} for row in rows])
    return found


@pytest.mark.usefixtures("often")
def test_a_crash_at_any_moment_loses_the_newest_events_alone(tmp_path: Path) -> None:
    """The storage as it was before each single write and removal; then the search goes on, and ends as if unbroken."""
    root = str(tmp_path / "results")
    watched = WatchedStorage(root, open_storage(root).fs, root, copies=tmp_path / "copies")
    with open_store(watched) as store:
        call(store, CALLS)
    expected = list(states(tmp_path))
    reached = 0
    for number, folder in enumerate(watched.taken):
        storage = open_storage(str(folder))
        store = open_store(storage)
        found = without_times(store.trials)
        reached = max(count for count, state in enumerate(expected) if state == found and count >= reached)
        if number % 4:
            continue  # that the others go on as well would take long to see
        for _ in range(2):  # resumed, it is interrupted before anything happens, and resumed again
            with open_store(storage) as store:
                pass
        assert without_times(store.trials) == found
        with open_store(storage) as store:
            call(store, CALLS[reached:])
        assert without_times(open_store(storage).trials) == expected[-1]
        assert report_of(storage) == report_of(watched)
        assert not storage.list("searches", "s", "journal")
    assert reached == len(CALLS)
    assert len(watched.taken) > 2 * len(CALLS)


def test_rows_of_trials_that_ended_keep_what_made_them(storage: Storage) -> None:
    with open_store(storage, source_hash="before") as store:
        write_few(store)
    with open_store(storage, source_hash="after") as store:
        store.end("t0001", "stopped")
    hashes = {name: runs.load_run(storage, f"s-{name}")["source_hash"] for name in ("t0000", "t0001", "t0002")}
    assert hashes == {"t0000": "before", "t0001": "after", "t0002": "before"}


def test_checkpoints_of_a_trial_go_once_its_end_is_durable(storage: Storage) -> None:
    seen: list[str] = []

    def remove() -> None:
        seen.append(open_store(storage).trials["t0000"].status)

    with open_store(storage) as store:
        store.start("t0000", {"lr": 0.1})
        store.end("t0000", "stopped", then=remove)
    assert seen == ["stopped"]


# --- reports of earlier versions ------------------------------------------------------------------------------------


def write_old(storage: Storage, table: str, run_id: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as earlier versions did: in a folder that names the run, without the column `run_id`."""
    storage.write_bytes(tables.encode(table, rows), "reports", table, f"run_id={run_id}", f"{table}.parquet")


@pytest.fixture
def old(storage: Storage, tmp_path: Path) -> Storage:
    """A storage with a run and a search of an earlier version: one trial has ended, one has not."""
    other = open_storage(str(tmp_path / "other"))
    with open_store(other, source_hash="before") as store:
        write_few(store)
    for table in tables.SEARCH_TABLES:
        for name in ("t0000", "t0001", "t0002"):
            rows = tables.read_table(other, table, run_id_of("s", name))
            if rows:
                write_old(storage, table, run_id_of("s", name), rows)
    write_old(storage, "runs", "alone", [{"kind": "train", "status": "completed"}])
    write_old(storage, "epochs", "alone", metric.epoch_rows(epoch(1, 0.5)))
    return storage


def test_a_search_of_an_earlier_version_goes_on(old: Storage) -> None:
    store = open_store(old)
    assert store.has_news
    assert [trial.trial_id for trial in store.unfinished()] == ["t0001"]
    assert [each["val_accuracy"] for each in store.trials["t0000"].history] == [0.6, 0.5]
    with store:
        store.add_epoch("t0001", epoch(2, 0.9), 3.0)
        store.end("t0001", "completed")
    again = open_store(old)
    assert again.trials == store.trials
    assert runs.load_run(old, "s-t0000")["source_hash"] == "before"
    assert runs.load_run(old, "s-t0001")["source_hash"] == "now"
    assert old.list("reports", "trials") == ["s.parquet"]
    assert old.list("reports", "runs") == ["run_id=alone", "s.parquet"]
    assert runs.list_runs(old) == ["alone", "s-t0000", "s-t0001", "s-t0002"]


@pytest.mark.usefixtures("often")
def test_a_crash_while_old_files_are_replaced_loses_nothing(old: Storage, tmp_path: Path) -> None:
    watched = WatchedStorage(old.uri, old.fs, old.root, copies=tmp_path / "copies")
    before = open_store(old).trials
    with open_store(watched):
        pass
    for folder in watched.taken:
        storage = open_storage(str(folder))
        with open_store(storage) as store:
            assert store.trials == before
        assert storage.list("reports", "trials") == ["s.parquet"]
        assert len(tables.read_table(storage, "epochs", "s-t0000")) == 4


def test_one_call_reads_all_layouts(old: Storage) -> None:
    """An ordinary run and a search of an earlier version, and both of this one, in every reader."""
    tables.open_reports(old)
    with TrialStore(old, "new", CONFIG, {}, BASE) as store:
        write_few(store)
    tables.write_table(old, "runs", "mine", [{"kind": "train", "status": "completed"}])
    tables.write_table(old, "epochs", "mine", metric.epoch_rows(epoch(1, 0.5)))
    trials = [f"{search}-{name}" for search in ("new", "s") for name in ("t0000", "t0001", "t0002")]
    for table, expected in (("runs", ["alone", "mine", *trials]), ("trials", trials)):
        folder = old.path("reports", table)
        glob = f"{folder}/**/*.parquet"
        found = {
            "pandas": pd.read_parquet(folder)["run_id"],
            "pyarrow": pyarrow.dataset.dataset(folder, partitioning="hive").to_table()["run_id"].to_pylist(),
            "polars": pl.read_parquet(folder)["run_id"],
            "polars, glob": pl.scan_parquet(glob).collect()["run_id"],
            "polars, hive": pl.scan_parquet(glob, hive_partitioning=True).collect()["run_id"],
            "duckdb": [row[0] for row in duckdb.sql(f"SELECT run_id FROM read_parquet('{glob}')").fetchall()],
            "page": [row["run_id"] for row in reading.read_rows(old, table)],
        }
        assert {name: sorted(values) for name, values in found.items()} == dict.fromkeys(found, sorted(expected))
    epochs, runs_of = (f"read_parquet('{old.path('reports', table)}/**/*.parquet')" for table in ("epochs", "runs"))
    counted = duckdb.sql(f"SELECT count(*) FROM {epochs} JOIN {runs_of} USING (run_id)").fetchall()
    assert counted == [(4 + 2 * 6,)]
    assert runs.list_runs(old) == sorted(["alone", "mine", *trials])
    assert runs.load_run(old, "alone")["kind"] == "train"


def test_the_page_and_csv_hold_both_layouts(old: Storage, tmp_path: Path) -> None:
    with TrialStore(old, "new", CONFIG, {}, BASE) as store:
        write_few(store)
    found = reading.load_reports(old)
    assert [row["run_id"] for row in found.runs] == ["alone"]
    assert {search.search_id: len(search.trials) for search in found.searches} == {"new": 3, "s": 3}
    assert all(len(search.epochs["t0000"]) == 4 and len(search.runs) == 3 for search in found.searches)
    tables.write_csv(old, tmp_path / "csv")
    ids = [line.split(",")[0] for line in (tmp_path / "csv" / "trials.csv").read_text().splitlines()]
    assert ids == ["run_id", *(f"{search}-{name}" for search in ("new", "s") for name in ("t0000", "t0001", "t0002"))]


def test_files_are_moved_once_and_keep_what_a_later_version_added(
    old: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(old.path("reports", "runs", "run_id=alone", "runs.parquet"))
    pq.write_table(pq.read_table(path).append_column("surplus", pa.array([7])), path)
    old.write_bytes(b"no parquet", "reports", "runs", "run_id=broken", "runs.parquet")
    tables.open_reports(old)
    told = capsys.readouterr().err
    assert "run_id=broken/runs.parquet is damaged" in told and told.count("\n") == 1
    assert old.list("reports", "runs") == ["alone", "run_id=broken", "s-t0000", "s-t0001", "s-t0002"]
    assert pq.read_table(old.path("reports", "runs", "alone", "runs.parquet"))["surplus"].to_pylist() == [7]
    before = os.stat(old.path("reports", "runs", "alone", "runs.parquet"))
    tables.open_reports(old)
    assert os.stat(old.path("reports", "runs", "alone", "runs.parquet")).st_mtime_ns == before.st_mtime_ns


def test_a_run_that_went_on_is_not_overwritten_by_its_old_file(old: Storage) -> None:
    """`open_reports` was killed between the two places of a file, and then the run went on."""
    tables.write_table(old, "runs", "alone", [{"kind": "train", "status": "diverged"}])
    assert runs.load_run(old, "alone")["status"] == "diverged"
    assert [row["status"] for row in reading.load_reports(old).runs] == ["diverged"]
    tables.open_reports(old)
    assert runs.load_run(old, "alone")["status"] == "diverged"
    assert "run_id=alone" not in old.list("reports", "epochs")
