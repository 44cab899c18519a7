"""Builds the report page from the Parquet reports: one HTML file that needs no network, and PNG files on request.

Orders the sections and fills the templates.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fashion.config import UserError, require
from fashion.reports.page.content import Figure, Images, Row, Section, SideBySide, pluralize
from fashion.reports.page.drawing.matplotlib_png import contact_sheet_png, encode_gray_png, figure_png
from fashion.reports.page.drawing.plotly_json import panel_json, plotly_js, plotly_js_base64
from fashion.reports.page.predictions import image_predictions_section, predictions_sections
from fashion.reports.page.reading import Reports, is_stand_in, load_reports
from fashion.reports.page.runs import curves_section, hardware_section, runs_section
from fashion.reports.page.searches import search_section
from fashion.reports.page.studies import study_section
from fashion.storage import Storage, open_storage

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Page:
    """A finished page: its HTML, and the content of the PNG files by name."""

    html: str
    pngs: dict[str, bytes]


def build_page(
    storage: Storage, out: Path, *, png: Path | None = None, run_ids: Sequence[str] = (), predictions: str = ""
) -> list[Path]:
    """Write the page of a storage's reports to `out` and, with `png`, every figure as a PNG file to that folder.

    `run_ids` restricts the page to these runs, searches or studies; `predictions` is a folder of predictions on a
    user's images, which get a section. Returns the files written. Raises `UserError`
    if there are no reports, a run does not exist, a report is damaged, or a file cannot be written; the page is
    written after the PNG files.
    """
    require(out.parent.is_dir(), f"--out {out}: the folder {out.parent} does not exist; make it or name another")
    require(not out.is_dir(), f"--out {out} is a folder; name a file")
    require(png is None or png.is_dir() or not png.exists(), f"--png {png} is a file; name a folder")
    page = make_page(storage, load_reports(storage, run_ids), predictions, with_pngs=png is not None)
    files = {} if png is None else {png / f"{name}.png": content for name, content in page.pngs.items()}
    files[out] = page.html.encode()
    for path, content in files.items():
        try:
            open_storage(str(path.parent)).write_bytes(content, path.name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{path} cannot be written ({reason}); name a place that can be") from error
    return list(files)


def make_page(storage: Storage, reports: Reports, predictions: str = "", *, with_pngs: bool) -> Page:
    """Return the page and, if wanted, the PNG files of its figures."""
    sections = [runs_section(reports.runs)] if reports.runs else []
    if any(reports.epochs.get(row["run_id"]) for row in reports.runs):
        sections.append(curves_section(reports))
    sections += [study_section(number, *study) for number, study in enumerate(reports.studies.items(), start=1)]
    sections += predictions_sections(storage, reports.runs)
    if predictions:
        sections.append(image_predictions_section(predictions))
    sections += [search_section(number, search) for number, search in enumerate(reports.searches, start=1)]
    if reports.runs:
        sections.append(hardware_section(reports.runs))
    runs = [*reports.runs, *(run for search in reports.searches for run in search.runs.values())]
    html = render_html(page_title(runs), page_summary(reports), stand_in_warning(runs), sections)
    return Page(html, png_files(sections) if with_pngs else {})


def render_html(title: str, summary: str, warning: str, sections: Sequence[Section]) -> str:
    """Fill the template. Jinja escapes every value that the template does not mark as `safe`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "plotly_json": panel_json,
        "png_base64": lambda pixels: base64.b64encode(encode_gray_png(pixels)).decode(),
    }
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        policy=content_security_policy(script, plotly_js()),
        title=title,
        summary=summary,
        warning=warning,
        sections=sections,
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=script,
        plotly_js=plotly_js_base64(),
    )


def content_security_policy(*scripts: str) -> str:
    """Return the policy of a page that runs these scripts alone, has its style sheet inside, and loads nothing."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # Plotly adds rules of its own to the style sheet, and makes the image that its button saves from a blob.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def png_files(sections: Sequence[Section]) -> dict[str, bytes]:
    """Draw every figure and every grid of images as PNG; the keys are their names."""
    files: dict[str, bytes] = {}
    for block in [block for section in sections for block in section.blocks]:
        for figure in block.figures if isinstance(block, SideBySide) else [block]:
            if isinstance(figure, Figure):
                files[figure.name] = figure_png(figure)
        if isinstance(block, Images) and block.items:
            labels = ["\n".join(image.lines) for image in block.items]
            files[block.name] = contact_sheet_png(block.title, [image.pixels for image in block.items], labels)
    return files


def page_title(runs: Sequence[Row]) -> str:
    """Return the title of the page, which says whether all runs used the stand-in data."""
    only_stand_in = bool(runs) and all(is_stand_in(row) for row in runs)
    return "Stand-in for Fashion-MNIST: runs and searches" if only_stand_in else "Fashion-MNIST: runs and searches"


def page_summary(reports: Reports) -> str:
    """Say which reports the page was made from. It has no time of its own, so equal reports give equal bytes."""
    moments = [row[name] for row in reports.runs for name in ("started_at", "finished_at") if row[name]]
    trials = sum(len(search.trials) for search in reports.searches)
    parts = [pluralize(len(reports.runs), "run")]
    parts += (
        [f"{pluralize(len(reports.searches), 'search', 'searches')} of {pluralize(trials, 'trial')}"] if trials else []
    )
    parts += [pluralize(len(reports.studies), "study", "studies")] if reports.studies else []
    until = f" up to {max(moments):%Y-%m-%d %H:%M} UTC" if moments else ""
    return f"Made from the Parquet reports of {', '.join(parts)}{until}."


def stand_in_warning(runs: Sequence[Row]) -> str:
    """Return a warning if any run used the stand-in data, else ''."""
    marked = [row for row in runs if is_stand_in(row)]
    if not marked:
        return ""
    which = "All runs" if len(marked) == len(runs) else f"{len(marked)} of {len(runs)} runs"
    return (
        f"{which} on this page used drawn pictures in place of Fashion-MNIST. Their results cannot be compared with "
        "results on the real data."
    )
