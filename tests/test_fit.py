"""The epochs of a run without Ray: the real network on the stand-in."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fashion import fit, loop, synthetic
from fashion.config import TrainConfig


def tensors(rows: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> loop.Batch:
    """Return images (N, 1, 28, 28) uint8 and labels (N,) int64."""
    images, labels = rows
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take many times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_network_learns_the_stand_in_but_not_fully(one_thread: None) -> None:
    """It must not be so easy that a broken recipe passes, nor so hard that a good one fails."""
    config = TrainConfig(preset="smoke", epochs=2, global_batch_size=50)
    images, labels = tensors(synthetic.draw(1200, seed=10))
    val = tensors(synthetic.draw(500, seed=11))
    pixels = images.float() / 255
    batches = fit.resident_batches(config, images, labels, fit.Rank(), config.steps_per_epoch(len(labels)))
    rows = fit.Rows(batches, val, len(labels), len(val[1]), float(pixels.mean()), float(pixels.std()))
    history = list(fit.Run(config, rows, fit.Rank(), wrap=lambda network, precision: (network, "none")).epochs())
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert 0.75 < history[-1]["val_accuracy"] < 0.95, history[-1]
