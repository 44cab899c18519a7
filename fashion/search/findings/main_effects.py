"""Main effects of the settings on a figure of the trials, each with the other settings held at their average."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fashion.search.findings.settings import Setting

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effect:
    """Difference of a figure between two levels of a setting, in the figure's unit."""

    start: str
    """Level from which it counts: the lowest third of a number's values, the worst choice."""
    end: str
    """Level up to which it counts: the highest third, the best choice."""
    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    means: list[float]
    """Estimated mean of the figure at each level, as if the trials' other settings were spread alike."""


def main_effects(settings: Sequence[Setting], figure: NDArray[np.float64]) -> dict[str, Effect]:
    """Return the effect of each setting on `figure`, (trials,); empty if the trials do not tell the settings apart.

    A setting of which nearly all trials have the same value is left out.

    Least squares of the figure on the levels of all settings, without interactions: the main effects of a design with
    three levels of each number and one of each choice (analysis of variance; Montgomery, "Design and Analysis of
    Experiments"). Intervals are Student's t with as many degrees of freedom as trials exceed parameters. Of choices the
    best and the worst are compared after a look at the figures, so that their interval is too narrow.
    """
    levels = {each.name: each.levels() for each in settings}
    columns: list[NDArray[np.float64]] = [np.ones(len(figure))]
    owners = [("", 0)]
    for name, (level, names) in levels.items():
        for number in range(1, len(names)):
            columns.append((level == number).astype(np.float64))
            owners.append((name, number))
    design = np.stack(columns, axis=1)
    freedom = len(figure) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return {}
    weights = np.asarray(np.linalg.lstsq(design, figure, rcond=None)[0], np.float64)
    residuals = figure - design @ weights
    covariance = np.linalg.inv(design.T @ design) * float(residuals @ residuals) / freedom
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    found = {}
    for setting in settings:
        _, names = levels[setting.name]
        if len(names) < 2:  # most trials have the same value
            continue
        at = {number: place for place, (name, number) in enumerate(owners) if name == setting.name}
        means = level_means(design, weights, list(at.values()), len(names))
        start, end = 0, len(names) - 1
        if setting.is_choice:
            start, end = int(np.argmin(means)), int(np.argmax(means))
        contrast = np.zeros(design.shape[1])
        for level_number, sign in ((start, -1.0), (end, 1.0)):
            if level_number:
                contrast[at[level_number]] += sign
        mean, half = float(contrast @ weights), reach * math.sqrt(max(0.0, float(contrast @ covariance @ contrast)))
        found[setting.name] = Effect(names[start], names[end], mean, mean - half, mean + half, means)
    return found


def level_means(
    design: NDArray[np.float64], weights: NDArray[np.float64], own: Sequence[int], num_levels: int
) -> list[float]:
    """Return what the model says on average over the trials if all were at a level of one setting, for each level.

    `design` is (trials, parameters); `own` are the columns of the setting's levels from 1 on.
    """
    others = design.copy()
    others[:, own] = 0.0
    base = float((others @ weights).mean())
    return [base + (float(weights[own[number - 1]]) if number else 0.0) for number in range(num_levels)]
