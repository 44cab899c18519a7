"""Rows read by Ray Data: exact shards for any number of workers, and one line for a file that cannot be read."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from conftest import prepare_archives, split_paths

from fashion.config import UserError
from fashion.data import loading, preparation
from fashion.data.archives import file_sha256
from fashion.data.manifest import DATA_FOLDER, SPLITS, load_manifest
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
        "no Parquet": f"{path.parents[1]} is damaged (",
        "short": f"{path.parents[1]} holds {rows - 1} rows, not {rows}; remove",
        "label 200": f"{path.parents[1]} is damaged (prepared data holds a label above 9",
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
