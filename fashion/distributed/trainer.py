"""One training run from start to report: build and fit the `TorchTrainer`, choose the checkpoint, write the rows."""

import functools
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import ray.exceptions
import ray.train
from pyarrow import fs as pafs

from fashion.cluster import connection
from fashion.cluster.lock import NameLock
from fashion.cluster.plan import Plan, make_plan
from fashion.cluster.preflight import check_every_node_sees
from fashion.config import FaultConfig, ScaleConfig, TrainConfig
from fashion.data import preparation, shards, splits
from fashion.data.manifest import SPLITS, Manifest, check_same_data, check_source, find_manifest
from fashion.data.rows import Split, joined
from fashion.distributed.callbacks import EpochReporter, TrackingCallback, read_step
from fashion.distributed.lean_trainer import LeanTrainer
from fashion.distributed.worker import train_loop_per_worker
from fashion.inference import evaluation
from fashion.model.network import num_parameters
from fashion.reports import provenance, runs, schemas, tables
from fashion.reports.progress import ProgressBar, last_line
from fashion.reports.tracking import FOLDER, MLflowRun, TensorBoard, check_mlflow
from fashion.storage import Storage
from fashion.training.checkpoint_manager import name_of
from fashion.training.metrics import best_epoch, epoch_rows, summarise

# Ctrl-C while workers start is heard when they have started; a second one is heard at once.
SECONDS_TO_STOP = 30.0
# A run with a range of workers looks this often whether the cluster has room for more (Ray's default is 60 s). To take
# them in costs a start of the workers and the work since the latest checkpoint.
SECONDS_BETWEEN_WIDTHS = 30.0

T = TypeVar("T")


@dataclass(frozen=True)
class RunSpec:
    """What a run is made of: where it is kept, its settings, its workers, its data, and the servers that hear of it."""

    storage: Storage
    run_id: str
    config: TrainConfig
    plan: Plan
    manifest: Manifest
    tracked: Sequence[MLflowRun] = ()
    faults: FaultConfig = FaultConfig()  # noqa: RUF009 - it is frozen


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves: the `runs` row, where things lie, and whether the run was already finished before."""

    run_id: str
    row: dict[str, Any]
    paths: dict[str, str]
    was_finished: bool = False


class RunFailed(RuntimeError):
    """A run that ended without a result; its `runs` row says why."""


def new_run_id(preset: str) -> str:
    """Return a fresh id such as `default-20260131-093000-1a2b`."""
    return f"{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def train(
    storage: Storage,
    run_id: str,
    config: TrainConfig,
    scale: ScaleConfig,
    *,
    faults: FaultConfig = FaultConfig(),  # noqa: B008 - it is frozen
    source: str = "auto",
    resume: bool = False,
    kind: str = "train",
    search_id: str = "",
    mlflow: str = "",
    announce: Callable[[Plan], None] = lambda plan: None,
) -> TrainResult:
    """Train, choose the best checkpoint on val, evaluate it once on test, and write all reports.

    Prepares the data from `source` if the storage holds none, and connects to Ray. `kind` and `search_id` are columns
    of its row: the winner of a search is trained as its `refit`. `mlflow` is the address of a server that hears of it.
    `announce` is given the plan before anything starts. Raises `UserError` for what the user can mend and
    `RunFailed` for a run that failed; the reports say the same.
    """
    scale.check_batch(config.global_batch_size)
    if mlflow:
        check_mlflow(mlflow)
    earlier = earlier_life(storage, run_id, config, resume)
    if earlier.get("status") == "completed":
        return TrainResult(run_id, earlier, result_paths(storage, run_id, earlier), was_finished=True)
    manifest = find_manifest(storage) or preparation.prepare(storage, source)[0]
    check_source(storage, manifest, source)
    check_same_data(storage, manifest, earlier)
    storage.check_writable(schemas.RUNS_FOLDER, schemas.REPORTS_FOLDER)
    with NameLock(storage, schemas.RUNS_FOLDER, run_id, "--run-id"):
        earlier = earlier_life(storage, run_id, config, resume)  # somebody may have had it until now
        if resume:
            provenance.warn_of_other_code(run_id, earlier)
        connection.connect()
        check_every_node_sees(storage)
        plan = make_plan(config, scale, manifest)
        announce(plan)
        for split in SPLITS:
            splits.load_split(storage, manifest, split)  # a damaged file is found before anything is written
        # Before the row: a server that refuses leaves none that would say "running" for ever.
        tracked = [MLflowRun(mlflow, run_id, config.to_dict())] if mlflow else []
        identity = {"kind": kind, "search_id": search_id or None}
        return carry_out(RunSpec(storage, run_id, config, plan, manifest, tracked, faults), identity | earlier)


def earlier_life(storage: Storage, run_id: str, config: TrainConfig, resume: bool) -> dict[str, Any]:
    """Return the row of the run that is to go on, or nothing for a new one; raises `UserError` if it may not."""
    if not resume:
        runs.check_new_run(storage, run_id)
        return {}
    runs.check_same_config(storage, run_id, config)
    return runs.load_run(storage, run_id)


def carry_out(job: RunSpec, earlier: dict[str, Any]) -> TrainResult:
    """Run `job` to its end and write its row; `earlier` has the columns that an earlier life and the caller know."""
    storage, run_id = job.storage, job.run_id
    started = begin_row(storage, run_id, job.config, job.manifest, earlier)
    clock = time.perf_counter()
    try:
        row = started | run_or_explain(job)
    except BaseException as error:
        # Nothing that was foreseen: the row says so, and the traceback goes on.
        failed = started | {"status": "failed", "error": brief(error)}
        tables.write_table(storage, "runs", run_id, [failed])
        for each in job.tracked:
            each.end(failed)
        raise
    row |= {"finished_at": datetime.now(UTC), "wall_s": (earlier.get("wall_s") or 0) + time.perf_counter() - clock}
    tables.write_table(storage, "runs", run_id, [row])
    for each in job.tracked:
        each.end(row)
    if row["status"] != "completed":
        raise RunFailed(f"run {run_id} {row['status']}: {row['error']}")
    return TrainResult(run_id, row, result_paths(storage, run_id, row))


def begin_row(
    storage: Storage, run_id: str, config: TrainConfig, manifest: Manifest, earlier: dict[str, Any]
) -> dict[str, Any]:
    """Write the `runs` row of a run that starts, or that goes on from its `earlier` row, and return it."""
    row = {
        "kind": earlier["kind"],
        "search_id": earlier["search_id"],
        "status": "running",
        "started_at": earlier.get("started_at") or datetime.now(UTC),
        "wall_s": earlier.get("wall_s"),
    } | identity_columns(config, manifest)
    tables.write_table(storage, "runs", run_id, [row])
    return row


def identity_columns(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """Return the columns of the `runs` table that say what a run is made of."""
    return {
        "dataset": manifest.dataset,
        "dataset_sha256": manifest.sha256,
        "source_hash": provenance.source_hash(),
        "preset": config.preset,
        "config_json": runs.config_json(config),
        "num_parameters": num_parameters(config.depth, config.padding),
        "data_mode": config.data_mode,
        "hardware": provenance.hardware(),
    } | provenance.versions()


def run_or_explain(job: RunSpec) -> dict[str, Any]:
    """Fit the run and evaluate its chosen checkpoint once on test; return the columns of the outcome.

    Whatever stops the run becomes a row with a status and a reason; details go to standard error.
    """
    try:
        columns = fit_and_choose(job)
        if columns["status"] == "completed":
            scores = evaluation.evaluate_run(job.storage, job.run_id, columns, split="test", plan=job.plan)
            columns |= {"test_loss": scores.loss, "test_accuracy": scores.accuracy, "test_rows": scores.num_rows}
    except (KeyboardInterrupt, SystemExit):
        # Ctrl-C, or the SIGTERM of `ray job stop`, which Ray turns into SystemExit.
        return {"status": "interrupted", "error": f"stopped; continue with --run-id {job.run_id} --resume"}
    except (ray.train.TrainingFailedError, ray.exceptions.RayError, OSError) as error:
        print(error, file=sys.stderr)
        return {"status": "failed", "error": brief(error)}
    return columns


def fit_and_choose(job: RunSpec) -> dict[str, Any]:
    """Fit the run and choose its checkpoint on val; return the columns of the outcome, those of test apart."""
    with ProgressBar(job.config.last_epoch, functools.partial(read_step, job.run_id)) as bar:
        trainer = build_trainer(job, bar.say)
        result = in_a_thread(trainer.fit, trainer.stop)
    return outcome_columns(job, result)


def in_a_thread(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Run `work` in a thread and wait for it; if the wait is interrupted, `stop` it and let it end.

    In the main thread Ray would take SIGINT for itself and keep it after the run; so, Ctrl-C reaches the caller.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:  # handed to the caller, whatever it is
            done.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        result, error = done.get()
    except BaseException:
        # Whatever ends the wait goes on to the caller, once the workers have ended. Ray's handler of SIGTERM has the
        # kernel abort the process 3 s later; to stop and to write may take longer.
        signal.alarm(0)
        stop()
        thread.join(SECONDS_TO_STOP)
        raise
    if error is not None:
        raise error
    return cast(T, result)


def brief(error: BaseException | str) -> str:
    """Return an error's last line, at most 500 characters; of a worker group's error, that of its first rank."""
    failures = getattr(error, "worker_failures", None)
    rank, first = min(failures.items()) if failures else (None, error)
    return last_line(first) if rank is None else f"worker {rank}: {last_line(first)}"


def build_trainer(job: RunSpec, say: Callable[[str], None]) -> LeanTrainer:
    """Return the trainer, its rows in the object store; `say` is given a line for each epoch."""
    storage, config, plan = job.storage, job.config, job.plan
    streamed = {}
    if config.data_mode == "streaming":
        # The one set that is split by Ray; everything else is cut by row number beforehand.
        streamed = {"train": splits.open_dataset(storage, job.manifest, "train").limit(plan.num_train_rows)}
    return LeanTrainer(
        train_loop_per_worker,
        train_loop_config=worker_settings(storage, job.manifest, config, plan)
        | {"folder": (schemas.RUNS_FOLDER, job.run_id), "faults": asdict(job.faults)},
        datasets=streamed,
        scaling_config=scaling_config(plan),
        run_config=ray.train.RunConfig(
            name=job.run_id,
            storage_path=storage.path(schemas.RUNS_FOLDER),
            storage_filesystem=storage.fs,
            failure_config=ray.train.FailureConfig(max_failures=job.faults.max_failures),
            callbacks=[
                EpochReporter(storage, job.run_id, config.last_epoch, say),
                TrackingCallback([*curves(storage, job.run_id, config), *job.tracked]),
            ],
            # Warnings of how Ray tidies up after a failure stay in its log folder; the failure itself is told below.
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def curves(storage: Storage, run_id: str, config: TrainConfig) -> list[TensorBoard]:
    """Return what writes TensorBoard's event files beside the run; nothing if the storage is no folder: it appends."""
    if not isinstance(storage.fs, pafs.LocalFileSystem):
        return []
    return [TensorBoard(storage.path(schemas.RUNS_FOLDER, run_id, FOLDER), config.to_dict())]


def worker_settings(storage: Storage, manifest: Manifest, config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """Return what every worker is told, the rows put into the object store; see `worker.train_loop_per_worker`.

    `folder` is left to the caller.
    """
    num_rows = {"train": plan.num_train_rows, "val": plan.num_val_rows}
    bounds = {split: shards.block_bounds(rows, *plan.num_workers) for split, rows in num_rows.items()}
    resident = ("train", "val") if config.data_mode == "resident" else ("val",)
    return {
        "config": config.to_dict(),
        "threads": plan.threads_per_worker,
        "pixel_mean": manifest.pixel_mean,
        "pixel_std": manifest.pixel_std,
        "bounds": bounds,
        "blocks": {
            split: shards.put_blocks(load_rows(storage, manifest, config, split), bounds[split]) for split in resident
        },
        "show_bar": sys.stdout.isatty(),
        "storage": storage.uri,
        "faults": asdict(FaultConfig()),
        "trial": "",
    }


def scaling_config(plan: Plan) -> ray.train.ScalingConfig:
    """Return the worker group's shape in Ray's terms."""
    low, high = plan.num_workers
    return ray.train.ScalingConfig(
        num_workers=high if low == high else (low, high),
        use_gpu=plan.use_gpu,
        resources_per_worker=plan.resources_per_worker(),
        elastic_resize_monitor_interval_s=SECONDS_BETWEEN_WIDTHS,
    )


def load_rows(storage: Storage, manifest: Manifest, config: TrainConfig, split: str) -> Split:
    """Return a split's rows; val's join those of train unless they are held out."""
    rows = splits.load_split(storage, manifest, split)
    if split == "train" and not config.hold_out_val:
        return joined(rows, splits.load_split(storage, manifest, "val"))
    return rows


def outcome_columns(job: RunSpec, result: ray.train.Result) -> dict[str, Any]:
    """Return the columns of the `runs` row that training decides."""
    told = result.return_value
    assert told is not None, "rank 0 returned nothing"
    history, facts = told["history"], {name: told[name] for name in (*schemas.PROCESS_COLUMNS, "resumed_from")}
    if told["diverged"]:
        return facts | {"status": "diverged", "error": told["diverged"], "epochs_done": len(history)}
    # A run killed between a checkpoint and its rows lacks some; the history in the checkpoint is what happened.
    tables.write_table(job.storage, "epochs", job.run_id, [row for metrics in history for row in epoch_rows(metrics)])
    best = best_epoch(history)
    return (
        summarise(history, best)
        | facts
        | {
            "status": "completed",
            "config_json": runs.config_json(job.config),
            "dataset_sha256": job.manifest.sha256,
            "checkpoint": f"{schemas.RUNS_FOLDER}/{job.run_id}/{name_of(best)}",
        }
    )


def result_paths(storage: Storage, run_id: str, row: dict[str, Any]) -> dict[str, str]:
    """Return where the run's things lie, as a person would write it."""
    return {
        "checkpoint": storage.show(row["checkpoint"] or ""),
        "reports": storage.show(schemas.REPORTS_FOLDER, "<table>", f"run_id={run_id}"),
    }
