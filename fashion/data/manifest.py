"""The manifest of prepared data: what `jobs.prepare` wrote, and the checks that a request or a run fits it."""

import re
from dataclasses import dataclass
from typing import Any

from fashion.config import UserError, build, parse_object, require
from fashion.data.sources import check_folder
from fashion.storage import Storage

SPLITS = ("train", "val", "test")
DATA_FOLDER = ("data", "fashion-mnist")
# Version of `manifest.json` and of the Parquet columns; code refuses any other one.
FORMAT_VERSION = 1
# Names of data sets and files: no slash and no leading dot, so that a file name cannot leave its folder.
PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What `jobs.prepare` wrote, read back from `manifest.json`."""

    dataset: str
    """`fashion-mnist`, or `fashion-mnist-synthetic` for the stand-in."""
    sha256: str
    """SHA-256 over the archives' sums, `val_rows` and `seed`. Each run records it: it names the data and its split."""
    seed: int
    """Seed of the split into train and val, and of the order of the training rows."""
    val_rows: int
    """Rows that val was asked to take from the 60,000."""
    rows: dict[str, int]
    """Rows per split."""
    class_counts: dict[str, list[int]]
    """Rows per class, per split."""
    pixel_mean: float
    """Mean pixel of the training split, in 0..1."""
    pixel_std: float
    """Standard deviation of the training split's pixels, in 0..1."""
    files: dict[str, dict[str, str]]
    """Per split: file name -> SHA-256 of its bytes."""
    archives: dict[str, str]
    """Archive name -> SHA-256: of the official archives that hold these rows, in whichever form they were found."""
    source: str = ""
    """Where the rows were found and in which form; empty in data that an earlier version prepared."""
    format_version: int = FORMAT_VERSION

    @property
    def is_stand_in(self) -> bool:
        """Whether this is the drawn stand-in instead of Fashion-MNIST."""
        return self.dataset.endswith("synthetic")


def check_same_request(storage: Storage, manifest: Manifest, source: str, val_rows: int, seed: int) -> None:
    """Raise `UserError` if the data that `manifest` describes was prepared from another source, split or seed."""
    folder = storage.show(*DATA_FOLDER)
    way_out = f"name another --storage, or remove {folder}"
    for name, requested, stored in (("--val-rows", val_rows, manifest.val_rows), ("--seed", seed, manifest.seed)):
        require(requested == stored, f"{folder} was prepared with {name} {stored}, not {requested}; {way_out}")
    if source != "auto":
        check_source(storage, manifest, source)


def check_source(storage: Storage, manifest: Manifest, source: str) -> None:
    """Raise `UserError` if the prepared data does not come from `source`; only `synthetic` accepts the stand-in."""
    place = storage.show(*DATA_FOLDER)
    if manifest.is_stand_in:
        require(
            source == "synthetic",
            f"{place} holds the drawn stand-in, not Fashion-MNIST; take it on purpose with --source synthetic, "
            "or name another --storage",
        )
    else:
        require(source != "synthetic", f"{place} holds {manifest.dataset}, not the stand-in; name another --storage")
    if source not in ("auto", "download", "synthetic"):
        check_folder(source)


def check_same_data(storage: Storage, manifest: Manifest, run: dict[str, Any]) -> None:
    """Raise `UserError` if the run of the `runs` row `run` was trained on other data or another split.

    Under another split, `val` would hold rows that the run was trained on.
    """
    require(
        run.get("dataset_sha256") in (None, manifest.sha256),
        f"the data in {storage.show(*DATA_FOLDER)} is not what the run was trained on (another source, --seed or "
        "--val-rows); prepare it again as it was",
    )


def find_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of the prepared data, or None if there is none; raises `UserError` if it is damaged."""
    if not storage.exists(*DATA_FOLDER, "manifest.json"):
        return None
    place = storage.show(*DATA_FOLDER, "manifest.json")
    data = storage.read_bytes(*DATA_FOLDER, "manifest.json")
    try:
        manifest = build(Manifest, parse_object(data))
        check_manifest(manifest)
    except ValueError as error:
        raise UserError(
            f"{place} is damaged ({error}); remove {storage.show(*DATA_FOLDER)} and prepare again"
        ) from error
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise `UserError` on a manifest with impossible values; a file name must not lead out of its folder."""
    require(manifest.format_version == FORMAT_VERSION, f"format {manifest.format_version}, expected {FORMAT_VERSION}")
    require(sorted(manifest.rows) == sorted(SPLITS) == sorted(manifest.files), "it does not name train, val and test")
    require(0 < manifest.pixel_std < 1 and 0 < manifest.pixel_mean < 1, "pixel mean or std outside 0..1")
    # As many as an `index` of 32 bits can tell apart: the sum of each file is known, and no process reads them all.
    require(all(1 <= rows < 2**31 for rows in manifest.rows.values()), f"rows {manifest.rows}")
    require(PLAIN_NAME.fullmatch(manifest.dataset) is not None, f"strange name {manifest.dataset!r}")
    require(SHA256.fullmatch(manifest.sha256) is not None, f"strange sum {manifest.sha256!r}")
    for split, files in manifest.files.items():
        require(bool(files), f"it names no file of {split}")
        for name in files:
            require(PLAIN_NAME.fullmatch(name) is not None and name.endswith(".parquet"), f"strange file name {name!r}")


def load_manifest(storage: Storage) -> Manifest:
    """Return the manifest; raises `UserError` with the command to run if no data is prepared, or if it is damaged."""
    manifest = find_manifest(storage)
    if manifest is None:
        raise UserError(f"no prepared data in {storage.uri}; run: python -m jobs.prepare --storage {storage.uri}")
    return manifest
