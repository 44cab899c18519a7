"""The manifest of prepared data: what was written, from which source, and whether a run may use it."""

import re
from dataclasses import dataclass
from typing import Any

from fashion.config import UserError, build, parse_object, require
from fashion.data.archives import MAX_ROWS_PER_SPLIT, archives_from, check_archives
from fashion.storage import Storage

SPLITS = ("train", "val", "test")
DATA_FOLDER = ("data", "fashion-mnist")
FORMAT_VERSION = 1
PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What `jobs.prepare` wrote, read back from `manifest.json`."""

    dataset: str
    """`fashion-mnist`, or `fashion-mnist-synthetic` for the stand-in."""
    sha256: str
    """Sum over the archives' sums, `val_rows` and `seed`: names the data, and how it was split, in every run."""
    seed: int
    val_rows: int
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
    """Archive name -> SHA-256."""
    format_version: int = FORMAT_VERSION

    @property
    def is_stand_in(self) -> bool:
        """Tell the drawn stand-in from Fashion-MNIST."""
        return self.dataset.endswith("synthetic")


def check_same_request(storage: Storage, found: Manifest, source: str, val_rows: int, seed: int) -> None:
    """Raise `UserError` if prepared data is there but is not what was asked for."""
    place = storage.show(*DATA_FOLDER)
    way_out = f"name another --storage, or remove {place}"
    for name, asked, have in (("--val-rows", val_rows, found.val_rows), ("--seed", seed, found.seed)):
        require(asked == have, f"{place} was prepared with {name} {have}, not {asked}; {way_out}")
    if source != "auto":
        check_source(storage, found, source)


def check_source(storage: Storage, found: Manifest, source: str) -> None:
    """Raise `UserError` if the prepared data does not come from `source`; only `synthetic` accepts the stand-in."""
    place = storage.show(*DATA_FOLDER)
    if found.is_stand_in:
        require(
            source == "synthetic",
            f"{place} holds the drawn stand-in, not Fashion-MNIST; take it on purpose with --source synthetic, "
            "or name another --storage",
        )
    else:
        require(source != "synthetic", f"{place} holds {found.dataset}, not the stand-in; name another --storage")
    if source not in ("auto", "download", "synthetic"):
        with archives_from(source) as (folder, official):
            check_archives(folder, official=official)


def check_same_data(storage: Storage, found: Manifest, run: dict[str, Any]) -> None:
    """Raise `UserError` if a `runs` row was made on other data: with another split, `val` holds rows it trained on."""
    require(
        run.get("dataset_sha256") in (None, found.sha256),
        f"the data in {storage.show(*DATA_FOLDER)} is not what the run was trained on (another source, --seed or "
        "--val-rows); prepare it again as it was",
    )


def find_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of finished prepared data, None when there is none; raises `UserError` if it is damaged."""
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
    """Raise `UserError` on a manifest whose values cannot be; a file name must stay inside its folder."""
    require(manifest.format_version == FORMAT_VERSION, f"format {manifest.format_version}, expected {FORMAT_VERSION}")
    require(sorted(manifest.rows) == sorted(SPLITS) == sorted(manifest.files), "it does not name train, val and test")
    require(0 < manifest.pixel_std < 1 and 0 < manifest.pixel_mean < 1, "pixel mean or std outside 0..1")
    require(all(1 <= rows <= MAX_ROWS_PER_SPLIT for rows in manifest.rows.values()), f"rows {manifest.rows}")
    require(PLAIN_NAME.fullmatch(manifest.dataset) is not None, f"strange name {manifest.dataset!r}")
    require(SHA256.fullmatch(manifest.sha256) is not None, f"strange sum {manifest.sha256!r}")
    for split, files in manifest.files.items():
        require(bool(files), f"it names no file of {split}")
        for name in files:
            require(PLAIN_NAME.fullmatch(name) is not None and name.endswith(".parquet"), f"strange file name {name!r}")


def load_manifest(storage: Storage) -> Manifest:
    """Return the manifest; raises `UserError` naming the command to run when the data is not prepared."""
    manifest = find_manifest(storage)
    if manifest is None:
        raise UserError(f"no prepared data in {storage.uri}; run: python -m jobs.prepare --storage {storage.uri}")
    return manifest
