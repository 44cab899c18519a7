"""Batch inference of a chosen checkpoint in Ray tasks: every row of a split exactly once, then its tables."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import torch.nn.functional as F

from fashion.cluster.plan import Plan
from fashion.config import NUM_CLASSES, RUN_ID_PATTERN, TrainConfig, UserError, require
from fashion.data import splits
from fashion.data.manifest import check_same_data, load_manifest
from fashion.data.rows import from_table, to_table
from fashion.data.shards import shard_bounds
from fashion.model.network import FashionCNN, place
from fashion.reports import classification, runs, schemas, tables
from fashion.storage import Storage, open_storage
from fashion.training import checkpoint, loop
from fashion.training import run as fit

# Batches have the same rows for any number of workers, so their arithmetic, and every tie, is the same.
ROWS_PER_BATCH = 500


@dataclass(frozen=True)
class Scores:
    """Result of an evaluation: the mean loss in nats, the accuracy in 0..1, and the rows counted."""

    loss: float
    accuracy: float
    num_rows: int


def classify(
    rows: pa.Table, uri: str, folder: str, config: dict[str, Any], precision: str, threads: int, use_gpu: bool
) -> pa.Table:
    """Turn rows of `data.SCHEMA` into index, label, predicted, probabilities and loss: a task of its own process.

    The weights come from `folder` below the storage `uri`, their sums verified.
    """
    fit.prepare_process(threads)
    device = torch.device("cuda" if use_gpu else "cpu")
    settings = TrainConfig.from_dict(config)
    model = load_model(open_storage(uri), folder, settings, device)
    starts = range(0, len(rows), ROWS_PER_BATCH)
    batches = (rows.slice(at, ROWS_PER_BATCH) for at in starts)
    return pa.concat_tables(classify_batch(model, batch, precision, device, settings.tta) for batch in batches)


def load_model(storage: Storage, folder: str, config: TrainConfig, device: torch.device) -> FashionCNN:
    """Return the network of a checkpoint on `device`, in evaluation mode.

    Raises `checkpoint.DamagedCheckpoint`, and `OSError` if a file is not there.
    """
    manifest = storage.read_bytes(folder, checkpoint.MANIFEST)
    weights = checkpoint.verified(checkpoint.WEIGHTS, manifest, storage.read_bytes(folder, checkpoint.WEIGHTS))
    model = fit.build_model(config, pixel_mean=0.0, pixel_std=1.0)
    model.load_state_dict(checkpoint.fitting_weights(weights, model))
    return place(model, device).eval()


def check_run(storage: Storage, run_id: str, row: dict[str, Any]) -> TrainConfig:
    """Return a run's settings; raises `UserError` unless its `runs` row leads to a checkpoint that can be loaded.

    The row is not ours alone: what its column `checkpoint` names must lie in the run's own folder.
    """
    config = runs.config_of(storage, run_id, row)
    folder = row["checkpoint"]
    if not folder:
        raise UserError(f"--run-id {run_id} has no checkpoint (status {row['status']}); train it first")
    own, _, name = folder.rpartition("/")
    require(
        own == f"{schemas.RUNS_FOLDER}/{run_id}" and RUN_ID_PATTERN.fullmatch(name) is not None,
        f"--run-id {run_id} names the checkpoint {folder!r}, which is none of its own; train it again",
    )
    try:
        load_model(storage, folder, config, torch.device("cpu"))
    except (checkpoint.DamagedCheckpoint, OSError) as error:
        raise UserError(f"--run-id {run_id} has no whole checkpoint in {folder} ({error}); train it again") from error
    return config


@torch.inference_mode()
def classify_batch(model: FashionCNN, batch: pa.Table, precision: str, device: torch.device, tta: str) -> pa.Table:
    """Classify one batch; see `classify`."""
    rows = from_table(batch)
    images = torch.from_numpy(np.array(rows.images)).unsqueeze(1).to(device)
    labels = torch.from_numpy(rows.labels.astype(np.int64)).to(device)
    logits = loop.classify(model, images, precision=precision, device=device, tta=tta)
    losses = F.cross_entropy(logits, labels, reduction="none").cpu().numpy()
    probabilities = logits.softmax(1).cpu().numpy()
    return pa.table(
        {
            "index": rows.index,
            "label": rows.labels,
            "predicted": logits.argmax(1).cpu().numpy().astype(np.uint8),
            "probabilities": pa.FixedSizeListArray.from_arrays(probabilities.reshape(-1), NUM_CLASSES),
            "loss": losses,
        }
    )


def predict(storage: Storage, row: dict[str, Any], split: str, plan: Plan) -> pa.Table:
    """Classify `split` with the chosen checkpoint of the `runs` row `row`; return predictions sorted by index.

    A task per worker, each on its shard: Ray runs them where there is room, and again if their process dies. Raises
    `AssertionError` unless every row of the split came back exactly once.
    """
    manifest = load_manifest(storage)
    check_same_data(storage, manifest, row)
    rows = to_table(splits.load_split(storage, manifest, split))
    task = ray.remote(num_cpus=plan.cpus_per_worker, num_gpus=1 if plan.use_gpu else None)(classify)
    told = (
        *(storage.uri, row["checkpoint"], json.loads(row["config_json"])),
        *(row["precision"], plan.threads_per_worker, plan.use_gpu),
    )
    parts = [task.remote(rows.slice(start, stop - start), *told) for start, stop in shards(len(rows), plan)]
    table = pa.concat_tables(ray.get(parts)).sort_by("index")
    index = table["index"].to_numpy()
    assert len(index) == len(rows) == len(np.unique(index)), (len(index), len(rows))
    return table


def shards(num_rows: int, plan: Plan) -> list[tuple[int, int]]:
    """Return the workers' row ranges, of whole batches but for the last one's end; a worker without rows has none."""
    batches, workers = -(-num_rows // ROWS_PER_BATCH), plan.num_workers[1]
    bounds = [shard_bounds(batches, rank, workers) for rank in range(workers)]
    return [(first * ROWS_PER_BATCH, min(end * ROWS_PER_BATCH, num_rows)) for first, end in bounds if first < end]


def evaluate_run(storage: Storage, run_id: str, row: dict[str, Any], *, split: str, plan: Plan) -> Scores:
    """Evaluate a run's chosen checkpoint on `split`; write `predictions`, `classes` and `confusion`.

    Each split has files of its own, so two evaluations of one run may go on at once. The row is one that `check_run`
    has passed, or fresh from training.
    """
    table = predict(storage, row, split, plan)
    labels, predicted = table["label"].to_numpy(), table["predicted"].to_numpy()
    matrix = classification.confusion_matrix(labels, predicted)
    fresh = {
        "predictions": table.to_pylist(),
        "classes": classification.class_rows(matrix),
        "confusion": classification.confusion_rows(matrix),
    }
    for name, rows in fresh.items():
        tables.write_table(storage, name, run_id, [{"split": split} | new for new in rows], part=split)
    losses = table["loss"].to_numpy().astype(np.float64)
    return Scores(float(losses.mean()), float((labels == predicted).mean()), len(labels))
