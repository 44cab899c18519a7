"""Predictions on a user's images, as a folder of Parquet parts that one call reads whole.

Part k holds the images numbered from 1000 k on, and appears whole or not at all; so a job that was killed goes on with
the parts that are missing. Beside them, `_manifest.json` says which images and which model they are of.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fashion.config import CLASS_NAMES, NUM_CLASSES, UserError, build, parse_object, require
from fashion.data.images.listing import Listing
from fashion.storage import Storage, read_parquet

# Whole batches of the evaluation, so that batches are the same however the work is divided and resumed.
ROWS_PER_PART = 1000
# Readers of Parquet pass over names that begin with this sign.
MANIFEST = "_manifest.json"
LEAST_CERTAIN = 10
READ_AT_A_TIME = 16
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("row", pa.int64()),
        ("label", pa.uint8()),
        ("name", pa.string()),
        ("probabilities", pa.list_(pa.float32(), NUM_CLASSES)),
        ("certainty", pa.float32()),
        ("error", pa.string()),
    ],
    metadata={"schema_version": "1"},
)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the predictions in a folder are of."""

    images: str
    """What the user named."""
    num_images: int
    listing_sha256: str
    """Sum of names, sizes and times of the images' files."""
    model: str
    """Name of the run or of the folder with the network."""
    model_sha256: str
    """Sum of its weights, settings and precision."""
    photo: bool
    column: str
    """Column of the Parquet files that holds the images; empty for image files."""

    @property
    def num_parts(self) -> int:
        """Number of parts when all are written."""
        return -(-self.num_images // ROWS_PER_PART)


@dataclass(frozen=True)
class Summary:
    """What the console and the page tell of a folder of predictions."""

    num_images: int
    """Images that were predicted or could not be read."""
    num_unreadable: int
    unreadable: list[dict[str, Any]]
    """A few of them: `path`, `row`, `error`."""
    class_counts: list[int]
    """Images of each of the ten classes."""
    least_certain: list[dict[str, Any]]
    """The images with the lowest certainty, lowest first: `path`, `row`, `label`, `certainty`."""


def part_name(part: int) -> str:
    """Return the file name of a part."""
    return f"part-{part:06}.parquet"


def find_missing(out: Storage, manifest: Manifest) -> list[int]:
    """Return the numbers of the parts that are missing; writes nothing.

    Raises `UserError` if the folder holds anything else than predictions on the same images by the same model, or if
    its name is no text.
    """
    # pyarrow, which reads and writes there, takes no other names.
    is_text = not any("\ud800" <= sign <= "\udfff" for sign in out.uri)
    require(is_text, f"--out {out.uri} holds bytes that are no UTF-8; name another folder")
    stored = load_manifest(out)
    if stored is None:
        names = [name for name in out.list() if not name.startswith(".")]
        require(not names, f"--out {out.uri} is not empty and holds no predictions ({names[:1]}); name another folder")
        out.check_writable()
        return list(range(manifest.num_parts))
    differing = differences(stored, manifest)
    require(
        not differing,
        f"--out {out.uri} holds predictions {differing}; name another folder, or remove this one",
    )
    there = set(out.list())
    return [part for part in range(manifest.num_parts) if part_name(part) not in there]


def check_apart(listing: Listing, out: Storage) -> None:
    """Raise `UserError` if the next listing would walk through the predictions, or find their files among the images.

    A file by itself, or a glob that matches none of them, may lie beside the predictions.
    """
    images, folder = listing.storage, f"{listing.storage.root.rstrip('/')}/"
    place = f"{out.root.rstrip('/')}/"
    if listing.glob is None or not out.fs.equals(images.fs) or not place.startswith(folder):
        return
    below = os.fsencode(place.removeprefix(folder))
    walks = listing.glob.is_endless and (not below or listing.glob.enters(below.rstrip(b"/")))
    names = [MANIFEST, *map(part_name, range(-(-len(listing) // ROWS_PER_PART)))]
    finds = any(listing.glob.matches(below + name.encode()) for name in names)
    require(not walks and not finds, f"--out {out.uri} lies inside --images {images.uri}; name a folder elsewhere")


def write_manifest(out: Storage, manifest: Manifest) -> None:
    """Write the manifest, without which a folder with parts is refused: call this before the first part is written."""
    out.write_bytes(json.dumps(asdict(manifest), indent=1).encode(), MANIFEST)


def differences(stored: Manifest, given: Manifest) -> str:
    """Return in what the predictions of a folder differ from those asked for; an empty text if in nothing."""
    if stored.model_sha256 != given.model_sha256:
        return f"of another model ({stored.model})"
    if stored.photo != given.photo:
        return f"made {'with' if stored.photo else 'without'} --photo"
    if stored.column != given.column:
        return f"of the column {stored.column or '(none)'}"
    if stored.listing_sha256 != given.listing_sha256:
        return f"on other images ({stored.num_images} of {stored.images}), or these have changed since"
    return ""


def load_manifest(out: Storage) -> Manifest | None:
    """Return the manifest of a folder of predictions, None if there is none; raises `UserError` if it is damaged."""
    try:
        return build(Manifest, parse_object(out.read_bytes(MANIFEST)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{out.show(MANIFEST)} is damaged ({error}); remove the folder") from error


def make_part(
    paths: pa.Array, rows: pa.Array, labels: np.ndarray, probabilities: np.ndarray, errors: Sequence[str | None]
) -> pa.Table:
    """Return the rows of a part with `SCHEMA`; an image with an error has neither class nor probabilities.

    `paths` and `rows` are Arrow arrays of N, `labels` (N,) uint8, `probabilities` (N, 10) float32.
    """
    missing = pa.array([error is not None for error in errors])
    missing_values = missing.to_numpy(zero_copy_only=False)
    names = pa.DictionaryArray.from_arrays(pa.array(labels, mask=missing_values), pa.array(CLASS_NAMES))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(probabilities.reshape(-1)), NUM_CLASSES)
    return pa.Table.from_arrays(
        [
            paths,
            rows,
            pa.array(labels, mask=missing_values),
            names.cast(pa.string()),
            pc.if_else(missing, pa.scalar(None, lists.type), lists),
            pa.array(probabilities.max(1), mask=missing_values),
            pa.array(errors, pa.string()),
        ],
        schema=SCHEMA,
    )


def write_part(out: Storage, part: int, table: pa.Table) -> None:
    """Write a part, which appears whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    out.write_bytes(sink.getvalue(), part_name(part))


def summarise(out: Storage, num_parts: int, most: int = LEAST_CERTAIN) -> Summary:
    """Read the parts, and return their numbers of images, the least certain of them, and some that are unreadable."""
    num_images, num_unreadable = 0, 0
    counts = np.zeros(NUM_CLASSES, np.int64)
    unreadable: list[dict[str, Any]] = []
    least: list[dict[str, Any]] = []
    for table in read_parts(out, num_parts):
        wrong = table.filter(pc.is_valid(table["error"]))
        num_images += len(table)
        num_unreadable += len(wrong)
        unreadable += wrong.slice(0, most - len(unreadable)).select(["path", "row", "error"]).to_pylist()
        right = table.filter(pc.is_null(table["error"])).select(["path", "row", "label", "certainty"])
        counts += np.bincount(right["label"].to_numpy(), minlength=NUM_CLASSES)
        least += right.take(pc.select_k_unstable(right, most, [("certainty", "ascending")])).to_pylist()
        least = sorted(least, key=lambda row: (row["certainty"], row["path"], row["row"] or 0))[:most]
    return Summary(num_images, num_unreadable, unreadable, counts.tolist(), least)


def check_complete(out: Storage, manifest: Manifest, summary: Summary) -> None:
    """Raise `UserError` unless a folder holds a prediction for each image, as it does when its job has ended."""
    require(
        summary.num_images == manifest.num_images,
        f"--out {out.uri} holds {summary.num_images:,} predictions for {manifest.num_images:,} images: parts were "
        "removed or replaced meanwhile; start the same command again, or name another folder",
    )


def read_parts(out: Storage, num_parts: int) -> Iterator[pa.Table]:
    """Yield the parts that are there, in order; raises `UserError` if one is damaged."""
    there = set(out.list())
    names = [name for name in map(part_name, range(num_parts)) if name in there]
    with ThreadPoolExecutor(READ_AT_A_TIME) as threads:
        for first in range(0, len(names), READ_AT_A_TIME):
            yield from threads.map(lambda name: read_part(out, name), names[first : first + READ_AT_A_TIME])


def read_part(out: Storage, name: str) -> pa.Table:
    """Return a part; raises `UserError` if it is damaged."""
    try:
        table = read_parquet(out.read_bytes(name))
        require(table.schema.equals(SCHEMA), f"its columns are {', '.join(table.schema.names)[:200]}")
    except ValueError as error:
        raise UserError(f"{out.show(name)} is damaged ({error}); remove it, and predict again") from error
    return table
