"""One training run from its settings to its reports: prepare, plan, train on Ray Train, evaluate, write the rows."""

import contextlib
import functools
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import ray.exceptions
import ray.train

from fashion.cluster import connection
from fashion.cluster.lock import NameLock
from fashion.cluster.nodes import NodesNotUp, wait_for_room
from fashion.cluster.plan import Plan, make_plan
from fashion.cluster.storage_access import check_every_node_sees
from fashion.config import FaultConfig, ScaleConfig, TrainConfig
from fashion.data import loading, preparation
from fashion.data.manifest import SPLITS, Manifest, check_same_data, check_source, find_manifest
from fashion.data.shards import StoredRows
from fashion.distributed.callbacks import EpochReporter, TrackingCallback, read_step
from fashion.distributed.trainers import Engine, make_engine, run_config, uses_internals
from fashion.distributed.worker import train_loop_per_worker
from fashion.inference import evaluation
from fashion.model.network import num_parameters
from fashion.reports import provenance, runs, schemas, tables
from fashion.reports.progress import ProgressBar, last_line
from fashion.reports.tracking import FOLDER, MLflowRun, TensorBoard, check_mlflow
from fashion.storage import Storage
from fashion.training.checkpoint_manager import name_of
from fashion.training.metrics import best_epoch, epoch_rows, summarise


@dataclass(frozen=True)
class RunSpec:
    """What to train: the run's name, its settings and workers, and where its data comes from."""

    run_id: str
    config: TrainConfig
    scale: ScaleConfig
    faults: FaultConfig = FaultConfig()  # noqa: RUF009 - it is frozen
    source: str = "auto"
    """Where the data comes from if the storage holds none: see `jobs.prepare`."""
    resume: bool = False
    """Whether to continue the run `run_id`, which must exist; otherwise it must not."""
    kind: str = "train"
    """Column of the `runs` row: `train`, `study`, or `refit` for the winner of a search."""
    search_id: str = ""
    """Column of the `runs` row: the search whose winner is refitted, else empty."""
    mlflow: str = ""
    """Address of an MLflow tracking server that gets each epoch; empty for none."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that is ready to start: its data is prepared, the cluster has room for it, its trackers are open."""

    storage: Storage
    spec: RunSpec
    plan: Plan
    manifest: Manifest
    rows: Mapping[str, StoredRows]
    """Rows in the object store: `val`, `test`, and `train` unless it is streamed."""
    trackers: Sequence[MLflowRun] = ()


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the `runs` row, the paths to show the user, and whether the run had finished before."""

    run_id: str
    row: dict[str, Any]
    paths: dict[str, str]
    was_finished: bool = False


class RunFailed(RuntimeError):
    """A run that ended without a result; its `runs` row says why."""


def new_run_id(preset: str) -> str:
    """Return a new id such as `default-20260131-093000-1a2b`."""
    return f"{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def train(storage: Storage, spec: RunSpec, announce: Callable[[Plan], None] = lambda plan: None) -> TrainResult:
    """Train, choose the best checkpoint on val, evaluate it once on test, and write all reports.

    Prepares the data if the storage holds none, and connects to Ray. Calls `announce` with the plan before anything
    starts. Does nothing for a run that is complete. Raises `UserError` for what the user can mend and `RunFailed` for a
    run that failed; the reports say the same.
    """
    scale, config = spec.scale, spec.config
    scale.check_batch(config.global_batch_size)
    uses_internals()  # a wrong setting is told before anything else
    if spec.mlflow:
        check_mlflow(spec.mlflow)
    stored = stored_row(storage, spec)
    if stored.get("status") == "completed":
        return TrainResult(spec.run_id, stored, result_paths(storage, spec.run_id, stored), was_finished=True)
    manifest = find_manifest(storage) or preparation.prepare(storage, spec.source)[0]
    check_source(storage, manifest, spec.source)
    check_same_data(storage, manifest, stored)
    tables.open_reports(storage, schemas.RUNS_FOLDER)
    with NameLock(storage, schemas.RUNS_FOLDER, spec.run_id, "--run-id"):
        stored = stored_row(storage, spec)  # another process may have trained the run until now
        if spec.resume:
            provenance.warn_of_other_code(spec.run_id, stored)
        connection.connect()
        try:
            plan = wait_for_room(lambda: make_plan(config, scale, manifest), scale.wait_for_nodes_s)
        except NodesNotUp as error:
            row = first_row(spec, manifest, stored) | {"status": "failed", "error": str(error)}
            tables.write_table(storage, "runs", spec.run_id, [row])
            raise RunFailed(f"run {spec.run_id}: {error}; continue with --run-id {spec.run_id} --resume") from None
        check_every_node_sees(storage)
        announce(plan)
        rows = read_rows(storage, manifest, config)  # finds a damaged file before anything is written
        # Before the `runs` row is written: a server that refuses must not leave a row that says "running" for ever.
        trackers = [MLflowRun(spec.mlflow, spec.run_id, config.to_dict())] if spec.mlflow else []
        return run_and_record(PlannedRun(storage, spec, plan, manifest, rows, trackers), stored)


def stored_row(storage: Storage, spec: RunSpec) -> dict[str, Any]:
    """Return the `runs` row of a run that resumes, {} for a new run.

    Raises `UserError` if the run to resume does not exist or has other settings, or if a new run's name is taken.
    """
    if not spec.resume:
        runs.check_new_run(storage, spec.run_id)
        return {}
    runs.check_same_config(storage, spec.run_id, spec.config)
    return runs.load_run(storage, spec.run_id)


def run_and_record(run: PlannedRun, stored: dict[str, Any]) -> TrainResult:
    """Train and evaluate `run`, and write its row; `stored` is the row of a run that resumes, else {}.

    Raises `RunFailed` unless the run completes.
    """
    storage, run_id = run.storage, run.spec.run_id
    started = first_row(run.spec, run.manifest, stored)
    tables.write_table(storage, "runs", run_id, [started])
    clock = time.perf_counter()
    try:
        row = started | run_or_explain(run)
    except BaseException as error:
        # An error that nobody foresaw: the row records it, and the traceback goes on to the user.
        failed = started | {"status": "failed", "error": summarise_error(error)}
        tables.write_table(storage, "runs", run_id, [failed])
        for tracker in run.trackers:
            tracker.end(failed)
        raise
    row |= {"finished_at": datetime.now(UTC), "wall_s": (stored.get("wall_s") or 0) + time.perf_counter() - clock}
    tables.write_table(storage, "runs", run_id, [row])
    for tracker in run.trackers:
        tracker.end(row)
    if row["status"] != "completed":
        raise RunFailed(f"run {run_id} {row['status']}: {row['error']}")
    return TrainResult(run_id, row, result_paths(storage, run_id, row))


def first_row(spec: RunSpec, manifest: Manifest, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the `runs` row of a run that starts, or resumes from its row `stored`."""
    return {
        "kind": stored.get("kind", spec.kind),
        "search_id": stored.get("search_id", spec.search_id or None),
        "status": "running",
        "started_at": stored.get("started_at") or datetime.now(UTC),
        "wall_s": stored.get("wall_s"),
    } | identity_columns(spec.config, manifest)


def identity_columns(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """Return the columns of the `runs` table that say what is trained: data, code, settings, network, versions."""
    return {
        "dataset": manifest.dataset,
        "dataset_sha256": manifest.sha256,
        "source_hash": provenance.source_hash(),
        "preset": config.preset,
        "config_json": runs.config_json(config),
        "num_parameters": num_parameters(config.depth, config.padding),
        "data_mode": config.data_mode,
    } | provenance.versions()


def run_or_explain(run: PlannedRun) -> dict[str, Any]:
    """Train the run and evaluate its chosen checkpoint once on test; return the columns of the outcome.

    An expected failure (Ctrl-C, lost workers, a full disk) becomes a status and a reason in the columns; details go to
    standard error.
    """
    try:
        columns = fit_and_choose(run)
        if columns["status"] == "completed":
            scores = evaluation.evaluate_run(
                run.storage, run.spec.run_id, columns, split="test", plan=run.plan, rows=run.rows["test"]
            )
            columns |= {"test_loss": scores.loss, "test_accuracy": scores.accuracy, "test_rows": scores.num_rows}
    except (KeyboardInterrupt, SystemExit):
        # Ctrl-C, or the SIGTERM of `ray job stop`, which Ray turns into SystemExit.
        return {"status": "interrupted", "error": f"stopped; continue with --run-id {run.spec.run_id} --resume"}
    except (ray.train.TrainingFailedError, ray.exceptions.RayError, OSError) as error:
        print(error, file=sys.stderr)
        return {"status": "failed", "error": summarise_error(error)}
    return columns


def fit_and_choose(run: PlannedRun) -> dict[str, Any]:
    """Train the run and choose its checkpoint on val; return the columns of the outcome, without those of test."""
    engine = make_engine()
    with ProgressBar(run.spec.config.last_epoch, functools.partial(read_step, engine, run.spec.run_id)) as bar:
        returned = fit(run, engine, bar.say)
    return outcome_columns(run, returned)


def summarise_error(error: BaseException | str) -> str:
    """Return the last line of an error, at most 500 characters; of a worker group's error, that of its lowest rank."""
    failures = getattr(error, "worker_failures", None)
    rank, first = min(failures.items()) if failures else (None, error)
    return last_line(first) if rank is None else f"worker {rank}: {last_line(first)}"


def fit(run: PlannedRun, engine: Engine, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the run, call `say` with a line per epoch, and return what rank 0 returns."""
    storage, config, plan, run_id = run.storage, run.spec.config, run.plan, run.spec.run_id
    streamed = {}
    if config.data_mode == "streaming":
        # Ray Train splits this set among the workers; of every other set, a rank pulls its rows by their numbers.
        streamed = {"train": loading.open_dataset(storage, run.manifest, ["train"]).limit(plan.num_train_rows)}
    with contextlib.ExitStack() as files:
        boards = [
            files.enter_context(contextlib.closing(each)) for each in tensorboard_writers(storage, run_id, config)
        ]
        returned = engine.train(
            train_loop_per_worker,
            worker_settings(storage, run.manifest, config, plan, run.rows)
            | {"folder": (schemas.RUNS_FOLDER, run_id), "faults": asdict(run.spec.faults), "engine": engine},
            scaling_config(plan, run.spec.faults.resize_every_s),
            run_config(
                "ERROR",  # Ray's warnings while it tidies up stay in its logs; `EpochReporter` prints the failure
                name=run_id,
                storage_path=storage.path(schemas.RUNS_FOLDER),
                storage_filesystem=storage.fs,
                failure_config=ray.train.FailureConfig(max_failures=run.spec.faults.max_failures),
                callbacks=[
                    EpochReporter(storage, run_id, config.last_epoch, say),
                    TrackingCallback([*boards, *run.trackers]),
                ],
            ),
            streamed,
        )
    assert returned is not None, "rank 0 returned nothing"
    return cast(dict[str, Any], returned)


def tensorboard_writers(storage: Storage, run_id: str, config: TrainConfig) -> list[TensorBoard]:
    """Return the writer of the run's TensorBoard event files; none in an object store, where files cannot grow."""
    if not storage.is_folder:
        return []
    return [TensorBoard(storage.path(schemas.RUNS_FOLDER, run_id, FOLDER), config.to_dict())]


def read_rows(storage: Storage, manifest: Manifest, config: TrainConfig) -> dict[str, StoredRows]:
    """Read all splits into the object store, apart from a `train` that is to be streamed, whose files are verified.

    Raises `UserError` if a file is missing or damaged.
    """
    if config.data_mode == "streaming":
        loading.verify_files(storage, manifest, "train")
        return loading.read_splits(storage, manifest, ["val", "test"])
    return loading.read_splits(storage, manifest, SPLITS)


def worker_settings(
    storage: Storage, manifest: Manifest, config: TrainConfig, plan: Plan, rows: Mapping[str, StoredRows]
) -> dict[str, Any]:
    """Return the settings of `worker.train_loop_per_worker`, but for `folder` and `engine`, which the caller adds."""
    own = {"val": rows["val"].part(0, plan.num_val_rows)}
    if "train" in rows:
        # In the order of the files val follows train, so a run without val trains on both.
        trained = rows["train"] if config.hold_out_val else rows["train"].followed_by(rows["val"])
        own["train"] = trained.part(0, plan.num_train_rows)
    return {
        "config": config.to_dict(),
        "threads": plan.threads_per_worker,
        "pixel_mean": manifest.pixel_mean,
        "pixel_std": manifest.pixel_std,
        "num_train_rows": plan.num_train_rows,
        "rows": own,
        "show_bar": sys.stdout.isatty(),
        "storage": storage.uri,
        "faults": asdict(FaultConfig()),
        "trial": "",
    }


def scaling_config(plan: Plan, resize_every_s: float = FaultConfig.resize_every_s) -> ray.train.ScalingConfig:
    """Return the plan's workers and their resources as Ray Train takes them.

    A run with a range of workers checks every `resize_every_s` seconds whether the cluster has room for more.
    """
    low, high = plan.num_workers
    return ray.train.ScalingConfig(
        num_workers=high if low == high else (low, high),
        use_gpu=plan.use_gpu,
        resources_per_worker=plan.resources_per_worker(),
        elastic_resize_monitor_interval_s=resize_every_s,
    )


def outcome_columns(run: PlannedRun, returned: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of the `runs` row that follow from what rank 0 returned; write all rows of `epochs` again."""
    run_id, history = run.spec.run_id, returned["history"]
    columns = {name: returned[name] for name in (*schemas.PROCESS_COLUMNS, "resumed_from")}
    if returned["diverged"]:
        return columns | {"status": "diverged", "error": returned["diverged"], "epochs_done": len(history)}
    # A run that was killed between a checkpoint and its rows lacks those; the checkpoint has the complete history.
    tables.write_table(run.storage, "epochs", run_id, [row for metrics in history for row in epoch_rows(metrics)])
    best = best_epoch(history)
    return (
        summarise(history, best)
        | columns
        | {
            "status": "completed",
            "config_json": runs.config_json(run.spec.config),
            "dataset_sha256": run.manifest.sha256,
            "checkpoint": f"{schemas.RUNS_FOLDER}/{run_id}/{name_of(best)}",
        }
    )


def result_paths(storage: Storage, run_id: str, row: dict[str, Any]) -> dict[str, str]:
    """Return the paths of the run's checkpoint and reports, as a person would write them."""
    return {
        "checkpoint": storage.show(row["checkpoint"] or ""),
        "reports": storage.show(schemas.REPORTS_FOLDER, "<table>", run_id),
    }
