"""Sends metrics to experiment trackers: TensorBoard event files beside a run or trial, and an MLflow server if named.

An MLflow server is told of a search's trials by Ray Tune's own callback.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fashion.config import UserError, require

FOLDER = "tensorboard"
EXPERIMENT = "fashion"
"""MLflow experiment of single runs; a search is an experiment named after it."""


class TensorBoard:
    """Writes each epoch's metrics, and the settings once."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        """Write into the local `folder`, which the first epoch creates."""
        self._folder = folder
        self._settings = settings
        self._writer: Any = None

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        """Add the metrics of an epoch, which are on disk afterwards."""
        # Imports torch, which readers of reports do not need. Its `SummaryWriter` would take two threads and a pipe for
        # each file, and the rest of the process's life to forget it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import hparams

        numbers = numbers_of(metrics)
        if self._writer is None:
            os.makedirs(self._folder, exist_ok=True)
            self._writer = EventsWriter(os.path.join(self._folder, "events"))
            for summary in hparams(self._settings, dict.fromkeys(numbers, 0.0)):
                self._write(summary, 0)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(Summary(value=values), int(numbers["epoch"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the file, if an epoch has created it."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, summary: Any, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))


def numbers_of(columns: dict[str, Any]) -> dict[str, int | float]:
    """Return the entries that are numbers."""
    return {name: value for name, value in columns.items() if isinstance(value, int | float)}


class MLflowRun:
    """A run on an MLflow tracking server: its settings, each epoch's metrics, its final status.

    A resumed run continues the server's run of the same name. If the server fails after the start, the run prints a
    warning and trains on.
    """

    def __init__(self, uri: str, run_id: str, settings: dict[str, Any]) -> None:
        """Start `run_id` on the server at `uri`, or continue it."""
        from mlflow.entities import Param

        self._uri = uri
        client = mlflow_client(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
        known = client.search_runs([number], f"attributes.run_name = '{run_id}'", max_results=1)
        self._id = (known[0] if known else client.create_run(number, run_name=run_id)).info.run_id
        client.update_run(self._id, status="RUNNING")
        client.log_batch(self._id, params=[Param(name, str(value)) for name, value in settings.items()])

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        """Add the metrics of an epoch."""
        with failure_as_warning(self._uri):
            self._log(numbers_of(metrics), int(metrics["epoch"]))

    def end(self, row: dict[str, Any]) -> None:
        """Add the results of the `runs` row `row`, and set the run's final status."""
        statuses = {"completed": "FINISHED", "interrupted": "KILLED"}
        with failure_as_warning(self._uri):
            self._log(numbers_of({name: row.get(name) for name in ("test_accuracy", "test_loss", "wall_s")}), 0)
            mlflow_client(self._uri).set_terminated(self._id, statuses.get(row["status"], "FAILED"))

    def _log(self, numbers: dict[str, int | float], step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        rows = [Metric(name, float(value), now, step) for name, value in numbers.items()]
        mlflow_client(self._uri).log_batch(self._id, metrics=rows)


@contextlib.contextmanager
def failure_as_warning(uri: str) -> Iterator[None]:
    """Turn a failure of the server at `uri` into a warning on standard error."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        print(f"warning: --mlflow {uri} was not told ({first_line(error)})", file=sys.stderr)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return str(error).strip().splitlines()[0][:200]


def mlflow_client(uri: str) -> Any:
    """Return a client of the server at `uri`, with short timeouts and without MLflow's telemetry."""
    # With its default limits, the client waits for minutes for a server that does not exist.
    for name, value in (("HTTP_REQUEST_MAX_RETRIES", "3"), ("HTTP_REQUEST_TIMEOUT", "30"), ("DISABLE_TELEMETRY", "1")):
        os.environ.setdefault(f"MLFLOW_{name}", value)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def check_mlflow(uri: str) -> None:
    """Raise `UserError` unless an MLflow server answers at `uri`."""
    require(
        uri.startswith(("http://", "https://")),
        f"--mlflow {uri} must be the address of a tracking server, as in http://127.0.0.1:5000",
    )
    require(
        find_spec("mlflow") is not None,
        f"--mlflow {uri} needs the package mlflow-skinny, which is not installed; install it or leave out --mlflow",
    )
    client = mlflow_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise UserError(f"--mlflow {uri} does not answer ({first_line(error)}); start it or leave it out") from error
