"""The epochs of a run without Ray: the real network on the stand-in."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fashion import checkpoint, fit, loop, synthetic
from fashion.config import Depth, TrainConfig
from fashion.metrics import Metrics


def run_of(config: TrainConfig, num_train_rows: int, num_val_rows: int = 100) -> fit.Run:
    """Return a run at its start, on the stand-in."""
    images, labels = tensors(synthetic.draw(num_train_rows, seed=10))
    val = tensors(synthetic.draw(num_val_rows, seed=11))
    pixels = images.float() / 255
    batches = fit.resident_batches(config, images, labels, fit.Rank(), config.steps_per_epoch(len(labels)))
    rows = fit.Rows(batches, val, len(labels), len(val[1]), float(pixels.mean()), float(pixels.std()))
    return fit.Run(config, rows, fit.Rank(), wrap=lambda network, precision: (network, "none"))


def without_times(history: list[Metrics]) -> list[Metrics]:
    return [{key: value for key, value in metrics.items() if not key.endswith("_s")} for metrics in history]


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["vgg", "deep-bn"])
def test_a_run_that_goes_on_within_an_epoch_ends_with_the_same_bits(one_thread: None, depth: Depth) -> None:
    """Everything that draws at random is on, and statistics of batch normalisation are in mid-flow."""
    config = TrainConfig(
        preset="smoke", epochs=2, global_batch_size=8, dropout_conv=0.1, dropout_fc=0.2, shift=1, depth=depth
    )
    whole = run_of(config, 160)
    saved: dict[tuple[int, int], dict[str, bytes]] = {}

    def save() -> None:
        saved[whole.epochs_done, whole.step] = whole.encode()

    history = list(whole.epochs(wants_pause=lambda seconds: True, on_pause=save))
    steps = [[step for epochs_done, step in saved if epochs_done == epoch] for epoch in (0, 1)]
    for each in steps:
        assert (each[0], each[-1]) == (1, 20), "looks after the first step and after the last"
        assert max(late - early for early, late in itertools.pairwise(each)) <= loop.STEPS_BETWEEN_LOOKS["cpu"]
    for place in [(epoch, each[at]) for epoch, each in enumerate(steps) for at in (len(each) // 2, -1)]:
        files = saved[place]
        again = run_of(config, 160)
        again.restore(files.__getitem__)
        assert (again.epochs_done, again.step) == place
        assert len(list(again.epochs())) == 2 - place[0]
        assert without_times(again.history) == without_times(history)
        for (name, one), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "epochs that do not follow each other": lambda progress: progress["history"].append({"epoch": 7}),
    "figures that are text": lambda progress: progress["history"][0].update(train_loss="0.5"),
    "no history": lambda progress: progress.pop("history"),
    "an unknown field": lambda progress: progress["positions"][0].update(code="x"),
    "a step as text": lambda progress: progress["positions"][0].update(step="10"),
    "a step beyond the epoch": lambda progress: progress["positions"][0].update(step=21),
    "ranks at other steps": lambda progress: progress["positions"].append(progress["positions"][0] | {"step": 11}),
    "states that are no base64": lambda progress: progress["positions"][0].update(states=["?"]),
    "positions that are a number": lambda progress: progress.update(positions=1),
}


@pytest.mark.slow
def test_a_progress_that_is_not_of_this_run_is_refused_and_changes_nothing(one_thread: None) -> None:
    config = TrainConfig(preset="smoke", epochs=2, global_batch_size=8)
    run = run_of(config, 160)
    saved: list[dict[str, bytes]] = []
    for _ in run.epochs(wants_pause=lambda seconds: run.epochs_done == 1, on_pause=lambda: saved.append(run.encode())):
        pass
    other = run_of(config, 160)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    for case, spoil in HOSTILE.items():
        progress = json.loads(saved[0][checkpoint.PROGRESS])
        spoil(progress)
        files = saved[0] | {checkpoint.PROGRESS: json.dumps(progress).encode()}
        files[checkpoint.MANIFEST] = checkpoint.manifest_of({name: files[name] for name in checkpoint.FILES}).encode()
        with pytest.raises(checkpoint.DamagedCheckpoint, match=r"progress.json cannot be used"):
            other.restore(files.__getitem__)
        assert other.history == [], case
    assert all(torch.equal(before[name], value) for name, value in other.model.state_dict().items())
    other.restore(saved[0].__getitem__)


def test_another_number_of_workers_takes_over_all_that_was_counted() -> None:
    before = [loop.Position(30, 1.5, 200, 240, 9.0, 0.1, ("x",)), loop.Position(30, 2.25, 210, 240, 9.0, 0.2, ("y",))]
    assert [loop.own_position(before, rank, 2) for rank in (0, 1)] == before
    after = [loop.own_position(before, rank, 3) for rank in (0, 1, 2)]
    assert [position.step for position in after] == [30, 30, 30]
    assert sum(position.num_rows for position in after) == 480
    assert sum(position.num_correct for position in after) == 410
    assert sum(position.loss_sum for position in after) == 3.75
    assert all(not position.states for position in after)


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
    history = list(run_of(config, 1200, num_val_rows=500).epochs())
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert 0.75 < history[-1]["val_accuracy"] < 0.95, history[-1]
