"""Rows read by Ray Data: exact shards for any number of workers, and one line for a file that cannot be read."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ROOT, job_environment, prepare_archives, split_paths

from fashion.config import UserError
from fashion.data import loading, preparation
from fashion.data.archives import file_sha256
from fashion.data.manifest import DATA_FOLDER, SPLITS, Manifest, load_manifest
from fashion.data.rows import Split
from fashion.storage import Storage, open_storage

pytestmark = pytest.mark.ray

ROWS_PER_FILE = 500


@pytest.fixture
def storage(ray_cluster: None, few_archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Prepared data in several files per split, in a folder whose name has signs that mean something in a URL."""
    monkeypatch.setattr(preparation, "ROWS_PER_FILE", ROWS_PER_FILE)
    storage = open_storage(str(tmp_path / "50% of it #1, really?"))
    prepare_archives(storage, few_archives)
    return storage


def test_shards_are_the_written_rows_in_their_order(storage: Storage) -> None:
    """Every shard, resident or streamed, is the rows of the files: the prefix that was asked for, none twice.

    Each worker gets references to the same blocks, whatever the number of workers.
    """
    manifest = load_manifest(storage)
    written = {split: loading.load_split(storage, manifest, split) for split in SPLITS}
    stored = loading.read_splits(storage, manifest, SPLITS)
    for split, rows in stored.items():
        assert len(rows.references) == len(manifest.files[split])
        assert rows.pull().index.tolist() == written[split].index.tolist()
    train = stored["train"].part(0, 1_507)
    assert len(train.references) == -(-1_507 // ROWS_PER_FILE)
    for width in (1, 2, 3, 7):
        pulled = [train.shard(rank, width).pull() for rank in range(width)]
        assert np.array_equal(np.concatenate([each.images for each in pulled]), written["train"].images[:1_507])
    joined = stored["train"].followed_by(stored["val"]).pull().labels
    assert joined.tolist() == [*written["train"].labels, *written["val"].labels]
    assert stored["val"].part(0, 0).pull().index.tolist() == []
    streamed = loading.open_dataset(storage, manifest, ["train"]).limit(1_507)
    tables = streamed.iter_batches(batch_size=None, batch_format="pyarrow")
    assert [row for table in tables for row in table["index"].to_pylist()] == written["train"].index[:1_507].tolist()
    session = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parent.parent
    assert "ReadParquet" in (session / "logs" / "ray-data" / "ray-data.log").read_text(), "Ray Data has read the files"


@pytest.mark.parametrize("state", ["damaged", "missing", "no Parquet", "short", "label 200"])
def test_a_file_that_cannot_be_read_is_told_by_one_line(storage: Storage, state: str) -> None:
    manifest = load_manifest(storage)
    path = Path(split_paths(storage, manifest, "val")[0])
    rows = sum(manifest.rows[split] for split in ("val", "test"))
    told = {
        "damaged": f"{path} is damaged; remove",
        "missing": f"{path} is missing; remove",
        "no Parquet": f"{path} is damaged (",
        "short": f"{path.parents[1]} holds {rows - 1} rows, not {rows}; remove",
        "label 200": f"{path} is damaged (it holds a label above 9",
    }
    if state == "missing":
        path.unlink()
    elif state == "damaged":
        path.write_bytes(path.read_bytes() + b"x")
    elif state == "no Parquet":
        path.write_bytes(b"PAR1" * 10)
    else:
        table = pq.read_table(path)
        labels = np.full(len(table), 200, np.uint8)
        changed = table.slice(1) if state == "short" else table.set_column(1, table.schema.field(1), [labels])
        pq.write_table(changed, path)
    if state not in ("missing", "damaged"):
        # Whoever hands over prepared data can make sums of anything.
        files = manifest.files | {"val": {path.name: file_sha256(path)}}
        manifest = dataclasses.replace(manifest, files=files)
        storage.write_bytes(json.dumps(vars(manifest)).encode(), *DATA_FOLDER, "manifest.json")
    with pytest.raises(UserError) as caught:
        loading.read_splits(storage, manifest, ["val", "test"])
    assert told[state] in str(caught.value)
    assert "prepare again" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def prepared_noise(folder: Path, num_rows: int) -> Storage:
    """Return a storage with `num_rows` training rows, as large a set as nobody has in archives."""
    storage = open_storage(str(folder))
    random = np.random.default_rng(0)
    sums: dict[str, dict[str, str]] = {}
    rows = {"train": num_rows, "val": 10, "test": 10}
    for split, count in rows.items():
        table = Split(
            random.integers(0, 256, (count, 28, 28), np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
            np.arange(count, dtype=np.int32),
        )
        sums[split] = preparation.write_split(storage, split, table)
    manifest = Manifest("noise", "0" * 64, 0, 10, rows, {}, 0.5, 0.3, sums, {})
    storage.write_bytes(json.dumps(vars(manifest)).encode(), *DATA_FOLDER, "manifest.json")
    return storage


DRIVER = """
import sys
from pathlib import Path
from fashion.cluster import connection
from fashion.data.loading import read_splits
from fashion.data.manifest import SPLITS, load_manifest
from fashion.storage import open_storage
storage = open_storage(sys.argv[1])
connection.connect()
rows = read_splits(storage, load_manifest(storage), SPLITS)
# Other than `getrusage`, this leaves out what the process had before it became Python.
[peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(len(rows["train"]), len(rows["train"].references), peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it reads the memory of a process of Linux")
def test_the_driver_holds_no_rows(ray_cluster: None, tmp_path: Path) -> None:
    """Its peak memory is that of ten thousand rows when there are 160,000, which are 125 MB."""
    variables = job_environment() | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    peaks = []
    for num_rows in (10_000, 160_000):
        storage = prepared_noise(tmp_path / str(num_rows), num_rows)
        command = [sys.executable, "-c", DRIVER, storage.uri]
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        found, blocks, kilobytes = map(int, done.stdout.split())
        assert (found, blocks) == (num_rows, num_rows // preparation.ROWS_PER_FILE)
        peaks.append(kilobytes / 1024)
    assert peaks[1] - peaks[0] < 60, peaks
