"""What a search draws and when it judges, and its trial store: no Ray needed."""

import json
import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from fashion.config import TrainConfig, UserError
from fashion.reports import runs, tables
from fashion.search.space import SearchConfig, SearchScale
from fashion.search.stored_settings import (
    STATE_VERSION,
    check_new_search,
    check_same_search,
    settings_place,
    stored_settings,
    write_settings,
)
from fashion.search.trial_store import TrialStore
from fashion.storage import Storage
from fashion.training import metrics as metric


def test_draws_lie_in_their_ranges_and_spread_over_orders_of_magnitude() -> None:
    config = SearchConfig(lr=(1e-4, 1e-1), dropout_fc=(0.2, 0.6), padding=("zeros", "partial"))
    draws = [config.draw(number) for number in range(600)]
    assert set(draws[0]) == {"lr", "dropout_conv", "dropout_fc", "padding"}
    assert all(1e-4 <= draw["lr"] <= 1e-1 and 0.2 <= draw["dropout_fc"] <= 0.6 for draw in draws)
    decades = Counter(math.floor(math.log10(draw["lr"])) for draw in draws)
    assert all(150 < decades[decade] < 250 for decade in (-4, -3, -2)), decades
    assert 240 < sum(draw["padding"] == "partial" for draw in draws) < 360


def test_a_draw_depends_on_seed_trial_and_name_alone() -> None:
    config = SearchConfig()
    assert config.draw(7) == SearchConfig(num_samples=1000).draw(7)
    more = SearchConfig(weight_decay=(1e-4, 1e-1)).draw(7)
    assert {name: more[name] for name in config.draw(7)} == config.draw(7), "another setting does not move the others"
    assert config.draw(7) != config.draw(8)
    assert config.draw(7) != SearchConfig(seed=1).draw(7)


def test_first_settings_come_first() -> None:
    config = SearchConfig(first=('{"lr": 0.5}', '{"dropout_fc": 0.0, "lr": NaN}'))
    assert config.draw(0)["lr"] == 0.5
    assert config.draw(0)["dropout_fc"] == SearchConfig().draw(0)["dropout_fc"]
    assert math.isnan(config.draw(1)["lr"])
    assert config.draw(2) == SearchConfig().draw(2)


MISTAKES = {
    "order": ({"lr": (1e-2, 1e-3)}, "--lr 0.01 0.001 must be two finite numbers, the lower one first"),
    "zero": ({"lr": (0.0, 1e-3)}, "--lr 0.0 0.001 is log-uniform; LOW must be above 0"),
    "dropout": ({"dropout_fc": (0.0, 1.0)}, "--dropout-fc 1.0 must lie in [0, 1)"),
    "nan": ({"dropout_conv": (0.0, math.nan)}, "--dropout-conv 0.0 nan must be two finite numbers"),
    "grace": ({"grace_epochs": 7}, "--grace-epochs 7 must lie between 1 and 6"),
    "factor": ({"reduction_factor": 1}, "--reduction-factor 1 must lie between 2 and"),
    "twice": ({"padding": ("zeros", "zeros")}, "--padding names zeros zeros: each one once"),
    "unknown": ({"first": ('{"epochs": 3}',)}, "sets epochs; this search draws dropout_conv, dropout_fc, lr"),
    "no json": ({"first": ("lr=1",)}, "--first lr=1 must be a JSON object such as"),
    "no object": ({"first": ("[1]",)}, "--first [1] must be a JSON object"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_space_that_cannot_be_searched_is_refused(case: str) -> None:
    settings, told = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        SearchConfig(**settings)
    assert told in str(caught.value)


def test_gpus_divide_among_workers() -> None:
    SearchScale(gpus_per_trial=0.25).check_workers(1)
    SearchScale(gpus_per_trial=2).check_workers(2)
    with pytest.raises(UserError, match="must be 0 or 2: one GPU for each worker"):
        SearchScale(gpus_per_trial=0.5).check_workers(2)
    with pytest.raises(UserError, match="more than the one GPU"):
        SearchScale(gpus_per_trial=2).check_workers(1)


def test_settings_survive_json() -> None:
    config = SearchConfig(padding=("zeros", "partial"), weight_decay=(1e-3, 1e-2), first=('{"lr": 0.1}',))
    assert SearchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- the trial store ------------------------------------------------------------------------------------------------

CONFIG = SearchConfig(num_samples=4, max_epochs=3)


def open_store(storage: Storage, config: SearchConfig = CONFIG) -> TrialStore:
    return TrialStore(storage, "s", config, {"dataset": "fashion-mnist"}, TrainConfig(epochs=3).to_dict())


def epoch(number: int, accuracy: float) -> dict[str, Any]:
    """Metrics of one epoch, as a trial reports them."""
    figures = {"loss": 1.0 - accuracy, "accuracy": accuracy, "rows": 100}
    both = {f"{split}_{name}": value for split in ("train", "val") for name, value in figures.items()}
    times = {"epoch_time_s": 2.0, "data_wait_s": 0.0, "val_time_s": 1.0, "val_wait_s": 0.0}
    return {"epoch": number, "lr": 1e-3, "world_size": 1, "device": "cpu"} | both | times


def test_rows_turn_into_metrics_and_back() -> None:
    history = [epoch(1, 0.5), epoch(2, 0.75)]
    rows = [row for metrics in history for row in metric.epoch_rows(metrics)]
    bare = [{key: value for key, value in each.items() if key not in ("world_size", "device")} for each in history]
    assert metric.from_rows(rows) == bare


def test_a_trial_store_is_read_back_as_it_was_written(storage: Storage) -> None:
    store = open_store(storage)
    store.start("t0000", {"lr": 0.1, "dropout_fc": 0.2})
    store.add_epoch("t0000", epoch(1, 0.6), 3.0)
    store.add_epoch("t0000", epoch(2, 0.5), 3.0)
    store.end("t0000", "stopped")
    store.start("t0001", {"lr": 0.2})
    store.add_epoch("t0001", epoch(1, 0.7), 3.0)
    store.start("t0002", {"lr": 0.3})
    store.end("t0002", "diverged", "loss is not finite")
    again = open_store(storage)
    assert again.trials["t0000"].settings == {"lr": 0.1, "dropout_fc": 0.2}
    assert [each["val_accuracy"] for each in again.trials["t0000"].history] == [0.6, 0.5]
    assert [trial.trial_id for trial in again.unfinished()] == ["t0001"]
    assert again.not_started() == [3]
    assert [trial.trial_id for trial in again.ranked()] == ["t0001", "t0000", "t0002"]
    judged = {trial.trial_id: len(history) for trial, history in again.judged()}
    assert judged == {"t0000": 2, "t0001": 0, "t0002": 0}, "an unfinished trial's last epoch may not have been judged"


def test_rows_of_a_trial(storage: Storage) -> None:
    store = open_store(storage)
    store.start("t0000", {"lr": 0.1, "padding": 7})
    store.add_epoch("t0000", epoch(1, 0.6), 3.0)
    store.add_epoch("t0000", epoch(2, 0.5), 3.0)
    store.add_epoch("t0000", epoch(2, 0.55), 3.0)  # reported again after a crash
    store.end("t0000", "error", "RuntimeError: boom")
    [row] = tables.read_table(storage, "trials", "s-t0000")
    assert (row["search_id"], row["trial_id"], row["status"], row["error"]) == (
        "s",
        "t0000",
        "error",
        "RuntimeError: boom",
    )
    assert (row["lr"], row["padding"], row["settings_json"]) == (0.1, None, '{"lr": 0.1, "padding": 7}')
    assert (row["epochs_done"], row["rung"], row["best_epoch"], row["max_epochs"]) == (2, 1, 1, 3)
    assert (row["val_accuracy"], row["last_val_accuracy"]) == (0.6, 0.55)
    run = runs.load_run(storage, "s-t0000")
    assert (run["kind"], run["status"], run["search_id"], run["epochs_done"]) == ("trial", "failed", "s", 2)
    assert run["started_at"] <= run["finished_at"] <= datetime.now(UTC)
    assert len(tables.read_table(storage, "epochs", "s-t0000")) == 4


def test_a_search_is_refused_under_a_taken_name_and_with_other_settings(storage: Storage) -> None:
    base = TrainConfig(epochs=3)
    identity = {"dataset": "fashion-mnist", "dataset_sha256": "0", "source_hash": "0"}
    check_new_search(storage, "s")
    write_settings(storage, "s", CONFIG, base, identity)
    with pytest.raises(UserError, match="--search-id s exists already"):
        check_new_search(storage, "s")
    check_same_search(storage, "s", CONFIG, base)
    with pytest.raises(UserError, match=r"--num-samples 9 \(was 4\)"):
        check_same_search(storage, "s", replace(CONFIG, num_samples=9), base)
    with pytest.raises(UserError, match="--search-id x does not exist"):
        stored_settings(storage, "x")
    whole = {"state_version": STATE_VERSION, "search": CONFIG.to_dict(), "base": base.to_dict()}
    for state in (
        b"{",
        b"[" * 100_000,
        b"[]",
        *(json.dumps(whole | {name: 1}).encode() for name in ("search", "base")),
    ):
        storage.write_bytes(state, *settings_place("s"))
        with pytest.raises(UserError, match=r"search.json is damaged \(.*\); start another search"):
            stored_settings(storage, "s")


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("trials", []),
        ("trials", [{"settings_json": None}]),
        ("trials", [{"settings_json": "[1]"}]),
        ("epochs", [{"epoch": 1, "split": "other", "loss": 1.0}]),
        ("epochs", [row | {"epoch": 2} for row in metric.epoch_rows(epoch(1, 0.5))]),
    ],
)
def test_damaged_rows_of_a_trial_are_refused(storage: Storage, table: str, rows: list[dict[str, Any]]) -> None:
    open_store(storage).start("t0000", {"lr": 0.1})
    tables.write_table(storage, table, "s-t0000", rows)
    with pytest.raises(UserError, match="the reports of s-t0000 are damaged"):
        open_store(storage)
