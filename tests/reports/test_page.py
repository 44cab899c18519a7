"""The report page: figures say what the rows say; the page is whole, safe and needs no network."""

import base64
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forms
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_job, split_paths

from fashion.config import UserError
from fashion.data import preparation, sources, synthetic
from fashion.data.images import predictions as image_predictions
from fashion.data.images.reading import read_again
from fashion.data.manifest import Manifest, load_manifest
from fashion.data.rows import Split
from fashion.reports import classification, tables
from fashion.reports.page import build, findings, predictions, reading, runs, searches, studies
from fashion.reports.page.content import Details, Figure, Panel, Table
from fashion.reports.page.drawing import matplotlib_png, plotly_json
from fashion.storage import Storage, open_storage
from jobs.report import main

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
NASTY = "</script><img src=x onerror=alert(1)>"
START = datetime(2026, 11, 20, 8, tzinfo=UTC)
RUNGS = (1, 2, 4)
FULL = 6


# --- sample reports -----------------------------------------------------------------------------------------------


def write_run(storage: Storage, run_id: str, last: int, turn: int, **other: Any) -> None:
    """Write a run of `last` epochs whose val loss is lowest at `turn`."""
    rows: list[dict[str, Any]] = []
    for epoch in range(1, last + 1):
        val_loss = 0.24 + 0.4 / (epoch + 1) ** 2 + 0.012 * max(0, epoch - turn)
        train_loss = 0.5 / epoch**0.7
        rows += [
            {"epoch": epoch, "split": "train", "loss": train_loss, "accuracy": 1 - 0.4 * train_loss, "rows": 55000},
            {"epoch": epoch, "split": "val", "loss": val_loss, "accuracy": 1.02 - 0.4 * val_loss, "rows": 5000},
        ]
    tables.write_table(storage, "epochs", run_id, rows)
    row = {
        "kind": "train",
        "status": "completed",
        "started_at": START,
        "finished_at": START + timedelta(minutes=50),
        "wall_s": 3000.0,
        "dataset": "fashion-mnist",
        "dataset_sha256": "0" * 64,
        "source_hash": "abcdef0123456789" * 4,
        "preset": "default",
        "config_json": json.dumps({"lr": 0.0015, "epochs": last}),
        "world_size": 2,
        "device": "cpu",
        "precision": "bf16",
        "epochs_done": last,
        "best_epoch": turn,
        "train_loss": 0.12,
        "train_accuracy": 0.96,
        "val_loss": 0.25,
        "val_accuracy": 0.92,
        "test_loss": 0.2,
        "test_accuracy": 0.93,
        "images_per_s": 312.5,
        "peak_memory_bytes": 1_500_000_000,
        "hardware": "a laptop, 2 cores",
    }
    tables.write_table(storage, "runs", run_id, [row | other])


def write_predictions(storage: Storage, run_id: str, split: Split, *, wrong_every: int = 12) -> None:
    """Write predictions on test: every `wrong_every`-th row takes the next class, ever less confidently."""
    labels = split.labels
    wrong = np.arange(len(labels)) % wrong_every == 0
    predicted = np.where(wrong, (labels + 1) % 10, labels).astype(np.uint8)
    chances = np.full((len(labels), 10), 0.001, np.float32)
    chances[np.arange(len(labels)), predicted] = np.linspace(0.99, 0.6, len(labels))
    columns = {
        "split": ["test"] * len(labels),
        "index": split.index,
        "label": labels,
        "predicted": predicted,
        "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(chances.reshape(-1)), 10),
        "loss": np.zeros(len(labels), np.float32),
    }
    tables.write_table(storage, "predictions", run_id, pa.table(columns), part="test")
    matrix = classification.confusion_matrix(labels, predicted)
    for table, rows in (
        ("confusion", classification.confusion_rows(matrix)),
        ("classes", classification.class_rows(matrix)),
    ):
        tables.write_table(storage, table, run_id, [{"split": "test"} | row for row in rows], part="test")


def trial(number: int, generator: np.random.Generator) -> dict[str, Any]:
    """Make one row of `trials`: every fifth diverges or fails, most of the rest are stopped at a rung."""
    status = ("diverged", "error")[number // 5 % 2] if number % 5 == 4 else "stopped"
    status = "completed" if number in (2, 7, 10) else status
    done = {"completed": FULL, "diverged": 1, "error": 0}.get(status, RUNGS[number % 3])
    lr, conv, fc = 10 ** generator.uniform(-4, -2), generator.uniform(0, 0.4), generator.uniform(0, 0.6)
    score = 0.9 + 0.004 * done - 0.01 * abs(np.log10(lr) + 3) - 0.02 * conv
    return {
        "search_id": "asha-1",
        "trial_id": f"t{number:03d}",
        "status": status,
        "error": f"RuntimeError: {NASTY}" if status == "error" else None,
        "lr": float(lr),
        "dropout_conv": float(conv),
        "dropout_fc": float(fc),
        "epochs_done": done,
        "rung": max((rung for rung in RUNGS if rung <= done), default=None),
        "best_epoch": done or None,
        "val_loss": 0.3 if status in ("stopped", "completed") else None,
        "val_accuracy": float(score) if status in ("stopped", "completed") else None,
        "wall_s": 20.0 * done,
        "shoe_size": number,
    }


def write_search(storage: Storage, count: int = 15) -> list[dict[str, Any]]:
    """Write a search: its trials (with a column that nobody knows), their runs and epochs, and a refit."""
    generator = np.random.default_rng(0)
    trials = [trial(number, generator) for number in range(count)]
    started = START
    for row in trials:
        run_id, wall = row["trial_id"], timedelta(seconds=row["wall_s"] + 5)
        times = {"started_at": started, "finished_at": started + wall}
        tables.write_table(storage, "runs", run_id, [{"kind": "trial", "search_id": "asha-1", "status": "x", **times}])
        top = row["val_accuracy"] or 0.5
        epochs = [
            {"epoch": epoch, "split": "val", "loss": 0.3, "accuracy": top - 0.03 / epoch + 0.03 / row["epochs_done"]}
            for epoch in range(1, row["epochs_done"] + 1)
        ]
        tables.write_table(storage, "epochs", run_id, epochs)
        started += wall / 2
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(trials), sink)
    storage.write_bytes(sink.getvalue(), "reports", "trials", "run_id=asha-1", "trials.parquet")
    tables.write_table(storage, "importance", "asha-1", finding_rows())
    write_run(storage, "asha-1-refit", 6, 6, kind="refit", search_id="asha-1", val_accuracy=0.999, test_accuracy=0.935)
    return trials


def finding_rows() -> list[dict[str, Any]]:
    """What the search found: one setting that mattered, one that may have, and one of which little is known."""
    common = {"search_id": "asha-1", "method": "ped-anova", "trials": 12, "best_trials": 4, "stopped_trials": 9}
    common |= {"epoch": 1, "effect_trials": 10, "near_trials": 8, "near_drop": 0.0123}
    lr = {
        "setting": "lr",
        "importance": 0.75,
        "p": 0.004,
        "effect": -0.0123,
        "effect_low": -0.02,
        "effect_high": -0.004,
    }
    lr |= {"first_third": 3e-4, "second_third": 2e-3, "winner": 1e-3, "best_low": 4e-4, "best_high": 1.5e-3}
    lr |= {"flat_low": 5e-4, "flat_high": 2e-3, "fall_per_tenth": 0.0042}
    lr |= {"overfit_effect": -0.1, "overfit_effect_low": -0.15, "overfit_effect_high": -0.05}
    fc = {
        "setting": "dropout_fc",
        "importance": 0.25,
        "p": 0.4,
        "effect": 0.001,
        "effect_low": -0.01,
        "effect_high": 0.02,
    }
    fc |= {"first_third": 0.2, "second_third": 0.4, "winner": 0.3}
    return [common | lr, common | fc, common | {"setting": NASTY, "note": "every trial has the same value"}]


def write_study(storage: Storage) -> None:
    """Write a study of two parts: three arms over four seeds, and an arm by itself."""

    def arm(part: str, name: str, settings: dict[str, Any], **other: Any) -> dict[str, Any]:
        row = {"study_id": "cures", "part": part, "arm": name, "preset": "seed", "settings_json": json.dumps(settings)}
        row |= {
            "epochs": 12,
            "train_rows": 55000,
            "turning_epoch": 10.5,
            "val_accuracy": 0.9301,
            "test_accuracy": 0.9288,
        }
        return row | {"seeds": 4, "val_accuracy_std": 0.0011, "test_accuracy_std": 0.0021} | other

    def compared(split: str, mean: float, reach: float) -> dict[str, Any]:
        name = f"{split}_effect"
        return {"baseline": "published", name: mean, f"{name}_low": mean - reach, f"{name}_high": mean + reach}

    few = compared("val", 0.0042, 0.0011) | compared("test", 0.0031, 0.0052)
    images = {"only_arm_right": 210, "only_baseline_right": 151, "mcnemar_p": 0.0021}
    alone = {"baseline": "published", "val_effect": -0.01, "test_effect": -0.02, "seeds": 1, "val_accuracy_std": None}
    rows = [
        arm("dropout", "published", {}),
        arm("dropout", "more", {"dropout_fc": 0.65}, **few, **images),
        arm("dropout", NASTY, {"dropout_fc": 0.9}, **alone, **images),
    ]
    tables.write_table(storage, "study", "cures-dropout", rows)
    tables.write_table(storage, "study", "cures-seed", [arm("seed", "seed", {})])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, small_archives: Path) -> Storage:
    """A storage with prepared data, two runs, one of them with predictions, a search and a study."""
    storage = open_storage(str(tmp_path_factory.mktemp("full")))
    splits = preparation.split_rows(sources.Source("", *forms.pairs(small_archives).values(), {}, False), 100, 0)
    manifest, _ = prepare_small(storage, small_archives)
    write_run(storage, "long", 14, 8, dataset_sha256=manifest.sha256, val_accuracy=0.93)
    write_run(storage, "short", 2, 2)
    write_predictions(storage, "long", splits["test"])
    write_search(storage)
    write_study(storage)
    return storage


def prepare_small(storage: Storage, archives: Path) -> tuple[Manifest, bool]:
    """Prepare the small stand-in, 500 test rows in place of 10,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "write_archives", lambda folder: shutil.copytree(archives, folder, dirs_exist_ok=True))
        return preparation.prepare(storage, "synthetic", val_rows=100)


def val_epochs(*losses: float) -> list[dict[str, Any]]:
    return [{"epoch": n, "split": "val", "loss": loss, "accuracy": 0.9} for n, loss in enumerate(losses, start=1)]


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "turn"),
    [((3, 2, 1), None), ((3, 1, 2), 2), ((1, 1, 2), 1), ((3, float("nan"), 2, 2.5), 3), ((1,), None), ((), None)],
)
def test_the_turning_point_is_the_lowest_val_loss_unless_it_comes_last(losses: Any, turn: int | None) -> None:
    assert runs.turning_epoch(val_epochs(*losses)) == turn


def test_curves_mark_both_turning_points_or_say_why_not(full: Storage) -> None:
    epochs = reading.load_reports(full).epochs
    long = runs.learning_curves(1, "long", epochs["long"])
    assert [panel.title.split()[0] for panel in long.panels] == ["Loss", "Accuracy"]
    for panel in long.panels:
        assert [(line.x, line.label) for line in panel.vertical_lines] == [
            (8, "lowest val loss: epoch 8"),
            (10, "published: epoch 10"),
        ]
        # One above the other, on the side that the curves leave free: falling from the top, or rising to it.
        free = [line.label_height > 0.5 for line in panel.vertical_lines]
        assert free == [panel.title.startswith("Loss")] * 2
        assert abs(panel.vertical_lines[0].label_height - panel.vertical_lines[1].label_height) >= 0.1 - 1e-9
        assert [(series.name, len(series.x)) for series in panel.series] == [("train", 14), ("val", 14)]
        assert len({(series.style.dash, series.style.marker) for series in panel.series}) == 2
    short = runs.learning_curves(2, "short", epochs["short"])
    assert not short.panels[0].vertical_lines
    assert "lowest at the last epoch. The published turning point, epoch 10, lies beyond" in short.caption


def test_what_asha_saved_equals_a_count_by_hand(full: Storage) -> None:
    (search,) = reading.load_reports(full).searches
    trials = search.trials
    spent, cost, saved = reading.spent_epochs(search)
    assert (len(trials), search.max_epochs, cost) == (15, FULL, 90)
    assert spent == sum(row["epochs_done"] for row in trials) == 40
    assert saved == sum(FULL - row["epochs_done"] for row in trials if row["status"] == "stopped") == 34
    assert search.rungs == list(RUNGS)
    caption = searches.saved_epochs(1, search).caption
    assert "would have cost 90 epochs; the search spent 40 (44%). ASHA's stops saved 34; 16 were not run" in caption


def test_the_best_trial_did_not_fail(full: Storage) -> None:
    (search,) = reading.load_reports(full).searches
    best = max((row for row in search.trials if row["val_accuracy"]), key=lambda row: row["val_accuracy"])
    assert search.best is best
    best["status"] = "diverged"
    again = replace(search).best  # a search looks for it once
    assert again is not None and again["trial_id"] != best["trial_id"]


def test_settings_are_known_fields_that_vary() -> None:
    trials = [{"lr": 1e-3, "dropout_fc": 0.1, "padding": "zeros", "seed": 1, "shoe_size": 1}] * 2
    assert reading.searched_settings(trials) == []
    other = {"lr": 1e-2, "dropout_fc": 0.1, "padding": "reflect", "seed": 2, "shoe_size": 2, "depth": None}
    assert reading.searched_settings([trials[0], other]) == ["lr", "padding"]


def test_scales_of_parallel_axes() -> None:
    assert searches.normalise("lr", [1e-4, 1e-3, 1e-2]) == (pytest.approx([0, 0.5, 1]), "0.0001", "0.01")
    assert searches.normalise("dropout_fc", [0.0, 0.1, 0.4]) == (pytest.approx([0, 0.25, 1]), "0", "0.4")
    assert searches.normalise("padding", ["zeros", "reflect"]) == ([1, 0], "reflect", "zeros")
    assert searches.normalise("lr", [0.1, 0.1])[0] == [0, 0]


def test_an_axis_leaves_out_far_off_points_and_says_so() -> None:
    assert searches.limits_without_outliers([0.90, 0.91, 0.92, 0.93, 0.94]) == (None, "")
    (low, high), text = searches.limits_without_outliers([0.1, 0.90, 0.905, 0.91, 0.92, 0.93])
    assert 0.89 < low < 0.90
    assert high > 0.93
    assert text == f" The axis leaves out 1 point(s) below {low:.3f}."


def test_a_search_without_any_result_still_has_a_section(storage: Storage) -> None:
    rows = [{"search_id": "s", "trial_id": name, "status": "error", "error": "boom", "lr": 0.1} for name in "ab"]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    storage.write_bytes(sink.getvalue(), "reports", "trials", "run_id=s", "trials.parquet")
    html = build.make_page(storage, reading.load_reports(storage), with_pngs=False).html
    assert "Search s" in html
    assert "2 error" in html


def test_what_mattered_is_a_table_and_a_figure(full: Storage) -> None:
    (search,) = reading.load_reports(full).searches
    figure, text, table = findings.findings_blocks(1, search)
    assert isinstance(text, str) and "best 4 of 12 trials apart" in text and "the 9 that were stopped early" in text
    assert "by epoch 1, the last that all 10 trials reached" in text and "lose 1.23 points" in text
    assert isinstance(table, Table)
    first, second, third = table.rows
    assert first.cells[:6] == ["lr", "0.75", "0.004", "0.001", "0.0004 to 0.0015", "-1.23 [-2.00, -0.40]"]
    assert first.cells[6:] == ["-0.100 [-0.150, -0.050]", "0.0005 to 0.002", "0.42", ""]
    assert second.cells[4:9] == ["", "+0.10 [-1.00, +2.00]", "", "", "-"]
    assert third.cells == [NASTY, "-", "-", "-", "", "", "", "", "-", "every trial has the same value"]
    assert [row.css_class for row in table.rows] == ["", "chance", "chance"], "what chance may explain is grey"
    assert isinstance(figure, Figure)
    assert [panel.title for panel in figure.panels] == [
        "Importance",
        "Effect on val accuracy",
        "Effect on the rise of val loss",
    ]
    assert all(isinstance(panel, Panel) and list(panel.y_ticks or {}) == [2, 1] for panel in figure.panels)
    interval, points = figure.panels[1].series
    assert points.x == pytest.approx([-1.23, 0.1])
    assert interval.x[:2] == pytest.approx([-2, -0.4])
    assert figure.panels[1].x_range == pytest.approx((-2.24, 2.24)), "no interval ends at the frame"


def test_a_search_without_findings_says_why_or_nothing(full: Storage) -> None:
    (search,) = reading.load_reports(full).searches
    few = dict.fromkeys(search.findings[0]) | {"setting": "lr", "note": "3 of 4 trials have a result"}
    text, table = findings.findings_blocks(1, replace(search, findings=[few]))
    assert text == "What mattered is not estimated: 3 of 4 trials have a result."
    assert isinstance(table, Table) and len(table.rows) == 1
    assert findings.findings_blocks(1, replace(search, findings=[])) == []
    assert findings.loss_curves(1, replace(search, findings=[few])) is None


def test_val_loss_is_drawn_by_thirds_with_its_lowest_points() -> None:
    losses = {"a": [0.9, 0.5, 0.6], "b": [0.9, 0.4, 0.3], "c": [0.8, 0.7], "d": [0.9], "e": [0.7, 0.6, 0.6]}
    trials = [{"trial_id": name, "lr": lr, "max_epochs": 4} for name, lr in zip(losses, (1, 2, 3, 2, 2), strict=True)]
    rows = {name: val_epochs(*each) for name, each in losses.items()}
    known = [{"setting": "lr", "first_third": 1.5, "second_third": 2.5}]
    search = reading.Search("s", [trial | {"epochs_done": 1} for trial in trials], rows, {}, known)
    figure = findings.loss_curves(1, search)
    assert figure is not None
    assert "Of 4 trials, 2 have turned before their last epoch." in figure.caption
    (panel,) = figure.panels
    assert isinstance(panel, Panel)
    named = {series.name: (list(series.x), list(series.y)) for series in panel.series}
    assert named["up to 1.5"] == ([1, 2, 3], [0.9, 0.5, 0.6])
    assert named["to 2.5"] == ([1, 2, 3, None, 1, 2, 3], [0.9, 0.4, 0.3, None, 0.7, 0.6, 0.6])
    assert named["above 2.5"] == ([1, 2], [0.8, 0.7])
    assert named["lowest"] == ([2, 3, 2, 2], [0.5, 0.3, 0.6, 0.7])
    assert [findings.lowest_loss_epoch(rows[name]) for name in losses] == [2, 3, 2, 1, 2]
    assert findings.lowest_loss_epoch([]) is None


def test_of_many_trials_those_with_most_epochs_are_drawn() -> None:
    trials = [{"trial_id": f"t{number}", "lr": number, "max_epochs": 5, "epochs_done": 5} for number in range(100)]
    rows = {f"t{number}": val_epochs(*[0.5] * (2 + (number >= 70))) for number in range(100)}
    known = [{"setting": "lr", "first_third": 33.0, "second_third": 66.0}]
    figure = findings.loss_curves(1, reading.Search("s", trials, rows, {}, known))
    assert figure is not None and "The 40 trials with fewer epochs are left out." in figure.caption
    assert sum(len(series.x) for series in figure.panels[0].series if series.name == "lowest") == 60


def test_a_loss_axis_leaves_out_far_off_points() -> None:
    assert findings.loss_limits([0.3, 0.4, 0.5, 0.6]) is None
    limits = findings.loss_limits([0.3, 0.31, 0.32, 0.33, 0.34, 0.35, 0.36, 0.37, 0.38, 9.0])
    assert limits is not None and limits[0] < 0.3 and 0.5 < limits[1] < 0.7


def test_settings_in_which_runs_differ_stand_apart_from_the_others() -> None:
    configs = [{"lr": 0.1, "padding": "zeros", "tta": "none"}, {"lr": 0.2, "padding": "zeros", "tta": "flip"}, {}]
    rows = [{"run_id": f"r{n}", "config_json": json.dumps(config)} for n, config in enumerate(configs)]
    differing, common = runs.settings_table(rows[:2])
    assert isinstance(differing, Details) and isinstance(common, Details)
    assert [row.cells for row in differing.table.rows] == [["r0", "0.1", "none"], ["r1", "0.2", "flip"]]
    assert [row.cells for row in common.table.rows] == [["padding", "zeros"]]
    (alone,) = runs.settings_table(rows[:1])
    assert isinstance(alone, Details) and alone.title == "Settings of the run" and len(alone.table.rows) == 3
    (all_differ,) = runs.settings_table(rows)
    assert isinstance(all_differ, Details) and list(all_differ.table.rows)[2].cells == ["r2", "-", "-", "-"]
    assert runs.settings_table(rows[2:]) == []


def test_one_epoch_is_no_curve(storage: Storage) -> None:
    write_run(storage, "once", 1, 1)
    reader = Reader(build.make_page(storage, reading.load_reports(storage), with_pngs=False).html)
    assert "One epoch makes no curve; its figures are in the table above: once." in reader.text
    assert reader.all("figure") == []
    assert "Train loss and accuracy are averages" not in reader.text
    write_run(storage, "twice", 2, 2)
    reader = Reader(build.make_page(storage, reading.load_reports(storage), with_pngs=False).html)
    assert [values["id"] for values in reader.all("figure")] == ["curves-1"]


def test_a_study_shows_each_difference_with_its_interval(full: Storage) -> None:
    rows = reading.load_reports(full).studies["cures"]
    figure = studies.effects_figure(1, "cures", rows)
    assert figure is not None
    (panel,) = figure.panels
    assert sorted(panel.y_ticks.values()) == ["dropout: " + NASTY, "dropout: more"]
    means = {series.name: series for series in panel.series}
    assert means["test"].x == pytest.approx([0.31, -2.0])
    assert means["test"].hover[0] == "dropout, more - published: test accuracy +0.31 points (-0.21 to +0.83)"
    assert means["test"].hover[1].endswith("test accuracy -2.00 points"), "one seed has no interval"
    assert means["val, 95 %"].x == pytest.approx([0.31, 0.53])
    assert studies.effects_figure(1, "cures", [row for row in rows if row["part"] == "seed"]) is None


def test_a_studys_table_says_what_was_compared(full: Storage) -> None:
    html = build.make_page(full, reading.load_reports(full, ["cures"]), with_pngs=False).html
    text = Reader(html).text
    assert "Study cures" in text and "Learning curves" not in text
    line = [cell.strip() for cell in text[text.index("dropout_fc 0.65") :].split("\n") if cell.strip()]
    assert line[1:4] == ["4 x 12 x 55,000", "0.9301 ± 0.0011", "0.9288 ± 0.0021"]
    assert line[4:9] == ["+0.42 [+0.31, +0.53]", "+0.31 [-0.21, +0.83]", "210 : 151", "0.0021", "10.5"]
    assert "-2.00\n" in text
    assert "preset seed" in text


# --- mistakes and images --------------------------------------------------------------------------------------------


def test_the_surest_mistakes_come_first(full: Storage) -> None:
    (rows,) = reading.read_files(full, "predictions", "long")
    found = predictions.find_mistakes(rows, "test")
    assert found is not None
    wrong = [row for row in rows.to_pylist() if row["label"] != row["predicted"]]
    assert found.total == len(wrong) == 42
    wrong.sort(key=lambda row: -row["probabilities"][row["predicted"]])
    assert found.index.tolist() == [row["index"] for row in wrong[:24]]
    assert found.probability[0] == pytest.approx(0.99)
    assert found.label_probability[0] == pytest.approx(0.001)
    assert predictions.find_mistakes(rows, "val") is None


def test_images_are_encoded_without_loss() -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)
    png = matplotlib_png.encode_gray_png(image)
    assert struct.unpack(">II", png[16:24]) == (28, 28)
    size = struct.unpack(">I", png[33:37])[0]
    lines = np.frombuffer(zlib.decompress(png[41 : 41 + size]), np.uint8).reshape(28, 29)
    assert (lines[:, 1:] == image).all()
    assert not lines[:, 0].any()


def test_missing_pixels_are_explained(full: Storage, storage: Storage, small_archives: Path) -> None:
    run = {"dataset_sha256": "1" * 64}
    assert "not what the run was trained on" in predictions.load_images(full, run, "test", [0])
    assert "holds no prepared data" in predictions.load_images(storage, run, "test", [0])
    sha256 = load_manifest(full).sha256
    assert "that the prepared test split lacks" in predictions.load_images(
        full, {"dataset_sha256": sha256}, "test", [9999]
    )
    manifest, _ = prepare_small(storage, small_archives)
    for path in split_paths(storage, manifest, "test"):
        Path(path).write_bytes(b"x")
    assert "is damaged" in predictions.load_images(storage, {"dataset_sha256": manifest.sha256}, "test", [0])


# --- the page -----------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects what a browser would find: tags with their attributes, the text, scripts; checks that tags close."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(text)
        elif self.open and self.open[-1] != "style":
            self.text += text + "\n"

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [values for name, values in self.tags if name == tag and kind in (values.get("class") or "")]


@pytest.fixture(scope="module")
def html(full: Storage) -> str:
    return build.make_page(full, reading.load_reports(full), with_pngs=False).html


def test_the_page_is_whole_small_and_needs_no_network(html: str) -> None:
    reader = Reader(html)
    assert len(html) < 5e6
    ids = [values["id"] for _, values in reader.tags if "id" in values]
    assert len(ids) == len(set(ids))
    for _, values in reader.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            target = values.get(name) or ""
            assert target == "" or target.startswith("data:") or target[1:] in ids, target
    assert "@import" not in html
    assert "url(" not in html.split("</style>")[0]
    assert len(reader.all("script")) == 2 + len(reader.all("div", "plot"))
    # Curves of three runs, the study, the confusion matrix and the classes; of the search: epochs and time, val loss by
    # two settings, three panels of what mattered, three settings, parallel coordinates, what was saved.
    assert len(reader.all("div", "plot")) == 3 * 2 + 1 + 1 + 1 + 2 + 2 + 3 + 3 + 1 + 1
    assert len(reader.all("img")) == 24


def test_every_figure_is_plain_json_that_the_library_draws(html: str) -> None:
    panels = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert panels
    for panel in panels:
        content = json.loads(panel)
        assert {trace["type"] for trace in content["data"]} <= {"scatter", "heatmap"}
        assert not re.search("[<>&]", panel)


def test_the_policy_allows_the_two_scripts_of_the_page_and_no_other(html: str) -> None:
    reader = Reader(html)
    (policy,) = [values["content"] for values in reader.all("meta") if "http-equiv" in values]
    inline = [script for script in reader.scripts if script.startswith("//")]
    digests = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in (*inline, plotly_json.plotly_js())
    ]
    assert len(inline) == 1
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy == f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    assert not any(name.startswith("on") for _, values in reader.tags for name in values)


def test_nothing_from_a_report_becomes_markup(html: str) -> None:
    assert NASTY in Reader(html).text
    assert NASTY not in html
    assert "onerror" not in str(Reader(html).tags)


def test_published_and_measured_stand_together_best_first(html: str) -> None:
    body = html.split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.sub("<.*?>", " ", row).split() for row in body.strip().split("\n")]
    # The refit claims a val accuracy of 0.999, having trained on val; its winning trial reached 0.917.
    assert [row[0] for row in rows] == ["published", "long", "short", "asha-1-refit"]
    assert {"0.9684", "0.0909", "0.9304", "0.2591"} <= set(rows[0])
    assert "+0.46" in rows[3]
    assert "STAND-IN" not in html


def test_stand_in_data_is_marked_everywhere(storage: Storage) -> None:
    write_run(storage, "real", 3, 2, val_accuracy=0.5)
    write_run(storage, "toy", 3, 2, dataset="fashion-mnist-synthetic", val_accuracy=0.99)
    html = build.make_page(storage, reading.load_reports(storage), with_pngs=False).html
    text = Reader(html).text
    assert "1 of 2 runs on this page used drawn pictures" in text
    assert "Learning curves of toy (STAND-IN DATA)" in text
    body = html.split("<tbody>")[1].split("</tbody>")[0]
    assert [re.sub("<.*?>", " ", row).split()[0] for row in body.strip().split("\n")] == ["published", "real", "toy"]
    assert re.search(r"toy \n+STAND-IN", text)


def test_a_run_that_still_runs_is_shown_with_its_epochs(storage: Storage) -> None:
    tables.write_table(storage, "runs", "live", [{"status": "running", "dataset": "fashion-mnist"}])
    tables.write_table(storage, "epochs", "live", val_epochs(0.5, 0.3))
    (row,) = reading.load_reports(storage).runs
    assert (row["best_epoch"], row["epochs_done"], row["val_accuracy"]) == (1, 2, 0.9)
    html = build.make_page(storage, reading.load_reports(storage), with_pngs=False).html
    assert "running" in html
    assert "Search" not in Reader(html).text
    assert "Confusion" not in Reader(html).text


def test_same_reports_same_bytes_and_only_chosen_runs(full: Storage, tmp_path: Path, html: str) -> None:
    out = tmp_path / "page.html"
    assert build.build_page(full, out) == [out]
    assert out.read_text() == html
    build.build_page(full, out, run_ids=["short"])
    assert "Learning curves of short" in out.read_text()
    assert not re.search("Learning curves of long|Search", Reader(out.read_text()).text)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.commands
def test_every_figure_becomes_a_png_file(full: Storage, tmp_path: Path) -> None:
    out, folder = tmp_path / "page.html", tmp_path / "figures"
    written = build.build_page(full, out, png=folder, run_ids=["long"])
    assert {path.name for path in written} == {
        "page.html",
        "curves-1.png",
        "confusion.png",
        "classes.png",
        "mistakes.png",
    }
    for path in folder.iterdir():
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", content[16:24])) > 300
    assert {values["id"] for values in Reader(out.read_text()).all("figure")} == {"curves-1", "confusion", "classes"}


@pytest.mark.slow
def test_search_figures_can_be_drawn_as_files(full: Storage) -> None:
    (search,) = reading.load_reports(full).searches
    drawn = searches.search_figures(1, search)
    assert [figure.name.split("-")[-1] for figure in drawn] == [
        "epochs",
        "loss",
        "time",
        "settings",
        "parallel",
        "saved",
    ]
    importance = findings.importance_figure(1, search.findings)
    assert importance is not None
    for figure in (importance, drawn[1], drawn[3], drawn[4]):
        assert matplotlib_png.figure_png(figure)[:4] == b"\x89PNG"


# --- mistakes of the user -------------------------------------------------------------------------------------------


def test_users_mistakes_name_the_value_and_leave_nothing(full: Storage, storage: Storage, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(UserError, match=r"--storage .*results holds no reports; train first"):
        build.build_page(storage, out)
    with pytest.raises(UserError, match=r"--run-id nope does not exist in .*; there are .*short"):
        build.build_page(full, out, run_ids=["long", "nope"])
    with pytest.raises(UserError, match=r"--out .*: the folder .*missing does not exist"):
        build.build_page(full, tmp_path / "missing" / "page.html")
    with pytest.raises(UserError, match=r"--png .*manifest.json is a file; name a folder"):
        build.build_page(full, out, png=Path(full.path("data", "fashion-mnist", "manifest.json")))
    with pytest.raises(UserError, match=r"--out .* is a folder; name a file"):
        build.build_page(full, tmp_path)
    with pytest.raises(UserError, match=r"/proc/page.html cannot be written \(.*\); name a place that can be"):
        build.build_page(full, Path("/proc/page.html"), run_ids=["short"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", ["runs", "epochs", "confusion"])
def test_a_damaged_report_is_named(table: str, storage: Storage, tmp_path: Path) -> None:
    write_run(storage, "a", 2, 2)
    tables.write_table(storage, "confusion", "a", [])
    path = Path(storage.path("reports", table, "a", f"{table}.parquet"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"{table}.parquet is damaged") as caught:
        build.build_page(storage, tmp_path / "page.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()
    pq.write_table(pa.table({"x": [1]}), path)
    if table != "runs":
        with pytest.raises(UserError, match=r"is damaged \(it lacks "):
            build.build_page(storage, tmp_path / "page.html")


@pytest.mark.commands
def test_the_command(full: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    main(["--storage", full.uri, "--out", str(out), "--run-id", "short, asha-1"])
    assert f"page: {out}" in capsys.readouterr().out
    assert "Search asha-1" in out.read_text()
    done = run_job("jobs.report", "--storage", str(tmp_path / "empty"), "--out", str(tmp_path / "b.html"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: --storage ")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.commands
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_headless_chromium_draws_every_figure_without_a_complaint(html: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(html)
    done = dump_dom(page)
    plots_there = len(Reader(html).all("div", "plot"))
    assert f'data-drawn="{plots_there}"' in done.stdout
    drawn = done.stdout.split('<div class="plot js-plotly-plot"')[1:]
    assert len(drawn) == plots_there
    for plot in drawn:
        assert '<svg class="main-svg"' in plot
        assert re.search(r'class="trace scatter|<image', plot)  # points and lines, or a heat map
    assert "CONSOLE" not in done.stderr, done.stderr


def dump_dom(page: Path) -> subprocess.CompletedProcess[str]:
    """Open a page in a headless browser without a network; its output is the document after the scripts have run."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet),
        *(f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--v=0"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--window-size=1200,2000"),
        *("--dump-dom", page.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


DRIVER = """
<script>
(() => {
  const table = document.querySelector("#runs table");
  const shown = (table) => [...table.tBodies[0].rows].filter((row) => !row.hidden);
  const names = () => shown(table).map((row) => row.cells[0].textContent.trim());
  const header = (title) => [...table.tHead.querySelectorAll("th")].find((each) => each.textContent.trim() === title);
  const click = (title) => header(title).querySelector("button").click();
  const found = { before: names() };
  click("val accuracy");
  found.descending = names();
  found.sorted = header("val accuracy").getAttribute("aria-sort");
  click("val accuracy");
  found.ascending = names();
  click("val accuracy");
  found.again = names();
  click("run");
  found.named = names();
  const input = document.querySelector("#runs input");
  input.value = "seed  FAILED";
  input.dispatchEvent(new Event("input"));
  found.filtered = names();
  found.note = document.querySelector("#runs .table-tools").textContent;
  document.documentElement.dataset.found = JSON.stringify(found);
  const trials = document.querySelector("#search-1-section table");
  const more = document.querySelector("#search-1-section .more");
  const counts = [shown(trials).length, more.hidden];
  more.click();
  document.documentElement.dataset.counts = JSON.stringify([...counts, shown(trials).length, more.hidden]);
})();
</script>
"""


@pytest.mark.commands
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_click_sorts_a_table_and_words_filter_it(storage: Storage, tmp_path: Path) -> None:
    """In the browser, with a script in the page that clicks, which the policy is taken out for."""
    for number in range(12):
        status, preset = ("failed" if number in (3, 5) else "completed"), ("best", "seed")[number % 2]
        accuracy = None if number == 7 else 0.9 + number / 1000
        write_run(storage, f"run-{number}", 1, 1, val_accuracy=accuracy, status=status, error=preset)
    tables.write_table(storage, "epochs", "run-7", [])  # from which its accuracy would be taken
    write_search(storage, 20)
    html = build.make_page(storage, reading.load_reports(storage), with_pngs=False).html
    html = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", html).replace("</body>", f"{DRIVER}</body>")
    (tmp_path / "page.html").write_text(html)
    dom = dump_dom(tmp_path / "page.html").stdout
    values = dict(re.findall(r'data-(found|counts)="(.*?)"', dom.partition(">")[0] + dom.partition("<head>")[0]))
    found = json.loads(unescape(values["found"]))
    ranked = ["asha-1-refit", *(f"run-{number}" for number in (11, 10, 9, 8, 6, 5, 4, 3, 2, 1, 0)), "run-7"]
    assert found["before"] == found["again"]
    assert found["descending"] == ["published", *ranked]
    assert found["sorted"] == "descending"
    assert found["ascending"] == ["published", *reversed(ranked[:-1]), "run-7"], "what is missing stays last"
    assert found["named"][1:6] == ["asha-1-refit", "run-0", "run-1", "run-2", "run-3"], "run-10 comes after run-9"
    assert found["filtered"] == ["run-3", "run-5"]
    assert found["note"] == "2 of 14 rows"
    assert json.loads(unescape(values["counts"])) == [15, False, 20, True]


# --- predictions on a user's images ---------------------------------------------------------------------------------


@pytest.fixture
def predicted(tmp_path: Path) -> tuple[Storage, list[np.ndarray]]:
    """Predictions on 30 image files, the first of which was removed since; another one could not be read."""
    photos, images = tmp_path / "my photos", list(np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8))
    photos.mkdir()
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(photos / f"{number:02}.png")
    (photos / "00.png").unlink()
    (photos / f"{NASTY.replace('/', '')}.png").write_bytes(b"")
    paths = [f"{photos}/{number:02}.png" for number in range(30)] + [f"{photos}/{NASTY.replace('/', '')}.png"]
    values = np.full((31, 10), 0.01, np.float32)
    values[:, 3] = 0.3 + 0.02 * np.arange(31)
    out = open_storage(str(tmp_path / "predictions"))
    manifest = image_predictions.Manifest(
        images=f"{photos}{NASTY}",
        num_images=31,
        listing_sha256="",
        model="mine",
        model_sha256="",
        photo=False,
        column="",
    )
    errors = [None] * 30 + ["it is empty"]
    labels = np.full(31, 3, np.uint8)
    table = image_predictions.make_part(pa.array(paths), pa.nulls(31, pa.int64()), labels, values, errors)
    image_predictions.write_manifest(out, manifest)
    image_predictions.write_part(out, 0, table)
    return out, images


def test_predictions_on_a_users_images_get_a_section(
    full: Storage, predicted: tuple[Storage, list[np.ndarray]]
) -> None:
    out, images = predicted
    page = build.make_page(full, reading.load_reports(full), out.uri, with_pngs=False)
    reader = Reader(page.html)
    assert "Predictions on your images" in reader.text
    assert "31 of 31 images of" in reader.text and "1 could not be read" in reader.text
    assert re.search(r"Dress\n+30\n+100.0%", reader.text)
    assert NASTY not in page.html and "onerror" not in str(reader.tags)
    section = page.html[page.html.index('id="your-images"') :].partition("</section>")[0]
    shown = [
        np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', section)
    ]
    assert len(shown) == predictions.MAX_LEAST_CERTAIN
    assert (shown[0] == 128).all(), "it is gone"
    assert all(np.array_equal(*pair) for pair in zip(shown[1:], images[1:], strict=False))
    assert re.findall(r"Dress (\d+\.\d)%<br>(\d+)\.png", section)[:2] == [("30.0", "00"), ("32.0", "01")]
    assert "not shown: it cannot be opened (No such file or directory)" in section
    assert list(build.png_files([predictions.image_predictions_section(out.uri)])) == ["least-certain"]


def test_rows_of_parquet_are_shown_too(full: Storage, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"pixels": pa.array([bytes(784), image.tobytes()], pa.binary(784))}), path)
    found = read_again(str(path), 1, images=str(path), column="pixels", photo=False)
    assert np.array_equal(found, image)
    assert read_again(str(path), 2, images=str(path), column="pixels", photo=False) == "its row is not there"
    path.write_bytes(b"")
    told = read_again(str(path), 1, images=str(path), column="pixels", photo=False)
    assert isinstance(told, str) and "rows.parquet cannot be read" in told


@pytest.mark.parametrize(("name", "told"), [("none", "holds no predictions"), ("file", "is a file; name")])
def test_a_folder_without_predictions_is_refused(full: Storage, tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        build.build_page(full, tmp_path / "page.html", predictions=str(tmp_path / name))
    assert "--predictions" in str(error.value) and told in str(error.value)
    assert not (tmp_path / "page.html").exists()
