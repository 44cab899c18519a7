"""The search: trials drawn from a space, run by Ray Tune, stopped by ASHA, kept in the reports, resumable from them.

Ray 2.60 restores an interrupted search without its scheduler, so that judged trials are forgotten. Here Tune's own
snapshots are never read. What a search has learned lies in its reports and in the checkpoints of its unfinished
trials; to go on, a fresh scheduler is shown every result again, and unfinished trials start from their checkpoints.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray.tune
from pyarrow import fs as pafs

from fashion.cluster import connection
from fashion.cluster.lock import NameLock
from fashion.cluster.nodes import NodesNotUp, autoscaler_status, wait_for_room
from fashion.cluster.storage_access import check_every_node_sees
from fashion.config import ScaleConfig, TrainConfig
from fashion.data import preparation
from fashion.data.manifest import Manifest, check_same_data, check_source, find_manifest
from fashion.data.shards import StoredRows
from fashion.distributed import trainer
from fashion.distributed.trainers import make_engine, run_in_thread, uses_internals
from fashion.reports import runs, schemas, tables
from fashion.reports.tracking import check_mlflow
from fashion.search.callbacks import Curves, SearchCallback
from fashion.search.findings.table import write_findings
from fashion.search.plan import SearchPlan, TrialLimit, make_search_plan
from fashion.search.sampler import PlannedSampler, build_sampler, pending_points
from fashion.search.scheduler import replay_scheduler, trial_name
from fashion.search.space import SearchConfig, SearchScale
from fashion.search.stored_settings import check_new_search, check_same_search, read_settings, write_settings
from fashion.search.trial import remove_workers, train_trial
from fashion.search.trial_store import CHECKPOINTS, Trial, TrialStore
from fashion.storage import Storage, open_storage

RETRIES = 1


class SearchFailed(RuntimeError):
    """A search without a single trial that has a result."""


@dataclass(frozen=True)
class SearchResult:
    """What `search` leaves: its trials, best first, and the refitted winner if that was asked for."""

    trials: list[Trial]
    refit: trainer.TrainResult | None
    was_finished: bool
    findings: list[dict[str, Any]]
    """What the search found: its rows of the table `importance`."""

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


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a search is started, which changes none of its numbers."""

    source: str = "auto"
    """Where the data comes from if the storage holds none yet."""
    resume: bool = False
    """Go on with the search of that name."""
    refit: bool = False
    """Afterwards train the winner on all rows and evaluate it once on test."""
    mlflow: str = ""
    """Address of an MLflow server that is told of every trial, as an experiment named like the search, and of the
    refit."""


@dataclass(frozen=True)
class SearchSpec:
    """What a search is made of: where it is kept, the settings that are not searched, its size, its data."""

    storage: Storage
    search_id: str
    base: TrainConfig
    scale: SearchScale
    plan: SearchPlan
    manifest: Manifest
    options: SearchOptions


def search(
    storage: Storage,
    search_id: str,
    config: SearchConfig,
    base: TrainConfig,
    scale: SearchScale,
    options: SearchOptions = SearchOptions(),
    announce: Callable[[SearchPlan], None] = lambda plan: None,
) -> SearchResult:
    """Run or continue a search.

    `base` gives the settings that are not searched. `announce` is given the plan before anything starts. Raises
    `UserError` for what the user can mend, and `SearchFailed` when no trial has a result; the reports say the same.
    """
    scale.check_workers(config.workers_per_trial)
    uses_internals()  # a wrong setting is told before anything else
    if options.mlflow:
        check_mlflow(options.mlflow)
    base = trial_base(config, base, scale)
    if options.resume:
        check_same_search(storage, search_id, config, base)
    else:
        check_new_search(storage, search_id)
    manifest = find_manifest(storage) or preparation.prepare(storage, options.source)[0]
    check_source(storage, manifest, options.source)
    if options.resume:
        check_same_data(storage, manifest, read_settings(storage, search_id))
    tables.open_reports(storage, schemas.SEARCHES_FOLDER)
    with NameLock(storage, schemas.SEARCHES_FOLDER, search_id, "--search-id"):
        if not options.resume:
            check_new_search(storage, search_id)  # somebody may have had the name until now
        connection.connect()
        identity = trainer.identity_columns(base, manifest)
        try:
            plan = wait_for_room(
                lambda: make_search_plan(config, base, scale, manifest, options.refit), scale.wait_for_nodes_s
            )
        except NodesNotUp as error:
            write_settings(storage, search_id, config, base, identity)
            raise SearchFailed(f"search {search_id}: {error}; continue with --search-id {search_id} --resume") from None
        check_every_node_sees(storage)
        announce(plan)
        spec = SearchSpec(storage, search_id, base, scale, plan, manifest, options)
        store = TrialStore(storage, search_id, config, identity, base.to_dict())
        points = pending_points(store)
        rows = trainer.read_rows(storage, manifest, base) if points else {}  # a damaged file is found here
        write_settings(storage, search_id, config, base, identity)
        if points or store.has_news:
            if options.resume:
                remove_checkpoints(storage, search_id, store)
            with store:
                if points:
                    run_trials(spec, store, points, rows)
            remove_checkpoints(storage, search_id, store)
        trials = store.ranked()
        findings = write_findings(storage, search_id, config, trials) if trials else []
    check_any_result(search_id, trials, scale)
    refitted = refit_winner(spec, trials[0]) if options.refit else None
    return SearchResult(trials, refitted, not points, findings)


def check_any_result(search_id: str, ranked: Sequence[Trial], scale: SearchScale) -> None:
    """Raise `SearchFailed` if no trial has a result; `ranked` are the trials that were started, best first."""
    if not ranked:
        raise SearchFailed(f"search {search_id}: --time-budget-s {scale.time_budget_s:g} ended before the first trial")
    if ranked[0].score < 0:
        raise SearchFailed(f"search {search_id}: no trial has a result; {ranked[0].trial_id} said: {ranked[0].error}")


def trial_base(config: SearchConfig, base: TrainConfig, scale: SearchScale) -> TrainConfig:
    """Return the settings that all trials share; raises `UserError` if their workers cannot share a batch."""
    for workers in (config.workers_per_trial, scale.refit_workers):
        ScaleConfig(num_workers=str(workers)).check_batch(base.global_batch_size)
    return replace(base, epochs=config.max_epochs, stop_after=0, seed=config.seed)


def run_trials(
    spec: SearchSpec, store: TrialStore, points: list[dict[str, Any]], rows: Mapping[str, StoredRows]
) -> None:
    """Run `points` on Ray Tune, all on the same `rows`, and note what becomes of each."""
    storage, search_id, scale, plan = spec.storage, spec.search_id, spec.scale, spec.plan
    shared = shared_by_trials(spec, store.config, rows)
    shared["checkpoint_every_s"] = scale.checkpoint_every_s
    engine = shared["engine"] = make_engine() if store.config.workers_per_trial > 1 else None
    trainable = ray.tune.with_resources(ray.tune.with_parameters(train_trial, shared=shared), plan.process_resources())
    limit = TrialLimit(store.config, scale, has_autoscaler=autoscaler_status().is_there)
    # Ours is the last one: Tune starts a trial again if a callback fails at its end, which is noted then already.
    callbacks = [*loggers(spec), SearchCallback(storage, search_id, store, engine)]
    try:
        with storage_of_tune(storage) as place:
            tuner = build_tuner(place, search_id, store, points, trainable, limit, callbacks, scale.time_budget_s)
            run_in_thread(tuner.fit)
    finally:
        limit.ask_for(0)
        for trial in store.unfinished():
            remove_workers(engine, search_id, trial.trial_id)
    for trial in store.unfinished():
        store.end(trial.trial_id, "stopped", f"the time budget of {scale.time_budget_s:g} s was spent")


def loggers(spec: SearchSpec) -> list[ray.tune.Callback]:
    """Return the callbacks that tell MLflow of trials and, in a folder, write curves for TensorBoard."""
    found: list[ray.tune.Callback] = []
    if spec.storage.is_folder:
        found.append(Curves(spec.storage, spec.search_id))
    if spec.options.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        found.append(MLflowLoggerCallback(spec.options.mlflow, experiment_name=spec.search_id))
    return found


@contextlib.contextmanager
def storage_of_tune(storage: Storage) -> Iterator[Storage]:
    """Give the storage for Tune's own files: the search's where that is a folder, otherwise a temporary folder.

    Nothing here reads them but TensorBoard, whose curves are written into a folder alone. In an object store Tune's
    event loop would wait for four requests at each start of a trial, and hold a connection for each trial.
    """
    if storage.is_folder:
        yield storage
        return
    with tempfile.TemporaryDirectory(prefix="fashion-tune-", ignore_cleanup_errors=True) as folder:
        yield open_storage(folder)


def build_tuner(
    storage: Storage,
    search_id: str,
    store: TrialStore,
    points: list[dict[str, Any]],
    trainable: Any,
    limit: Callable[[int], int],
    callbacks: list[ray.tune.Callback],
    time_budget_s: float = 0.0,
) -> ray.tune.Tuner:
    """Return the Tuner of a search, which runs `trainable` for each of `points` and resumes from nothing of Tune's own.

    `storage` is for Tune's own files; `limit` says how many trials may run at a time. Sets variables of the environment
    that Tune reads.
    """
    quieten_tune()
    # Tune starts one trial at a time if it is not told how many may wait for a process; `limit` decides.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(len(points))
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=PlannedSampler(points, build_sampler(store), limit),
            scheduler=replay_scheduler(store),
            num_samples=len(points),
            time_budget_s=time_budget_s or None,
            # A trial with workers of its own holds its process until they are gone; a fresh process is quicker.
            reuse_actors=store.config.workers_per_trial == 1,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name=search_id,
            storage_path=storage.path(schemas.SEARCHES_FOLDER),
            storage_filesystem=storage.fs,
            failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def quieten_tune() -> None:
    """Keep Tune from writing and saying a second time what the reports hold and the `SearchCallback` says."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its CSV and JSON files
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # Its snapshots, which hold every trial and are never read here; the curves for TensorBoard are copied with them.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "60")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # this one prints failures whatever its verbosity
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # a list of the trials that failed


def shared_by_trials(spec: SearchSpec, config: SearchConfig, rows: Mapping[str, StoredRows]) -> dict[str, Any]:
    """Return what `trial.train_trial` is told; the `rows` are in the object store once for all trials."""
    workers, plan = config.workers_per_trial, spec.plan
    settings = trainer.worker_settings(spec.storage, spec.manifest, spec.base, plan.trial, rows) | {"show_bar": False}
    shared = settings | {
        "base": spec.base.to_dict(),
        "storage": spec.storage.uri,
        "search_id": spec.search_id,
        "workers_per_trial": workers,
        "use_gpu": plan.trial.use_gpu,
        "gpu_share": plan.gpus_per_trial,
    }
    if workers == 1:
        return shared
    return shared | {"worker_settings": settings, "scaling": trainer.scaling_config(plan.trial)}


def remove_checkpoints(storage: Storage, search_id: str, store: TrialStore) -> None:
    """Remove the checkpoints of all trials but the unfinished ones.

    Workers that were still saving when their trial was stopped leave some, and so does a crash: of trials that had just
    ended, and of trials whose start was lost, which start anew. One listing finds them all.
    """
    unfinished = {trial.trial_id for trial in store.unfinished()}
    folder = storage.path(schemas.SEARCHES_FOLDER, search_id)
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=True)
    inside = (info.path.removeprefix(f"{folder}/").split("/") for info in storage.fs.get_file_info(selector))
    names = {parts[0] for parts in inside if parts[1:2] == [CHECKPOINTS]} - unfinished
    with ThreadPoolExecutor(tables.READERS) as pool:
        places = ((schemas.SEARCHES_FOLDER, search_id, name, CHECKPOINTS) for name in sorted(names))
        list(pool.map(lambda place: storage.delete_folder(*place), places))


def refit_winner(spec: SearchSpec, winner: Trial) -> trainer.TrainResult:
    """Train the winner's settings on all rows, val included, for the epochs chosen on val; evaluate once on test."""
    assert winner.best is not None, "the winner has an epoch"
    config = replace(
        TrainConfig.from_dict(spec.base.to_dict() | winner.settings),
        hold_out_val=False,
        max_train_rows=0,
        stop_after=int(winner.best["epoch"]),
    )
    assert spec.plan.refit is not None, "the plan has room for the refit"
    scale = ScaleConfig(
        num_workers=str(spec.plan.refit.num_workers[0]),
        cpus_per_worker=spec.scale.cpus_per_worker,
        use_gpu="yes" if spec.plan.refit.use_gpu else "no",
        wait_for_nodes_s=spec.scale.wait_for_nodes_s,
    )
    run_id = f"{spec.search_id}-refit"
    run = trainer.RunSpec(
        run_id,
        config,
        scale,
        source=spec.options.source,
        resume=runs.find_run(spec.storage, run_id) is not None,
        kind="refit",
        search_id=spec.search_id,
        mlflow=spec.options.mlflow,
    )
    return trainer.train(spec.storage, run)
