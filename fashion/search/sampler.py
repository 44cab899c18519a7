"""The settings that a search tries: a Ray Tune searcher that returns planned settings, or draws them by TPE."""

from collections import deque
from collections.abc import Callable
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from fashion.search.space import CHOICES, LOG_UNIFORM, TRIAL
from fashion.search.trial import METRIC
from fashion.search.trial_store import ENDED, TrialStore, name_of


def pending_points(store: TrialStore) -> list[dict[str, Any]]:
    """Return the points that are left to run, unfinished trials first.

    A point, as Tune and Optuna call it, holds the settings of one trial; here it holds the trial's name as well. TPE
    draws the settings of a new trial only when the trial starts: until then the point holds the name alone.
    """
    config = store.config
    unfinished = [{TRIAL: trial.trial_id} | trial.settings for trial in store.unfinished()]
    draws_all = config.sampler == "random"
    new = [
        {TRIAL: name_of(number)} | (config.draw(number) if draws_all or number < len(config.first) else {})
        for number in store.not_started()
    ]
    return unfinished + new


class PlannedSampler(Searcher):  # type: ignore[misc]  # Ray has no types
    """Returns the given points in order, the settings drawn where a point has none.

    `sampler` draws them, and is given the results of the trials whose settings it drew. `limit` is given the number of
    trials that have not ended, and returns how many may run at a time: their number follows the cluster.
    """

    def __init__(self, points: list[dict[str, Any]], sampler: OptunaSearch | None, limit: Callable[[int], int]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._points = deque(points)
        self._sampler = sampler
        self._limit = limit
        self._drawn: set[str] = set()
        self._running: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Return the next point, for the trial that Tune calls `trial_id`.

        Returns None if no more trials may run now, and `FINISHED` if no point is left.
        """
        if not self._points:
            return Searcher.FINISHED
        if len(self._running) >= self._limit(len(self._running) + len(self._points)):
            return None
        self._running.add(trial_id)
        point = self._points.popleft()
        if set(point) == {TRIAL}:
            assert self._sampler is not None, point
            point |= self._sampler.suggest(trial_id)
            self._drawn.add(trial_id)
        return point

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Give the sampler the last result of a trial whose settings it drew, and its place to another trial."""
        self._running.discard(trial_id)
        if self._sampler is not None and trial_id in self._drawn:
            self._sampler.on_trial_complete(trial_id, result=result, error=error)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing, though Tune asks for it: a search resumes from its reports."""


def build_sampler(store: TrialStore) -> OptunaSearch | None:
    """Return Optuna's TPE, given the ended trials whose settings it drew; None if settings are drawn independently."""
    config = store.config
    if config.sampler == "random":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: distribution(name, getattr(config, name)) for name in config.searched()}
    # The generator's state is not saved: with the same seed, a resumed search would draw the same settings again.
    seed = config.seed + len(store.trials)
    sampler = OptunaSearch(space, metric=METRIC, mode="max", seed=seed)
    drawn = [trial for trial in store.trials.values() if int(trial.trial_id[1:]) >= len(config.first)]
    for trial in drawn:
        if trial.status in ENDED:
            value = trial.history[-1][METRIC] if trial.history else 0.0
            sampler.add_evaluated_point(trial.settings, value, error=trial.status == "error")
    return sampler


def distribution(name: str, values: tuple[Any, ...]) -> optuna.distributions.BaseDistribution:
    """Return the Optuna distribution of the setting `name`: its choices, or its bounds LOW and HIGH."""
    if name in CHOICES:
        return optuna.distributions.CategoricalDistribution(values)
    return optuna.distributions.FloatDistribution(values[0], values[1], log=name in LOG_UNIFORM)
