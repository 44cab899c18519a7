"""Settings: every mistake is refused with a message that names the value, the limit and the way out."""

import math
from dataclasses import replace
from typing import Any

import pytest

from fashion import config
from fashion.config import ScaleConfig, TrainConfig, UserError


@pytest.mark.parametrize("name", config.PRESET_NAMES)
def test_presets_carry_their_name_and_survive_a_round_trip(name: str) -> None:
    preset = config.preset(name)
    assert preset.preset == name
    assert TrainConfig.from_dict(preset.to_dict()) == preset


def test_the_published_recipe_has_no_augmentation_and_some_dropout() -> None:
    seed = config.preset("seed")
    assert (seed.flip, seed.shift, seed.erase, seed.label_smoothing) == ("none", 0, 0, 0)
    assert (seed.padding, seed.ema_decay, seed.tta) == ("zeros", 0, "none")
    assert seed.dropout_conv > 0
    assert seed.dropout_fc > 0


def test_the_best_recipes_are_the_default_for_longer_with_every_cure() -> None:
    """Whoever changes the default preset has to decide about the other two as well."""
    best, deep, default = (config.preset(name) for name in ("best", "best-deep", "default"))
    assert (best.depth, best.padding, best.optimizer, best.init) == ("vgg", "zeros", "muon", "he")
    assert (best.epochs, best.flip, best.shift, best.label_smoothing) == (10, "random", 1, 0.05)
    assert 0.9 < best.ema_decay < 1
    assert best.tta == "flip"
    assert replace(best, preset="default", epochs=3, shift=0, ema_decay=0, tta="none") == default
    assert replace(best, preset="best-deep", epochs=12, depth="deep-bn") == deep


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("lr", -1.0, r"--lr -1.0 must be a finite number above 0"),
        ("lr", math.nan, r"--lr nan must be"),
        ("lr", math.inf, r"--lr inf must be"),
        ("dropout_conv", 1.0, r"--dropout-conv 1.0 must lie in \[0, 1\)"),
        ("dropout_fc", -0.1, r"--dropout-fc -0.1 must lie in \[0, 1\)"),
        ("dropout_fc", math.nan, r"--dropout-fc nan must lie in"),
        ("erase", 1.0, r"--erase 1.0 must lie in \[0, 1\)"),
        ("ema_decay", 1.0, r"--ema-decay 1.0 must lie in \[0, 1\)"),
        ("ema_decay", -0.1, r"--ema-decay -0.1 must lie in"),
        ("epochs", 0, r"--epochs 0 must be at least 1"),
        ("global_batch_size", 0, r"--global-batch-size 0"),
        ("weight_decay", math.nan, r"--weight-decay nan"),
        ("shift", 9, r"--shift 9 must lie between 0 and 8"),
        ("max_train_rows", -1, r"--max-train-rows -1"),
        ("seed", -1, r"--seed -1"),
        ("preset", "best-ever", r"--preset best-ever does not exist; known are default, best, best-deep, seed, smoke"),
    ],
)
def test_a_wrong_value_is_refused(field: str, value: object, told: str) -> None:
    with pytest.raises(UserError, match=told):
        TrainConfig(**{field: value})


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(UserError, match="unknown setting droput"):
        TrainConfig.from_dict({"droput": 0.1})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lr": "fast"}, "--lr 'fast' must be of type float"),
        ({"lr": 10**400}, "--lr 1000"),
        ({"epochs": True}, "--epochs True must be of type int"),
        ({"tta": "crop"}, r"--tta 'crop' must be of type Literal\['none', 'flip'\]"),
        ({"epochs": 2.0}, "--epochs 2.0 must be of type int"),
        ({"hold_out_val": None}, "--hold-out-val None must be of type bool"),
        ({"padding": ["zeros"]}, "--padding \\['zeros'\\] must be of type Literal"),
        ([], "settings \\[\\] must be a JSON object"),
    ],
)
def test_a_stored_value_of_another_type_is_refused(values: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        TrainConfig.from_dict(values)
    assert TrainConfig.from_dict({"lr": 1}).lr == 1, "JSON may write a float as a whole number"


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(UserError("a\nb \x1b[31m \ud800")) == "a\\nb \\x1b[31m \\ud800"
    assert len(str(UserError("x" * 10_000_000))) == 2005


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a":' * 100_000, b"\xff"])
def test_what_is_no_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        config.parse_object(text)


@pytest.mark.parametrize(("num_workers", "expected"), [("1", (1, 1)), ("7", (7, 7)), ("2:8", (2, 8))])
def test_number_of_workers(num_workers: str, expected: tuple[int, int]) -> None:
    assert ScaleConfig(num_workers=num_workers).worker_range == expected


@pytest.mark.parametrize("num_workers", ["0", "-1", "two", "8:2", "2:", ":2", "", "1.5"])
def test_a_wrong_number_of_workers_is_refused(num_workers: str) -> None:
    with pytest.raises(UserError, match="--num-workers"):
        ScaleConfig(num_workers=num_workers)


@pytest.mark.parametrize("cpus", [0.0, -1.0, math.nan, 1.5])
def test_a_wrong_number_of_cpus_is_refused(cpus: float) -> None:
    with pytest.raises(UserError, match="--cpus-per-worker"):
        ScaleConfig(cpus_per_worker=cpus)


def test_a_batch_must_divide_evenly_and_the_message_says_what_would() -> None:
    ScaleConfig(num_workers="7").check_batch(126)
    with pytest.raises(UserError, match=r"--global-batch-size 128 is not divisible by 7 workers; take 126 or 133"):
        ScaleConfig(num_workers="7").check_batch(128)
    with pytest.raises(UserError, match="not divisible by 3 workers"):
        ScaleConfig(num_workers="2:4").check_batch(128)
    with pytest.raises(UserError, match="take 4"):
        ScaleConfig(num_workers="4").check_batch(2)


def test_steps_are_whole_batches() -> None:
    assert TrainConfig(global_batch_size=128).steps_per_epoch(55_000) == 429
    with pytest.raises(UserError, match="more than the 100 training rows"):
        TrainConfig(global_batch_size=128).steps_per_epoch(100)


@pytest.mark.parametrize("run_id", ["a", "seed-2.1_x"])
def test_run_ids(run_id: str) -> None:
    config.check_run_id(run_id)


@pytest.mark.parametrize("run_id", ["", "001", "a/b", "../a", "A", "a b", "x" * 101, "a\n"])
def test_a_run_id_that_is_no_safe_folder_name_is_refused(run_id: str) -> None:
    with pytest.raises(UserError, match="--run-id"):
        config.check_run_id(run_id)
