"""The stand-in data set: files, balance, determinism; it can be learnt, but not trivially. Few rows, no torch."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fashion.data import synthetic

NAMES = [
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
]


def read_bodies(folder: Path) -> dict[str, bytes]:
    """Return each archive's decompressed bytes."""
    return {name: gzip.decompress((folder / name).read_bytes()) for name in NAMES}


@pytest.mark.parametrize("num_rows", [1, 7, 10, 33])
def test_shapes_types_and_balance(num_rows: int) -> None:
    images, labels = synthetic.draw(num_rows, seed=0)
    assert images.shape == (num_rows, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (num_rows,) and labels.dtype == np.uint8
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.max() - counts.min() <= 1


def test_rows_are_in_random_order() -> None:
    _, labels = synthetic.draw(200, seed=0)
    assert not np.array_equal(labels, np.sort(labels))
    # Shuffled labels repeat their predecessor about once in ten rows; a fixed cycle of classes never does.
    assert 5 <= np.count_nonzero(labels[1:] == labels[:-1]) <= 40


def test_every_row_gets_a_picture_of_its_own_label(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_with_label(_: object, rows: int, label: int) -> NDArray[np.uint8]:
        assert 1 <= rows <= 3
        return np.full((rows, 28, 28), label + 1, np.uint8)

    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 3)
    monkeypatch.setattr(synthetic, "render", fill_with_label)
    images, labels = synthetic.draw(104, seed=4)
    assert (images == labels[:, None, None] + 1).all()


def test_pictures_of_one_class_differ() -> None:
    images = synthetic.render(np.random.default_rng(0), 50, 0)
    assert len({image.tobytes() for image in images}) == 50


def test_same_seed_same_pixels_other_seed_other_pixels() -> None:
    images, labels = synthetic.draw(60, seed=3)
    again, labels_again = synthetic.draw(60, seed=3)
    other, labels_other = synthetic.draw(60, seed=4)
    assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
    assert not np.array_equal(labels, labels_other)
    for label in range(10):
        assert not np.array_equal(images[labels == label], other[labels_other == label])


def test_a_seed_gives_these_pixels_on_every_machine() -> None:
    """Reports name the data by its sum: pin a new one only if the drawing (or numpy's random stream) really changed."""
    images, labels = synthetic.draw(100, seed=0)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16] == "0bc3e7dcc44df2bc"


@pytest.mark.parametrize("label", range(10))
def test_garments_lie_on_a_black_background(label: int) -> None:
    images = synthetic.render(np.random.default_rng(label), 20, label)
    covered = (images > 0).reshape(20, -1).mean(axis=1)
    assert 0.2 < np.median(covered) < 0.8
    assert np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]]) == 0


def test_upper_body_parameters_overlap() -> None:
    """No single parameter tells a shirt from a T-shirt or a pullover, as with the real garments."""
    for name, by_class in synthetic.UPPER_RANGES.items():
        shirt_low, shirt_high = by_class[4]
        for low, high in (by_class[0], by_class[1]):
            assert max(low, shirt_low) < min(high, shirt_high), name


def test_archives_have_official_names_and_headers(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    synthetic.write_archives(folder, num_train_rows=30, num_test_rows=20)
    assert sorted(path.name for path in folder.iterdir()) == NAMES  # no temporary file stays behind
    bodies = read_bodies(folder)
    for stem, num_rows in (("train", 30), ("t10k", 20)):
        images, labels = bodies[f"{stem}-images-idx3-ubyte.gz"], bodies[f"{stem}-labels-idx1-ubyte.gz"]
        assert struct.unpack(">4I", images[:16]) == (2051, num_rows, 28, 28) and len(images) == 16 + num_rows * 784
        assert struct.unpack(">2I", labels[:8]) == (2049, num_rows) and len(labels) == 8 + num_rows
        assert np.bincount(np.frombuffer(labels[8:], np.uint8)).tolist() == [num_rows // 10] * 10


def test_archives_hold_what_is_drawn(tmp_path: Path) -> None:
    """Images and labels of a file pair belong together, in row order."""
    synthetic.write_archives(tmp_path, seed=5, num_train_rows=40, num_test_rows=10)
    bodies = read_bodies(tmp_path)
    images, labels = synthetic.draw_rows(40, np.random.SeedSequence(5).spawn(2)[0])
    assert bodies["train-images-idx3-ubyte.gz"][16:] == images.tobytes()
    assert bodies["train-labels-idx1-ubyte.gz"][8:] == labels.tobytes()


def test_archive_bytes_depend_on_the_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[dict[str, str]] = []
    for number, (seed, now) in enumerate([(0, 1e9), (0, 1.5e9), (1, 1e9)]):
        monkeypatch.setattr("time.time", lambda now=now: now)
        folder = tmp_path / str(number)
        synthetic.write_archives(folder, seed=seed, num_train_rows=20, num_test_rows=20)
        sums.append({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES})
    assert sums[0] == sums[1]
    assert all(sums[0][name] != sums[2][name] for name in NAMES)


def test_train_and_test_share_no_picture(tmp_path: Path) -> None:
    synthetic.write_archives(tmp_path, num_train_rows=50, num_test_rows=50)
    bodies = read_bodies(tmp_path)
    assert bodies["train-labels-idx1-ubyte.gz"] != bodies["t10k-labels-idx1-ubyte.gz"]
    train, test = (
        {body[row : row + 784] for row in range(16, len(body), 784)}
        for body in (bodies["train-images-idx3-ubyte.gz"], bodies["t10k-images-idx3-ubyte.gz"])
    )
    assert len(train) == len(test) == 50 and not train & test


def test_a_failed_write_leaves_neither_archive_nor_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write_archives(tmp_path, num_train_rows=10, num_test_rows=10)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_and_negative_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="num_rows is 0, must be at least 1"):
        synthetic.draw(0, seed=0)
    with pytest.raises(ValueError):
        synthetic.draw(10, seed=-1)


def ridge_accuracy(train: tuple[NDArray[np.uint8], ...], test: tuple[NDArray[np.uint8], ...]) -> NDArray[np.float64]:
    """Fit one-hot labels by ridge regression on 14 x 14 pixels; return the (10,) share of hits per class of `test`."""

    def features(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        pooled = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196) / 255
        return np.hstack([pooled, np.ones((len(pooled), 1))])

    inputs = features(train[0])
    weights = np.linalg.solve(inputs.T @ inputs + 3 * np.eye(197), inputs.T @ np.eye(10)[train[1]])
    hits = (features(test[0]) @ weights).argmax(axis=1) == test[1]
    return np.bincount(test[1], hits, 10) / np.bincount(test[1], minlength=10)


def test_a_linear_model_learns_it_but_not_fully() -> None:
    by_class = ridge_accuracy(synthetic.draw(1500, seed=10), synthetic.draw(700, seed=11))
    assert 0.55 < by_class.mean() < 0.90
    assert (by_class > 0.2).all()  # every class is recognisable: chance is 0.1
    assert by_class[1] > by_class[6] + 0.15  # trousers are easy and shirts are hard, as in the real data
