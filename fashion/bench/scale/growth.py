"""Measure what a search costs as it grows: trials that only report, on the real Tuner, in a folder or an object store.

Each number of trials is measured in a process of its own, with and without the project's bookkeeping. Prints a table.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fashion import cli
from fashion.bench.measurement import Measurement, alternate
from fashion.bench.scale import reporting
from fashion.bench.scale.reporter import Reporter
from fashion.cluster import connection
from fashion.config import ScaleConfig, require
from fashion.reports import provenance, tables
from fashion.reports.page.build import build_page
from fashion.reports.page.content import BLUE, VERMILLION, Figure, Panel, Series, Style
from fashion.reports.page.drawing.matplotlib_png import figure_png
from fashion.search.sampler import pending_points
from fashion.search.scheduler import replay_scheduler
from fashion.search.space import SearchConfig
from fashion.storage import Storage, open_storage

SEARCH_ID = "growth"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `fashion.bench.scale.growth`."""

    storage: tuple[str, ...] = ()
    """Folders or URIs in which the searches are kept, each in a folder that is removed; by default a temporary
    folder."""
    trials: tuple[int, ...] = (100, 1000, 5000)
    """Numbers of trials to measure."""
    epochs: int = 3
    """Most epochs of a trial."""
    concurrent: int = 2
    """Trials at a time, each in a process."""
    alone: bool = False
    """Measure Tune alone as well, with the same scheduler: its time and memory."""
    out: str = ""
    """File to write the rows to as Parquet."""
    png: str = ""
    """File to draw them in as PNG."""
    one: str = ""
    """For the command's own use: `ours` or `alone`, to measure one number of trials in this process."""


def main(argv: Sequence[str]) -> None:
    """Measure each number of trials in a process of its own; print a table with a row for each."""
    flags = cli.parse(Flags, argv, prog="python -m fashion.bench.scale.growth", description=__doc__ or "")
    require(min(flags.trials, default=0) >= 1, f"--trials {flags.trials} must be numbers of at least 1")
    with tempfile.TemporaryDirectory() as folder:
        uris = flags.storage or (folder,)
        if flags.one:
            print(json.dumps(measure(open_storage(uris[0]), flags.trials[0], flags)), flush=True)
            return
        rows = [compare(uri, count, flags) for uri in uris for count in flags.trials]
    reporting.print_table(rows)
    if flags.out:
        made_by = {"hardware": provenance.hardware(), "source_hash": provenance.source_hash()} | provenance.versions()
        pq.write_table(pa.Table.from_pylist([row | made_by for row in rows]), flags.out)
    if flags.png:
        Path(flags.png).write_bytes(figure_png(growth_figure(rows)))


def compare(uri: str, count: int, flags: Flags) -> dict[str, Any]:
    """Measure one number of trials in a storage, with `--alone` also of Tune by itself; return the row of the table."""
    store = "folder" if open_storage(uri).is_folder else "object store"
    row = {"store": store} | run_one("ours", uri, count, flags)
    if flags.alone:
        alone = run_one("alone", uri, count, flags)
        row |= {"s alone": alone["s"], "ratio": row["s"] / alone["s"], "MB alone": alone["MB of the driver"]}
    return row


def run_one(side: str, uri: str, count: int, flags: Flags) -> dict[str, Any]:
    """Measure one number of trials in a process of its own, whose memory is the driver's."""
    command = [sys.executable, "-m", "fashion.bench.scale.growth", "--one", side, "--storage", uri]
    command += ["--trials", str(count), "--epochs", str(flags.epochs), "--concurrent", str(flags.concurrent)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def growth_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Return the figure of the table: time in the event loop, time of the search and memory by the number of trials."""
    panels = [
        growth_panel(rows, "In the event loop", "ms per reported epoch", {"": "ms per epoch"}),
        growth_panel(rows, "The whole search", "seconds", {"": "s", "alone, ": "s alone"}),
        growth_panel(rows, "Memory of the driver", "MB", {"": "MB of the driver", "alone, ": "MB alone"}),
    ]
    return Figure(name="growth", title="What a search costs as it grows, and Tune alone", caption="", panels=panels)


def growth_panel(rows: Sequence[dict[str, Any]], title: str, unit: str, columns: dict[str, str]) -> Panel:
    """Return a panel with a line per store and column; `columns` maps the start of a line's name to its column."""
    series = []
    for store, colour, marker in (("folder", BLUE, "circle"), ("object store", VERMILLION, "square")):
        for prefix, column in columns.items():
            points = [(row["trials"], row[column]) for row in rows if row["store"] == store and column in row]
            if points:
                x, y = zip(*points, strict=True)
                style = Style(colour, "dot" if prefix else "solid", marker)
                series.append(Series(name=prefix + store, x=x, y=y, hover=[""] * len(x), style=style))
    top = 1.25 * max((value for line in series for value in line.y if value is not None), default=1.0)
    ticks = {float(row["trials"]): f"{row['trials']:,}" for row in rows}
    return Panel(
        title=title, x_title="trials", y_title=unit, series=series, log_x=True, x_ticks=ticks, y_range=(0.0, top)
    )


def measure(storage: Storage, count: int, flags: Flags) -> dict[str, Any]:
    """Run one search in a folder of its own, and read it back; return the row of the table."""
    connection.connect(num_cpus=flags.concurrent)
    config = SearchConfig(num_samples=count, max_epochs=flags.epochs)
    with reporting.scratch(storage) as place:
        trainable = reporting.trainable(Reporter(place.uri, SEARCH_ID, flags.epochs))
        keeps = flags.one == "ours"
        done = reporting.run_search(place, SEARCH_ID, config, trainable, limit=lambda _: flags.concurrent, keeps=keeps)
        row: dict[str, Any] = {"trials": count, "s": done.seconds, "MB of the driver": peak_mb()}
        if not keeps:
            return row
        events = sum(len(calls) for calls in done.callback.values())
        return row | {
            "events/s": events / done.seconds,
            "ms per epoch": done.ms_per_call("on_trial_result"),
            "ms per start": done.ms_per_call("on_trial_start"),
            "ms per end": done.ms_per_call("on_trial_complete"),
            "files in reports": reporting.num_files(place, "reports"),
            "files in searches": reporting.num_files(place, "searches"),
            "s to resume": resume_seconds(place, config),
            **{f"s to read {table}": reporting.read_seconds(place, table) for table in tables.SEARCH_TABLES},
            "s of the page": page_seconds(place),
        }


def peak_mb() -> float:
    """Return the largest resident memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def resume_seconds(storage: Storage, config: SearchConfig) -> float:
    """Return the time until a resumed search knows its trials and its scheduler has seen their results, in seconds."""
    started = time.perf_counter()
    store = reporting.trial_store(storage, SEARCH_ID, config)
    assert pending_points(store) == []
    replay_scheduler(store)
    return time.perf_counter() - started


def page_seconds(storage: Storage) -> float:
    """Return the time of making the page, in seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        build_page(storage, Path(folder, "report.html"))
    return time.perf_counter() - started


# --- row l of jobs.bench ----------------------------------------------------------------------------------------------


def search_vs_tune(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row l: trials a second of a search of 500 trials that only report 3 epochs, against Tune alone with the same
    scheduler, in `storage`; and the same of its event loop, as epochs a second against 500 a second (2 ms each).
    """
    config = SearchConfig(num_samples=500, max_epochs=3)
    in_loop: list[float] = []

    def run(repeat: int, *, keeps: bool) -> float:
        with reporting.scratch(storage) as place:
            trainable = reporting.trainable(Reporter(place.uri, SEARCH_ID, config.max_epochs))
            with unseen():
                done = reporting.run_search(place, SEARCH_ID, config, trainable, limit=lambda _: 2, keeps=keeps)
        if keeps and repeat > 0:
            in_loop.append(1000 / done.ms_per_call("on_trial_result"))
        return config.num_samples / done.seconds

    rates = alternate(
        {"ours": lambda repeat: run(repeat, keeps=True), "alone": lambda repeat: run(repeat, keeps=False)}, repeats
    )
    target = 1 / 1.25 if storage.is_folder else 1 / 1.5
    return [
        Measurement("l_search_vs_tune_alone", "trials/s", rates["ours"], rates["alone"], target, 1),
        Measurement("l_epochs_in_event_loop_vs_2_ms", "epochs/s", in_loop, [500.0] * repeats, 1.0, 1),
    ]


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Print nothing of what the search prints for each epoch."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


if __name__ == "__main__":
    cli.run(main)
