"""What a trial of these searches runs: it reports figures and trains nothing. A cluster runs many of them at a time on
one machine, so this module imports neither torch nor what needs it.
"""

import json
import time
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import ray.tune

from fashion.reports import schemas
from fashion.search.space import TRIAL
from fashion.search.trial_store import CHECKPOINTS
from fashion.storage import open_storage
from fashion.training.metrics import Metrics

if TYPE_CHECKING:
    from fashion.distributed.trainers import Engine

STATE = "state.json"
"""File of a trial's checkpoint: the metrics of its epochs."""


@dataclass(frozen=True)
class Reporter:
    """What a trial does in place of training: each epoch takes `epoch_s` seconds, asleep."""

    uri: str
    search_id: str
    max_epochs: int
    epoch_s: float = 0.0
    saves: bool = False
    """Whether it writes a checkpoint before each report and goes on from one."""
    engine: "Engine | None" = None
    """What trains a trial of several workers."""


def report_epochs(point: dict[str, Any], *, reporter: Reporter) -> None:
    """Run a trial: report the epochs of its checkpoint, if there is one, and then the others."""
    storage = open_storage(reporter.uri) if reporter.saves else None
    place = (schemas.SEARCHES_FOLDER, reporter.search_id, point[TRIAL], CHECKPOINTS, STATE)
    history: list[Metrics] = []
    if storage is not None and storage.exists(*place):
        history = json.loads(storage.read_bytes(*place))
    for metrics in history:
        ray.tune.report(dict(metrics))
    for epoch in range(len(history) + 1, reporter.max_epochs + 1):
        time.sleep(reporter.epoch_s)
        metrics = metrics_of(point, epoch)
        history.append(metrics)
        if storage is not None:
            storage.write_bytes(json.dumps(history).encode(), *place)
        ray.tune.report(dict(metrics))


def metrics_of(point: dict[str, Any], epoch: int) -> Metrics:
    """Return the metrics of a trial's epoch: drawn, and the same whenever they are asked for."""
    chance = Random(f"{sorted(point.items())}")
    goal, noise = chance.uniform(0.5, 0.9), Random(f"{sorted(point.items())} {epoch}").gauss(0, 0.01)
    accuracy = min(1.0, max(0.0, goal * (1 - 0.5**epoch) + noise))
    metrics: Metrics = {"epoch": epoch, "lr": point.get("lr", 0.1), "world_size": 1, "device": "cpu"}
    for split, rows in (("train", 55_000), ("val", 5_000)):
        metrics |= {f"{split}_accuracy": accuracy, f"{split}_loss": 2.3 * (1 - accuracy), f"{split}_rows": rows}
    return metrics | {"epoch_time_s": 1.0, "data_wait_s": 0.0, "val_time_s": 0.1, "val_wait_s": 0.0}


def reported(point: dict[str, Any], epoch: int) -> Metrics:
    """Return what the trial store keeps of `metrics_of(point, epoch)` in a trial's history."""
    return {name: value for name, value in metrics_of(point, epoch).items() if name not in schemas.PROCESS_COLUMNS}
