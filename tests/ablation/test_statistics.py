"""Intervals and tests of differences between recipes, against results computed by hand or in the literature."""

import numpy as np
import pytest

from fashion.ablation.statistics import mcnemar, paired_effect


def test_an_effect_is_the_mean_of_pairs_with_students_interval() -> None:
    """Student's own example, extra hours of sleep of ten patients: a mean of 1.58 and t = 4.06, p = 0.0028."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    effect = paired_effect(second, first)
    assert effect.mean == pytest.approx(1.58)
    assert (effect.low, effect.high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))


def test_what_a_pair_shares_does_not_widen_the_interval() -> None:
    baseline = [0.1, 0.5, 0.9]
    effect = paired_effect([each + 0.01 for each in baseline], baseline)
    assert effect.low == pytest.approx(0.01)
    assert effect.high == pytest.approx(0.01)


def test_one_pair_has_no_interval() -> None:
    effect = paired_effect([0.93], [0.92])
    assert effect.mean == pytest.approx(0.01)
    assert (effect.low, effect.high) == (None, None)


@pytest.mark.parametrize(
    ("only_ours", "only_baseline", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 2**10), (0, 10, 2 / 2**10), (9, 1, 2 * 11 / 2**10)],
)
def test_mcnemar_counts_what_one_alone_has_right(only_ours: int, only_baseline: int, p: float) -> None:
    ours = np.repeat([True, False, True, False], [only_ours, only_baseline, 20, 7])
    baseline = np.repeat([False, True, True, False], [only_ours, only_baseline, 20, 7])
    found = mcnemar(ours, baseline)
    assert (found.only_ours, found.only_baseline) == (only_ours, only_baseline)
    assert found.p == pytest.approx(p)
