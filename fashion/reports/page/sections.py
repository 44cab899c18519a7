"""The report page: Parquet reports -> figures -> one HTML file that needs no network, and PNG files on request.

Reads the reports, chooses what is shown and in which order. Knows neither Ray nor torch.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs as pafs

from fashion.config import CLASS_NAMES, NUM_CLASSES, UserError, require
from fashion.data import splits
from fashion.data.manifest import find_manifest
from fashion.reports.console import PUBLISHED, points, with_spread
from fashion.reports.page import drawing as draw
from fashion.reports.page import figures
from fashion.reports.page import html as page
from fashion.reports.page.figures import Figure, Row, Search, finite, shown
from fashion.reports.page.html import Column, Picture, Section
from fashion.reports.schemas import REPORTS_FOLDER, SCHEMAS
from fashion.reports.tables import in_schema
from fashion.storage import Storage, open_storage, read_parquet

MAX_CURVES = 6
"""Runs whose learning curves are drawn; more are in the table only."""
MAX_MISTAKES = 24
MAX_TRIALS = 15
"""Trials that a search's table shows at once."""

TRIAL_COLUMNS = (
    *("search_id", "trial_id", "status", "error", "lr", "dropout_conv", "dropout_fc"),
    *("epochs_done", "rung", "best_epoch", "val_loss", "val_accuracy", "wall_s"),
)

# Without these columns a file is of no use; all others may be missing.
NEEDED = {
    "epochs": {"epoch", "split", "loss", "accuracy"},
    "trials": {"search_id", "trial_id", "status"},
    **{table: set(SCHEMAS[table].names) for table in ("predictions", "classes", "confusion", "study")},
}


@dataclass(frozen=True)
class Reports:
    """What the page is made of; `runs` without the trials, best first."""

    runs: list[Row]
    epochs: dict[str, list[Row]]
    """Run id -> rows of `epochs`."""
    searches: list[Search]
    studies: dict[str, list[Row]]
    """Study id -> rows of `study`."""


@dataclass(frozen=True)
class Mistakes:
    """The most confident mistakes of a run, (N,) each: row number in the official file, classes, probabilities."""

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float64]
    label_probability: NDArray[np.float64]
    total: int
    """All mistakes, also those not kept."""


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


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rows(storage: Storage, table: str) -> list[Row]:
    """Return all rows of a table with their `run_id`; columns that an older report lacks are None."""
    return [row for run_id, rows in read_files(storage, table) for row in filled(table, run_id, rows)]


def filled(table: str, run_id: str, rows: pa.Table) -> list[Row]:
    """Turn rows into dictionaries with every column of the table."""
    names = SCHEMAS[table].names if table in SCHEMAS else []
    blank = dict.fromkeys([*names, *(TRIAL_COLUMNS if table == "trials" else ())])
    return [blank | {"run_id": run_id} | row for row in rows.to_pylist()]


def read_files(storage: Storage, table: str, run_id: str = "") -> list[tuple[str, pa.Table]]:
    """Return (run id, rows) of each file of a table, or of one run's files; eight at a time."""
    folder = [REPORTS_FOLDER, table, *([f"run_id={run_id}"] if run_id else [])]
    selector = pafs.FileSelector(storage.path(*folder), allow_not_found=True, recursive=True)
    found = sorted(info.path for info in storage.fs.get_file_info(selector) if info.type == pafs.FileType.File)
    paths = [path for path in found if path.endswith(".parquet") and not Path(path).name.startswith(".")]

    def read(path: str) -> tuple[str, pa.Table]:
        owner = next((part[7:] for part in path.split("/") if part.startswith("run_id=")), "")
        place = path.removeprefix(f"{storage.root}/")
        file = storage.show(place)
        try:
            rows = read_parquet(storage.read_bytes(place))
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} cannot be read ({reason}); see to the storage") from error
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); remove it or write it again") from error
        missing = ", ".join(sorted(NEEDED.get(table, set()) - set(rows.column_names)))
        require(not missing, f"{file} is damaged (it lacks {missing}); remove it or write it again")
        try:
            return owner, in_schema(table, rows)
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); remove it or write it again") from error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read, paths))


def load_reports(storage: Storage, run_ids: Sequence[str] = ()) -> Reports:
    """Read runs, epochs and trials; raises `UserError` when there is nothing, or not what was asked for."""
    runs = {row["run_id"]: row for row in read_rows(storage, "runs")}
    trials = read_rows(storage, "trials")
    way_out = f"train first: python -m jobs.train --storage {storage.uri}"
    require(bool(runs or trials), f"--storage {storage.uri} holds no reports; {way_out}")
    epochs: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(storage, "epochs"):
        if isinstance(row["epoch"], int):
            epochs[row["run_id"]].append(row)
    for run_id, row in runs.items():
        fill_from_epochs(row, epochs.get(run_id, []))
    searches, studies = group_searches(trials, runs, epochs), group_studies(read_rows(storage, "study"))
    check_known(run_ids, runs, [*studies, *(search.search_id for search in searches)], storage)
    wanted = set(run_ids) or {*runs, *studies, *(search.search_id for search in searches)}
    shown_runs = [row for row in runs.values() if row["run_id"] in wanted and (run_ids or row["kind"] != "trial")]
    wanted |= {row["search_id"] for row in shown_runs if row["search_id"]}
    searches = [search for search in searches if search.search_id in wanted]
    studies = {study_id: rows for study_id, rows in studies.items() if study_id in wanted}
    return Reports(ranked(shown_runs, searches), epochs, searches, studies)


def check_known(asked: Sequence[str], runs: dict[str, Row], names: Sequence[str], storage: Storage) -> None:
    """Raise `UserError` if what was asked for is no run and not in `names` (searches, studies); it names some."""
    order = sorted(runs, key=lambda run_id: (runs[run_id]["kind"] == "trial", run_id))
    for run_id in asked:
        some = ", ".join([*names, *order][:8])
        require(run_id in {*names, *order}, f"--run-id {run_id} does not exist in {storage.uri}; there are {some}")


def fill_from_epochs(run: Row, epochs: Sequence[Row]) -> None:
    """Give a run that has no figures of its own yet (running, interrupted) those of its best epoch so far."""
    val = [row for row in epochs if row["split"] == "val" and finite(row["accuracy"])]
    if run["val_accuracy"] is not None or not val:
        return
    best = max(val, key=lambda row: float(row["accuracy"]))
    train = [row for row in epochs if row["split"] == "train" and row["epoch"] == best["epoch"]]
    run |= {"best_epoch": best["epoch"], "epochs_done": max(row["epoch"] for row in epochs)}
    for split, rows in (("val", [best]), ("train", train)):
        for row in rows:
            run |= {f"{split}_loss": row["loss"], f"{split}_accuracy": row["accuracy"]}


def group_searches(trials: Sequence[Row], runs: dict[str, Row], epochs: dict[str, list[Row]]) -> list[Search]:
    """Group trials by search and find each one's run and epochs."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for trial in trials:
        groups[str(trial["search_id"])].append(trial)
    searches: list[Search] = []
    for search_id, rows in sorted(groups.items()):
        owners = {row["trial_id"]: run_of(row, [*runs, *epochs]) for row in rows}
        searches.append(
            Search(
                search_id,
                rows,
                {trial: epochs.get(run_id, []) for trial, run_id in owners.items()},
                {trial: runs[run_id] for trial, run_id in owners.items() if run_id in runs},
            )
        )
    return searches


def group_studies(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows of studies, which come part by part, by study."""
    studies: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        studies[str(row["study_id"])].append(row)
    return dict(studies)


def run_of(trial: Row, run_ids: Sequence[str]) -> str:
    """Return the run id of a trial: its own id, or that after the search's, or the row's `run_id`."""
    trial_id, search_id = str(trial["trial_id"]), str(trial["search_id"])
    names = [trial_id, f"{search_id}-{trial_id}", f"{search_id}_{trial_id}", f"{search_id}.{trial_id}"]
    return next((name for name in names if name in run_ids), str(trial["run_id"]))


def ranked(runs: Sequence[Row], searches: Sequence[Search]) -> list[Row]:
    """Sort runs: real data before the stand-in, then by val accuracy; a refit has that of the trial that won.

    Test accuracy does not decide: what was chosen by it could no longer be judged by it. A refit trains on val too.
    """
    won = {search.search_id: search.best["val_accuracy"] for search in searches if search.best is not None}

    def key(row: Row) -> tuple[bool, float, str]:
        score: Any = won.get(row["search_id"]) if row["kind"] == "refit" else row["val_accuracy"]
        return is_stand_in(row), -float(score) if finite(score) else 1.0, str(row["run_id"])

    return sorted(runs, key=key)


def is_stand_in(row: Row) -> bool:
    """Tell whether a run used the drawn images in place of Fashion-MNIST."""
    return str(row["dataset"]).endswith("synthetic")


# --- the page -----------------------------------------------------------------------------------------------------


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
        body += gallery.show(figures.learning_curves(number, marked_id(row), reports.epochs[row["run_id"]]))
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
    drawn = figures.study_effects(number, study_id, rows)
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


def table_of(storage: Storage, table: str, run_id: str) -> list[Row]:
    """Return one run's rows of a table."""
    return [row for owner, rows in read_files(storage, table, run_id) for row in filled(table, owner, rows)]


def confusion_section(gallery: Gallery, storage: Storage, run: Row, split: str, cells: Sequence[Row]) -> Section:
    """Draw the confusion matrix and the figures per class."""
    body = gallery.show(figures.confusion(marked_id(run), split, cells))
    classes = [row for row in table_of(storage, "classes", run["run_id"]) if row["split"] == split]
    if classes:
        body = f'<div class="pair">{body}{gallery.show(figures.class_figures(classes))}</div>'
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


def mistake_lines(found: Mistakes) -> list[list[str]]:
    """Write what is said under each image."""
    columns = (found.label, found.predicted, found.probability, found.label_probability)
    return [
        [f"is: {CLASS_NAMES[label]}", f"said: {CLASS_NAMES[predicted]} {sure:.1%}", f"right one: {right:.1%}"]
        for label, predicted, sure, right in zip(*(column.tolist() for column in columns), strict=True)
    ]


def find_mistakes(predictions: pa.Table, split: str) -> Mistakes | None:
    """Return up to 24 rows of `split` that were mistaken with the highest probability; None if it has no rows."""
    rows = predictions.filter(pa.compute.equal(predictions["split"], split)) if len(predictions) else predictions
    if not len(rows):
        return None
    label = rows["label"].to_numpy().astype(np.int64)
    predicted = rows["predicted"].to_numpy().astype(np.int64)
    chances = rows["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, NUM_CLASSES).astype(np.float64)
    sure = np.take_along_axis(chances, predicted[:, None], axis=1)[:, 0]
    wrong = np.flatnonzero(label != predicted)
    top = wrong[np.argsort(-np.nan_to_num(sure[wrong]), kind="stable")][:MAX_MISTAKES]
    right = np.take_along_axis(chances, label[:, None], axis=1)[:, 0]
    index = rows["index"].to_numpy().astype(np.int64)
    return Mistakes(index[top], label[top], predicted[top], sure[top], right[top], len(wrong))


def find_pixels(storage: Storage, run: Row, split: str, index: Sequence[int]) -> dict[int, NDArray[np.uint8]] | str:
    """Return images of a split by their index, or why they cannot be shown."""
    try:
        manifest = find_manifest(storage)
        if manifest is None:
            return "The images are not shown: this storage holds no prepared data."
        if manifest.sha256 != run["dataset_sha256"]:
            return "The images are not shown: the prepared data in this storage is not what the run was trained on."
        rows = splits.load_split(storage, manifest, split)
    except (UserError, pa.ArrowException, OSError) as error:
        return f"The images are not shown: {' '.join(str(error).split())}"
    images = dict(zip(rows.index.tolist(), rows.images, strict=True))
    if not set(index) <= set(images):
        return f"The images are not shown: the predictions name images that the prepared {split} split lacks."
    return {each: images[each] for each in index}


def search_section(gallery: Gallery, number: int, search: Search) -> Section:
    """Show a search: what it spent, its best trials, and its figures."""
    spent, full, saved = figures.spent_epochs(search)
    groups = ", ".join(f"{len(trials)} {name}" for name, _, trials in figures.by_status(search.trials))
    text = f"{count(len(search.trials), 'trial')}: {groups}. Epochs: {spent} spent, {full} if all had run in full"
    text += f" ({spent / full:.0%}); ASHA's stops saved {saved}." if full else "."
    body = page.paragraph(text) + trials_table(search)
    body += "".join(gallery.show(figure) for figure in figures.search_figures(number, search))
    mark = " (STAND-IN DATA)" if any(map(is_stand_in, search.runs.values())) else ""
    return Section(f"search-{number}-section", f"Search {search.search_id}{mark}", body)


def trials_table(search: Search) -> str:
    """List the trials, best first; the tail of a long list is folded."""
    names = figures.searched_settings(search.trials)
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
