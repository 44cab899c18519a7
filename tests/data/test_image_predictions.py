"""Folders of predictions: parts that appear whole, what a job that goes on takes over, and what it refuses."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from fashion.config import CLASS_NAMES, UserError
from fashion.data.images import predictions as parts
from fashion.data.images.listing import list_images
from fashion.storage import Storage, open_storage

ERRORS = {3: "it is empty", 1500: "it is damaged"}
MANIFEST = parts.Manifest(
    images="photos",
    num_images=2300,
    listing_sha256="a" * 64,
    model="mine",
    model_sha256="b" * 64,
    photo=False,
    column="",
)


@pytest.fixture
def out(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "predictions"), "--out")


def probabilities() -> np.ndarray:
    values = np.random.default_rng(0).random((MANIFEST.num_images, 10)).astype(np.float32)
    return values / values.sum(1, keepdims=True)


def part(number: int) -> pa.Table:
    """A part of the 2,300 images, of which two could not be read."""
    rows = range(number * parts.ROWS_PER_PART, min((number + 1) * parts.ROWS_PER_PART, MANIFEST.num_images))
    values = probabilities()[rows.start : rows.stop]
    return parts.make_part(
        pa.array([f"photos/{row}.png" for row in rows]),
        pa.nulls(len(rows), pa.int64()),
        values.argmax(1).astype(np.uint8),
        values,
        [ERRORS.get(row) for row in rows],
    )


def test_a_folder_is_read_whole_by_one_call(out: Storage) -> None:
    assert parts.find_missing(out, MANIFEST) == [0, 1, 2]
    assert out.list() == []
    parts.write_manifest(out, MANIFEST)
    for number in (2, 0, 1):
        parts.write_part(out, number, part(number))
    table = pd.read_parquet(out.uri)
    assert table["path"].tolist() == [f"photos/{row}.png" for row in range(2300)]
    assert table["error"].dropna().to_dict() == ERRORS
    right = table[table["error"].isna()]
    assert right["name"].tolist() == [CLASS_NAMES[int(label)] for label in right["label"]]
    values = np.stack(right["probabilities"].to_list())
    assert np.array_equal(values, np.delete(probabilities(), list(ERRORS), axis=0))
    assert np.array_equal(values.max(1), right["certainty"].to_numpy())
    wrong = table[table["error"].notna()]
    assert wrong[["label", "name", "probabilities", "certainty"]].isna().all(axis=None)


def test_a_job_goes_on_with_what_is_missing(out: Storage) -> None:
    parts.write_manifest(out, MANIFEST)
    parts.write_part(out, 1, part(1))
    assert parts.find_missing(out, MANIFEST) == [0, 2]
    assert parts.find_missing(out, replace(MANIFEST, images="./photos", model="results")) == [0, 2], (
        "the names may differ"
    )


REFUSED = {
    "model_sha256": ("c" * 64, "holds predictions of another model (mine)"),
    "listing_sha256": ("c" * 64, "holds predictions on other images (2300 of photos), or these have changed since"),
    "photo": (True, "holds predictions made without --photo"),
    "column": ("picture", "holds predictions of the column (none)"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_other_predictions_are_refused_and_kept(field: str, out: Storage) -> None:
    value, told = REFUSED[field]
    parts.write_manifest(out, MANIFEST)
    before = out.read_bytes(parts.MANIFEST)
    with pytest.raises(UserError) as error:
        parts.find_missing(out, replace(MANIFEST, **{field: value}))
    assert told in str(error.value) and "name another folder, or remove this one" in str(error.value)
    assert (out.list(), out.read_bytes(parts.MANIFEST)) == ([parts.MANIFEST], before)


@pytest.mark.parametrize(
    ("images", "out", "is_apart"),
    [
        ("", "out", False),
        ("", "", False),
        ("", "../out", True),
        ("", ".out", True),
        ("a.png", "out", True),
        ("*.png", "out", True),
        ("*/*.png", "out", True),
        ("**/*.png", "sub/out", False),
        ("s*/**", "out", True),
        ("s*/**", "sub/out", False),
        ("*/*", "out", False),
        ("*/part*", "out/b", True),
        ("*/_*", "out", False),
    ],
)
def test_predictions_lie_apart_from_what_is_listed(images: str, out: str, is_apart: bool, tmp_path: Path) -> None:
    """Beside a file, or in a folder where a glob finds nothing, they disturb no listing."""
    tree = tmp_path / "photos"
    for name in ("a.png", "sub/b.png", "sub/part.png", "sub/_.png"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    listing = list_images(str(tree / images))
    storage = open_storage(os.path.normpath(tree / out), "--out")
    if is_apart:
        parts.check_apart(listing, storage)
        return
    with pytest.raises(UserError, match=r"lies inside --images .*; name a folder elsewhere"):
        parts.check_apart(listing, storage)


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    out = open_storage(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "--out")
    with pytest.raises(UserError, match=r"--out .*/\\udcff holds bytes that are no UTF-8"):
        parts.find_missing(out, MANIFEST)


def test_a_folder_of_something_else_is_refused(out: Storage) -> None:
    Path(out.root).mkdir()
    (Path(out.root) / "holiday.png").touch()
    with pytest.raises(UserError, match="is not empty and holds no predictions"):
        parts.find_missing(out, MANIFEST)
    assert out.list() == ["holiday.png"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"images": 3}', b"\xff"])
def test_a_damaged_manifest_is_told(content: bytes, out: Storage) -> None:
    out.write_bytes(content, parts.MANIFEST)
    with pytest.raises(UserError, match=r"_manifest\.json is damaged"):
        parts.find_missing(out, MANIFEST)


def test_the_summary_holds_the_least_certain_of_all_parts(out: Storage) -> None:
    parts.write_manifest(out, MANIFEST)
    for number in range(3):
        parts.write_part(out, number, part(number))
    summary = parts.summarise(out, MANIFEST.num_parts)
    certainty = probabilities().max(1)
    certainty[list(ERRORS)] = 1
    expected = np.argsort(certainty)[: parts.LEAST_CERTAIN]
    assert [row["path"] for row in summary.least_certain] == [f"photos/{row}.png" for row in expected]
    labels = np.delete(probabilities().argmax(1), list(ERRORS))
    assert summary.class_counts == np.bincount(labels, minlength=10).tolist()
    assert (summary.num_images, summary.num_unreadable) == (2300, 2)
    assert [row["error"] for row in summary.unreadable] == list(ERRORS.values())
    parts.check_complete(out, MANIFEST, summary)


def test_a_folder_that_lacks_predictions_is_told(out: Storage) -> None:
    parts.write_manifest(out, MANIFEST)
    parts.write_part(out, 1, part(1))
    told = f"--out {out.uri} holds 1,000 predictions for 2,300 images: .*; start the same command again"
    with pytest.raises(UserError, match=told):
        parts.check_complete(out, MANIFEST, parts.summarise(out, MANIFEST.num_parts))


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_part_is_told(damage: str, out: Storage) -> None:
    parts.write_manifest(out, MANIFEST)
    parts.write_part(out, 0, part(0))
    content = out.read_bytes(parts.part_name(0))
    if damage == "other":
        parts.write_part(out, 0, pa.table({"a": [1]}))
    else:
        out.write_bytes(content[: len(content) // 2], parts.part_name(0))
    with pytest.raises(UserError, match=r"part-000000\.parquet is damaged"):
        parts.summarise(out, MANIFEST.num_parts)
