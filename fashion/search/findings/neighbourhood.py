"""How flat the winner's neighbourhood is: what the trials nearest to it lose against it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from fashion.search.findings.settings import Setting

TOLERANCE = 0.01
"""Loss of accuracy up to which a value counts as good as the winner's."""


@dataclass(frozen=True)
class Slope:
    """How steeply the accuracy falls along one setting, away from the winner's value."""

    fall_per_tenth: float
    """Loss of accuracy for each tenth of the setting's range, >= 0."""
    low: float
    """Least value, in the setting's unit, that costs less than `TOLERANCE`, as far as the neighbours reach."""
    high: float
    """Greatest such value."""


@dataclass(frozen=True)
class Neighbourhood:
    """The trials nearest to the winner, and what they lose against it."""

    num_trials: int
    drop: float
    """Median loss of accuracy of the neighbours."""
    slopes: dict[str, Slope]
    """Numeric setting -> its slope."""


def neighbourhood(settings: Sequence[Setting], drops: NDArray[np.float64]) -> Neighbourhood:
    """Return how the accuracy falls around the winner, the first trial, whose drop is 0.

    `drops` (trials,) are losses of accuracy against the winner. Neighbours are the quarter of the trials nearest to it,
    and at least twice as many as the model has parameters. Distance is Euclidean over the settings' places between 0
    and 1; another choice counts 1. Loss is modelled as a sum over the settings of a slope times the distance along the
    setting, and fitted with slopes of at least 0 (non-negative least squares, Lawson and Hanson 1974).
    """
    away = np.stack([distance_along(each) for each in settings], axis=1)
    nearest = np.argsort(np.linalg.norm(away[1:], axis=1), kind="stable") + 1
    count = min(len(nearest), max(2 * (len(settings) + 1), math.ceil(len(drops) / 4)))
    near = nearest[:count]
    slopes, _ = nnls(away[near], drops[near])
    return Neighbourhood(
        count,
        float(np.median(drops[near])),
        {
            each.name: slope_along(each, float(slope), near)
            for each, slope in zip(settings, slopes, strict=True)
            if not each.is_choice
        },
    )


def distance_along(setting: Setting) -> NDArray[np.float64]:
    """Return each trial's distance from the first along one setting, (trials,), from 0 to 1."""
    if setting.is_choice:
        return np.array([float(value != setting.values[0]) for value in setting.values])
    places = setting.places()
    distance: NDArray[np.float64] = np.abs(places - places[0])
    return distance


def slope_along(setting: Setting, slope: float, near: NDArray[np.int64]) -> Slope:
    """Return the slope of a setting, with the values around the winner's that cost less than `TOLERANCE`.

    `slope` is the loss over the whole range; beyond the farthest of the neighbours, trials number `near`, on a side of
    the winner, nothing is known.
    """
    places = setting.places()
    place, winner = float(places[0]), float(setting.values[0])
    limit = TOLERANCE / slope if slope > 0 else math.inf
    below, above = place - float(places[near].min()), float(places[near].max()) - place
    low = setting.value_at(place - min(limit, max(below, 0.0)))
    high = setting.value_at(place + min(limit, max(above, 0.0)))
    return Slope(slope / 10, min(low, winner), max(high, winner))
