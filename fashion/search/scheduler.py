"""The scheduler of a search: Ray Tune's ASHA, keyed by trial names that stay the same when a search is resumed."""

from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from fashion.search.space import TRIAL, SearchConfig
from fashion.search.trial import METRIC
from fashion.search.trial_store import ENDED, TrialStore
from fashion.training.metrics import rung_score


def trial_name(trial: Any) -> str:
    """Return the name of a Tune trial and of its folder, such as `t0003`; Tune's own id changes on `--resume`."""
    return str(trial.config[TRIAL])


@dataclass(frozen=True)
class TrialKey:
    """What stands for a trial in the scheduler, which reads nothing of a trial but `trial_id`."""

    trial_id: str
    """The trial's name."""


class ASHA(ASHAScheduler):  # type: ignore[misc]  # Ray has no types
    """Asynchronous successive halving (ASHA) that identifies trials by name and compares them by `rung_score`.

    Ray implements the stopping variant of Li et al. 2018 (arXiv 1810.05934): a trial that reaches a rung is stopped if
    its score is below the (1 - 1/`reduction_factor`) quantile of the trials that reached that rung before it. The first
    trial at a rung always goes on.
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

    def _with_score(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return `result` with `rung_score` under `METRIC`: Tune accepts only a metric that trials report."""
        return result | {METRIC: rung_score(result, self._judge_by)}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial, under its name."""
        super().on_trial_add(tune_controller, trial_key(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return `STOP` or `CONTINUE` for a trial that reports an epoch."""
        return str(super().on_trial_result(tune_controller, trial_key(trial), self._with_score(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record the last result of a trial that has ended."""
        super().on_trial_complete(tune_controller, trial_key(trial), self._with_score(result))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Remove a trial that never ran."""
        super().on_trial_remove(tune_controller, trial_key(trial))


def trial_key(trial: Any) -> TrialKey:
    """Return the key of a Tune trial, or `trial` itself if it is a key already, as in `replay_scheduler`."""
    return trial if isinstance(trial, TrialKey) else TrialKey(trial_name(trial))


def replay_scheduler(store: TrialStore) -> ASHA:
    """Return a scheduler that has seen every result that the search had judged before, oldest trial first.

    For a new search, whose store is empty, that is a new scheduler.
    """
    scheduler = ASHA(store.config)
    for trial, judged in store.judged():
        key = TrialKey(trial.trial_id)
        scheduler.on_trial_add(None, key)
        for metrics in judged:
            scheduler.on_trial_result(None, key, metrics)
        if trial.status == "diverged":
            # The result that `trial.report_failure` gave to Tune, without figures: `rung_score` is 0.
            scheduler.on_trial_result(None, key, {"epoch": len(judged) + 1})
        if trial.status in ENDED and judged:
            scheduler.on_trial_complete(None, key, judged[-1])
    return scheduler
