"""Curves where people already look: TensorBoard event files beside a run. Those of trials are Ray Tune's own."""

from typing import Any

from ray.train import UserCallback
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

FOLDER = "tensorboard"


class TensorBoard(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Writes each epoch's metrics, and the settings once; runs in Ray Train's controller."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        """Write into the local `folder`, which is made with the first epoch."""
        self._folder = folder
        self._settings = settings
        self._writer: SummaryWriter | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Add an epoch."""
        numbers = {name: value for name, value in metrics[0].items() if isinstance(value, int | float)}
        if self._writer is None:
            self._writer = SummaryWriter(self._folder, flush_secs=1)
            for summary in hparams(self._settings, dict.fromkeys(numbers, 0.0)):
                self._writer.file_writer.add_summary(summary)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, int(numbers["epoch"]))
        self._writer.flush()
