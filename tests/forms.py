"""Fashion-MNIST in the forms in which others keep it, written from the four archives."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from PIL import Image

from fashion.data import archives
from fashion.data.archives import Pair

Writer = Callable[[Path, Path], None]
"""(folder with the four archives, new folder)."""


def pairs(source: Path) -> dict[str, Pair]:
    """Return the rows of train and t10k."""
    kinds = ("images-idx3", "labels-idx1")
    return {
        stem: archives.read_pair(*(source / f"{stem}-{kind}-ubyte.gz" for kind in kinds)) for stem in ("train", "t10k")
    }


def copy_as(folder: str, sign: str = "-", suffix: str = ".gz") -> Writer:
    """Return what copies the archives into `folder`, with another sign before `idx`, plain if `suffix` is empty."""

    def write(source: Path, target: Path) -> None:
        (target / folder).mkdir(parents=True)
        for name in archives.ARCHIVES:
            content = (source / name).read_bytes()
            path = target / folder / (name.removesuffix(".gz").replace("-idx", f"{sign}idx") + suffix)
            path.write_bytes(content if suffix else gzip.decompress(content))

    return write


def csv_table(pair: Pair) -> pa.Table:
    """Return rows as Kaggle's table: label, pixel1, ..., pixel784."""
    columns = np.column_stack([pair[1], pair[0].reshape(len(pair[1]), -1)]).T
    return pa.table([np.ascontiguousarray(c) for c in columns], names=["label", *(f"pixel{n}" for n in range(1, 785))])


def kaggle(header: bool, shuffled: bool) -> Writer:
    """Return what writes Kaggle's two files; the rows of Kaggle's own are in another order than the official one."""

    def write(source: Path, target: Path) -> None:
        target.mkdir(parents=True)
        for name, pair in zip(("train", "test"), pairs(source).values(), strict=True):
            order = np.random.default_rng(0).permutation(len(pair[1])) if shuffled else np.arange(len(pair[1]))
            table = csv_table((pair[0][order], pair[1][order]))
            options = pa_csv.WriteOptions(include_header=header, quoting_style="none")
            pa_csv.write_csv(table, target / f"fashion-mnist_{name}.csv", options)

    return write


def png(image: np.ndarray, kind: str = "PNG") -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def hub_table(pair: Pair) -> pa.Table:
    """Return rows as the hub keeps them."""
    cells = [{"bytes": png(image), "path": None} for image in pair[0]]
    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table({"image": image, "label": pa.array(pair[1].astype(np.int64))})


def hub(folder: str, parts: int = 1) -> Writer:
    """Return what writes the hub's Parquet files, the training rows in `parts` files."""

    def write(source: Path, target: Path) -> None:
        (target / folder).mkdir(parents=True)
        for name, pair, count in zip(("train", "test"), pairs(source).values(), (parts, 1), strict=True):
            table = hub_table(pair)
            size = -(-len(table) // count)
            for part in range(count):
                path = target / folder / f"{name}-{part:05d}-of-{count:05d}.parquet"
                pq.write_table(table.slice(part * size, size), path)

    return write


FORMS: dict[str, Writer] = {
    "archives": copy_as("."),
    "archives, dot names": copy_as(".", "."),
    "plain IDX": copy_as(".", "-", ""),
    "plain IDX, dot names": copy_as(".", ".", ""),
    "torchvision's root": copy_as("FashionMNIST/raw", "-", ""),
    "Keras's cache": copy_as("datasets/fashion-mnist"),
    "Kaggle's CSV": kaggle(header=True, shuffled=True),
    "CSV without a header": kaggle(header=False, shuffled=False),
    "the hub's Parquet": hub("fashion_mnist"),
    "Parquet in parts": hub("data", parts=2),
}
