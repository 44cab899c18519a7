"""The data plane: strict reading, honest splits, whole files, and each way that a source can be wrong."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, assert_refused, call_job, split_paths, take_for_official

from fashion.config import UserError
from fashion.data import archives, loading, preparation, shards, synthetic
from fashion.data.manifest import DATA_FOLDER, SPLITS, load_manifest
from fashion.data.preparation import combined_sha256
from fashion.data.rows import from_table
from fashion.storage import Storage, open_storage
from jobs import prepare


def test_prepare_splits_every_row_once(storage: Storage, lenient: Path) -> None:
    manifest, written = preparation.prepare(storage, str(lenient), val_rows=305, seed=3)
    assert written
    assert manifest.rows == {"train": 2695, "val": 305, "test": 500}
    train, val = (loading.load_split(storage, manifest, split) for split in ("train", "val"))
    assert sorted([*train.index, *val.index]) == list(range(3000))
    images, labels = archives.read_pair(lenient / TRAIN_IMAGES, lenient / TRAIN_LABELS)
    for split in (train, val):
        assert (images[split.index] == split.images).all()
        assert (labels[split.index] == split.labels).all()
    assert set(np.bincount(val.labels)) == {30, 31}
    assert manifest.class_counts["train"] == np.bincount(train.labels, minlength=10).tolist()
    assert manifest.pixel_mean == pytest.approx(train.images.mean() / 255)
    assert manifest.pixel_std == pytest.approx(train.images.std() / 255)
    assert (np.diff(train.index) < 0).any(), "training rows lie in random order, so that a prefix is a random subset"


def test_preparing_again_changes_nothing_and_another_request_is_refused(storage: Storage, lenient: Path) -> None:
    first, _ = preparation.prepare(storage, str(lenient), val_rows=300)
    again, written = preparation.prepare(storage, "auto", val_rows=300)
    assert not written
    assert again == first
    with pytest.raises(UserError, match="prepared with --val-rows 300, not 400; name another --storage, or remove"):
        preparation.prepare(storage, "auto", val_rows=400)
    with pytest.raises(UserError, match="not the stand-in; name another --storage"):
        preparation.prepare(storage, "synthetic", val_rows=300)


# --- the stand-in, where there is no network ------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, lenient: Path) -> None:
    """No mirror answers, and the stand-in has few rows, other ones than the small archives."""
    draw = synthetic.write_archives

    def refuse(_: Path) -> Path:
        raise archives.DownloadFailed("no mirror answers")

    monkeypatch.setattr(archives, "download", refuse)
    monkeypatch.setattr(synthetic, "write_archives", lambda folder: draw(folder, seed=1, num_train_rows=2000))


def or_synthetic(storage: Storage, val_rows: int = 300) -> list[str]:
    return ["--storage", storage.uri, "--source", "auto", "--val-rows", str(val_rows), "--or-synthetic"]


@pytest.mark.slow
def test_without_a_network_the_stand_in_serves_until_there_is_one(
    storage: Storage, offline: None, lenient: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # it is there already the second time
        prepare.main(or_synthetic(storage))
        printed = capsys.readouterr()
        assert "Going on with the drawn stand-in" in printed.err
        assert ": fashion-mnist-synthetic, 1700 train, 300 val, 10000 test rows" in printed.out
    monkeypatch.setattr(archives, "download", lambda _: lenient)
    prepare.main(or_synthetic(storage))
    assert "stand-in" not in capsys.readouterr().err
    manifest = load_manifest(storage)
    assert manifest.rows == {"train": 2700, "val": 300, "test": 500}
    for split in SPLITS:
        assert storage.list(*DATA_FOLDER, split) == sorted(manifest.files[split]), "no file of the stand-in stays"


@pytest.mark.parametrize("failure", [UserError("another sum"), OSError("disk full"), RuntimeError("a bug")])
def test_only_a_failed_download_is_a_reason_for_the_stand_in(
    storage: Storage, offline: None, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(_: Path) -> Path:
        raise failure

    monkeypatch.setattr(archives, "download", fail)
    with pytest.raises(type(failure), match=str(failure)):
        prepare.main(or_synthetic(storage))
    assert not storage.exists(*DATA_FOLDER)


def test_prepared_data_is_never_replaced_by_the_stand_in(storage: Storage, lenient: Path, offline: None) -> None:
    real, _ = preparation.prepare(storage, str(lenient), val_rows=300)
    prepare.main(or_synthetic(storage))
    assert load_manifest(storage) == real
    with pytest.raises(UserError, match="prepared with --val-rows 300, not 400"):
        prepare.main(or_synthetic(storage, 400))


# --- the split ------------------------------------------------------------------------------------------------------


def test_another_seed_takes_another_val(tmp_path: Path, lenient: Path) -> None:
    index = []
    for seed in (0, 0, 1):
        storage = open_storage(str(tmp_path / f"{len(index)}"))
        manifest, _ = preparation.prepare(storage, str(lenient), val_rows=300, seed=seed)
        index.append(loading.load_split(storage, manifest, "val").index.tolist())
    assert index[0] == index[1]
    assert index[0] != index[2]


def test_a_half_written_folder_is_not_taken_for_a_finished_one(storage: Storage, lenient: Path) -> None:
    preparation.prepare(storage, str(lenient), val_rows=300)
    Path(storage.path(*DATA_FOLDER, "manifest.json")).unlink()
    with pytest.raises(UserError, match=r"run: python -m jobs.prepare"):
        load_manifest(storage)
    _, written = preparation.prepare(storage, str(lenient), val_rows=300)
    assert written


def _prepare(arguments: tuple[str, str]) -> str:
    uri, source = arguments
    take_for_official(pytest.MonkeyPatch(), Path(source))
    return preparation.prepare(open_storage(uri), source, val_rows=300)[0].sha256


@pytest.mark.commands
def test_two_processes_at_once_do_no_harm(storage: Storage, lenient: Path) -> None:
    task = (storage.uri, str(lenient))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.map(_prepare, [task, task])
    manifest = load_manifest(storage)
    assert sums == [manifest.sha256] * 2
    assert [len(loading.load_split(storage, manifest, split).labels) for split in SPLITS] == [2700, 300, 500]


@pytest.mark.parametrize("state", ["damaged", "missing"])
def test_a_damaged_file_is_noticed_and_the_way_out_is_one(storage: Storage, lenient: Path, state: str) -> None:
    manifest, _ = preparation.prepare(storage, str(lenient), val_rows=300)
    path = Path(split_paths(storage, manifest, "val")[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if state == "missing" else path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} is {state}; remove (.*) and prepare again") as told:
        loading.load_split(storage, manifest, "val")
    shutil.rmtree(str(told.value).split()[4])
    again, written = preparation.prepare(storage, str(lenient), val_rows=300)
    assert written
    assert len(loading.load_split(storage, again, "val").labels) == 300


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 99},
        {"pixel_std": 0.0},
        {"rows": {"train": 1}},
        {"surplus": 1},
        {"files": {"train": {"../../x.parquet": "0"}, "val": {}, "test": {}}},
        {"files": {name: {} for name in SPLITS}},
        {"rows": {"train": "many", "val": 1, "test": 1}},
        {"pixel_mean": "grey"},
        {"dataset": "fashion\nmnist"},
        {"sha256": None},
    ],
)
def test_a_damaged_manifest_is_refused(storage: Storage, lenient: Path, change: dict[str, object]) -> None:
    preparation.prepare(storage, str(lenient), val_rows=300)
    path = Path(storage.path(*DATA_FOLDER, "manifest.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"manifest.json is damaged .* prepare again"):
        load_manifest(storage)


@pytest.mark.parametrize("content", [b"", b"PAR1" * 10, None])
def test_a_sum_that_fits_proves_nothing(storage: Storage, lenient: Path, content: bytes | None) -> None:
    """Whoever hands over prepared data can make sums of anything."""
    manifest, _ = preparation.prepare(storage, str(lenient), val_rows=300)
    [name] = manifest.files["val"]
    path = Path(storage.path(*DATA_FOLDER, "val", name))
    if content is None:
        pq.write_table(pq.read_table(path).slice(1), path)
    else:
        path.write_bytes(content)
    told = "holds 299 rows, not 300" if content is None else f"{path} is damaged"
    files = manifest.files | {"val": {name: archives.file_sha256(path)}}
    with pytest.raises(UserError, match=rf"{told}.*; remove .* and prepare again"):
        loading.load_split(storage, dataclasses.replace(manifest, files=files), "val")


# --- wrong archives -----------------------------------------------------------------------------------------------


def idx(magic: int, *sizes: int, body: bytes) -> bytes:
    """Return a gzip'd IDX file."""
    return gzip.compress(struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + body, compresslevel=1)


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
WRONG = {
    "missing file": (TRAIN_LABELS, None, "lacks train-labels-idx1-ubyte.gz"),
    "truncated gzip": (TRAIN_IMAGES, lambda old: old[: len(old) // 2], "not a whole gzip file"),
    "no gzip": (TRAIN_IMAGES, lambda old: b"hello", "not a whole gzip file"),
    "wrong magic": (TRAIN_IMAGES, lambda old: idx(2052, 1, 28, 28, body=bytes(784)), "magic number is 2052"),
    "wrong size": (TRAIN_IMAGES, lambda old: idx(2051, 1, 28, 29, body=bytes(812)), "image size is (28, 29)"),
    "short header": (TRAIN_LABELS, lambda old: gzip.compress(b"\0\0\10\1"), "header is cut short"),
    "2**32 rows": (TRAIN_IMAGES, lambda old: idx(2051, 2**32 - 1, 28, 28, body=b""), "promises 4294967295 rows"),
    "no rows": (TRAIN_LABELS, lambda old: idx(2049, 0, body=b""), "promises 0 rows"),
    "short body": (TRAIN_LABELS, lambda old: idx(2049, 3000, body=bytes(2999)), "but holds 2999 bytes"),
    "surplus bytes": (TRAIN_LABELS, lambda old: idx(2049, 3000, body=bytes(3001)), "but holds more"),
    "label 10": (TRAIN_LABELS, lambda old: idx(2049, 3000, body=bytes([10]) * 3000), "holds label 10, expected 0 to 9"),
    "counts differ": (
        TRAIN_LABELS,
        lambda old: idx(2049, 2999, body=bytes(2999)),
        "holds 3000 images but train-labels-idx1-ubyte.gz 2999 labels",
    ),
    "another sum": (
        TRAIN_LABELS,
        lambda old: idx(2049, 3000, body=bytes(3000)),
        "right format, but the SHA-256 of its rows",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_archive_is_refused_and_nothing_is_written(
    case: str, storage: Storage, lenient: Path, tmp_path: Path
) -> None:
    name, change, told = WRONG[case]
    folder = tmp_path / "source"
    shutil.copytree(lenient, folder)
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    done = call_job(prepare.main, "--storage", storage.uri, "--source", str(folder), "--val-rows", "300")
    assert_refused(done, told)
    assert not Path(storage.root).exists()


def test_no_source_folder(storage: Storage) -> None:
    with pytest.raises(UserError, match="neither auto, download, synthetic nor a folder; a folder must hold"):
        preparation.prepare(storage, "/does/not/exist")


@pytest.mark.parametrize("val_rows", [0, 9, 50_001])
def test_val_rows_have_limits(storage: Storage, val_rows: int) -> None:
    with pytest.raises(UserError, match="--val-rows"):
        preparation.prepare(storage, "auto", val_rows=val_rows)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the official archives are not here")
@pytest.mark.slow
def test_the_official_archives(storage: Storage) -> None:
    """The pinned constants are facts about the real data: recompute them from it."""
    manifest, _ = preparation.prepare(storage, str(REAL_DATA))
    assert manifest.dataset == "fashion-mnist"
    assert manifest.rows == {"train": 55_000, "val": 5_000, "test": 10_000}
    assert manifest.class_counts["val"] == [500] * 10
    assert manifest.class_counts["test"] == [1000] * 10
    images, _ = archives.read_pair(REAL_DATA / TRAIN_IMAGES, REAL_DATA / TRAIN_LABELS)
    assert (images.mean() / 255, images.std() / 255) == (
        pytest.approx(0.28604, abs=1e-5),
        pytest.approx(0.35302, abs=1e-5),
    )


# --- files and shards ---------------------------------------------------------------------------------------------


def test_a_slice_of_a_table_keeps_its_images(storage: Storage, lenient: Path) -> None:
    manifest, _ = preparation.prepare(storage, str(lenient), val_rows=300)
    table = pq.read_table(split_paths(storage, manifest, "test")[0])
    whole, part = from_table(table), from_table(table.slice(100, 7))
    assert (whole.images[100:107] == part.images).all()


@pytest.mark.parametrize("num_rows", [1, 10, 55_000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_cover_every_row_once(num_rows: int, world_size: int) -> None:
    bounds = [shards.shard_bounds(num_rows, rank, world_size) for rank in range(world_size)]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(num_rows))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sizes", [[1000], [300, 300, 300, 100], [1] * 1000, [0, 999, 0, 1]])
def test_one_set_of_blocks_serves_every_number_of_workers(sizes: list[int]) -> None:
    """The references stand for the rows here: a shard has those of the blocks that overlap it, and no other."""
    blocks = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    train = shards.StoredRows.of_blocks(blocks, sizes).part(10, 977)
    for width in (1, 2, 3, 7, 256):
        for rank in range(width):
            shard = train.shard(rank, width)
            first, end = shards.shard_bounds(967, rank, width)
            assert (shard.start, shard.stop) == (10 + first, 10 + end)
            overlapping = [(lower, upper) for lower, upper in blocks if max(lower, 10 + first) < min(upper, 10 + end)]
            assert [each for each in shard.references if each[0] < each[1]] == overlapping
            assert (shard.bounds[0], shard.bounds[-1]) == (overlapping[0][0], overlapping[-1][1])


def test_storage_writes_whole_files_or_none(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(b"old", "a", "file")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(b"new", "a", "file")
    assert storage.read_bytes("a", "file") == b"old"
    assert [path.name for path in Path(storage.path("a")).iterdir()] == ["file"]


def test_storage_must_be_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for place in (file, file / "below"):
        with pytest.raises(UserError, match="is a file; name another folder"):
            open_storage(str(place))
    with pytest.raises(UserError, match="nonsense://x cannot be opened"):
        open_storage("nonsense://x")


def test_keys_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="--storage holds keys") as refusal:
        open_storage("s3://AKIA123:hush%2F@bucket/folder")
    assert "hush" not in str(refusal.value)


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not enter; root may enter any, so it acts as somebody else meanwhile."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


def test_a_storage_that_may_not_be_entered(closed: Path) -> None:
    for place in (closed, closed / "below"):
        with pytest.raises(UserError, match=r"cannot be entered \(.*Permission denied.*\); name a folder that can be"):
            open_storage(str(place))


def test_each_folder_that_is_written_to_must_take_files(storage: Storage) -> None:
    root = Path(storage.root)
    storage.check_writable()
    storage.check_writable("data/fashion-mnist", "runs")
    assert not root.exists()
    root.mkdir()
    (root / "runs").write_text("")
    (root / "data").symlink_to("/proc")  # takes no files, not even root's
    storage.check_writable()
    storage.check_writable("reports")
    for folder in ("runs", "data", "data/fashion-mnist"):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); name a folder that can be"):
            storage.check_writable("reports", folder)
    assert sorted(path.name for path in root.iterdir()) == ["data", "runs"]


def test_the_sum_names_archives_and_split() -> None:
    sums = {"b": "2", "a": "1"}
    named = combined_sha256(sums, val_rows=5, seed=0)
    assert named == hashlib.sha256(b"a:1\nb:2\nseed:0\nval_rows:5\n").hexdigest()
    assert len({named, combined_sha256(sums, 6, 0), combined_sha256(sums, 5, 1)}) == 3
