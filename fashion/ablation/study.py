"""Runs the ablation study: trains each arm of each part with the same seeds, and writes one row per arm.

A part is a set of arms that differ in one thing; its first arm is the baseline of the others. Each arm and seed is a
run like any other, so an interrupted study continues with what is missing, and the reports hold everything measured.
"""

import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fashion.ablation.parts import Part
from fashion.ablation.statistics import mcnemar, paired_effect
from fashion.cluster.plan import Plan
from fashion.config import FaultConfig, ScaleConfig, TrainConfig, preset, require
from fashion.distributed import trainer
from fashion.reports import provenance, schemas, tables
from fashion.reports.runs import differing_settings, find_run, load_run
from fashion.storage import Storage

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to train: parts by name, the number of seeds, and overrides that shorten every run."""

    study_id: str
    parts: Mapping[str, Part]
    seeds: int
    """Runs per arm, with seeds 0, 1, ..."""
    epochs: int = 0
    """Epochs of every run; 0 takes those of the part."""
    max_train_rows: int = 0
    """Training rows of every run; 0 takes those of the preset."""

    def run_id(self, part: str, arm: str, seed: int) -> str:
        """Return the id of one run."""
        return f"{self.study_id}-{part}-{arm}-s{seed}"

    def config(self, part: str, arm: str, seed: int) -> TrainConfig:
        """Return the settings of one run."""
        recipe = self.parts[part]
        config = replace(preset(recipe.preset), **recipe.settings[arm], seed=seed)
        epochs = self.epochs or recipe.epochs or config.epochs
        return replace(config, epochs=epochs, max_train_rows=self.max_train_rows or config.max_train_rows)


def run_study(
    storage: Storage,
    study: Study,
    scale: ScaleConfig,
    *,
    faults: FaultConfig,
    source: str,
    announce: Callable[[str, Plan], None],
) -> Iterator[tuple[str, list[Row]]]:
    """Train the runs that are missing, part by part; yield the name and the rows of each part once it is complete.

    The rows are also written after each seed. A run that was interrupted resumes from its latest checkpoint.
    `announce(run_id, plan)` is called before each run.

    Raises `UserError`, before anything is trained, if a run of this study has other settings, and what `trainer.train`
    raises.
    """
    check_same_settings(storage, study)
    for name, part in study.parts.items():
        # All arms of a seed before the next seed, so that an interrupted study has pairs to compare.
        for seed in range(study.seeds):
            for arm in part.settings:
                run_id = study.run_id(name, arm, seed)
                spec = trainer.RunSpec(
                    run_id,
                    study.config(name, arm, seed),
                    scale,
                    faults=faults,
                    source=source,
                    resume=find_run(storage, run_id) is not None,
                    kind="study",
                )
                trainer.train(storage, spec, announce=functools.partial(announce, run_id))
            rows = part_rows(storage, study, name, seed + 1)
            tables.write_table(storage, "study", f"{study.study_id}-{name}", rows)
        yield name, rows


def check_same_settings(storage: Storage, study: Study) -> None:
    """Raise `UserError` if a run of this study exists with other settings: the study would compare unlike runs."""
    for name, part in study.parts.items():
        for arm, seed in itertools.product(part.settings, range(study.seeds)):
            run_id = study.run_id(name, arm, seed)
            if find_run(storage, run_id) is not None:
                differing = differing_settings(storage, run_id, study.config(name, arm, seed))
                require(
                    not differing,
                    f"--study-id {study.study_id} has {run_id} with other settings: {', '.join(differing)}; "
                    "repeat those of its first command, or name another study",
                )


def part_rows(storage: Storage, study: Study, name: str, seeds: int) -> list[Row]:
    """Return the `study` rows of the part `name`, over its runs of the first `seeds` seeds, which must be complete."""
    part = study.parts[name]
    run_ids = {arm: [study.run_id(name, arm, seed) for seed in range(seeds)] for arm in part.settings}
    runs = {arm: [load_run(storage, run_id) for run_id in ids] for arm, ids in run_ids.items()}
    correct = {arm: correct_predictions(storage, ids[0]) for arm, ids in run_ids.items()}
    baseline = next(iter(part.settings))
    rows = []
    for arm, settings in part.settings.items():
        row: Row = dict.fromkeys(schemas.SCHEMAS["study"].names)
        row |= {"study_id": study.study_id, "part": name, "arm": arm, "settings_json": json.dumps(settings)}
        row |= run_columns(runs[arm]) | epoch_columns(storage, run_ids[arm])
        if arm != baseline:
            row |= {"baseline": baseline} | effect_columns(runs[arm], runs[baseline])
            test = mcnemar(correct[arm], correct[baseline])
            row |= {"only_arm_right": test.only_ours, "only_baseline_right": test.only_baseline, "mcnemar_p": test.p}
        rows.append(row)
    return rows


def run_columns(runs: Sequence[Row]) -> Row:
    """Return the columns that summarise an arm's `runs` rows: means, standard deviations, provenance."""
    row: Row = {"seeds": len(runs), "wall_s": sum(run["wall_s"] for run in runs)}
    for name in ("val_accuracy", "val_loss", "test_accuracy", "test_loss"):
        values = [run[name] for run in runs]
        row |= {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else None}
    # A study may be continued on another machine or with other code: all distinct values are listed.
    shared = ("preset", "precision", "hardware", "dataset_sha256", *provenance.versions(), "source_hash")
    row |= {name: ", ".join(sorted({str(run[name]) for run in runs})) for name in shared}
    return row | {"num_parameters": runs[0]["num_parameters"]}


def effect_columns(runs: Sequence[Row], baseline: Sequence[Row]) -> Row:
    """Return the columns of the differences in accuracy to the baseline, paired by seed, on val and on test."""
    row: Row = {}
    for split in ("val", "test"):
        ours, theirs = ([run[f"{split}_accuracy"] for run in each] for each in (runs, baseline))
        effect = paired_effect(ours, theirs)
        row |= {f"{split}_effect": effect.mean, f"{split}_effect_low": effect.low, f"{split}_effect_high": effect.high}
    return row


def epoch_columns(storage: Storage, run_ids: Sequence[str]) -> Row:
    """Return the columns that come from the `epochs` rows: epochs, rows per epoch, and the turning epoch.

    From the turning epoch on, val loss rises: it is the epoch of the lowest val loss, the median over the runs.
    """
    epochs = [tables.read_table(storage, "epochs", run_id) for run_id in run_ids]
    turns = [min((row["loss"], row["epoch"]) for row in rows if row["split"] == "val")[1] for rows in epochs]
    trained = [row for row in epochs[0] if row["split"] == "train"]
    return {"epochs": len(trained), "train_rows": trained[0]["rows"], "turning_epoch": float(statistics.median(turns))}


def correct_predictions(storage: Storage, run_id: str) -> NDArray[np.bool_]:
    """Return whether a run classifies each test image (n,) correctly, in the order of the images' index."""
    rows = [row for row in tables.read_table(storage, "predictions", run_id) if row["split"] == "test"]
    rows.sort(key=lambda row: row["index"])
    return np.array([row["label"] == row["predicted"] for row in rows])
