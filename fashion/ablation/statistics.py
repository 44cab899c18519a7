"""Compares two recipes: a confidence interval of their difference over seeds, and McNemar's test over images."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effect:
    """Mean difference of pairs and its confidence interval; the bounds are None if there is only one pair."""

    mean: float
    low: float | None
    high: float | None


def paired_effect(ours: Sequence[float], baseline: Sequence[float]) -> Effect:
    """Return the mean of `ours` minus `baseline`, pair by pair, with its 95 % confidence interval.

    The interval is Student's t over the differences (Student 1908, "The probable error of a mean"). What both runs of a
    pair owe to their common seed cancels out.
    """
    assert len(ours) == len(baseline) > 0, (len(ours), len(baseline))
    differences = [a - b for a, b in zip(ours, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Effect(mean, None, None)
    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * standard_error
    return Effect(mean, mean - half_width, mean + half_width)


@dataclass(frozen=True)
class McNemar:
    """How many images only one of two models classifies correctly, and the p-value of McNemar's exact test."""

    only_ours: int
    only_baseline: int
    p: float


def mcnemar(ours: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> McNemar:
    """Compare two models on the same images; each array (n,) is True where the model is correct.

    The exact test of McNemar 1947, "Note on the sampling error of the difference between correlated proportions": if
    the models are equally good, of the images that only one classifies correctly, half are expected to be ours.
    """
    assert ours.shape == baseline.shape, (ours.shape, baseline.shape)
    only_ours, only_baseline = int((ours & ~baseline).sum()), int((baseline & ~ours).sum())
    differing = only_ours + only_baseline
    p = float(stats.binomtest(only_ours, differing, 0.5).pvalue) if differing else 1.0
    return McNemar(only_ours, only_baseline, p)
