"""The scheduler that stops trials: ASHA with trial names that stay the same when a search is resumed."""

from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from fashion.search.space import SearchConfig
from fashion.search.trial import METRIC, TRIAL
from fashion.search.trial_store import ENDED, TrialStore
from fashion.training.metrics import rung_score


def trial_name(trial: Any) -> str:
    """Return the name, as `t0003`, of a Tune trial; its folder has the same name."""
    return str(trial.config[TRIAL])


@dataclass(frozen=True)
class TrialKey:
    """Stands for a trial in Ray's scheduler, which uses `trial_id` alone: here the trial's name, not Tune's id."""

    trial_id: str


class ASHA(ASHAScheduler):  # type: ignore[misc]  # Ray has no types
    """Asynchronous successive halving that identifies trials by their names, so that a search can be resumed.

    Ray's scheduler is the stopping variant of Li et al. 2018 (arXiv 1810.05934): at a rung, it stops a trial unless
    its score is in the best share of those that reached the rung so far. The first trials to reach a rung always pass.
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
        """Return `result` with `rung_score` as the metric: Tune expects the metric among a trial's own."""
        return result | {METRIC: rung_score(result, self._judge_by)}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial."""
        super().on_trial_add(tune_controller, trial_key(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide, on an epoch's result, whether the trial continues."""
        return str(super().on_trial_result(tune_controller, trial_key(trial), self._scored(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record a trial's end and its last result."""
        super().on_trial_complete(tune_controller, trial_key(trial), self._scored(result))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Remove a trial that never ran."""
        super().on_trial_remove(tune_controller, trial_key(trial))


def trial_key(trial: Any) -> TrialKey:
    """Return the key of a Tune trial; a key is returned as it is."""
    return trial if isinstance(trial, TrialKey) else TrialKey(trial_name(trial))


def replay_scheduler(store: TrialStore) -> ASHA:
    """Return a scheduler that has got every judged result again, trial by trial, and so has its former state."""
    scheduler = ASHA(store.config)
    for trial, judged in store.judged():
        key = TrialKey(trial.trial_id)
        scheduler.on_trial_add(None, key)
        for metrics in judged:
            scheduler.on_trial_result(None, key, metrics)
        if trial.status == "diverged":
            scheduler.on_trial_result(None, key, {"epoch": len(judged) + 1})
        if trial.status in ENDED and judged:
            scheduler.on_trial_complete(None, key, judged[-1])
    return scheduler
