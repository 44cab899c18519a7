"""Prepare Fashion-MNIST: fetch, verify, split and write it as Parquet, once."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fashion import cli

if TYPE_CHECKING:
    from fashion.data.manifest import Manifest
    from fashion.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of `jobs.prepare`."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI (s3://, gs://, ...) that holds data, runs and reports."""
    source: str = cli.DEFAULT_SOURCE
    """auto (what is prepared, else what Keras, torchvision or the hub left here, else download), download, synthetic,
    or a folder that holds the data in any form that docs/design.md names."""
    val_rows: int = 5000
    """Rows that validation takes from the 60,000, equally many of each class."""
    seed: int = 0
    """Seed of the split."""
    or_synthetic: bool = False
    """Take the stand-in where the download fails, and replace a stand-in by real data that can be had."""


def main(argv: Sequence[str]) -> None:
    """Parse the flags, prepare the data, print what the storage now holds."""
    flags = cli.parse(Flags, argv, prog="python -m jobs.prepare", description=__doc__ or "", default=Flags())
    from fashion.data import preparation
    from fashion.data.manifest import DATA_FOLDER
    from fashion.storage import open_storage

    storage = open_storage(flags.storage)
    if flags.or_synthetic:
        manifest, written = prepare_or_synthetic(storage, flags)
    else:
        manifest, written = preparation.prepare(storage, flags.source, flags.val_rows, flags.seed)
    rows = ", ".join(f"{count} {split}" for split, count in manifest.rows.items())
    print(f"{'prepared' if written else 'already prepared'}: {manifest.dataset}, {rows} rows")
    print(f"pixels: mean {manifest.pixel_mean:.5f}, std {manifest.pixel_std:.5f}; sha256 {manifest.sha256[:16]}...")
    print(f"data: {storage.show(*DATA_FOLDER)}")
    if manifest.is_stand_in:
        print("NOTE: this is the drawn stand-in, not Fashion-MNIST; its accuracies say nothing about the real data.")


def prepare_or_synthetic(storage: "Storage", flags: Flags) -> "tuple[Manifest, bool]":
    """Prepare the real data or, with a warning, the stand-in if the real data cannot be downloaded.

    Every other failure is raised: the stand-in would fail for the same reason, or hide what the user should mend.
    """
    from fashion.data import archives, preparation

    try:
        return preparation.prepare(storage, flags.source, flags.val_rows, flags.seed, replace_stand_in=True)
    except archives.DownloadFailed as error:
        print(f"\n*** {error} ***", file=sys.stderr)
        print("*** Going on with the drawn stand-in. Its accuracies are not Fashion-MNIST's. ***\n", file=sys.stderr)
        return preparation.prepare(storage, "synthetic", flags.val_rows, flags.seed)


if __name__ == "__main__":
    cli.run(main)
