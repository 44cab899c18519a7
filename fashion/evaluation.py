"""Batch inference of a chosen checkpoint with Ray Data: every row of a split exactly once, then its tables."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
import torch.nn.functional as F

from fashion import checkpoint, data, fit, loop, report
from fashion.cluster import Plan
from fashion.config import NUM_CLASSES, TrainConfig, UserError
from fashion.model import place
from fashion.storage import Storage, open_storage

# Blocks and batches have the same rows for any number of workers, so their arithmetic, and every tie, is the same.
ROWS_PER_BLOCK = 500


@dataclass(frozen=True)
class Scores:
    """Result of an evaluation: the mean loss in nats, the accuracy in 0..1, and the rows counted."""

    loss: float
    accuracy: float
    num_rows: int


class Classifier:
    """A worker of `map_batches`: loads the checkpoint once, then classifies batches."""

    def __init__(
        self, uri: str, folder: str, config: dict[str, Any], precision: str, threads: int, use_gpu: bool
    ) -> None:
        """Load the weights from `folder` below the storage `uri`, their sums verified."""
        torch.set_num_threads(threads)
        storage = open_storage(uri)
        manifest = storage.read_bytes(folder, checkpoint.MANIFEST)
        weights = checkpoint.verified(checkpoint.WEIGHTS, manifest, storage.read_bytes(folder, checkpoint.WEIGHTS))
        model = fit.build_model(TrainConfig.from_dict(config), pixel_mean=0.0, pixel_std=1.0)
        model.load_state_dict(checkpoint.load_weights(weights))
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._model = place(model, self._device).eval()
        self._precision = precision

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Turn rows of `data.SCHEMA` into index, label, predicted, probabilities and loss."""
        rows = data.from_table(batch.select(data.SCHEMA.names).cast(data.SCHEMA))
        images = torch.from_numpy(np.array(rows.images)).unsqueeze(1).to(self._device)
        labels = torch.from_numpy(rows.labels.astype(np.int64)).to(self._device)
        with loop.autocast(self._precision, self._device):
            logits = self._model(images)
        logits = logits.float()
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

    Raises `AssertionError` unless every row of the split came back exactly once.
    """
    manifest = data.load_manifest(storage)
    data.check_same_data(storage, manifest, row)
    num_rows = manifest.rows[split]
    blocks = data.evaluation_blocks(data.load_split(storage, manifest, split), ROWS_PER_BLOCK)
    workers = min(plan.num_workers[1], -(-num_rows // ROWS_PER_BLOCK))
    predictions = blocks.map_batches(
        Classifier,
        fn_constructor_args=(
            storage.uri,
            row["checkpoint"],
            json.loads(row["config_json"]),
            row["precision"],
            plan.threads_per_worker,
            plan.use_gpu,
        ),
        batch_size=ROWS_PER_BLOCK,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=plan.cpus_per_worker,
        num_gpus=1 if plan.use_gpu else None,
    )
    tables = [pa.table(batch) for batch in predictions.iter_batches(batch_size=None, batch_format="pyarrow")]
    table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables).sort_by("index")
    index = table["index"].to_numpy()
    assert len(index) == num_rows == len(np.unique(index)), (len(index), num_rows)
    return table


def evaluate_run(storage: Storage, run_id: str, row: dict[str, Any], *, split: str, plan: Plan) -> Scores:
    """Evaluate a run's chosen checkpoint on `split`; write `predictions`, `classes` and `confusion`.

    Each split has files of its own, so two evaluations of one run may go on at once. Raises `UserError` if the run has
    no checkpoint.
    """
    if not row["checkpoint"]:
        raise UserError(f"--run-id {run_id} has no checkpoint (status {row['status']}); train it first")
    table = predict(storage, row, split, plan)
    labels, predicted = table["label"].to_numpy(), table["predicted"].to_numpy()
    matrix = report.confusion_matrix(labels, predicted)
    fresh = {
        "predictions": table.to_pylist(),
        "classes": report.class_rows(matrix),
        "confusion": report.confusion_rows(matrix),
    }
    for name, rows in fresh.items():
        report.write_table(storage, name, run_id, [{"split": split} | new for new in rows], part=split)
    losses = table["loss"].to_numpy().astype(np.float64)
    return Scores(float(losses.mean()), float((labels == predicted).mean()), len(labels))
