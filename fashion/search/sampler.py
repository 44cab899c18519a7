"""Which settings a search tries: a Ray Tune searcher that hands out planned trials, or lets TPE draw them."""

from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from fashion.search.space import CHOICES, LOG_UNIFORM
from fashion.search.trial import METRIC, TRIAL
from fashion.search.trial_store import ENDED, TrialStore, name_of


def pending_trials(store: TrialStore) -> list[dict[str, Any]]:
    """Return the points that are left to run, unfinished trials first.

    TPE draws a new trial's settings when it starts, so such a point holds the name alone.
    """
    config = store.config
    begun = [{TRIAL: trial.trial_id} | trial.settings for trial in store.unfinished()]
    independent = config.sampler == "random"
    fresh = [
        {TRIAL: name_of(k)} | (config.draw(k) if independent or k < len(config.first) else {})
        for k in store.untouched()
    ]
    return begun + fresh


class PlannedSampler(Searcher):  # type: ignore[misc]  # Ray has no types
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


def build_sampler(store: TrialStore) -> OptunaSearch | None:
    """Return Optuna's TPE as a sampler that knows the ended trials; None if settings are drawn independently."""
    config = store.config
    if config.sampler == "random":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: distribution(name, getattr(config, name)) for name in config.searched()}
    # Its generator starts anew in each life; another seed, so that it does not draw the same points again.
    seed = config.seed + len(store.trials)
    sampler = OptunaSearch(space, metric=METRIC, mode="max", seed=seed)
    drawn = [trial for trial in store.trials.values() if int(trial.trial_id[1:]) >= len(config.first)]
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
