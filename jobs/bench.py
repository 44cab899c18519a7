"""Measure the job side by side with its alternatives; print the ratios and write them as Parquet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashion import cli
from fashion.config import ScaleConfig, require

if TYPE_CHECKING:
    from fashion.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `jobs.bench`."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI that holds the prepared data; the `bench` table is written there too."""
    rows: str = "b"
    """Letters of the rows to run, with commas between them: a (step against matrix products), b (the job's loop against
    the bare step), c (against torchrun), d (batches against Ray Data), e (against Keras), f (more workers), g (batches
    against index_select), h (start-up), i (trials of a search), j (time to the published accuracy: most of an hour),
    k (the job on GPUs: time to that accuracy, images/s, memory), l (a search of 500 trials that only report, against
    Tune alone), m (an evaluation, against actors under Ray Data)."""
    repeats: int = 7
    """How often each side is timed, >= 3; row j runs once."""
    out: str = ""
    """File to write the rows to as Parquet as well; its folder must exist."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def main(argv: Sequence[str]) -> None:
    """Parse, check where the rows go, measure, print and write the rows."""
    flags = cli.parse(Flags, argv, prog="python -m jobs.bench", description=__doc__ or "")
    require(flags.repeats >= 3, f"--repeats {flags.repeats} must be at least 3")
    from fashion.bench.rows import ROWS
    from fashion.cluster import connection
    from fashion.reports import tables
    from fashion.storage import open_storage

    out = Path(flags.out).expanduser().absolute() if flags.out else None
    if out is not None:
        require(out.parent.is_dir(), f"--out {out}: the folder {out.parent} does not exist; make it or name another")
        require(not out.is_dir(), f"--out {out} is a folder; name a file")
        require(os.access(out.parent, os.W_OK), f"--out {out}: the folder cannot be written; name another")
    storage = open_storage(flags.storage)
    letters = flags.rows.split(",")
    unknown = [letter for letter in letters if letter not in ROWS]
    require(not unknown, f"--rows {','.join(unknown)} does not exist; known are {', '.join(ROWS)}")
    tables.open_reports(storage)
    connection.connect()
    rows: list[dict[str, Any]] = []
    try:
        for letter in letters:
            rows += [measured.columns() for measured in ROWS[letter](storage, flags.scale, flags.repeats)]
    finally:  # rows take minutes: those before one that fails are kept
        if rows:
            write_rows(storage, rows, out)


def write_rows(storage: "Storage", rows: list[dict[str, Any]], out: Path | None) -> None:
    """Write the rows as a file of the table `bench`, and as `out`; print them."""
    from fashion.reports import console, tables
    from fashion.storage import open_storage

    path = tables.write_table(storage, "bench", f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}", rows)
    console.print_bench(rows)
    print(f"report: {path}")
    if out is not None:
        open_storage(str(out.parent)).write_bytes(tables.encode("bench", rows), out.name)
        print(f"rows: {out}")


if __name__ == "__main__":
    cli.run(main)
