"""One training run from start to report: build and fit the `TorchTrainer`, choose the checkpoint, write the rows."""

import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

from fashion import cluster, data, evaluation, report
from fashion.cluster import Plan
from fashion.config import ScaleConfig, TrainConfig
from fashion.model import NUM_PARAMETERS
from fashion.progress import EpochsWriter, Watcher
from fashion.storage import Storage
from fashion.worker import train_loop_per_worker

CHECKPOINTS_TO_KEEP = 1


@dataclass(frozen=True)
class Finished:
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
    source: str = "auto",
    resume: bool = False,
    announce: Callable[[Plan], None] = lambda plan: None,
) -> Finished:
    """Train, choose the best checkpoint on val, evaluate it once on test, and write all reports.

    Prepares the data from `source` if the storage holds none, and connects to Ray. `announce` is given the plan before
    anything starts. Raises `UserError` for what the user can mend and `RunFailed` for a run that failed; the reports
    say the same.
    """
    scale.check_batch(config.global_batch_size)
    if resume:
        report.check_same_config(storage, run_id, config)
        row = report.load_run(storage, run_id)
        if row["status"] == "completed":
            return Finished(run_id, row, result_paths(storage, run_id, row), was_finished=True)
    else:
        report.check_new_run(storage, run_id)
    manifest = data.find_manifest(storage) or data.prepare(storage, source)[0]
    cluster.connect()
    plan = cluster.make_plan(config, scale, manifest.rows["train"], manifest.rows["val"])
    announce(plan)
    storage.check_writable()
    started = begin_row(storage, run_id, config, manifest)
    clock = time.perf_counter()
    row = started | run_or_explain(storage, run_id, config, plan, manifest)
    if row["status"] == "completed":
        scores = evaluation.evaluate_run(storage, run_id, row, split="test", plan=plan)
        row |= {"test_loss": scores.loss, "test_accuracy": scores.accuracy, "test_rows": scores.num_rows}
    row |= {"finished_at": datetime.now(UTC), "wall_s": time.perf_counter() - clock}
    report.write_table(storage, "runs", run_id, [row])
    if row["status"] != "completed":
        raise RunFailed(f"run {run_id} {row['status']}: {row['error']}")
    return Finished(run_id, row, result_paths(storage, run_id, row))


def begin_row(storage: Storage, run_id: str, config: TrainConfig, manifest: data.Manifest) -> dict[str, Any]:
    """Write the `runs` row of a run that starts or continues, and return it."""
    earlier = report.find_run(storage, run_id) or {}
    row = {
        "kind": "train",
        "status": "running",
        "started_at": earlier.get("started_at") or datetime.now(UTC),
        "dataset": manifest.dataset,
        "dataset_sha256": manifest.sha256,
        "source_hash": report.source_hash(),
        "preset": config.preset,
        "config_json": report.config_json(config),
        "num_parameters": NUM_PARAMETERS,
        "data_mode": config.data_mode,
        "hardware": report.hardware(),
    } | report.versions()
    report.write_table(storage, "runs", run_id, [row])
    return row


def run_or_explain(
    storage: Storage, run_id: str, config: TrainConfig, plan: Plan, manifest: data.Manifest
) -> dict[str, Any]:
    """Fit the run; return the columns of its outcome. A failure of the training code becomes a row, not a traceback."""
    try:
        with Watcher(storage, run_id, config.epochs):
            result = build_trainer(storage, run_id, config, plan, manifest).fit()
    except ray.train.WorkerGroupError as error:
        print(error, file=sys.stderr)
        rank, first = min(error.worker_failures.items())
        return {"status": "failed", "error": f"worker {rank}: {' '.join(str(first).split())[-500:]}"}
    except (ray.exceptions.RayActorError, KeyboardInterrupt, SystemExit):
        # What reaches the driver after Ctrl-C depends on what Ray was waiting for: its own handler ends the controller.
        return {"status": "interrupted", "error": f"stopped; continue with --run-id {run_id} --resume"}
    return outcome_columns(storage, run_id, result)


def build_trainer(
    storage: Storage, run_id: str, config: TrainConfig, plan: Plan, manifest: data.Manifest
) -> TorchTrainer:
    """Return the trainer; its datasets are materialised and cut here, while CPUs are still free."""
    cuts = {
        "train": data.cut_points(plan.num_train_rows, *plan.num_workers),
        "val": data.cut_points(plan.num_val_rows, *plan.num_workers),
    }
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config=worker_settings(config, plan, manifest, cuts),
        datasets=open_datasets(storage, manifest, config, cuts),
        # Only a streamed train set is split by Ray; everything else is cut by row number beforehand.
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"] if config.data_mode == "streaming" else []),
        scaling_config=scaling_config(plan),
        run_config=ray.train.RunConfig(
            name=run_id,
            storage_path=storage.show(report.RUNS_FOLDER),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=CHECKPOINTS_TO_KEEP, checkpoint_score_attribute="checkpoint_score"
            ),
            # With an elastic width, a lost worker or node costs the epochs since the last checkpoint, not the run.
            failure_config=ray.train.FailureConfig(max_failures=0 if plan.num_workers[0] == plan.num_workers[1] else 3),
            callbacks=[EpochsWriter(storage, run_id)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def worker_settings(
    config: TrainConfig, plan: Plan, manifest: data.Manifest, cuts: dict[str, list[int]]
) -> dict[str, Any]:
    """Return what every worker is told; see `worker.train_loop_per_worker`."""
    return {
        "config": config.to_dict(),
        "threads": plan.threads_per_worker,
        "pixel_mean": manifest.pixel_mean,
        "pixel_std": manifest.pixel_std,
        "cuts": cuts,
        "show_bar": sys.stdout.isatty(),
    }


def scaling_config(plan: Plan) -> ray.train.ScalingConfig:
    """Return the worker group's shape in Ray's terms."""
    low, high = plan.num_workers
    return ray.train.ScalingConfig(
        num_workers=high if low == high else (low, high),
        use_gpu=plan.use_gpu,
        resources_per_worker=plan.resources_per_worker(),
    )


def open_datasets(
    storage: Storage, manifest: data.Manifest, config: TrainConfig, cuts: dict[str, list[int]]
) -> dict[str, Any]:
    """Return the Ray Datasets by the names that the workers ask for: `train-0`, `val-0`, ... or `train` if streamed."""
    datasets: dict[str, Any] = {}
    for split, points in cuts.items():
        if split == "train" and config.data_mode == "streaming":
            datasets["train"] = data.open_dataset(storage, manifest, split).limit(points[-1])
        else:
            pieces = data.open_pieces(data.load_split(storage, manifest, split), points)
            datasets |= {f"{split}-{k}": piece for k, piece in enumerate(pieces)}
    return datasets


def outcome_columns(storage: Storage, run_id: str, result: ray.train.Result) -> dict[str, Any]:
    """Return the columns of the `runs` row that training decides."""
    told = result.return_value
    assert told is not None, "rank 0 returned nothing"
    if told["diverged"]:
        return {"status": "diverged", "error": told["diverged"], "epochs_done": len(told["history"]) // 2}
    assert result.best_checkpoints, "training ended without a checkpoint"
    written = report.read_table(storage, "epochs", run_id)
    assert written == told["history"], "the epochs table is not the history that the workers kept"
    checkpoint, best = max(result.best_checkpoints, key=lambda pair: pair[1]["checkpoint_score"])
    name = checkpoint.path.rstrip("/").rsplit("/", 1)[-1]
    return summarise(told["history"], int(best["epoch"])) | {
        "status": "completed",
        "checkpoint": f"{report.RUNS_FOLDER}/{run_id}/{name}",
        **{key: told[key] for key in ("world_size", "device", "precision", "threads_per_worker")},
        **{key: told[key] for key in ("peak_memory_bytes", "resumed_from")},
    }


def summarise(history: list[dict[str, Any]], best_epoch: int) -> dict[str, Any]:
    """Return the `runs` columns that follow from the `epochs` rows.

    The four numbers are those of the best epoch. `images_per_s` is the median over epochs, without the first one,
    which pays for warming up, if there are others.
    """
    rows = {(row["epoch"], row["split"]): row for row in history}
    train, val = rows[best_epoch, "train"], rows[best_epoch, "val"]
    rates = [row["images_per_s"] for row in history if row["split"] == "train"]
    warm = sorted(rates[1:] or rates)
    return {
        "epochs_done": len(rates),
        "best_epoch": best_epoch,
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "images_per_s": (warm[(len(warm) - 1) // 2] + warm[len(warm) // 2]) / 2,
    }


def result_paths(storage: Storage, run_id: str, row: dict[str, Any]) -> dict[str, str]:
    """Return where the run's things lie, as a person would write it."""
    return {
        "checkpoint": storage.show(row["checkpoint"]),
        "reports": storage.show(report.REPORTS_FOLDER, "<table>", f"run_id={run_id}"),
    }
