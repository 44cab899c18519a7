"""The study: cures against overfitting, each beside the recipe without it, over the same seeds; a row for each arm.

A part holds arms that differ in one thing; the first is what the others are compared with. Each arm and seed is a run
like any other, so that a study goes on where it was cut off, and all that it measured lies in the reports.
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
class Size:
    """How much of a study is done: 0 epochs are those of the part's preset, 0 rows are all."""

    seeds: int
    epochs: int = 0
    max_train_rows: int = 0


def run_id_of(study_id: str, part: str, arm: str, seed: int) -> str:
    """Return the id of one run of a study."""
    return f"{study_id}-{part}-{arm}-s{seed}"


def config_of(part: Part, arm: str, size: Size, seed: int) -> TrainConfig:
    """Return the settings of one run."""
    config = replace(preset(part.preset), **part.arms[arm], seed=seed)
    epochs = size.epochs or part.epochs or config.epochs
    return replace(config, epochs=epochs, max_train_rows=size.max_train_rows or config.max_train_rows)


def carry_out(
    storage: Storage,
    study_id: str,
    parts: Mapping[str, Part],
    size: Size,
    scale: ScaleConfig,
    *,
    faults: FaultConfig,
    source: str,
    announce: Callable[[str, Plan], None],
) -> Iterator[tuple[str, list[Row]]]:
    """Train what is not yet trained, seed by seed; after each part, write its rows and yield them under its name.

    Raises `UserError`, before anything is trained, if a run of that name has other settings, and what `trainer.train`
    raises. A run that was cut off goes on from its latest checkpoint.
    """
    check_same_settings(storage, study_id, parts, size)
    for name, part in parts.items():
        # All arms of a seed before the next seed: a study that is cut off leaves pairs.
        for seed in range(size.seeds):
            for arm in part.arms:
                run_id = run_id_of(study_id, name, arm, seed)
                trainer.train(
                    storage,
                    run_id,
                    config_of(part, arm, size, seed),
                    scale,
                    faults=faults,
                    source=source,
                    resume=find_run(storage, run_id) is not None,
                    kind="study",
                    announce=functools.partial(announce, run_id),
                )
            rows = part_rows(storage, study_id, name, part, seed + 1)
            tables.write_table(storage, "study", f"{study_id}-{name}", rows)
        yield name, rows


def check_same_settings(storage: Storage, study_id: str, parts: Mapping[str, Part], size: Size) -> None:
    """Raise `UserError` if the study has runs that were begun with other settings: it would compare unlike ones."""
    for name, part in parts.items():
        for arm, seed in itertools.product(part.arms, range(size.seeds)):
            run_id = run_id_of(study_id, name, arm, seed)
            if find_run(storage, run_id) is not None:
                differing = differing_settings(storage, run_id, config_of(part, arm, size, seed))
                require(
                    not differing,
                    f"--study-id {study_id} has {run_id} with other settings: {', '.join(differing)}; "
                    "repeat those of its first command, or name another study",
                )


def part_rows(storage: Storage, study_id: str, name: str, part: Part, seeds: int) -> list[Row]:
    """Return the rows of a part whose runs of the first `seeds` seeds are complete."""
    runs = {
        arm: [load_run(storage, run_id_of(study_id, name, arm, seed)) for seed in range(seeds)] for arm in part.arms
    }
    first = next(iter(part.arms))
    rights = {arm: rights_of(storage, run_id_of(study_id, name, arm, 0)) for arm in part.arms}
    rows = []
    for arm, own in runs.items():
        row: Row = dict.fromkeys(schemas.SCHEMAS["study"].names)
        row |= {"study_id": study_id, "part": name, "arm": arm, "settings_json": json.dumps(part.arms[arm])}
        row |= figures(own) | course(storage, [run_id_of(study_id, name, arm, seed) for seed in range(seeds)])
        if arm != first:
            row |= {"baseline": first} | comparison(own, runs[first])
            found = mcnemar(rights[arm], rights[first])
            row |= {"only_arm_right": found.only_ours, "only_baseline_right": found.only_baseline, "mcnemar_p": found.p}
        rows.append(row)
    return rows


def figures(runs: Sequence[Row]) -> Row:
    """Return the columns that an arm has by itself."""
    row: Row = {"seeds": len(runs), "wall_s": sum(run["wall_s"] for run in runs)}
    for name in ("val_accuracy", "val_loss", "test_accuracy", "test_loss"):
        values = [run[name] for run in runs]
        row |= {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else None}
    # Of a study that was continued elsewhere, or with other code, all are named.
    shared = ("preset", "precision", "hardware", "dataset_sha256", *provenance.versions(), "source_hash")
    row |= {name: ", ".join(sorted({str(run[name]) for run in runs})) for name in shared}
    return row | {"num_parameters": runs[0]["num_parameters"]}


def comparison(own: Sequence[Row], baseline: Sequence[Row]) -> Row:
    """Return the columns of the paired differences to the baseline; `val` is what choices are made by."""
    row: Row = {}
    for split in ("val", "test"):
        effect = paired_effect(*([run[f"{split}_accuracy"] for run in runs] for runs in (own, baseline)))
        row |= {f"{split}_effect": effect.mean, f"{split}_effect_low": effect.low, f"{split}_effect_high": effect.high}
    return row


def course(storage: Storage, run_ids: Sequence[str]) -> Row:
    """Return the columns that come of the epochs: how many, of how many rows, and the one from which val loss rises.

    That turning point is the epoch of the lowest val loss, the median over the runs.
    """
    epochs = [tables.read_table(storage, "epochs", run_id) for run_id in run_ids]
    turns = [min((row["loss"], row["epoch"]) for row in rows if row["split"] == "val")[1] for rows in epochs]
    trained = [row for row in epochs[0] if row["split"] == "train"]
    return {"epochs": len(trained), "train_rows": trained[0]["rows"], "turning_epoch": float(statistics.median(turns))}


def rights_of(storage: Storage, run_id: str) -> NDArray[np.bool_]:
    """Return which test images (n,) a run has right, in the order of their index."""
    rows = [row for row in tables.read_table(storage, "predictions", run_id) if row["split"] == "test"]
    rows.sort(key=lambda row: row["index"])
    return np.array([row["label"] == row["predicted"] for row in rows])
