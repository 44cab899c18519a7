"""The settings that a search tries: a Ray Tune searcher that suggests planned trials, or lets TPE draw them."""

from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from fashion.search.space import CHOICES, LOG_UNIFORM
from fashion.search.trial import METRIC, TRIAL
from fashion.search.trial_store import ENDED, TrialStore, name_of


def pending_trials(store: TrialStore) -> list[dict[str, Any]]:
    """Return the trials that are left to run, unfinished ones first: the name of each, under `TRIAL`, and its settings.

    Where TPE draws the settings, when a trial starts, a trial has its name alone.
    """
    config = store.config
    unfinished = [{TRIAL: trial.trial_id} | trial.settings for trial in store.unfinished()]
    independent = config.sampler == "random"
    new = [
        {TRIAL: name_of(k)} | (config.draw(k) if independent or k < len(config.first) else {})
        for k in store.not_started()
    ]
    return unfinished + new


class PlannedSampler(Searcher):  # type: ignore[misc]  # Ray has no types
    """Suggests pending trials in order. `sampler` draws settings for those without, and gets these trials' results."""

    def __init__(self, pending: list[dict[str, Any]], sampler: OptunaSearch | None) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._pending = list(pending)
        self._sampler = sampler
        self._drawn: set[str] = set()
        """Tune's ids of the trials whose settings `sampler` drew."""

    def suggest(self, trial_id: str) -> Any:
        """Return name and settings of the next trial, which Tune calls `trial_id`."""
        if not self._pending:
            return Searcher.FINISHED
        trial = self._pending.pop(0)
        if set(trial) == {TRIAL}:
            assert self._sampler is not None, trial
            trial |= self._sampler.suggest(trial_id)
            self._drawn.add(trial_id)
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the result of a trial to the sampler that drew its settings."""
        if self._sampler is not None and trial_id in self._drawn:
            self._sampler.on_trial_complete(trial_id, result=result, error=error)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: a search resumes from its reports."""


def build_sampler(store: TrialStore) -> OptunaSearch | None:
    """Return Optuna's TPE with the results of the ended trials; None if settings are drawn independently."""
    config = store.config
    if config.sampler == "random":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: distribution(name, getattr(config, name)) for name in config.searched()}
    # A resumed search starts a new generator; another seed keeps it from drawing the same settings again.
    seed = config.seed + len(store.trials)
    sampler = OptunaSearch(space, metric=METRIC, mode="max", seed=seed)
    drawn = [trial for trial in store.trials.values() if int(trial.trial_id[1:]) >= len(config.first)]
    for trial in drawn:
        if trial.status in ENDED:
            value = trial.history[-1][METRIC] if trial.history else 0.0
            sampler.add_evaluated_point(trial.settings, value, error=trial.status == "error")
    return sampler


def distribution(name: str, values: tuple[Any, ...]) -> optuna.distributions.BaseDistribution:
    """Return the range or the choices of the setting `name` as an Optuna distribution."""
    if name in CHOICES:
        return optuna.distributions.CategoricalDistribution(values)
    return optuna.distributions.FloatDistribution(values[0], values[1], log=name in LOG_UNIFORM)
