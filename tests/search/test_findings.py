"""What a search found, over trials with planted effects: importance, effects, the winner's neighbourhood. No Ray."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fashion.reports import console, schemas, tables
from fashion.search.findings.importance import num_best
from fashion.search.findings.main_effects import main_effects
from fashion.search.findings.neighbourhood import TOLERANCE, neighbourhood
from fashion.search.findings.settings import Setting, settings_of
from fashion.search.findings.table import finding_rows, write_findings
from fashion.search.space import SearchConfig
from fashion.search.trial_store import Trial
from fashion.storage import Storage

Planted = Callable[[dict[str, Any]], float]


def history(accuracies: list[float], losses: list[float] | None = None) -> list[dict[str, Any]]:
    losses = losses or [1 - accuracy for accuracy in accuracies]
    pairs = enumerate(zip(accuracies, losses, strict=True), start=1)
    return [{"epoch": n, "val_accuracy": accuracy, "val_loss": loss} for n, (accuracy, loss) in pairs]


def ranked(trials: list[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: (-trial.score, trial.trial_id))


def search_of(config: SearchConfig, planted: Planted, noise: float = 0.002) -> list[Trial]:
    """Trials as the search draws them, that reach what `planted` says of their settings; two epochs each."""
    generator = random.Random(0)
    trials = []
    for number in range(config.num_samples):
        settings = config.draw(number)
        accuracy = planted(settings) + generator.gauss(0, noise)
        trials.append(Trial(f"t{number:04d}", settings, "completed", history=history([accuracy - 0.1, accuracy])))
    return ranked(trials)


def by_setting(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["setting"]: dict.fromkeys(schemas.SCHEMAS["importance"].names) | row for row in rows}


def lr_alone(settings: dict[str, Any]) -> float:
    return 0.9 - 0.05 * abs(math.log10(settings["lr"] / 3e-3))


# --- importance -------------------------------------------------------------------------------------------------------


def test_the_planted_setting_is_first_and_one_without_influence_near_0() -> None:
    config = SearchConfig(num_samples=80, max_epochs=2)
    rows = finding_rows("s", config, search_of(config, lr_alone))
    assert rows[0]["setting"] == "lr"
    found = by_setting(rows)
    assert sum(row["importance"] for row in rows) == pytest.approx(1)
    assert found["lr"]["importance"] > 0.8 and found["lr"]["p"] < 1e-6
    for name in ("dropout_conv", "dropout_fc"):
        assert found[name]["importance"] < 0.1
        assert found[name]["p"] > 0.05
        assert found[name]["effect_low"] < 0 < found[name]["effect_high"]
    assert (found["lr"]["trials"], found["lr"]["best_trials"], found["lr"]["method"]) == (80, 20, "ped-anova")
    assert 1e-3 < found["lr"]["best_low"] < 3e-3 < found["lr"]["best_high"] < 1e-2


def test_a_choice_can_matter_most() -> None:
    config = SearchConfig(num_samples=60, max_epochs=2, padding=("zeros", "partial"), depth=("vgg", "deep", "deep-bn"))
    rows = finding_rows("s", config, search_of(config, lambda s: 0.9 - 0.03 * (s["padding"] == "partial")))
    found = by_setting(rows)
    assert rows[0]["setting"] == "padding" and found["padding"]["importance"] > 0.5
    assert (found["padding"]["effect_from"], found["padding"]["effect_to"]) == ("partial", "zeros")
    assert found["padding"]["effect"] == pytest.approx(0.03, abs=0.003)
    assert found["padding"]["winner_choice"] == "zeros"
    assert found["depth"]["importance"] < 0.2 and found["depth"]["effect_to"] in config.depth
    unknown = ("winner", "first_third", "low_accuracy", "fall_per_tenth", "flat_low", "best_low")
    assert [found["padding"][name] for name in unknown] == [None] * len(unknown)


def test_how_long_poor_trials_were_trained_does_not_matter_to_importance() -> None:
    """The same trials, the poorer half of them stopped after the first epoch: the same trials are the best."""
    config = SearchConfig(num_samples=40, max_epochs=2)
    full = search_of(config, lr_alone)
    stopped = [
        trial if rank < 20 else Trial(trial.trial_id, trial.settings, "stopped", history=trial.history[:1])
        for rank, trial in enumerate(full)
    ]
    whole, cut = by_setting(finding_rows("s", config, full)), by_setting(finding_rows("s", config, ranked(stopped)))
    for name in whole:
        assert whole[name]["importance"] == cut[name]["importance"]
    assert (whole["lr"]["stopped_trials"], cut["lr"]["stopped_trials"]) == (0, 20)
    assert (whole["lr"]["epoch"], cut["lr"]["epoch"]) == (2, 1), "effects compare after equal training"
    # An epoch earlier every trial has 0.1 less, so the differences are the same.
    assert cut["lr"]["effect"] == pytest.approx(whole["lr"]["effect"])
    assert cut["lr"]["low_accuracy"] == pytest.approx(whole["lr"]["low_accuracy"] - 0.1)
    assert cut["lr"]["near_drop"] == pytest.approx(whole["lr"]["near_drop"])


# --- effects ----------------------------------------------------------------------------------------------------------


def test_main_effects_are_those_of_a_balanced_design_by_hand() -> None:
    """Three levels of one setting and two of another, each pair twice: means of levels and their differences."""
    first = Setting("dropout_fc", [level / 2 for level in range(3) for _ in range(4)], 0.0, 1.0)
    second = Setting("padding", ["zeros", "zeros", "partial", "partial"] * 3)
    noise = np.array([1, -1, -1, 1] * 3) * 0.01
    figure = np.repeat([0.5, 0.7, 0.6], 4) + np.array([0.0, 0.0, 0.2, 0.2] * 3) + noise
    found = main_effects([first, second], figure)
    assert found["dropout_fc"].means == pytest.approx([0.6, 0.8, 0.7])
    assert found["dropout_fc"].mean == pytest.approx(0.1)
    assert (found["dropout_fc"].start, found["dropout_fc"].end) == ("lowest third", "highest third")
    assert (found["padding"].start, found["padding"].end) == ("zeros", "partial")
    assert found["padding"].mean == pytest.approx(0.2)
    # 12 trials, 4 parameters; the residuals are the noise. Student's t of 8 degrees of freedom reaches 2.306.
    error = math.sqrt(12 * 0.01**2 / 8)
    assert found["dropout_fc"].high - 0.1 == pytest.approx(2.306 * error * math.sqrt(1 / 4 + 1 / 4), rel=1e-3)
    assert found["padding"].high - 0.2 == pytest.approx(2.306 * error * math.sqrt(1 / 6 + 1 / 6), rel=1e-3)


def test_an_effect_is_told_apart_from_a_setting_that_happens_to_go_with_it() -> None:
    """Low learning rates come with much dropout here: of the two only dropout has an effect."""
    generator = np.random.default_rng(0)
    fc = generator.uniform(0, 0.7, 60)
    lr = np.exp(np.interp(0.7 * fc / 0.7 + 0.3 * generator.uniform(0, 1, 60), [0, 1], np.log([3e-2, 3e-4])))
    settings = [Setting("lr", lr.tolist(), 3e-4, 3e-2), Setting("dropout_fc", fc.tolist(), 0.0, 0.7)]
    level = np.searchsorted(np.quantile(fc, [1 / 3, 2 / 3]), fc)
    found = main_effects(settings, 0.9 - 0.02 * level + generator.normal(0, 0.002, 60))
    assert found["dropout_fc"].mean == pytest.approx(-0.04, abs=0.004)
    assert abs(found["lr"].mean) < 0.004


def test_settings_that_always_go_together_have_no_effects_of_their_own() -> None:
    fc = [number / 20 for number in range(12)]
    settings = [Setting("dropout_fc", fc, 0.0, 0.7), Setting("dropout_conv", fc, 0.0, 0.7)]
    assert main_effects(settings, np.linspace(0.5, 0.9, 12)) == {}


def test_dropout_that_keeps_val_loss_from_rising_is_seen() -> None:
    """Every trial runs all four epochs; the loss turns after the second, the more the less dropout there is."""
    config = SearchConfig(num_samples=30, max_epochs=4)
    trials = []
    for number in range(30):
        settings = config.draw(number)
        rise = 0.2 * (0.7 - settings["dropout_fc"])
        losses = [0.5, 0.3, 0.3 + rise / 2, 0.3 + rise]
        accuracies = [0.8, 0.85, 0.86, 0.87 + number / 1e4]
        trials.append(Trial(f"t{number:04d}", settings, "completed", history=history(accuracies, losses)))
    found = by_setting(finding_rows("s", config, ranked(trials)))
    row = found["dropout_fc"]
    values = sorted(trial.settings["dropout_fc"] for trial in trials)
    assert row["overfit_trials"] == 30
    assert row["overfit_effect"] == pytest.approx(-0.2 * (np.mean(values[20:]) - np.mean(values[:10])), abs=0.005)
    assert row["overfit_effect_low"] < row["overfit_effect_high"] < 0
    assert found["lr"]["overfit_effect_low"] < 0 < found["lr"]["overfit_effect_high"]
    assert row["first_third"] == pytest.approx(np.quantile(values, 1 / 3))
    stopped = [Trial(t.trial_id, t.settings, "stopped", history=t.history[:3]) for t in trials]
    assert by_setting(finding_rows("s", config, ranked(stopped)))["dropout_fc"]["overfit_effect"] is None


# --- the winner's neighbourhood ---------------------------------------------------------------------------------------


def test_a_slope_is_found_where_it_was_planted() -> None:
    """Along dropout_fc the accuracy falls by 0.2 over the range, so by 0.02 a tenth; along the other it is flat."""
    generator = np.random.default_rng(1)
    fc, conv = generator.uniform(0, 0.7, 40), generator.uniform(0, 0.5, 40)
    fc[0], conv[0] = 0.35, 0.25
    settings = [Setting("dropout_fc", fc.tolist(), 0.0, 0.7), Setting("dropout_conv", conv.tolist(), 0.0, 0.5)]
    found = neighbourhood(settings, 0.2 * np.abs(fc - 0.35) / 0.7)
    assert found.num_trials == 10
    steep, flat = found.slopes["dropout_fc"], found.slopes["dropout_conv"]
    assert steep.fall_per_tenth == pytest.approx(0.02)
    assert steep.high - 0.35 == pytest.approx(TOLERANCE / 0.2 * 0.7)
    assert 0.35 - steep.low == pytest.approx(TOLERANCE / 0.2 * 0.7)
    assert flat.fall_per_tenth == pytest.approx(0, abs=1e-9)
    near = np.argsort(np.hypot((fc - 0.35) / 0.7, (conv - 0.25) / 0.5))[1:11]
    assert flat.high == pytest.approx(conv[near].max()), "no farther than the neighbours reach"
    assert flat.low == pytest.approx(conv[near].min())


def test_a_range_does_not_leave_what_was_searched() -> None:
    lr = [3e-4, *np.geomspace(3.5e-4, 3e-2, 15).tolist()]
    found = neighbourhood([Setting("lr", lr, 3e-4, 3e-2)], np.zeros(16))
    assert found.slopes["lr"].low == 3e-4
    assert 3e-4 < found.slopes["lr"].high < 3e-2
    assert found.drop == 0


def test_nothing_is_said_of_a_side_where_nothing_was_tried() -> None:
    lr = [1e-2, *np.geomspace(3e-4, 3e-3, 15).tolist()]
    found = neighbourhood([Setting("lr", lr, 3e-4, 3e-2)], np.zeros(16))
    assert found.slopes["lr"].high == pytest.approx(1e-2)
    assert found.slopes["lr"].low < 1e-2


def test_another_choice_may_cost_but_has_no_slope() -> None:
    settings = [
        Setting("padding", ["zeros"] + ["zeros", "partial"] * 10),
        Setting("dropout_fc", [0.3] + [0.3 + number / 100 for number in range(20)], 0.0, 0.7),
    ]
    found = neighbourhood(settings, np.array([0.0] + [0.0, 0.05] * 10))
    assert list(found.slopes) == ["dropout_fc"]
    assert found.slopes["dropout_fc"].fall_per_tenth == pytest.approx(0, abs=1e-3)


def test_neighbours_are_compared_at_equal_epochs() -> None:
    """The others were stopped after the first epoch, in which they were as good as the winner was then."""
    config = SearchConfig(num_samples=12, max_epochs=3)
    trials = [Trial("t0000", config.draw(0), "completed", history=history([0.6, 0.8, 0.9]))]
    trials += [Trial(f"t{k:04d}", config.draw(k), "stopped", history=history([0.59])) for k in range(1, 12)]
    found = by_setting(finding_rows("s", config, ranked(trials)))
    assert found["lr"]["near_drop"] == pytest.approx(0.01)
    assert found["lr"]["winner"] == config.draw(0)["lr"]


# --- what cannot be told ----------------------------------------------------------------------------------------------


def told(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines on the console, after writing the rows as a table, which must take all of them."""
    tables.encode("importance", rows)
    capsys.readouterr()
    console.print_findings([dict.fromkeys(schemas.SCHEMAS["importance"].names) | row for row in rows])
    return capsys.readouterr().out.splitlines()


def test_three_lines_say_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    config = SearchConfig(num_samples=80, max_epochs=2, padding=("zeros", "partial"))
    trials = search_of(config, lr_alone)
    trials[70:] = [Trial(t.trial_id, t.settings, "stopped", history=t.history[:1]) for t in trials[70:]]
    importance, effect, winner = told(finding_rows("s", config, ranked(trials)), capsys)
    assert importance.startswith("importance lr 0.") and "no more than chance dropout" in importance
    assert importance.endswith("share of what sets the best 20 of 80 trials apart; 10 were stopped early")
    assert effect.startswith("effect     lr ") and "epoch 1, which all 80 trials reached" in effect
    assert winner.startswith("winner     lr 0.00") and "cost less than a point" in winner and "nearest trials" in winner


def test_few_trials_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    config = SearchConfig(num_samples=7, max_epochs=2)
    trials = search_of(config, lr_alone)
    trials.append(Trial("t0007", config.draw(7), "error", "boom"))
    rows = finding_rows("s", config, trials)
    assert [row["setting"] for row in rows] == ["lr", "dropout_conv", "dropout_fc"]
    assert {row["note"] for row in rows} == {"7 of 8 trials have a result; 8 are needed"}
    assert all(row.get("importance") is None for row in rows)
    assert [line.split(":")[0].split()[0] for line in told(rows, capsys)] == ["importance", "effect", "winner"]


def test_eight_trials_are_enough_for_importance_alone(capsys: pytest.CaptureFixture[str]) -> None:
    config = SearchConfig(num_samples=8, max_epochs=2, padding=("zeros", "partial"))
    rows = finding_rows("s", config, search_of(config, lr_alone))
    assert all(row["importance"] is not None for row in rows)
    assert {row["note"] for row in rows} == {"too few trials to tell the settings' effects apart"}
    assert told(rows, capsys)[1] == "effect     not estimated: too few trials to tell the settings' effects apart"


@pytest.mark.parametrize("status", ["error", "diverged"])
def test_a_search_in_which_all_failed_says_so(status: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = SearchConfig(num_samples=9, max_epochs=2, padding=("zeros", "partial"))
    trials = [Trial(f"t{number:04d}", config.draw(number), status, "boom") for number in range(9)]
    rows = finding_rows("s", config, ranked(trials))
    assert {row["note"] for row in rows} == {"0 of 9 trials have a result; 8 are needed"}
    assert len(told(rows, capsys)) == 3
    assert finding_rows("s", config, []) != []


def test_strange_settings_of_trials_that_crashed_are_left_alone() -> None:
    config = SearchConfig(num_samples=20, max_epochs=2, padding=("zeros", "partial"))
    trials = search_of(config, lr_alone)
    trials.append(Trial("t0020", {"lr": math.nan, "dropout_fc": "much", "padding": 7}, "error", "refused"))
    trials.append(Trial("t0021", config.draw(21), "stopped", "the time budget of 1 s was spent"))
    assert by_setting(finding_rows("s", config, ranked(trials)))["lr"]["trials"] == 20


def test_a_trial_that_the_time_budget_cut_does_not_set_the_epoch_of_the_effects() -> None:
    config = SearchConfig(num_samples=20, max_epochs=2)
    trials = search_of(config, lr_alone)
    whole = by_setting(finding_rows("s", config, trials))
    last = trials[-1]
    trials[-1] = Trial(last.trial_id, last.settings, "stopped", "the time budget was spent", history=last.history[:1])
    found = by_setting(finding_rows("s", config, ranked(trials)))
    assert (found["lr"]["trials"], found["lr"]["effect_trials"], found["lr"]["epoch"]) == (20, 19, 2)
    assert found["lr"]["importance"] == whole["lr"]["importance"]
    for trial in trials:
        trial.status, trial.error = "stopped", "the time budget was spent"
    rows = finding_rows("s", config, trials)
    assert {row["note"] for row in rows} == {"too few trials to tell the settings' effects apart"}


def test_trials_that_diverged_are_the_poorest() -> None:
    """High learning rates diverge, with some epochs of good figures before; all that trained are alike."""
    config = SearchConfig(num_samples=40, max_epochs=2)
    trials = search_of(config, lambda settings: 0.9, noise=0.0005)
    failed = [trial for trial in trials if trial.settings["lr"] > 3e-3]
    for trial in failed:
        trial.status, trial.history = "diverged", history([0.95, math.nan])
    found = by_setting(finding_rows("s", config, ranked(trials)))
    assert found["lr"]["diverged_trials"] == len(failed) > 10
    assert found["lr"]["effect_trials"] == 40 - len(failed)
    assert found["lr"]["best_high"] < 3e-3 and found["lr"]["importance"] > 0.5
    assert abs(found["lr"]["effect"]) < 0.001


@pytest.mark.parametrize("only", ["lr", "all"])
def test_settings_that_do_not_vary(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    fixed: dict[str, Any] = {"dropout_conv": (0.1, 0.1), "dropout_fc": (0.5, 0.5), "padding": ("zeros",)}
    fixed |= {"lr": (1e-3, 1e-3)} if only == "all" else {}
    config = SearchConfig(num_samples=20, max_epochs=2, **fixed)
    found = by_setting(finding_rows("s", config, search_of(config, lr_alone)))
    assert {found[name]["note"] for name in ("dropout_conv", "padding")} == {"every trial has the same value"}
    assert (found["lr"]["importance"], found["lr"]["note"]) == (
        (1.0, "no other setting varies") if only == "lr" else (None, "every trial has the same value")
    )
    lines = told(list(found.values()), capsys)
    assert len(lines) == 3 and ("not estimated: every trial" in lines[0]) is (only == "all")


def test_trials_that_all_tie_have_no_best_quarter() -> None:
    config = SearchConfig(num_samples=16, max_epochs=2)
    found = by_setting(finding_rows("s", config, search_of(config, lambda settings: 0.1, noise=0.0)))
    assert {row["note"] for row in found.values()} == {"no quarter of the trials is better than the rest"}
    assert found["lr"]["effect"] == pytest.approx(0, abs=1e-12)
    assert found["lr"]["fall_per_tenth"] == pytest.approx(0, abs=1e-12)


def test_a_first_trial_may_lie_outside_of_the_range() -> None:
    config = SearchConfig(num_samples=20, max_epochs=2, weight_decay=(1e-4, 1e-1), first=('{"weight_decay": 0}',))
    trials = search_of(config, lr_alone)
    [decay] = [
        each for each in settings_of(config, [trial.settings for trial in trials]) if each.name == "weight_decay"
    ]
    assert (decay.low, decay.high) == (0.0, 0.1)
    assert 0 <= decay.places().min() <= decay.places().max() <= 1
    assert by_setting(finding_rows("s", config, trials))["weight_decay"]["importance"] < 0.5


def test_places_and_values_are_inverse() -> None:
    lr = Setting("lr", [1e-4, 1e-3, 1e-2], 1e-4, 1e-2)
    assert lr.places() == pytest.approx([0, 0.5, 1])
    assert [lr.value_at(float(place)) for place in lr.places()] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert lr.value_at(-1) == 1e-4 and lr.value_at(2) == 1e-2


def test_values_that_repeat_make_fewer_thirds() -> None:
    levels, names = Setting("dropout_fc", [0.0] * 8 + [0.3, 0.6], 0.0, 0.7).levels()
    assert levels.tolist() == [0] * 8 + [1, 1]
    assert names == ["lowest third", "highest third"]
    assert Setting("dropout_fc", [0.0, 0.5, 0.5], 0.0, 0.7).levels()[1] == ["0", "0.5"]


def test_a_setting_that_hardly_varies_has_no_effect_that_looks_exact() -> None:
    settings = [
        Setting("dropout_fc", [0.1, 0.2] + [0.5] * 10, 0.0, 0.7),
        Setting("lr", np.geomspace(1e-3, 1e-2, 12).tolist(), 1e-3, 1e-2),
    ]
    assert len(settings[0].levels()[1]) == 1
    assert list(main_effects(settings, np.linspace(0.5, 0.9, 12))) == ["lr"]


@pytest.mark.parametrize(("trials", "best"), [(8, 4), (16, 4), (40, 10), (1000, 250)])
def test_the_best_are_a_quarter_and_no_fewer_than_four(trials: int, best: int) -> None:
    assert num_best(trials) == best


def test_rows_are_written_once_per_search(storage: Storage) -> None:
    config = SearchConfig(num_samples=20, max_epochs=2)
    trials = search_of(config, lr_alone)
    for _ in range(2):  # as when a finished search is resumed
        rows = write_findings(storage, "s", config, trials)
    read = tables.read_table(storage, "importance", "s")
    assert [row["setting"] for row in read] == [row["setting"] for row in rows]
    assert read[0]["importance"] == rows[0]["importance"] and read[0]["search_id"] == "s"
