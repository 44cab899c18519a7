"""The data set as others keep it: each form gives the same rows and the same sum, and each wrong file is named."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forms
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, assert_refused, call_job, take_for_official

from fashion.config import UserError
from fashion.data import archives, preparation, sources, synthetic
from fashion.storage import Storage, open_storage
from jobs import prepare


@pytest.fixture(scope="module")
def handful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of 120 training and 30 test rows."""
    folder = tmp_path_factory.mktemp("handful")
    synthetic.write_archives(folder, num_train_rows=120, num_test_rows=30)
    return folder


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, handful: Path) -> Path:
    """The same, taken for the official archives."""
    take_for_official(monkeypatch, handful)
    return handful


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home and a working directory in which nothing lies."""
    for name in ("KERAS_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


# --- right forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", forms.FORMS)
def test_each_form_gives_the_same_rows_and_sum(form: str, official: Path, tmp_path: Path) -> None:
    source = tmp_path / "my data"
    forms.FORMS[form](official, source)
    expected, _ = preparation.prepare(open_storage(str(tmp_path / "a")), str(official), val_rows=20)
    manifest, _ = preparation.prepare(open_storage(str(tmp_path / "b")), str(source), val_rows=20)
    assert (manifest.sha256, manifest.archives, manifest.files) == (expected.sha256, expected.archives, expected.files)
    assert str(source) in manifest.source
    again, written = preparation.prepare(open_storage(str(tmp_path / "b")), str(source), val_rows=20)
    assert not written
    assert again == manifest


def test_of_several_forms_the_first_complete_one_is_read(official: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    forms.kaggle(header=True, shuffled=True)(official, source)
    plain = tmp_path / "plain"
    forms.copy_as(".", "-", "")(official, plain)
    for path in list(plain.iterdir())[1:]:
        shutil.copy(path, source)
    assert sources.read_source(str(source)).place == f"CSV files in {source}", "three of four plain files"
    shutil.copy(next(iter(plain.iterdir())), source)
    assert sources.read_source(str(source)).place == f"plain IDX files in {source}"
    for name in archives.ARCHIVES:
        shutil.copy(official / name, source)
    assert sources.read_source(str(source)).place == f"gzip'd archives in {source}"


@pytest.mark.parametrize(
    ("place", "form"),
    [
        ("home/.keras/datasets/fashion-mnist", "archives"),
        ("here/data", "torchvision's root"),
        ("home/.cache/huggingface/hub/datasets--zalando-datasets--fashion_mnist/snapshots/1f", "the hub's Parquet"),
    ],
)
def test_auto_takes_what_others_left_here_and_says_so(
    official: Path, nowhere: Path, capsys: pytest.CaptureFixture[str], place: str, form: str
) -> None:
    forms.FORMS[form](official, nowhere / place)
    prepare.main(["--storage", str(nowhere / "s"), "--source", "auto", "--val-rows", "20"])
    (taken,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("taken: ")]
    assert Path(place).name in taken


def test_auto_passes_over_what_is_damaged_and_says_so(
    official: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forms.FORMS["archives"](official, nowhere / "home/.keras/datasets/fashion-mnist")
    wrong = nowhere / "home/.keras/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz"
    wrong.write_bytes(wrong.read_bytes()[:20])
    monkeypatch.setattr(archives, "download", lambda _: official)
    prepare.main(["--storage", str(nowhere / "s"), "--source", "auto", "--val-rows", "20"])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"passed over: {wrong}: not a whole gzip file")
    assert told[1] == "taken: the official download"


# --- wrong files ----------------------------------------------------------------------------------------------------

TRAIN_CSV, TEST_CSV = "fashion-mnist_train.csv", "fashion-mnist_test.csv"
TRAIN_PARQUET, TEST_PARQUET = (f"fashion_mnist/{name}-00000-of-00001.parquet" for name in ("train", "test"))
HTML = b"\n<!DOCTYPE html><html><body>404</body></html>"


def cell(row: int, column: int, value: str) -> Callable[[bytes], bytes]:
    """Return what replaces a cell of a CSV file; row 0 is the header."""

    def change(content: bytes) -> bytes:
        lines = [line.split(b",") for line in content.splitlines()]
        lines[row][column] = value.encode()
        return b"\n".join(b",".join(line) for line in lines) + b"\n"

    return change


def rows(change: Callable[[pa.Table], pa.Table]) -> Callable[[bytes], bytes]:
    """Return what changes the table in a Parquet file."""

    def write(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(change(pq.read_table(pa.BufferReader(content))), sink)
        return bytes(sink.getvalue())

    return write


def image(content: bytes | None) -> Callable[[bytes], bytes]:
    """Return what replaces the third image of a Parquet file."""

    def change(table: pa.Table) -> pa.Table:
        cells = table["image"].to_pylist()
        cells[2] = {"bytes": content, "path": None}
        return table.set_column(0, "image", pa.array(cells, table.schema.field("image").type))

    return rows(change)


def label(value: int | None) -> Callable[[bytes], bytes]:
    """Return what replaces the first label of a Parquet file."""
    return rows(lambda t: t.set_column(1, "label", pa.array([value, *t["label"].to_pylist()[1:]], pa.int64())))


def plain(name: str, change: Callable[[bytes], bytes]) -> tuple[str, str, Callable[[bytes], bytes]]:
    return ("plain IDX", name, change)


def grey(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), np.uint8)


# Form, file, what is done to its content (None removes it, a string is told in its place), what is told.
WRONG: dict[str, tuple[str, str, Any, str]] = {
    "CSV: a row too few": ("Kaggle's CSV", TRAIN_CSV, lambda c: c[: c[:-1].rindex(b"\n") + 1], "holds 119 rows"),
    "CSV: a row twice": ("Kaggle's CSV", TEST_CSV, lambda c: c + c.splitlines()[-1] + b"\n", "holds 31 rows"),
    "CSV: label 10": ("Kaggle's CSV", TRAIN_CSV, cell(7, 0, "10"), "holds label 10, expected 0 to 9"),
    "CSV: pixel 256": ("Kaggle's CSV", TRAIN_CSV, cell(3, 9, "256"), "invalid value '256'"),
    "CSV: pixel -1": ("Kaggle's CSV", TEST_CSV, cell(3, 9, "-1"), "invalid value '-1'"),
    "CSV: pixel as text": ("Kaggle's CSV", TRAIN_CSV, cell(3, 9, "dark"), "invalid value 'dark'"),
    "CSV: pixel 0.5": ("CSV without a header", TRAIN_CSV, cell(3, 9, "0.5"), "invalid value '0.5'"),
    "CSV: no pixel": ("Kaggle's CSV", TRAIN_CSV, cell(3, 9, ""), "a value of the column pixel9 is missing"),
    "CSV: another pixel": ("Kaggle's CSV", TRAIN_CSV, cell(3, 9, "77"), "right format, but the SHA-256 of its rows"),
    "CSV: a row of 784": (
        "Kaggle's CSV",
        TEST_CSV,
        lambda c: c[:-1].rpartition(b",")[0] + b"\n",
        "Expected 785 columns",
    ),
    "CSV: 784 columns": (
        "Kaggle's CSV",
        TRAIN_CSV,
        lambda c: b"\n".join(line.rpartition(b",")[0] for line in c.splitlines()),
        "(784), expected label, pixel1 to pixel784 (785)",
    ),
    "CSV: no header, 784 columns": (
        "CSV without a header",
        TRAIN_CSV,
        lambda c: b"\n".join(line.rpartition(b",")[0] for line in c.splitlines()),
        "Expected 785 columns, got 784",
    ),
    "CSV: columns in another order": ("Kaggle's CSV", TRAIN_CSV, cell(0, 1, "pixel2"), "its columns are label, pixel2"),
    "CSV: HTML": ("Kaggle's CSV", TRAIN_CSV, lambda c: HTML, "is a web page (HTML), not data"),
    "CSV: empty": ("Kaggle's CSV", TEST_CSV, lambda c: b"", "fetch it again"),
    "CSV: header alone": ("Kaggle's CSV", TEST_CSV, lambda c: c.splitlines()[0] + b"\n", "holds no rows"),
    "CSV: no test": ("Kaggle's CSV", TEST_CSV, None, "lacks fashion-mnist_test.csv"),
    "CSV: a folder": ("Kaggle's CSV", TEST_CSV, "folder", "is a folder, not a file"),
    "gzip: HTML": ("archives", "train-images-idx3-ubyte.gz", lambda c: HTML, "is a web page (HTML), not data"),
    "gzip: truncated": ("archives", "t10k-images-idx3-ubyte.gz", lambda c: c[:-9], "not a whole gzip file"),
    "gzip: a folder": ("archives", "t10k-labels-idx1-ubyte.gz", "folder", "is a folder, not a file"),
    "gzip: one missing": ("archives", "t10k-labels-idx1-ubyte.gz", None, "lacks t10k-labels-idx1-ubyte.gz"),
    "IDX: truncated": ("plain IDX", "train-images-idx3-ubyte", lambda c: c[:-9], "promises 120 rows of 784 bytes but"),
    "IDX: magic": ("plain IDX", "train-labels-idx1-ubyte", lambda c: b"\0\0\x0d" + c[3:], "magic number is 3329"),
    "IDX: 27 wide": (
        "plain IDX",
        "t10k-images-idx3-ubyte",
        lambda c: c[:15] + b"\x1b" + c[16:],
        "image size is (28, 27)",
    ),
    "IDX: label 10": (
        "plain IDX",
        "t10k-labels-idx1-ubyte",
        lambda c: c[:-1] + b"\n",
        "holds label 10, expected 0 to 9",
    ),
    "IDX: another label": (
        "plain IDX, dot names",
        "train-labels.idx1-ubyte",
        lambda c: c[:-1] + bytes([(c[-1] + 1) % 10]),
        "right format, but the SHA-256 of its rows",
    ),
    "PNG: in colour": (
        "the hub's Parquet",
        TRAIN_PARQUET,
        image(forms.png(np.zeros((28, 28, 3), np.uint8))),
        "row 3: its PNG is of mode RGB, not grey",
    ),
    "PNG: 27 wide": ("the hub's Parquet", TRAIN_PARQUET, image(forms.png(grey(28, 27))), "row 3: its PNG is 27 x 28"),
    "PNG: huge": ("the hub's Parquet", TEST_PARQUET, image(forms.png(grey(2800, 2800))), "its PNG is 2800 x 2800"),
    "PNG: truncated": ("the hub's Parquet", TRAIN_PARQUET, image(forms.png(grey(28, 28))[:50]), "is no whole PNG"),
    "PNG: a JPEG": ("the hub's Parquet", TRAIN_PARQUET, image(forms.png(grey(28, 28), "JPEG")), "is no whole PNG"),
    "PNG: none": ("the hub's Parquet", TRAIN_PARQUET, image(None), "row 3: its image is no whole PNG"),
    "PNG: 64 MB of zeros": (
        "the hub's Parquet",
        TRAIN_PARQUET,
        image(bytes(64 << 20)),
        "bytes, more than 4096 each; fetch it again",
    ),
    "PNG: another pixel": (
        "the hub's Parquet",
        TRAIN_PARQUET,
        image(forms.png(grey(28, 28))),
        "right format, but the SHA-256 of its rows",
    ),
    "Parquet: label 10": ("the hub's Parquet", TEST_PARQUET, label(10), "holds label 10, expected 0 to 9"),
    "Parquet: label -1": ("the hub's Parquet", TEST_PARQUET, label(-1), "holds label -1, expected 0 to 9"),
    "Parquet: no label": ("the hub's Parquet", TEST_PARQUET, label(None), "a label is missing"),
    "Parquet: other columns": (
        "the hub's Parquet",
        TRAIN_PARQUET,
        rows(lambda t: t.rename_columns(["img", "label"])),
        "its columns are img, label, not image, label",
    ),
    "Parquet: text for images": (
        "the hub's Parquet",
        TRAIN_PARQUET,
        rows(lambda t: t.set_column(0, "image", pa.array(["x"] * len(t)))),
        "the column image is of type string, not PNG bytes",
    ),
    "Parquet: text for labels": (
        "the hub's Parquet",
        TRAIN_PARQUET,
        rows(lambda t: t.set_column(1, "label", pa.array(["Coat"] * len(t)))),
        "the column label is of type string, not an integer",
    ),
    "Parquet: a row too few": ("the hub's Parquet", TRAIN_PARQUET, rows(lambda t: t.slice(1)), "holds 119 rows"),
    "Parquet: no rows": ("the hub's Parquet", TEST_PARQUET, rows(lambda t: t.slice(0, 0)), "holds no rows"),
    "Parquet: truncated": ("the hub's Parquet", TRAIN_PARQUET, lambda c: c[: len(c) // 2], "fetch it again"),
    "Parquet: HTML": ("the hub's Parquet", TEST_PARQUET, lambda c: HTML, "is a web page (HTML), not data"),
    "Parquet: no test": ("the hub's Parquet", TEST_PARQUET, None, "lacks test*.parquet"),
    "Parquet: a part missing": (
        "Parquet in parts",
        "data/train-00001-of-00002.parquet",
        None,
        "is one of 2 files, but 1 are there",
    ),
}


@pytest.fixture(scope="module")
def written(handful: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each form in a folder of its own."""
    folder = tmp_path_factory.mktemp("forms")
    for name, write in forms.FORMS.items():
        write(handful, folder / name)
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_by_name_and_nothing_is_written(
    case: str, storage: Storage, official: Path, written: Path, tmp_path: Path
) -> None:
    form, name, change, told = WRONG[case]
    source = tmp_path / "my source"
    shutil.copytree(written / form, source)
    path = source / name
    content = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change is not None:
        path.write_bytes(change(content))
    done = call_job(prepare.main, "--storage", storage.uri, "--source", str(source), "--val-rows", "20")
    assert_refused(done, told)
    assert (path.name if change is not None else path.name.partition("-0000")[0]) in done.stderr
    assert not Path(storage.root).exists()


def test_a_folder_of_something_else_is_told_what_it_may_hold(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no Fashion-MNIST; it must hold the four archives, .*Kaggle's"):
        sources.read_source(str(tmp_path))


# --- the real rows --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the official archives are not here")
@pytest.mark.slow
def test_the_order_of_the_official_rows_is_what_the_file_says() -> None:
    for stem, pair in forms.pairs(REAL_DATA).items():
        files = {name: REAL_DATA / name for name in archives.ROWS}
        shuffled = tuple(array[np.random.default_rng(1).permutation(len(array))] for array in pair)
        assert archives.rows_sha256(stem, shuffled) != archives.rows_sha256(stem, pair)
        ordered = archives.prove(stem, shuffled, files)
        assert all((one == other).all() for one, other in zip(ordered, pair, strict=True))


def test_a_file_that_promises_much_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows are read than a split may have, whatever the file holds."""
    from fashion.data import tabular

    monkeypatch.setattr(tabular, "MAX_ROWS_PER_SPLIT", 10)
    monkeypatch.setattr(tabular, "CSV_BLOCK_BYTES", 1 << 14)
    line = ",".join(["0"] * 785) + "\n"
    path = tmp_path / TRAIN_CSV
    path.write_text(line * 200)
    with pytest.raises(UserError, match="holds more than 10 rows"):
        tabular.read_csv(path)
    pq.write_table(forms.hub_table((np.zeros((11, 28, 28), np.uint8), np.zeros(11, np.uint8))), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="promises 11 rows, more than 10"):
        tabular.read_parquet_images([tmp_path / "t.parquet"])


def test_gzip_is_known_by_its_content(official: Path, tmp_path: Path) -> None:
    """Browsers inflate what they save, and keep the name."""
    name = "train-labels-idx1-ubyte.gz"
    path = tmp_path / name
    path.write_bytes(gzip.decompress((official / name).read_bytes()))
    assert len(archives.read_idx(path, magic=2049, shape=())) == 120
