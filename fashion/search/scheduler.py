"""Which settings a search tries and which trials it stops: Ray Tune's searcher and scheduler, given back their past.

Both are built from the ledger, so an interrupted search goes on as if it had never stopped.
"""

from dataclasses import dataclass
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from fashion.search.space import CHOICES, LOG_UNIFORM, SearchConfig
from fashion.search.trial import METRIC, TRIAL
from fashion.search.trial_store import ENDED, Ledger, name_of
from fashion.training.metrics import rung_score


def waiting(ledger: Ledger) -> list[dict[str, Any]]:
    """Return the points that are left to run, unfinished trials first.

    TPE draws a new trial's settings when it starts, so such a point holds the name alone.
    """
    config = ledger.config
    begun = [{TRIAL: trial.trial_id} | trial.settings for trial in ledger.unfinished()]
    independent = config.sampler == "random"
    fresh = [
        {TRIAL: name_of(k)} | (config.draw(k) if independent or k < len(config.first) else {})
        for k in ledger.untouched()
    ]
    return begun + fresh


def trial_name(trial: Any) -> str:
    """Return a Tune trial's own name, which is also that of its folder."""
    return str(trial.config[TRIAL])


class Points(Searcher):  # type: ignore[misc]  # Ray has no types
    """Hands out points in order; those without settings are drawn by the sampler, which learns how trials end."""

    def __init__(self, points: list[dict[str, Any]], sampler: OptunaSearch | None) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._points = list(points)
        self._sampler = sampler
        self._handed_out: dict[str, dict[str, Any]] = {}
        self._asked: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Return the next point for the Tune trial `trial_id`."""
        if not self._points:
            return Searcher.FINISHED
        point = self._points.pop(0)
        if set(point) == {TRIAL}:
            assert self._sampler is not None, point
            point |= self._sampler.suggest(trial_id)
            self._asked.add(trial_id)
        self._handed_out[trial_id] = point
        return point

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the sampler how a trial that it drew has ended."""
        if self._sampler is not None and trial_id in self._asked:
            self._sampler.on_trial_complete(trial_id, result=result, error=error)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Keep nothing: a search goes on from its reports."""


def sampler_of(ledger: Ledger) -> OptunaSearch | None:
    """Return Optuna's TPE as a sampler that knows the ended trials; None if settings are drawn independently."""
    config = ledger.config
    if config.sampler == "random":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: distribution(name, getattr(config, name)) for name in config.searched()}
    # Its generator starts anew in each life; another seed, so that it does not draw the same points again.
    seed = config.seed + len(ledger.trials)
    sampler = OptunaSearch(space, metric=METRIC, mode="max", seed=seed)
    drawn = [trial for trial in ledger.trials.values() if int(trial.trial_id[1:]) >= len(config.first)]
    for trial in drawn:
        if trial.status in ENDED:
            value = trial.history[-1][METRIC] if trial.history else 0.0
            sampler.add_evaluated_point(trial.settings, value, error=trial.status == "error")
    return sampler


def distribution(name: str, values: tuple[Any, ...]) -> optuna.distributions.BaseDistribution:
    """Return a setting's range in Optuna's terms."""
    if name in CHOICES:
        return optuna.distributions.CategoricalDistribution(values)
    return optuna.distributions.FloatDistribution(values[0], values[1], log=name in LOG_UNIFORM)


@dataclass(frozen=True)
class Alias:
    """A trial as the scheduler sees it: by a name that stays."""

    trial_id: str


class NamedASHA(ASHAScheduler):  # type: ignore[misc]  # Ray has no types
    """Asynchronous successive halving that knows trials by their own names, the same in each life of a search.

    Ray's is the stopping variant of Li et al. 2018 (arXiv 1810.05934): at a rung, a trial below the best share of those
    that got there before is stopped. The first ones to arrive always pass.
    """

    def __init__(self, config: SearchConfig) -> None:
        super().__init__(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=config.max_epochs,
            grace_period=config.grace_epochs,
            reduction_factor=config.reduction_factor,
        )
        self._judge_by = config.judge_by

    def _scored(self, result: dict[str, Any]) -> dict[str, Any]:
        """Put `rung_score` where Ray looks: Tune insists that the metric it looks for is one that trials report."""
        return result | {METRIC: rung_score(result, self._judge_by)}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial up."""
        super().on_trial_add(tune_controller, alias(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide on a trial's result."""
        return str(super().on_trial_result(tune_controller, alias(trial), self._scored(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take note of a trial's end."""
        super().on_trial_complete(tune_controller, alias(trial), self._scored(result))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never ran."""
        super().on_trial_remove(tune_controller, alias(trial))


def alias(trial: Any) -> Alias:
    """Return what stands for a Tune trial; an alias stands for itself."""
    return trial if isinstance(trial, Alias) else Alias(trial_name(trial))


def replayed(ledger: Ledger) -> NamedASHA:
    """Return the scheduler in the state that it was in: it is shown each decided result again, oldest trial first."""
    scheduler = NamedASHA(ledger.config)
    for trial, decided in ledger.judged():
        known = Alias(trial.trial_id)
        scheduler.on_trial_add(None, known)
        for metrics in decided:
            scheduler.on_trial_result(None, known, metrics)
        if trial.status == "diverged":
            scheduler.on_trial_result(None, known, {"epoch": len(decided) + 1})
        if trial.status in ENDED and decided:
            scheduler.on_trial_complete(None, known, decided[-1])
    return scheduler
