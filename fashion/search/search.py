"""A search on Ray Tune: trials with settings drawn from a space, poor ones stopped by ASHA, the winner refitted.

A search resumes from its reports and from the checkpoints of its unfinished trials, never from Tune's own snapshots:
Ray 2.60 restores an interrupted search without its scheduler, which would forget the results that it has judged. Here a
new scheduler gets every result again, and unfinished trials start from their checkpoints.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray.tune
from ray.tune.logger.tensorboardx import TBXLoggerCallback

from fashion.cluster import connection
from fashion.cluster.lock import NameLock
from fashion.cluster.preflight import check_every_node_sees
from fashion.config import ScaleConfig, TrainConfig
from fashion.data import preparation
from fashion.data.manifest import Manifest, check_same_data, check_source, find_manifest
from fashion.distributed import trainer
from fashion.reports import runs, schemas
from fashion.reports.tracking import check_mlflow
from fashion.search.callbacks import SearchCallback
from fashion.search.plan import SearchPlan, make_search_plan
from fashion.search.sampler import PlannedSampler, build_sampler, pending_trials
from fashion.search.scheduler import replay_scheduler, trial_name
from fashion.search.space import SearchConfig, SearchScale
from fashion.search.state import check_new_search, check_same_search, read_state, write_state
from fashion.search.trial import CHECKPOINTS, remove_workers, train_trial
from fashion.search.trial_store import Trial, TrialStore
from fashion.storage import Storage

# A trial that crashes is started once more; a second crash is probably its own fault.
MAX_TRIAL_FAILURES = 1


class SearchFailed(RuntimeError):
    """A search without a single trial that has a result."""


@dataclass(frozen=True)
class SearchSpec:
    """What to search: the search's name, its space, the settings that are not searched, its resources and its data."""

    search_id: str
    config: SearchConfig
    base: TrainConfig
    """The settings that are not searched."""
    scale: SearchScale
    source: str = "auto"
    """Where the data comes from if the storage holds none: see `jobs.prepare`."""
    resume: bool = False
    """Whether to continue the search `search_id`, which must exist; otherwise it must not."""
    refit: bool = False
    """Whether to train the winner on all rows afterwards, and to evaluate it once on test."""
    mlflow: str = ""
    """Address of an MLflow tracking server that gets every trial, in an experiment named like the search, and the
    refit; empty for none."""


@dataclass(frozen=True)
class SearchResult:
    """What `search` returns: its trials, best first, and the refitted winner if `refit` was set."""

    trials: list[Trial]
    refit: trainer.TrainResult | None
    was_finished: bool
    """Whether the search was complete before, so that nothing was run."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the trials as plain values, best first."""
        return [
            {
                "trial_id": trial.trial_id,
                "status": trial.status,
                "settings": trial.settings,
                "epochs_done": len(trial.history),
                "best": trial.best or {},
            }
            for trial in self.trials
        ]


def search(
    storage: Storage, spec: SearchSpec, announce: Callable[[SearchPlan], None] = lambda plan: None
) -> SearchResult:
    """Run or continue a search, and refit its winner if `spec` says so.

    Prepares the data if the storage holds none, and connects to Ray. Calls `announce` with the plan before anything
    starts. Raises `UserError` for what the user can mend, and `SearchFailed` when no trial has a result; the reports
    say the same.
    """
    search_id, scale = spec.search_id, spec.scale
    scale.check_workers(spec.config.workers_per_trial)
    if spec.mlflow:
        check_mlflow(spec.mlflow)
    spec = replace(spec, base=trial_base(spec.config, spec.base, scale))
    if spec.resume:
        check_same_search(storage, search_id, spec.config, spec.base)
    else:
        check_new_search(storage, search_id)
    manifest = find_manifest(storage) or preparation.prepare(storage, spec.source)[0]
    check_source(storage, manifest, spec.source)
    if spec.resume:
        check_same_data(storage, manifest, read_state(storage, search_id))
    storage.check_writable(schemas.SEARCHES_FOLDER, schemas.REPORTS_FOLDER)
    with NameLock(storage, schemas.SEARCHES_FOLDER, search_id, "--search-id"):
        if not spec.resume:
            check_new_search(storage, search_id)  # another process may have used the name until now
        connection.connect()
        check_every_node_sees(storage)
        plan = make_search_plan(spec.config, spec.base, scale, manifest)
        announce(plan)
        identity = trainer.identity_columns(spec.base, manifest)
        write_state(storage, search_id, spec.config, spec.base, identity)
        store = TrialStore(storage, search_id, spec.config, identity, spec.base.to_dict())
        pending = pending_trials(store)
        if pending:
            run_trials(storage, spec, plan, shared_by_trials(storage, spec, plan, manifest), store, pending)
    trials = store.ranked()
    if not trials:
        raise SearchFailed(f"search {search_id}: --time-budget-s {scale.time_budget_s:g} ended before the first trial")
    if trials[0].score < 0:
        raise SearchFailed(f"search {search_id}: no trial has a result; {trials[0].trial_id} said: {trials[0].error}")
    return SearchResult(
        trials, refit_winner(storage, spec, plan, trials[0]) if spec.refit else None, was_finished=not pending
    )


def trial_base(config: SearchConfig, base: TrainConfig, scale: SearchScale) -> TrainConfig:
    """Return the settings that all trials share; raises `UserError` if their workers cannot share a batch."""
    for workers in (config.workers_per_trial, scale.refit_workers):
        ScaleConfig(num_workers=str(workers)).check_batch(base.global_batch_size)
    return replace(base, epochs=config.max_epochs, stop_after=0, seed=config.seed)


def run_trials(
    storage: Storage,
    spec: SearchSpec,
    plan: SearchPlan,
    shared: dict[str, Any],
    store: TrialStore,
    pending: list[dict[str, Any]],
) -> None:
    """Run the `pending` trials on Ray Tune; `store` records them. Removes all checkpoints of trials afterwards.

    `shared` is what `shared_by_trials` returns, `pending` what `sampler.pending_trials` returns.
    """
    quieten_tune()
    trainable = ray.tune.with_resources(ray.tune.with_parameters(train_trial, shared=shared), plan.process_resources())
    tuner = ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=PlannedSampler(pending, build_sampler(store)),
            scheduler=replay_scheduler(store),
            num_samples=len(pending),
            max_concurrent_trials=plan.concurrent,
            time_budget_s=spec.scale.time_budget_s or None,
            # A trial with workers of its own keeps its process until they have ended; a new process starts sooner.
            reuse_actors=spec.config.workers_per_trial == 1,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name=spec.search_id,
            storage_path=storage.path(schemas.SEARCHES_FOLDER),
            storage_filesystem=storage.fs,
            failure_config=ray.tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            callbacks=[SearchCallback(storage, spec.search_id, store), *loggers(spec)],
            verbose=0,
        ),
    )
    try:
        trainer.run_in_thread(tuner.fit)
    finally:
        for trial in store.unfinished():
            remove_workers(spec.search_id, trial.trial_id)
    for trial in store.unfinished():
        store.end(trial.trial_id, "stopped", f"the time budget of {spec.scale.time_budget_s:g} s was spent")
    remove_checkpoints(storage, spec.search_id, store)


def loggers(spec: SearchSpec) -> list[ray.tune.Callback]:
    """Return Tune's own callbacks that write TensorBoard's event files and, with `spec.mlflow`, to an MLflow server."""
    if not spec.mlflow:
        return [TBXLoggerCallback()]
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return [TBXLoggerCallback(), MLflowLoggerCallback(spec.mlflow, experiment_name=spec.search_id)]


def quieten_tune() -> None:
    """Keep Tune from writing and printing a second time what the reports hold and `SearchCallback` prints."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its CSV and JSON files
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints failures whatever its verbosity
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # a list of the trials that failed


def shared_by_trials(storage: Storage, spec: SearchSpec, plan: SearchPlan, manifest: Manifest) -> dict[str, Any]:
    """Put the rows into the object store, once for all trials; return `shared` as `trial.train_trial` takes it."""
    workers = spec.config.workers_per_trial
    settings = trainer.worker_settings(storage, manifest, spec.base, plan.trial) | {"show_bar": False}
    shared = settings | {
        "base": spec.base.to_dict(),
        "storage": storage.uri,
        "search_id": spec.search_id,
        "workers_per_trial": workers,
        "use_gpu": plan.trial.use_gpu,
        "checkpoint_every_s": spec.scale.checkpoint_every_s,
    }
    if workers == 1:
        return shared
    return shared | {"worker_settings": settings, "scaling": trainer.scaling_config(plan.trial)}


def remove_checkpoints(storage: Storage, search_id: str, store: TrialStore) -> None:
    """Remove the checkpoints of all trials, once more: workers that were saving when their trial ended left some."""
    for name in store.trials:
        storage.delete_folder(schemas.SEARCHES_FOLDER, search_id, name, CHECKPOINTS)


def refit_winner(storage: Storage, spec: SearchSpec, plan: SearchPlan, winner: Trial) -> trainer.TrainResult:
    """Train the winner's settings on all rows, val included, up to its best epoch on val; evaluate once on test."""
    assert winner.best is not None, "the winner has an epoch"
    config = replace(
        TrainConfig.from_dict(spec.base.to_dict() | winner.settings),
        hold_out_val=False,
        max_train_rows=0,
        stop_after=int(winner.best["epoch"]),
    )
    scale = ScaleConfig(
        num_workers=str(spec.scale.refit_workers),
        cpus_per_worker=spec.scale.cpus_per_worker,
        use_gpu="yes" if plan.trial.use_gpu else "no",
    )
    run_id = f"{spec.search_id}-refit"
    resume = runs.find_run(storage, run_id) is not None
    refit = trainer.RunSpec(
        run_id,
        config,
        scale,
        source=spec.source,
        resume=resume,
        kind="refit",
        search_id=spec.search_id,
        mlflow=spec.mlflow,
    )
    return trainer.train(storage, refit)
