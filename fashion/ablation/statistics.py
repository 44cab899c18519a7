"""What a sceptic asks of two recipes: how sure is the difference, over seeds and over images."""

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
    """Mean difference of pairs and its interval; no bounds where one pair leaves no spread to judge by."""

    mean: float
    low: float | None
    high: float | None


def paired_effect(ours: Sequence[float], baseline: Sequence[float]) -> Effect:
    """Return the mean of `ours` minus `baseline`, pair by pair, with its 95 % interval.

    Student's t over the differences (Student 1908, "The probable error of a mean"): what both of a pair owe to their
    seed cancels out.
    """
    assert len(ours) == len(baseline) > 0, (len(ours), len(baseline))
    differences = [one - other for one, other in zip(ours, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Effect(mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    return Effect(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class McNemar:
    """Images that one of two models alone has right, and the probability of a split at least as uneven by chance."""

    only_ours: int
    only_baseline: int
    p: float


def mcnemar(ours: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> McNemar:
    """Compare two models on the same images, (n,) each, True where right.

    The exact test of McNemar 1947, "Note on the sampling error of the difference between correlated proportions": of
    the images that one alone has right, half are expected to be ours.
    """
    assert ours.shape == baseline.shape, (ours.shape, baseline.shape)
    only_ours, only_baseline = int((ours & ~baseline).sum()), int((baseline & ~ours).sum())
    differing = only_ours + only_baseline
    p = float(stats.binomtest(only_ours, differing, 0.5).pvalue) if differing else 1.0
    return McNemar(only_ours, only_baseline, p)
