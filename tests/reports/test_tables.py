"""Reports: tables have fixed schemas, files appear whole, and one call reads a table in pandas and in DuckDB."""

import csv
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fashion.config import UserError
from fashion.reports import classification, provenance, runs, schemas, tables
from fashion.storage import Storage

DESIGNED = {
    "runs": "run_id kind search_id status error started_at finished_at wall_s dataset dataset_sha256 source_hash "
    "preset config_json num_parameters world_size device precision threads_per_worker epochs_done best_epoch "
    "train_loss train_accuracy val_loss val_accuracy test_loss test_accuracy test_rows images_per_s ray_version "
    "torch_version resumed_from",
    "epochs": "run_id epoch split loss accuracy rows lr epoch_time_s data_wait_s images_per_s",
    "predictions": "run_id index label predicted probabilities loss",
    "classes": "run_id label name precision recall f1 support",
    "confusion": "run_id label predicted count",
}


def epoch(number: int, **other: Any) -> dict[str, Any]:
    return {"epoch": number, "split": "train", "loss": 0.5, "accuracy": 0.8, "rows": 10} | other


@pytest.mark.parametrize("table", DESIGNED)
def test_tables_have_the_agreed_columns(table: str, storage: Storage) -> None:
    tables.write_table(storage, table, "a", [])
    frame = pd.read_parquet(f"{storage.uri}/reports/{table}")
    assert set(DESIGNED[table].split()) <= set(frame.columns)


def test_rows_come_back_as_written(storage: Storage) -> None:
    tables.write_table(storage, "epochs", "a", [epoch(1), epoch(2)])
    rows = tables.read_table(storage, "epochs", "a")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == 0.5
    assert rows[0]["lr"] is None
    assert tables.read_table(storage, "epochs", "b") == []


def test_parts_of_a_table_have_files_of_their_own(storage: Storage) -> None:
    """So evaluations of two splits at the same time never overwrite each other's rows."""
    for split, counts in (("val", [1]), ("test", [2, 3]), ("val", [4])):
        tables.write_table(storage, "confusion", "a", [{"split": split, "count": n} for n in counts], part=split)
    assert storage.list("reports", "confusion", "a") == ["confusion-test.parquet", "confusion-val.parquet"]
    rows = tables.read_table(storage, "confusion", "a")
    assert [(row["split"], row["count"]) for row in rows] == [("test", 2), ("test", 3), ("val", 4)]
    assert len(pd.read_parquet(f"{storage.uri}/reports/confusion")) == 3


def test_an_unknown_column_is_refused(storage: Storage) -> None:
    with pytest.raises(ValueError, match="table epochs has no column acuracy"):
        tables.write_table(storage, "epochs", "a", [{"acuracy": 0.5}])
    assert not storage.exists("reports")


def test_whole_tables_in_pandas_and_duckdb(storage: Storage) -> None:
    for run_id in ("one", "two"):
        tables.write_table(storage, "epochs", run_id, [epoch(1), epoch(2)])
    frame = pd.read_parquet(f"{storage.uri}/reports/epochs")
    assert frame.groupby("run_id", observed=True).epoch.max().to_dict() == {"one": 2, "two": 2}
    query = (
        f"select run_id, count(*) from read_parquet('{storage.uri}/reports/epochs/**/*.parquet') group by 1 order by 1"
    )
    assert duckdb.sql(query).fetchall() == [("one", 2), ("two", 2)]


def test_files_carry_the_version_of_their_schema(storage: Storage) -> None:
    path = tables.write_table(storage, "runs", "a", [{"status": "running", "started_at": datetime.now(UTC)}])
    assert pq.read_schema(path).metadata[b"schema_version"] == b"1"


def test_readers_never_see_a_part(storage: Storage) -> None:
    """One writer replaces a table again and again while readers scan it: every scan sees one whole version."""
    stop = threading.Event()
    seen: list[int] = []

    def scan() -> None:
        while not stop.is_set():
            frame = pd.read_parquet(f"{storage.uri}/reports/epochs")
            assert frame.epoch.nunique() == 1
            assert len(frame) == 500
            seen.append(int(frame.epoch[0]))

    tables.write_table(storage, "epochs", "a", [epoch(0)] * 500)
    readers = [threading.Thread(target=scan) for _ in range(2)]
    for reader in readers:
        reader.start()
    version, deadline = 0, time.monotonic() + 300
    while len(set(seen)) < 5 and time.monotonic() < deadline:
        version += 1
        tables.write_table(storage, "epochs", "a", [epoch(version)] * 500)
    stop.set()
    for reader in readers:
        reader.join()
    assert len(set(seen)) >= 5


def test_a_missing_run_is_refused_and_the_existing_ones_are_named(storage: Storage) -> None:
    with pytest.raises(UserError, match="there are none yet"):
        runs.load_run(storage, "x")
    tables.write_table(storage, "runs", "a", [{"status": "running"}])
    with pytest.raises(UserError, match=r"--run-id x does not exist .* there are a"):
        runs.load_run(storage, "x")
    assert runs.load_run(storage, "a")["status"] == "running"


def test_a_damaged_report_is_named(storage: Storage) -> None:
    path = Path(tables.write_table(storage, "runs", "a", [{"status": "running"}]))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="is damaged"):
        runs.find_run(storage, "a")


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"lr": "fast"}', '{"droput": 1}', "[" * 100_000])
def test_damaged_settings_of_a_run_are_refused(storage: Storage, text: str | None) -> None:
    tables.write_table(storage, "runs", "a", [{"status": "running", "config_json": text}])
    with pytest.raises(UserError, match="a is damaged: config_json cannot be used"):
        runs.stored_config(storage, "a")


def test_columns_have_the_types_of_their_table(storage: Storage) -> None:
    path = Path(tables.write_table(storage, "epochs", "a", []))
    pq.write_table(pa.table({"epoch": [1], "loss": [2], "surplus": ["x"]}), path)
    [row] = tables.read_table(storage, "epochs", "a")
    assert (row["epoch"], row["loss"], row["split"], list(row)) == (1, 2.0, None, schemas.SCHEMAS["epochs"].names)
    for table in (
        pa.table({"epoch": ["one"]}),
        pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["epoch", "epoch"]),
        pa.table({"split": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())}),
    ):
        pq.write_table(table, path)
        with pytest.raises(UserError, match=r"epochs.parquet is damaged \(.*\); remove it"):
            tables.read_table(storage, "epochs", "a")


def test_the_source_hash_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, root = provenance.source_hash(), Path(provenance.__file__).resolve().parents[2]
    for folder in ("fashion", "jobs"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "fashion" / "reports" / "provenance.py"))
    hash_now = provenance.source_hash.__wrapped__
    assert hash_now() == here, "a copy elsewhere is the same code"
    seen = {hash_now()}
    for path in (tmp_path / "fashion" / "training" / "loop.py", tmp_path / "jobs" / "train.py"):
        path.write_text(path.read_text() + "\n")
        seen.add(hash_now())
    (tmp_path / "jobs" / "train.py").rename(tmp_path / "jobs" / "other.py")
    seen.add(hash_now())
    assert len(seen) == 4
    (tmp_path / "jobs" / "notes.txt").write_text("not code")
    assert hash_now() in seen


def test_a_run_resumed_by_other_code_prints_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    provenance.warn_of_other_code("a", {"source_hash": provenance.source_hash()})
    assert capsys.readouterr().err == ""
    provenance.warn_of_other_code("a", {"source_hash": "0" * 64})
    assert capsys.readouterr().err.startswith("warning: run a was trained so far by other code (000000000000, now ")


# --- the tables of an evaluation ----------------------------------------------------------------------------------


def test_confusion_and_class_rows_equal_a_count_by_hand() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 500).astype(np.uint8)
    predicted = np.where(generator.random(500) < 0.7, labels, generator.integers(0, 10, 500)).astype(np.uint8)
    matrix = classification.confusion_matrix(labels, predicted)
    cells = classification.confusion_rows(matrix)
    assert len(cells) == 100
    for cell in cells:
        assert cell["count"] == ((labels == cell["label"]) & (predicted == cell["predicted"])).sum()
    for row in classification.class_rows(matrix):
        label = row["label"]
        hits = ((labels == label) & (predicted == label)).sum()
        assert row["support"] == (labels == label).sum()
        assert row["recall"] == pytest.approx(hits / (labels == label).sum())
        assert row["precision"] == pytest.approx(hits / (predicted == label).sum())
        assert row["f1"] == pytest.approx(2 * row["precision"] * row["recall"] / (row["precision"] + row["recall"]))


def test_a_class_that_is_never_predicted_has_metrics_of_zero() -> None:
    matrix = classification.confusion_matrix(np.array([3], np.uint8), np.array([4], np.uint8))
    rows = classification.class_rows(matrix)
    assert (rows[3]["recall"], rows[4]["precision"], rows[5]["f1"]) == (0, 0, 0)


def test_every_table_is_written_as_csv(storage: Storage, tmp_path: Path) -> None:
    """What a reader without Parquet sees: the same values, `run_id` first."""
    told = 'a "quoted", cell;\nof two lines'
    tables.write_table(storage, "runs", "b", [{"error": told, "val_accuracy": 0.5}])
    tables.write_table(storage, "runs", "a", [{"started_at": datetime(2020, 1, 2, tzinfo=UTC)}])
    folder = tmp_path / "my tables"
    written = tables.write_csv(storage, folder)
    assert sorted(path.name for path in written) == sorted(f"{table}.csv" for table in schemas.SCHEMAS)
    with (folder / "runs.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["run_id"], first["started_at"], first["error"]) == ("a", "2020-01-02T00:00:00+00:00", "")
    assert (second["run_id"], second["error"], second["val_accuracy"]) == ("b", told, "0.5")
    assert (folder / "epochs.csv").read_text().startswith("run_id,epoch,split,")


def test_csv_without_reports_is_refused(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no reports to write as CSV"):
        tables.write_csv(storage, tmp_path / "tables")
    assert not (tmp_path / "tables").exists()
