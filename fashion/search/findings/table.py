"""The rows of the table `importance`: one for each setting that a search drew."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fashion.reports import tables
from fashion.search.findings.importance import LEAST_TRIALS, METHOD, chance, importances, num_best
from fashion.search.findings.main_effects import Effect, main_effects
from fashion.search.findings.neighbourhood import neighbourhood
from fashion.search.findings.settings import Setting, settings_of
from fashion.search.space import SearchConfig
from fashion.search.trial_store import Trial
from fashion.storage import Storage

Row = dict[str, Any]

FINISHED = ("completed", "stopped")
"""Statuses of trials whose figures are compared. A trial that diverged is the poorest; one that crashed is left out."""


@dataclass(frozen=True)
class Figures:
    """A trial's figures on val, by epoch."""

    accuracy: list[float]
    loss: list[float]

    def reached(self, epochs: int) -> float:
        """Return the best accuracy of the first `epochs` epochs; 0 if there are none, as for a trial that diverged."""
        return max(self.accuracy[:epochs], default=0.0)

    @property
    def loss_rise(self) -> float:
        """How far the last epoch's loss lies above the lowest, in nats per row, >= 0: how much the trial overfits."""
        return self.loss[-1] - min(self.loss)


def write_findings(storage: Storage, search_id: str, config: SearchConfig, ranked: Sequence[Trial]) -> list[Row]:
    """Write what a search found into the table `importance`, and return the rows; `ranked` are its trials, best first.

    The rows of a search replace those that it had.
    """
    rows = finding_rows(search_id, config, ranked)
    tables.write_table(storage, "importance", search_id, rows)
    return rows


def finding_rows(search_id: str, config: SearchConfig, ranked: Sequence[Trial]) -> list[Row]:
    """Return one row for each searched setting; what cannot be estimated is null, and `note` says why."""
    # A trial that the time budget ended before its first epoch has no result; diverged ones come last.
    trials = [trial for trial in ranked if trial.status in FINISHED and figures_of(trial).accuracy]
    finished = len(trials)
    trials += [trial for trial in ranked if trial.status == "diverged"]
    figures = [figures_of(trial) for trial in trials]
    settings = settings_of(config, [trial.settings for trial in trials])
    counts = {
        "trials": len(trials),
        "stopped_trials": sum(trial.status == "stopped" for trial in trials),
        "diverged_trials": sum(trial.status == "diverged" for trial in trials),
    }
    rows: list[Row] = [{"search_id": search_id, "setting": each.name, "method": METHOD} | counts for each in settings]
    varied = [each for each in settings if not each.is_constant]
    for row, each in zip(rows, settings, strict=True):
        row |= values_of(each, finished)
        row["note"] = "every trial has the same value" if each.is_constant and trials else None
    if finished < LEAST_TRIALS:
        return [
            row | {"note": f"{finished} of {len(ranked)} trials have a result; {LEAST_TRIALS} are needed"}
            for row in rows
        ]
    if not varied:
        return rows
    found: dict[str, Row] = {each.name: {} for each in settings}
    for part in (
        importance_columns(varied, trials),
        effect_columns(settings, trials, figures),
        overfit_columns(settings, trials, figures, config.max_epochs),
        neighbourhood_columns(varied, figures),
    ):
        for name, columns in part.items():
            found[name] |= columns
    return sorted((row | found[row["setting"]] for row in rows), key=lambda row: -(row.get("importance") or 0.0))


def figures_of(trial: Trial) -> Figures:
    """Return a trial's figures on val, up to the first epoch whose figures are not finite."""
    accuracy, loss = list[float](), list[float]()
    for metrics in trial.history:
        pair = metrics.get("val_accuracy"), metrics.get("val_loss")
        if any(value is None or not math.isfinite(value) for value in pair):
            break
        accuracy.append(float(metrics["val_accuracy"]))
        loss.append(float(metrics["val_loss"]))
    return Figures(accuracy, loss)


def values_of(setting: Setting, finished: int) -> Row:
    """Return the columns that say which values the `finished` first trials have: the winner's, and the thirds."""
    if not finished:
        return {}
    first, second = setting.of(range(finished)).thirds() or (None, None)
    winner = setting.values[0]
    own = {"winner_choice": str(winner)} if setting.is_choice else {"winner": float(winner)}
    return own | {"first_third": first, "second_third": second}


def importance_columns(varied: Sequence[Setting], trials: Sequence[Trial]) -> dict[str, Row]:
    """Return the columns about importance, by setting; the trials are sorted, best first."""
    best = num_best(len(trials))
    if best >= len(trials) or trials[best - 1].score <= trials[-1].score:
        return {each.name: {"note": "no quarter of the trials is better than the rest"} for each in varied}
    found = importances(varied, best)
    columns: dict[str, Row] = {}
    for each in varied:
        columns[each.name] = {
            "importance": found[each.name],
            "best_trials": best,
            "p": chance(each, best),
            "note": None if len(varied) > 1 else "no other setting varies",
        }
        if not each.is_choice:
            columns[each.name] |= {"best_low": min(each.values[:best]), "best_high": max(each.values[:best])}
    return columns


def effect_columns(settings: Sequence[Setting], trials: Sequence[Trial], figures: Sequence[Figures]) -> dict[str, Row]:
    """Return the columns about the effect on accuracy, by setting.

    All trials are compared after the same training: by the best accuracy up to the last epoch that each of them
    reached. In a search with early stopping that is an early epoch. Trials that the time budget cut off, which have an
    `error`, are left out, so that one of them does not set the epoch.
    """
    rows = [number for number, trial in enumerate(trials) if trial.status in FINISHED and trial.error is None]
    epoch = min((len(figures[number].accuracy) for number in rows), default=0)
    accuracies = np.array([figures[number].reached(epoch) for number in rows])
    varied = [each for each in (every.of(rows) for every in settings) if not each.is_constant]
    estimated = main_effects(varied, accuracies) if rows else {}
    columns: dict[str, Row] = {
        each.name: {"note": "nearly all trials have the same value"} for each in varied if each.name not in estimated
    }
    if not estimated:
        told = {"note": "too few trials to tell the settings' effects apart"}
        return {each.name: told for each in settings if not each.is_constant}
    for name, effect in estimated.items():
        columns[name] = {"epoch": epoch, "effect_trials": len(rows)} | bounds("effect", effect)
        columns[name] |= {"effect_from": effect.start, "effect_to": effect.end}
        if len(effect.means) == 3 and name in {each.name for each in varied if not each.is_choice}:
            levels = ("low_accuracy", "middle_accuracy", "high_accuracy")
            columns[name] |= dict(zip(levels, effect.means, strict=True))
    return columns


def overfit_columns(
    settings: Sequence[Setting], trials: Sequence[Trial], figures: Sequence[Figures], max_epochs: int
) -> dict[str, Row]:
    """Return the columns about the effect on overfitting, by setting, over the trials that ran every epoch."""
    rows = [number for number in range(len(trials)) if len(figures[number].loss) == max_epochs > 1]
    if len(rows) < LEAST_TRIALS:
        return {}
    rises = np.array([figures[number].loss_rise for number in rows])
    varied = [each for each in (every.of(rows) for every in settings) if not each.is_constant]
    return {
        name: {"overfit_trials": len(rows)} | bounds("overfit_effect", effect)
        for name, effect in main_effects(varied, rises).items()
    }


def bounds(name: str, effect: Effect) -> Row:
    """Return an effect and its interval as three columns."""
    return {name: effect.mean, f"{name}_low": effect.low, f"{name}_high": effect.high}


def neighbourhood_columns(varied: Sequence[Setting], figures: Sequence[Figures]) -> dict[str, Row]:
    """Return the columns about the winner's neighbourhood, by setting."""
    found = neighbourhood(varied, drops_of(figures))
    columns: dict[str, Row] = {}
    for each in varied:
        columns[each.name] = {"near_trials": found.num_trials, "near_drop": found.drop}
        if each.name in found.slopes:
            slope = found.slopes[each.name]
            columns[each.name] |= {
                "fall_per_tenth": slope.fall_per_tenth,
                "flat_low": slope.low,
                "flat_high": slope.high,
            }
    return columns


def drops_of(figures: Sequence[Figures]) -> NDArray[np.float64]:
    """Return what each trial loses against the first, the winner, (trials,), as a fraction of accuracy.

    Each is compared by the best accuracy up to the last epoch that both reached; one without an epoch, which diverged
    at once, by the winner's accuracy in the first and nothing.
    """
    winner = figures[0]
    drops = []
    for each in figures:
        epochs = max(1, min(len(winner.accuracy), len(each.accuracy)))
        drops.append(winner.reached(epochs) - each.reached(epochs))
    return np.array(drops)
