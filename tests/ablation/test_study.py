"""A small study: every arm runs with the same seeds, finished runs are not repeated, and the rows match their runs."""

import json
import statistics
from dataclasses import fields

import pytest

from fashion.ablation.parts import PARTS, Part
from fashion.ablation.study import Row, Study, run_study
from fashion.config import FaultConfig, ScaleConfig, TrainConfig, UserError, check_run_id
from fashion.reports import tables
from fashion.reports.runs import find_run, load_run
from fashion.storage import Storage

pytestmark = pytest.mark.ray

CURE = Part(
    preset="smoke",
    settings={
        "plain": {"precision": "fp32"},
        "mirrored": {"precision": "fp32", "flip": "alternating", "dropout_fc": 0.1, "tta": "flip"},
    },
)


def run_few(storage: Storage, seeds: int) -> list[Row]:
    announced: list[str] = []
    [(name, rows)] = run_study(
        storage,
        Study(study_id="few", parts={"cure": CURE}, seeds=seeds, epochs=2, max_train_rows=128),
        ScaleConfig(num_workers="1"),
        faults=FaultConfig(),
        source="auto",
        announce=lambda run_id, plan: announced.append(run_id),
    )
    assert name == "cure"
    expected = [f"few-cure-{arm}-s{seed}" for seed in range(seeds - 1, seeds) for arm in CURE.settings]
    assert announced == expected, "only the new seed is trained"
    return rows


def test_a_study_goes_on_and_its_rows_are_those_of_its_runs(ray_cluster: None, tiny_storage: Storage) -> None:
    [alone, _] = run_few(tiny_storage, 1)
    assert (alone["seeds"], alone["val_accuracy_std"]) == (1, None)
    rows = run_few(tiny_storage, 2)
    assert [(row["arm"], row["baseline"]) for row in rows] == [("plain", None), ("mirrored", "plain")]
    stored = tables.read_table(tiny_storage, "study", "few-cure")
    assert [row["test_accuracy"] for row in stored] == [row["test_accuracy"] for row in rows]
    runs = {
        arm: [load_run(tiny_storage, f"few-cure-{arm}-s{seed}") for seed in (0, 1)] for arm in ("plain", "mirrored")
    }
    for row in stored:
        own = runs[row["arm"]]
        assert [(run["kind"], run["status"], run["epochs_done"]) for run in own] == [("study", "completed", 2)] * 2
        assert [json.loads(run["config_json"])["seed"] for run in own] == [0, 1]
        assert row["val_accuracy"] == statistics.fmean(run["val_accuracy"] for run in own)
        assert row["test_loss_std"] == statistics.stdev(run["test_loss"] for run in own)
        assert (row["seeds"], row["epochs"], row["train_rows"]) == (2, 2, 128)
        assert row["turning_epoch"] in (1.0, 1.5, 2.0)
    mirrored = stored[1]
    assert json.loads(mirrored["settings_json"]) == CURE.settings["mirrored"]
    differences = [runs["mirrored"][k]["val_accuracy"] - runs["plain"][k]["val_accuracy"] for k in (0, 1)]
    assert mirrored["val_effect"] == pytest.approx(statistics.fmean(differences))
    assert mirrored["val_effect_low"] <= mirrored["val_effect"] <= mirrored["val_effect_high"]
    # The difference in correct images is that between the images that only one of the two has right.
    right = [round(runs[arm][0]["test_accuracy"] * 200) for arm in ("mirrored", "plain")]
    assert mirrored["only_arm_right"] - mirrored["only_baseline_right"] == right[0] - right[1]


def test_every_arm_is_a_recipe_that_can_be_trained() -> None:
    known = {field.name for field in fields(TrainConfig)}
    study = Study(study_id="study", parts=PARTS, seeds=1)
    for name, part in PARTS.items():
        configs = {arm: study.config(name, arm, seed=3) for arm in part.settings}
        assert len(set(configs.values())) == len(configs), f"two arms of {name} are the same"
        for arm, settings in part.settings.items():
            assert set(settings) <= known
            assert configs[arm].seed == 3
            assert not part.epochs or configs[arm].epochs == part.epochs
            check_run_id(study.run_id(name, arm, 99))


def test_a_study_of_another_size_under_the_same_name_is_refused(tiny_storage: Storage) -> None:
    """Otherwise runs of unlike sizes would be compared. This test uses the study of the test above. The first part here
    is new, and is not begun either."""
    with pytest.raises(UserError, match=r"--study-id few has few-cure-plain-s0 .* --epochs 1 .was 2.*; .*another"):
        list(
            run_study(
                tiny_storage,
                Study(study_id="few", parts={"before": CURE, "cure": CURE}, seeds=1, epochs=1, max_train_rows=64),
                ScaleConfig(num_workers="1"),
                faults=FaultConfig(),
                source="auto",
                announce=lambda run_id, plan: None,
            )
        )
    assert find_run(tiny_storage, "few-before-plain-s0") is None
