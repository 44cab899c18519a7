"""What a search draws and when it judges, and its trial store: no Ray needed."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from fashion.config import TrainConfig, UserError
from fashion.search.space import SearchConfig, SearchScale
from fashion.search.stored_settings import (
    STATE_VERSION,
    check_new_search,
    check_same_search,
    settings_place,
    stored_settings,
    write_settings,
)
from fashion.storage import Storage


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


CONFIG = SearchConfig(num_samples=4, max_epochs=3)


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
