"""Measure this project side by side with its alternatives, in one run; print the ratios and keep them as Parquet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fashion import cli
from fashion.config import ScaleConfig, require


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What `jobs.bench` takes."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI that holds the prepared data; the `bench` table goes there too."""
    rows: str = "b"
    """Letters of the rows to run, separated by commas: b (the job's loop against the bare step)."""
    repeats: int = 7
    """How often each side is timed, >= 3."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def main(argv: Sequence[str]) -> None:
    """Parse, measure, print and write the rows."""
    flags = cli.parse(Flags, argv, prog="python -m jobs.bench", description=__doc__ or "")
    require(flags.repeats >= 3, f"--repeats {flags.repeats} must be at least 3")
    from fashion import bench, cluster, report, summary
    from fashion.storage import open_storage

    storage = open_storage(flags.storage)
    letters = flags.rows.split(",")
    unknown = [letter for letter in letters if letter not in bench.ROWS]
    require(not unknown, f"--rows {','.join(unknown)} does not exist; known are {', '.join(bench.ROWS)}")
    storage.check_writable(report.REPORTS_FOLDER)
    cluster.connect()
    rows = [bench.ROWS[letter](storage, flags.scale, flags.repeats).columns() for letter in letters]
    path = report.write_table(storage, "bench", f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}", rows)
    summary.print_bench(rows)
    print(f"report: {path}")


if __name__ == "__main__":
    cli.run(main)
