"""Evaluates the chosen checkpoint of a run on a split: Ray tasks classify every row exactly once; then the tables."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import torch.nn.functional as F

from fashion.cluster.plan import Plan
from fashion.config import NUM_CLASSES, TrainConfig
from fashion.data import loading
from fashion.data.manifest import check_same_data, load_manifest
from fashion.data.rows import from_table, to_table
from fashion.data.shards import StoredRows, shard_bounds
from fashion.inference.classifier import ROWS_PER_BATCH, compute_logits, load_model
from fashion.model.device import set_arithmetic
from fashion.model.network import FashionCNN
from fashion.reports import classification, tables
from fashion.storage import Storage, open_storage
from fashion.training.run import prepare_process


@dataclass(frozen=True)
class Scores:
    """Result of an evaluation: the mean loss in nats per row, the accuracy in 0..1, and the number of rows."""

    loss: float
    accuracy: float
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that a process needs to load a run's network and to classify with it as the run did."""

    storage: str
    """URI of the storage."""
    folder: str
    """Folder of the checkpoint, relative to the storage."""
    config: dict[str, Any]
    """The run's settings, as `TrainConfig.to_dict` gives them."""
    precision: str
    threads: int
    use_gpu: bool


def classify(stored: StoredRows, spec: ModelSpec) -> pa.Table:
    """Classify rows of the object store; return index, label, predicted, probabilities and loss. Runs as a Ray task.

    Raises as `load_model` does.
    """
    prepare_process(spec.threads)
    device = torch.device("cuda" if spec.use_gpu else "cpu")
    config = TrainConfig.from_dict(spec.config)
    set_arithmetic(spec.precision, config.deterministic, device)
    model = load_model(open_storage(spec.storage), spec.folder, config, device)
    rows = to_table(stored.pull())
    batches = (rows.slice(start, ROWS_PER_BATCH) for start in range(0, len(rows), ROWS_PER_BATCH))
    return pa.concat_tables(classify_batch(model, batch, spec.precision, device, config.tta) for batch in batches)


@torch.inference_mode()
def classify_batch(model: FashionCNN, batch: pa.Table, precision: str, device: torch.device, tta: str) -> pa.Table:
    """Classify one batch; return the columns that `classify` does."""
    rows = from_table(batch)
    labels = torch.from_numpy(rows.labels.astype(np.int64)).to(device)
    logits = compute_logits(model, rows.images, precision, device, tta)
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


def predict(storage: Storage, row: dict[str, Any], split: str, plan: Plan, rows: StoredRows | None = None) -> pa.Table:
    """Classify `split` with the chosen checkpoint of the `runs` row `row`; return predictions sorted by index.

    `rows` are those of the split if they are in the object store already; otherwise Ray Data reads them. Starts one Ray
    task per worker, each on its shard; Ray retries a task whose process dies. Raises `UserError` if the storage holds
    other data than the run was trained on, and `AssertionError` unless every row of the split came back exactly once.
    """
    manifest = load_manifest(storage)
    check_same_data(storage, manifest, row)
    if rows is None:
        rows = loading.read_splits(storage, manifest, [split])[split]
    task = ray.remote(num_cpus=plan.cpus_per_worker, num_gpus=1 if plan.use_gpu else None)(classify)
    spec = ModelSpec(
        storage=storage.uri,
        folder=row["checkpoint"],
        config=json.loads(row["config_json"]),
        precision=row["precision"],
        threads=plan.threads_per_worker,
        use_gpu=plan.use_gpu,
    )
    parts = [task.remote(rows.part(start, stop), spec) for start, stop in shards(len(rows), plan)]
    table = pa.concat_tables(ray.get(parts)).sort_by("index")
    index = table["index"].to_numpy()
    assert len(index) == len(rows) == len(np.unique(index)), (len(index), len(rows))
    return table


def shards(num_rows: int, plan: Plan) -> list[tuple[int, int]]:
    """Return the row range of each worker that gets rows, as (start, stop); all but the last hold whole batches."""
    batches, workers = -(-num_rows // ROWS_PER_BATCH), plan.num_workers[1]
    bounds = [shard_bounds(batches, rank, workers) for rank in range(workers)]
    return [(first * ROWS_PER_BATCH, min(end * ROWS_PER_BATCH, num_rows)) for first, end in bounds if first < end]


def evaluate_run(
    storage: Storage, run_id: str, row: dict[str, Any], *, split: str, plan: Plan, rows: StoredRows | None = None
) -> Scores:
    """Evaluate a run's chosen checkpoint on `split`; write the tables `predictions`, `classes` and `confusion`.

    `row` is the run's `runs` row, one that `check_run` has accepted or that training has just written; `rows` is as for
    `predict`. Each split has its own files, so evaluations of a run on different splits may run at the same time.
    """
    table = predict(storage, row, split, plan, rows)
    labels, predicted = table["label"].to_numpy(), table["predicted"].to_numpy()
    matrix = classification.confusion_matrix(labels, predicted)
    rows_by_table = {
        "predictions": table.to_pylist(),
        "classes": classification.class_rows(matrix),
        "confusion": classification.confusion_rows(matrix),
    }
    for name, split_rows in rows_by_table.items():
        tables.write_table(storage, name, run_id, [{"split": split} | each for each in split_rows], part=split)
    losses = table["loss"].to_numpy().astype(np.float64)
    return Scores(float(losses.mean()), float((labels == predicted).mean()), len(labels))
