"""The report page: Parquet reports -> figures -> one HTML file that needs no network, and PNG files on request.

Reads the reports, chooses what is shown and in which order. Knows neither Ray nor torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa

from fashion.config import UserError, require
from fashion.reports.console import PUBLISHED, points, with_spread
from fashion.reports.page import drawing as draw
from fashion.reports.page import html as page
from fashion.reports.page import run_figures, search_figures
from fashion.reports.page.figures import Figure, Row, finite, shown
from fashion.reports.page.html import Column, Picture, Section
from fashion.reports.page.mistakes import find_mistakes, find_pixels, mistake_lines
from fashion.reports.page.reading import Reports, is_stand_in, load_reports, read_files, table_of
from fashion.reports.page.search_figures import Search
from fashion.storage import Storage, open_storage

MAX_CURVES = 6
"""Runs whose learning curves are drawn; more are in the table only."""
MAX_TRIALS = 15
"""Trials that a search's table shows at once."""


@dataclass(frozen=True)
class Page:
    """A finished page: its HTML, and the PNG files by name."""

    html: str
    pngs: dict[str, bytes]


def build_page(storage: Storage, out: Path, *, png: Path | None = None, run_ids: Sequence[str] = ()) -> list[Path]:
    """Make the page of a storage's reports at `out`; with `png`, also every figure as a file in that folder.

    `run_ids` restricts the page to these runs (or searches, or studies). Returns the files written. Raises `UserError`
    when there are no reports, a run does not exist, a report is damaged, or a place cannot be written; the page is
    written last.
    """
    require(out.parent.is_dir(), f"--out {out}: the folder {out.parent} does not exist; make it or name another")
    require(not out.is_dir(), f"--out {out} is a folder; name a file")
    require(png is None or png.is_dir() or not png.exists(), f"--png {png} is a file; name a folder")
    made = make_page(storage, load_reports(storage, run_ids), with_pngs=png is not None)
    files = {} if png is None else {png / f"{name}.png": content for name, content in made.pngs.items()}
    files[out] = made.html.encode()
    for path, content in files.items():
        try:
            open_storage(str(path.parent)).write_bytes(content, path.name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{path} cannot be written ({reason}); name a place that can be") from error
    return list(files)


@dataclass
class Gallery:
    """Collects what is drawn, so that each figure is on the page and, if wanted, becomes a file of the same name."""

    with_pngs: bool
    pngs: dict[str, bytes]

    def show(self, figure: Figure) -> str:
        """Return a figure's HTML and keep its PNG."""
        if self.with_pngs:
            self.pngs[figure.name] = draw.figure_png(figure)
        panels = [(draw.panel_json(panel), panel.height) for panel in figure.panels]
        return page.figure(figure.name, figure.title, figure.caption, panels)


def make_page(storage: Storage, reports: Reports, *, with_pngs: bool) -> Page:
    """Return the page and the PNG files of its figures."""
    gallery = Gallery(with_pngs, {})
    sections = [runs_section(reports.runs)] if reports.runs else []
    if any(reports.epochs.get(row["run_id"]) for row in reports.runs):
        sections.append(curves_section(gallery, reports))
    sections += [
        study_section(gallery, number, *study) for number, study in enumerate(reports.studies.items(), start=1)
    ]
    sections += predictions_sections(gallery, storage, reports.runs)
    sections += [search_section(gallery, number, search) for number, search in enumerate(reports.searches, start=1)]
    if reports.runs:
        sections.append(hardware_section(reports.runs))
    every = [*reports.runs, *(run for search in reports.searches for run in search.runs.values())]
    html = page.render(title(every), lead(reports), stand_in_banner(every), sections, draw.library_base64())
    return Page(html, gallery.pngs)


def title(runs: Sequence[Row]) -> str:
    """Name the page after its data."""
    only_stand_in = bool(runs) and all(is_stand_in(row) for row in runs)
    return "Stand-in for Fashion-MNIST: runs and searches" if only_stand_in else "Fashion-MNIST: runs and searches"


def lead(reports: Reports) -> str:
    """Say what the page was made from. No clock: the same reports give the same bytes."""
    moments = [row[name] for row in reports.runs for name in ("started_at", "finished_at") if row[name]]
    trials = sum(len(search.trials) for search in reports.searches)
    parts = [count(len(reports.runs), "run")]
    parts += [f"{count(len(reports.searches), 'search', 'searches')} of {count(trials, 'trial')}"] if trials else []
    parts += [count(len(reports.studies), "study", "studies")] if reports.studies else []
    until = f" up to {max(moments):%Y-%m-%d %H:%M} UTC" if moments else ""
    return f"Made from the Parquet reports of {', '.join(parts)}{until}."


def count(number: int, word: str, plural: str = "") -> str:
    """Write a number with its word."""
    return f"{number} {word if number == 1 else plural or word + 's'}"


def stand_in_banner(runs: Sequence[Row]) -> str:
    """Warn if any run used the stand-in."""
    marked = [row for row in runs if is_stand_in(row)]
    if not marked:
        return ""
    whom = "All runs" if len(marked) == len(runs) else f"{len(marked)} of {len(runs)} runs"
    text = f"{whom} on this page used drawn pictures in place of Fashion-MNIST: figures not comparable with any other."
    return page.banner("STAND-IN DATA.", text)


def name_of(row: Row) -> str:
    """Return a run's id, loudly marked if it used the stand-in, as HTML."""
    return escape(row["run_id"]) + (" " + page.badge("STAND-IN") if is_stand_in(row) else "")


def fraction(value: Any) -> str:
    """Write an accuracy or a loss as HTML."""
    return escape(shown(value, "{:.4f}".format))


def runs_section(runs: Sequence[Row]) -> Section:
    """Set the published figures beside those of every run."""
    measures = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", "test_accuracy", "test_loss")
    columns = [Column("run", number=False), Column("data", number=False), Column("epoch")]
    columns += [Column(name.replace("_", " ")) for name in measures] + [Column("status", number=False)]
    published = [fraction(PUBLISHED.get(name)) for name in measures]
    rows = [("first", ["published", "fashion-mnist", "-", *published, "-"])]
    for place, row in enumerate(runs):
        values = [
            fraction(row[name]) + (against_published(row) if name == "test_accuracy" else "") for name in measures
        ]
        cells = [name_of(row), escape(shown(row["dataset"])), escape(best_of(row)), *values, status(row)]
        rows.append(("chosen" if place == 0 else "", cells))
    text = (
        "Best run first, by val accuracy (a refit: by that of its winning trial): test decides nothing, so that it can "
        "be believed. Figures are those of the chosen epoch; losses in nats per image, accuracies in 0 to 1. Of the "
        "published network these four figures are known; its optimizer, batch size and dropout rates are not."
    )
    return Section("runs", "Published and measured", page.paragraph(text) + page.table(columns, rows) + settings(runs))


def against_published(row: Row) -> str:
    """Write the distance to the published test accuracy in points; nothing for the stand-in."""
    if not finite(row["test_accuracy"]) or is_stand_in(row):
        return ""
    return f" <small>{100 * (row['test_accuracy'] - PUBLISHED['test_accuracy']):+.2f} pt</small>"


def best_of(row: Row) -> str:
    """Write the chosen epoch and how many there were."""
    return "-" if row["best_epoch"] is None else f"{row['best_epoch']} of {shown(row['epochs_done'])}"


def status(row: Row) -> str:
    """Write a status and, if there is one, the error, as HTML."""
    text = escape(shown(row["status"]))
    return text + (f'<br><span class="error">{escape(str(row["error"])[:300])}</span>' if row["error"] else "")


def settings(runs: Sequence[Row]) -> str:
    """List each run's settings, folded."""
    parsed = [(row, read_config(row["config_json"])) for row in runs]
    names = sorted({name for _, config in parsed for name in config})
    if not names:
        return ""
    columns = [Column("setting", number=False), *(Column(row["run_id"]) for row, _ in parsed)]
    rows = [("", [escape(name), *(escape(shown(config.get(name))) for _, config in parsed)]) for name in names]
    return page.details("Settings of each run", page.table(columns, rows))


def read_config(text: str | None) -> Row:
    """Return the settings in `config_json`; none if it holds no object."""
    try:
        config = json.loads(text or "{}")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def curves_section(gallery: Gallery, reports: Reports) -> Section:
    """Draw the learning curves of the best runs."""
    drawn = [row for row in reports.runs if reports.epochs.get(row["run_id"])]
    text = (
        "Train loss and accuracy are those seen during the epoch, with augmentation and dropout on; val is measured "
        "after it. The published test loss turns upward after epoch 10."
    )
    body = page.paragraph(text)
    if len(drawn) > MAX_CURVES:
        body += page.paragraph(f"The {MAX_CURVES} best of {len(drawn)} runs; choose others with --run-id.")
    for number, row in enumerate(drawn[:MAX_CURVES], start=1):
        body += gallery.show(run_figures.learning_curves(number, marked_id(row), reports.epochs[row["run_id"]]))
    return Section("curves", "Learning curves", body)


def marked_id(row: Row) -> str:
    """Return a run's id as text, marked if it used the stand-in."""
    return str(row["run_id"]) + (" (STAND-IN DATA)" if is_stand_in(row) else "")


def study_section(gallery: Gallery, number: int, study_id: str, rows: Sequence[Row]) -> Section:
    """Show a study: what each arm reaches, and how sure its difference to the first of its part is."""
    words = ("arm", "settings")
    titles = (*words, "trained", "val", "test", "val difference", "test difference", "alone right", "p", "turns at")
    columns = [Column(name, number=name not in words) for name in titles]
    text = (
        "Trained: seeds x epochs x rows. Accuracies are means and standard deviations over the seeds; differences, in "
        "percentage points, are to the first arm of the part at the same seed, with their 95 % confidence intervals. "
        "Choices are made by val. Alone right: how many test images the arm's model of seed 0 has right and the first "
        "arm's has not, and the other way round, with McNemar's p. Turns at: the epoch of the lowest val loss, the "
        "median over the seeds."
    )
    drawn = run_figures.study_effects(number, study_id, rows)
    body = page.paragraph(text) + page.table(columns, [study_cells(row) for row in rows])
    body += gallery.show(drawn) if drawn else ""
    return Section(f"study-{number}-section", f"Study {study_id}", body)


def study_cells(row: Row) -> tuple[str, list[str]]:
    """Return an arm's line of the table."""
    compared = [""] * 4
    if row["baseline"] is not None:
        compared = [points(row, split) for split in ("val", "test")]
        compared += [
            f"{row['only_arm_right']} : {row['only_baseline_right']}",
            shown(row["mcnemar_p"], "{:.2g}".format),
        ]
    settings = ", ".join(f"{name} {shown(value)}" for name, value in read_config(row["settings_json"]).items())
    size = " x ".join(shown(row[name], "{:,}".format) for name in ("seeds", "epochs", "train_rows"))
    reached = [with_spread(row[f"{split}_accuracy"], row[f"{split}_accuracy_std"]) for split in ("val", "test")]
    cells = [f"{row['part']}: {row['arm']}", settings or f"preset {row['preset']}", size, *reached, *compared]
    return "" if row["baseline"] else "first", [escape(cell) for cell in [*cells, shown(row["turning_epoch"])]]


def predictions_sections(gallery: Gallery, storage: Storage, runs: Sequence[Row]) -> list[Section]:
    """Show the predictions of the best run that has any, those on test if there are."""
    for row in runs:
        cells = table_of(storage, "confusion", row["run_id"])
        for split in ("test", "val", "train"):
            rows = [cell for cell in cells if cell["split"] == split]
            if rows:
                return [
                    confusion_section(gallery, storage, row, split, rows),
                    *mistakes_section(gallery, storage, row, split),
                ]
    return []


def confusion_section(gallery: Gallery, storage: Storage, run: Row, split: str, cells: Sequence[Row]) -> Section:
    """Draw the confusion matrix and the figures per class."""
    body = gallery.show(run_figures.confusion(marked_id(run), split, cells))
    classes = [row for row in table_of(storage, "classes", run["run_id"]) if row["split"] == split]
    if classes:
        body = f'<div class="pair">{body}{gallery.show(run_figures.class_figures(classes))}</div>'
        columns = [Column("class", number=False), *(Column(name) for name in ("precision", "recall", "F1", "images"))]
        shares = ("precision", "recall", "f1")
        cells_of = [[escape(row["name"]), *(fraction(row[n]) for n in shares), str(row["support"])] for row in classes]
        rows = [("", entry) for entry in cells_of]
        body += page.table(columns, rows)
    return Section("classes-of-run", f"Predictions of {marked_id(run)} on {split}", body)


def mistakes_section(gallery: Gallery, storage: Storage, run: Row, split: str) -> list[Section]:
    """Show the most confident mistakes as images, if the data that the run used is at hand."""
    tables = [rows for _, rows in read_files(storage, "predictions", run["run_id"])]
    found = find_mistakes(pa.concat_tables(tables), split) if tables else None
    if found is None:
        return []
    heading = "The most confident mistakes"
    pixels = find_pixels(storage, run, split, found.index.tolist())
    if isinstance(pixels, str):
        return [Section("mistakes", heading, page.paragraph(pixels))]
    images, lines = [pixels[index] for index in found.index.tolist()], mistake_lines(found)
    text = (
        f"{len(lines)} of the {count(found.total, 'mistake')} on {split}, surest first: what it is, "
        "what the network said and how probable it held it, and what it left to the right answer."
    )
    items = [Picture(draw.gray_png(image), entry) for image, entry in zip(images, lines, strict=True)]
    if gallery.with_pngs and images:
        gallery.pngs["mistakes"] = draw.contact_sheet_png(heading, images, ["\n".join(entry) for entry in lines])
    return [Section("mistakes", heading, page.paragraph(text) + page.pictures(items))]


def search_section(gallery: Gallery, number: int, search: Search) -> Section:
    """Show a search: what it spent, its best trials, and its figures."""
    spent, full, saved = search_figures.spent_epochs(search)
    groups = ", ".join(f"{len(trials)} {name}" for name, _, trials in search_figures.by_status(search.trials))
    text = f"{count(len(search.trials), 'trial')}: {groups}. Epochs: {spent} spent, {full} if all had run in full"
    text += f" ({spent / full:.0%}); ASHA's stops saved {saved}." if full else "."
    body = page.paragraph(text) + trials_table(search)
    body += "".join(gallery.show(figure) for figure in search_figures.search_figures(number, search))
    mark = " (STAND-IN DATA)" if any(map(is_stand_in, search.runs.values())) else ""
    return Section(f"search-{number}-section", f"Search {search.search_id}{mark}", body)


def trials_table(search: Search) -> str:
    """List the trials, best first; the tail of a long list is folded."""
    names = search_figures.searched_settings(search.trials)
    columns = [Column("trial", number=False), Column("val accuracy"), Column("val loss"), Column("best epoch")]
    columns += [Column("epochs"), Column("rung"), *(Column(name) for name in names), Column("s")]
    columns += [Column("status", number=False)]
    order = sorted(search.trials, key=lambda row: -row["val_accuracy"] if finite(row["val_accuracy"]) else 1.0)
    rows = [
        (
            "chosen" if row is search.best else "",
            [
                escape(str(row["trial_id"])),
                *(fraction(row[name]) for name in ("val_accuracy", "val_loss")),
                *(escape(shown(row[name])) for name in ("best_epoch", "epochs_done", "rung")),
                *(escape(shown(row.get(name))) for name in names),
                escape(shown(row["wall_s"], "{:.0f}".format)),
                status(row),
            ],
        )
        for row in order
    ]
    head = page.table(columns, rows[:MAX_TRIALS])
    rest = rows[MAX_TRIALS:]
    return head + (page.details(f"{len(rest)} more", page.table(columns, rest)) if rest else "")


def hardware_section(runs: Sequence[Row]) -> Section:
    """List what each run ran on, how fast, and with which code."""
    words = {"run", "device", "precision", "data", "hardware", "Ray", "torch", "code"}
    titles = ["run", "images/s", "time", "workers", "threads", "device", "precision", "data", "memory", "hardware"]
    columns = [Column(name, number=name not in words) for name in [*titles, "Ray", "torch", "code"]]
    rows = []
    for row in runs:
        plain = [
            shown(row["images_per_s"], "{:,.0f}".format),
            shown(row["wall_s"], "{:,.0f} s".format),
            *(shown(row[name]) for name in ("world_size", "threads_per_worker", "device", "precision", "data_mode")),
            shown(row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e9, "{:.2f} GB".format),
            *(shown(row[name]) for name in ("hardware", "ray_version", "torch_version")),
        ]
        code = escape(shown(row.get("commit") or row["source_hash"])[:12])
        rows.append(("", [name_of(row), *map(escape, plain), f"<code>{code}</code>"]))
    text = (
        "Images/s: training rows per second over all workers, median epoch. Time: the whole run, evaluation included. "
        "Memory: the peak of the largest worker. Code: the first digits of the SHA-256 over the project's Python files."
    )
    return Section("hardware", "Speed and hardware", page.paragraph(text) + page.table(columns, rows))
