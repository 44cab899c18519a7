"""Which trials a search stops: ASHA that knows trials by names that stay the same when a search is resumed."""

from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from fashion.search.space import SearchConfig
from fashion.search.trial import METRIC, TRIAL
from fashion.search.trial_store import ENDED, TrialStore
from fashion.training.metrics import rung_score


def trial_name(trial: Any) -> str:
    """Return a Tune trial's own name, which is also that of its folder."""
    return str(trial.config[TRIAL])


@dataclass(frozen=True)
class TrialKey:
    """A trial as the scheduler sees it: by a name that stays."""

    trial_id: str


class ASHA(ASHAScheduler):  # type: ignore[misc]  # Ray has no types
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
        super().on_trial_add(tune_controller, trial_key(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide on a trial's result."""
        return str(super().on_trial_result(tune_controller, trial_key(trial), self._scored(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take note of a trial's end."""
        super().on_trial_complete(tune_controller, trial_key(trial), self._scored(result))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never ran."""
        super().on_trial_remove(tune_controller, trial_key(trial))


def trial_key(trial: Any) -> TrialKey:
    """Return what stands for a Tune trial; an alias stands for itself."""
    return trial if isinstance(trial, TrialKey) else TrialKey(trial_name(trial))


def replay_scheduler(store: TrialStore) -> ASHA:
    """Return the scheduler in the state that it was in: it is shown each decided result again, oldest trial first."""
    scheduler = ASHA(store.config)
    for trial, decided in store.judged():
        known = TrialKey(trial.trial_id)
        scheduler.on_trial_add(None, known)
        for metrics in decided:
            scheduler.on_trial_result(None, known, metrics)
        if trial.status == "diverged":
            scheduler.on_trial_result(None, known, {"epoch": len(decided) + 1})
        if trial.status in ENDED and decided:
            scheduler.on_trial_complete(None, known, decided[-1])
    return scheduler
