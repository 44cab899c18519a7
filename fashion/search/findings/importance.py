"""Importance of each setting: PED-ANOVA, and whether chance alone would do."""

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from scipy import stats

from fashion.search.findings.settings import Setting

METHOD = "ped-anova"
LEAST_TRIALS = 8
"""Trials below which nothing is estimated."""
BEST_SHARE = 4
"""One trial in this many counts as one of the best."""
LEAST_BEST = 4


def num_best(num_trials: int) -> int:
    """Return how many of the trials count as the best: a quarter, at least four."""
    return max(LEAST_BEST, num_trials // BEST_SHARE)


def importances(settings: Sequence[Setting], best: int) -> dict[str, float]:
    """Return each setting's share of what sets the `best` first trials apart, 0 to 1; the shares sum to 1.

    PED-ANOVA (Watanabe, Bansal, Hutter 2023, arXiv 2304.10255), by Optuna: the Pearson divergence between the density
    of a setting's values among the best trials and its density among all. It asks only whether a trial is among the
    best, by the best epoch that it ran: one that was stopped early ranks by fewer epochs. Settings must not be
    constant, and the trials must be sorted, best first. (Optuna's fANOVA needs scikit-learn.)
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    num_trials = len(settings[0].values)
    assert 0 < best < num_trials, (best, num_trials)
    distributions: dict[str, BaseDistribution] = {
        each.name: CategoricalDistribution(each.choices) if each.is_choice else FloatDistribution(0.0, 1.0)
        for each in settings
    }
    columns = {
        each.name: [str(value) for value in each.values] if each.is_choice else each.places().tolist()
        for each in settings
    }
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: column[rank] for name, column in columns.items()},
                distributions=distributions,
                value=float(rank),
            )
            for rank in range(num_trials)
        ]
    )
    # Half a trial less, so that rounding takes no trial more.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(best - 0.5) / num_trials)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {each.name: float(found[each.name]) for each in settings}


def chance(setting: Setting, best: int) -> float:
    """Return the probability that chance spreads the `best` first trials so unevenly over the setting's levels.

    The chi-squared test of independence of being among the best and the level: the thirds of a number's values, or the
    choices. Of few trials it is a rough figure.
    """
    levels, names = setting.levels()
    counts = np.stack([np.bincount(part, minlength=len(names)) for part in (levels[:best], levels[best:])])
    return float(stats.chi2_contingency(counts).pvalue)
