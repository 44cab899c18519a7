"""Make one self-contained HTML page from the Parquet reports: runs, curves, mistakes, searches. Needs no network."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fashion import cli


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `jobs.report`."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI that holds the reports."""
    out: str = "report.html"
    """File to write; its folder must exist."""
    png: str = ""
    """Folder to write every figure to as PNG as well; it is created if it does not exist."""
    csv: str = ""
    """Folder to write every table to as CSV as well; it is created if it does not exist."""
    predictions: str = ""
    """Folder or URI with predictions of `jobs.predict`, which get a section of the page."""
    run_id: str = ""
    """Runs or searches to show: names with commas between them; all if empty."""


def main(argv: Sequence[str]) -> None:
    """Parse, make the page, print where it is."""
    started = time.perf_counter()
    flags = cli.parse(Flags, argv, prog="python -m jobs.report", description=__doc__ or "")
    run_ids = [name.strip() for name in flags.run_id.split(",") if name.strip()]
    from fashion.reports import tables
    from fashion.reports.page.build import build_page
    from fashion.storage import open_storage

    storage = open_storage(flags.storage)
    out, png = Path(flags.out).expanduser(), Path(flags.png).expanduser() if flags.png else None
    written = build_page(storage, out, png=png, run_ids=run_ids, predictions=flags.predictions)
    print(f"{len(written)} file(s) in {time.perf_counter() - started:.1f} s")
    if flags.csv:
        for path in tables.write_csv(storage, Path(flags.csv).expanduser()):
            print(f"table: {path.absolute()}")
    if png is not None:
        print(f"figures: {png.absolute()}")
    print(f"page: {out.absolute()} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    cli.run(main)
