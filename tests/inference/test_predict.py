"""`jobs.predict`: the classes of `jobs.evaluate` for the same pixels, whatever form they have; kills; mistakes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ROOT, assert_refused, call_job, job_environment, prepare_archives, wait_for
from photographs import content, draw_scene, photograph
from PIL import Image

from fashion.cluster.plan import Workers
from fashion.config import CLASS_NAMES, ScaleConfig, TrainConfig, UserError
from fashion.data.archives import read_pair
from fashion.data.images import predictions as parts
from fashion.data.images.decoding import decode_image
from fashion.data.images.listing import Listing, list_images
from fashion.distributed import trainer
from fashion.inference import prediction
from fashion.inference.classifier import Classifier, ModelFiles, Predictions
from fashion.reports import tables
from fashion.storage import Storage, open_storage
from jobs import evaluate, predict

pytestmark = pytest.mark.ray

# One worker for 1,000 images, and half a CPU for each of two: a cluster of the tests has two CPUs.
WORKERS = ["--num-workers", "2", "--cpus-per-worker", "0.5"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, few_archives: Path, ray_cluster: None) -> Storage:
    """A storage with the run `mine`, trained on few rows, and evaluated on the first 1,000 of test."""
    storage = open_storage(str(tmp_path_factory.mktemp("trained")))
    prepare_archives(storage, few_archives)
    config = TrainConfig(epochs=3, max_train_rows=1000, global_batch_size=25, precision="fp32")
    trainer.train(storage, trainer.RunSpec("mine", config, ScaleConfig(num_workers="1")))
    return storage


@pytest.fixture(scope="module")
def test_rows(few_archives: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of test."""
    return read_pair(few_archives / "t10k-images-idx3-ubyte.gz", few_archives / "t10k-labels-idx1-ubyte.gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, test_rows: tuple[np.ndarray, np.ndarray]) -> Path:
    """The images of test as PNG files, in two folders, whose names sort as the rows."""
    place = tmp_path_factory.mktemp("my images")
    for row, image in enumerate(test_rows[0]):
        path = place / f"{row // 500}" / f"{row:05}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return place


def evaluated(storage: Storage) -> pd.DataFrame:
    """What the evaluation gave for test."""
    rows = [row for row in tables.read_table(storage, "predictions", "mine") if row["split"] == "test"]
    return pd.DataFrame(rows).sort_values("index", ignore_index=True)


def predicted(storage: Storage, images: Path | str, out: Path, *flags: str) -> tuple[pd.DataFrame, str]:
    """Run the job; return its rows and what it printed."""
    named = [] if "--model" in flags else ["--storage", storage.uri, "--run-id", "mine"]
    done = call_job(predict.main, *named, "--images", str(images), "--out", str(out), *WORKERS, *flags)
    assert done.returncode == 0, done.stderr
    return pd.read_parquet(out), done.stdout


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Check that predictions are those of the evaluation, to the bit."""
    assert found["label"].tolist() == expected["predicted"].tolist()
    assert np.array_equal(np.stack(found["probabilities"]), np.stack(expected["probabilities"]))
    assert found["name"].tolist() == [CLASS_NAMES[label] for label in expected["predicted"]]
    assert found["certainty"].tolist() == np.stack(expected["probabilities"]).max(1).tolist()
    assert found["error"].isna().all()
    assert found["label"].nunique() > 5, "it learned something"


def test_files_get_the_classes_of_the_evaluation(storage: Storage, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found, said = predicted(storage, folder, out)
    assert_same(found, evaluated(storage))
    assert found["path"].tolist() == [f"{folder}/{row // 500}/{row:05}.png" for row in range(len(found))]
    assert found["row"].isna().all()
    assert f"images     {len(found):,} image files of {folder}" in said
    assert f"{len(found):,} of {len(found):,} images" in said
    assert f"the 10 least certain of {len(found):,}" in said
    assert f"predictions: {out}" in said
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again, said = predicted(storage, folder, out)
    assert "are there already; nothing to do" in said
    assert again.equals(found)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("form", ["prepared", "hub", "lists"])
def test_rows_of_parquet_get_them_too(
    form: str, storage: Storage, tmp_path: Path, test_rows: tuple[np.ndarray, np.ndarray]
) -> None:
    """The prepared data itself, PNG files in a struct, and lists; over files and groups that end anywhere."""
    images, place = test_rows[0], tmp_path / "rows"
    place.mkdir()
    if form == "prepared":
        for path in Path(storage.root, "data", "fashion-mnist", "test").glob("*.parquet"):
            shutil.copy(path, place)
    elif form == "hub":
        cells = pa.array([{"bytes": content(Image.fromarray(each)), "path": None} for each in images])
        for name, rows in (("a", slice(0, 333)), ("b", slice(333, None))):
            pq.write_table(pa.table({"image": cells[rows]}), place / f"{name}.parquet", row_group_size=100)
    else:
        lists = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), 784).cast(pa.list_(pa.uint8()))
        pq.write_table(pa.table({"pixels": lists, "image": pa.nulls(len(images))}), place / "a.parquet")
    found, _ = predicted(storage, place, tmp_path / "out", *(["--column", "pixels"] if form == "lists" else []))
    assert_same(found, evaluated(storage))
    expected = {str(path): pq.read_metadata(path).num_rows for path in sorted(place.iterdir())}
    assert found.groupby("path").size().to_dict() == expected
    for path, number in expected.items():
        assert found[found["path"] == path]["row"].tolist() == list(range(number))


def test_the_exported_folder_gives_them_and_needs_no_storage(storage: Storage, folder: Path, tmp_path: Path) -> None:
    flags = ["--storage", storage.uri, "--run-id", "mine", "--split", "val", "--export", str(tmp_path / "model")]
    done = call_job(evaluate.main, *flags)
    assert done.returncode == 0, done.stderr
    found, _ = predicted(storage, f"{folder}/0/*.png", tmp_path / "out", "--model", str(tmp_path / "model"))
    assert_same(found, evaluated(storage)[: len(found)])
    assert len(found) == min(500, len(evaluated(storage)))


def test_what_cannot_be_read_has_a_row_and_disturbs_no_other(storage: Storage, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "some"
    shutil.copytree(folder, place)
    bad = {"0/00003.png": b"", "0/00499.png": b"<html>", "1/00500.png": content(Image.new("L", (30, 28)))}
    for name, data in bad.items():
        (place / name).write_bytes(data)
    found, said = predicted(storage, place, tmp_path / "out")
    wrong = found["error"].notna()
    assert found[wrong]["path"].tolist() == [f"{place}/{name}" for name in bad]
    assert [error[:12] for error in found[wrong]["error"]] == ["it is empty", "it is neithe", "it has 30 x "]
    assert found[wrong][["label", "name", "probabilities", "certainty"]].isna().all(axis=None)
    assert_same(found[~wrong], evaluated(storage)[~wrong])
    assert f"3 of {len(found):,} images could not be read:\n  {place}/0/00003.png: it is empty" in said


def test_a_job_that_is_killed_goes_on_where_it_was(storage: Storage, folder: Path, tmp_path: Path) -> None:
    """Twelve thousand links, a process with a cluster of its own, killed when a third of the parts are there."""
    place, out = tmp_path / "many", tmp_path / "out"
    place.mkdir()
    files = sorted(folder.rglob("*.png"))
    number = 12_000
    for row in range(number):
        (place / f"{row:06}.png").symlink_to(files[row % len(files)])
    command = [sys.executable, "-m", "jobs.predict", "--storage", storage.uri, "--run-id", "mine"]
    command += ["--images", str(place), "--out", str(out)]
    killed = subprocess.Popen(
        command, cwd=ROOT, env=job_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: killed.poll() is not None or len(list(out.glob("part-*"))) >= 4, "part")
    assert killed.poll() is None, killed.communicate()[1]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_for(lambda: is_still(out), "end of its workers")
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 4 <= len(before) < number // parts.ROWS_PER_PART
    done = subprocess.run(command, cwd=ROOT, env=job_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{len(before)} of 12 parts are there already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = pd.read_parquet(out)
    assert found["path"].tolist() == [str(path) for path in sorted(place.iterdir())]
    expected = evaluated(storage)["predicted"].to_numpy()
    assert found["label"].tolist() == expected[np.arange(number) % len(files)].tolist()


def is_still(out: Path) -> bool:
    """Tell whether no part appears for a while: the workers of a killed driver end when they find it gone."""
    before = sorted(out.glob("part-*"))
    time.sleep(5)
    return sorted(out.glob("part-*")) == before


def test_photographs_are_known_nearly_as_well_as_the_originals(
    storage: Storage, test_rows: tuple[np.ndarray, np.ndarray]
) -> None:
    """Of 300 to 900 pixels, on light grounds, in colour, off centre; half of them as JPEG files."""
    images, labels = (rows[:300] for rows in test_rows)
    rng = np.random.default_rng(0)
    files = [
        content(photograph(image, draw_scene(rng)), "JPEG" if row % 2 else "PNG") for row, image in enumerate(images)
    ]
    classifier = Classifier.load(storage.uri, run_id="mine")
    originals = float((classifier.predict(images).labels == labels).mean())
    photographs = np.stack([decode_image(data, photo=True) for data in files])
    found = float((classifier.predict(photographs).labels == labels).mean())
    assert originals > 0.7, originals
    assert found >= originals - 0.05, (found, originals)


def test_the_job_takes_photographs(storage: Storage, tmp_path: Path, test_rows: tuple[np.ndarray, np.ndarray]) -> None:
    rng, photos = np.random.default_rng(1), tmp_path / "photos"
    photos.mkdir()
    for row in range(3):
        (photos / f"{row}.jpg").write_bytes(content(photograph(test_rows[0][row], draw_scene(rng)), "JPEG"))
    found, _ = predicted(storage, photos / "*.jpg", tmp_path / "out", "--photo")
    pixels = np.stack([decode_image(path.read_bytes(), photo=True) for path in sorted(photos.glob("*.jpg"))])
    expected = Classifier.load(storage.uri, run_id="mine").predict(pixels)
    assert found["label"].tolist() == expected.labels.tolist()
    assert json.loads((tmp_path / "out" / parts.MANIFEST).read_text())["photo"] is True


def test_parts_that_follow_each_other_are_read_together() -> None:
    found = prediction.stretches([0, 1, 2, 3, 5, 6, 9], 3)
    assert [(each["first"], each["stop"]) for each in found] == [(0, 3), (3, 4), (5, 7), (9, 10)]
    assert prediction.stretches([], 3) == []


def test_a_parquet_file_that_is_damaged_is_one_line(storage: Storage, tmp_path: Path) -> None:
    """Its rows are counted from its end; what is wrong is seen by a task."""
    path, rng = tmp_path / "a.parquet", np.random.default_rng(0)
    cells = [content(Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8))) for _ in range(20)]
    pq.write_table(pa.table({"image": cells}), path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    flags = ["--storage", storage.uri, "--run-id", "mine", "--images", str(path), "--out", str(tmp_path / "out")]
    assert_refused(call_job(predict.main, *flags, *WORKERS), "a.parquet cannot be read")


def shared_job(listing: Listing, out: Storage) -> prediction.Shared:
    return prediction.Shared(listing, out, ModelFiles(b"", {}, "fp32"), photo=False, use_gpu=False, threads=1)


class Guesses:
    """A network that has learned nothing."""

    def predict(self, pixels: np.ndarray) -> Predictions:
        rows = len(pixels)
        return Predictions(np.zeros(rows, np.uint8), np.array(["x"] * rows), np.full((rows, 10), 0.1, np.float32))


def raise_error(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises `error`."""

    def function(*arguments: Any, **options: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize("place", ["read_images", "write_part"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "part"), OSError("no answer"), UserError("it is damaged")],
    ids=["full", "silent", "damaged"],
)
def test_a_storage_that_fails_in_a_task_is_told_as_it_was(
    place: str, error: OSError | UserError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task returns what is wrong, since Ray Data hands on no exception."""
    if place == "write_part" and isinstance(error, UserError):
        pytest.skip("writing has no user's mistakes")
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    job = shared_job(list_images(str(tmp_path)), open_storage(str(tmp_path / "out"), "--out"))
    monkeypatch.setattr(ray, "get", lambda reference: job)
    monkeypatch.setattr(prediction, "load", lambda reference: (job, Guesses()))
    monkeypatch.setattr(prediction, place, raise_error(error))
    [read] = prediction.read_parts(pa.Table.from_pylist([{"first": 0, "stop": 1}]), None)
    [row] = prediction.predict_parts(read, None).to_pylist()
    assert not list(tmp_path.glob("out/*"))
    with pytest.raises(type(error)) as told:
        prediction.raise_failure(row["failure"])
    assert str(told.value) == str(error)
    assert getattr(told.value, "errno", None) == getattr(error, "errno", None)


def test_what_is_read_and_written_has_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    job = shared_job(list_images(str(tmp_path)), open_storage(str(tmp_path / "out"), "--out"))
    monkeypatch.setattr(ray, "get", lambda reference: job)
    monkeypatch.setattr(prediction, "load", lambda reference: (job, Guesses()))
    [read] = prediction.read_parts(pa.Table.from_pylist([{"first": 0, "stop": 1}]), None)
    told = prediction.predict_parts(read, None)
    assert told.to_pylist() == [{"part": 0, "images": 1, "unreadable": 0, "failure": None}]
    assert [path.name for path in tmp_path.glob("out/*")] == [parts.part_name(0)]


@pytest.mark.parametrize("unseen", ["check_every_node_sees", "check_every_node_finds"])
def test_nothing_is_written_unless_every_node_sees_all(
    unseen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions on another node's disk would be lost."""
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    listing, out = list_images(str(tmp_path)), open_storage(str(tmp_path / "out"), "--out")
    files = ModelFiles(b"", {}, "fp32")
    manifest = prediction.make_manifest(listing, files, str(tmp_path), "mine", photo=False)
    asked: list[tuple[Storage, list[str]]] = []
    monkeypatch.setattr(prediction.connection, "connect", lambda: None)
    monkeypatch.setattr(prediction, "wait_for_room", lambda plan, wait_s: Workers(1, 1, use_gpu=False))
    monkeypatch.setattr(prediction, "check_every_node_sees", lambda storage: asked.append((storage, [])))
    monkeypatch.setattr(
        prediction, "check_every_node_finds", lambda storage, paths: asked.append((storage, list(paths)))
    )
    monkeypatch.setattr(prediction, "predict_images", raise_error(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prediction.predict_missing(listing, files, out, [0], manifest=manifest, scale=ScaleConfig())
    assert asked == [(out, []), (listing.storage, [str(tmp_path / "a.png")])]
    shutil.rmtree(out.root)
    monkeypatch.setattr(prediction, unseen, raise_error(UserError("not seen")))
    with pytest.raises(UserError, match="not seen"):
        prediction.predict_missing(listing, files, out, [0], manifest=manifest, scale=ScaleConfig())
    assert out.list() == []


def test_the_plan_shows_names_that_are_no_text(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(folder)
    Image.new("L", (28, 28)).save(f"{folder}/a.png")
    listing, out = list_images(folder), open_storage(f"{folder}/out", "--out")
    manifest = prediction.make_manifest(listing, ModelFiles(b"", {}, "fp32"), folder, folder, photo=False)
    shown = f"{tmp_path}/\\udcff"
    lines = [f"images     1 image files of {shown}", f"model      {shown}", f"out        {shown}/out"]
    assert prediction.plan_lines(listing, manifest, [0], out) == lines


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"images": "nowhere"}, "does not exist; name a file, a folder, a glob or a URI"),
    "no run": ({"run_id": "other"}, "--run-id other does not exist"),
    "neither": ({"run_id": ""}, "either --run-id RUN or --model FOLDER"),
    "both": ({"model": "x"}, "either --run-id RUN or --model FOLDER"),
    "out among the images": ({"out": "{images}/out"}, "lies inside --images"),
    "out is a file": ({"out": "{images}/0/00000.png"}, "is a file; name another folder"),
    "out holds others": ({"out": "{images}"}, "lies inside --images"),
    "a column of files": ({"column": "image"}, "--column image is for Parquet files"),
    "too many workers": ({"num_workers": "999"}, "--num-workers 999 needs 999 CPUs"),
    "misspelt": ({"imags": "x"}, "--imags"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case: str, storage: Storage, folder: Path, tmp_path: Path) -> None:
    changed, told = MISTAKES[case]
    flags = {"storage": storage.uri, "run_id": "mine", "images": str(folder), "out": str(tmp_path / "out")} | changed
    words = [
        word
        for name, value in flags.items()
        if value
        for word in (f"--{name.replace('_', '-')}", value.format(images=folder))
    ]
    before = sorted(folder.rglob("*"))
    assert_refused(call_job(predict.main, *words), told)
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "out").exists()


def test_pixels_are_no_photographs(storage: Storage, tmp_path: Path) -> None:
    data = Path(storage.root, "data", "fashion-mnist", "test")
    flags = ["--storage", storage.uri, "--run-id", "mine", "--images", str(data), "--out", str(tmp_path), "--photo"]
    assert_refused(call_job(predict.main, *flags), "--photo is for photographs, and the column image holds 28 x 28")
