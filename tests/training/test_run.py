"""The epochs of a run without Ray: the real network on the stand-in."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fashion.config import Depth, Precision, TrainConfig
from fashion.data import synthetic
from fashion.model.eager import without_compiler
from fashion.model.network import place
from fashion.training import checkpoint, loop, sync
from fashion.training.batches import Batch, plain_batches
from fashion.training.metrics import Metrics
from fashion.training.run import (
    EVAL_BATCH_SIZE,
    Rank,
    Shards,
    TrainingRun,
    WrappedModel,
    build_model,
    resident_batches,
    without_ddp,
)

ALONE = Rank()
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def run_of(config: TrainConfig, num_train_rows: int, num_val_rows: int = 100, rank: Rank = ALONE) -> TrainingRun:
    """Return a run at its start, on the stand-in; of several ranks, each takes the rows that are its own."""
    images, labels = tensors(synthetic.draw(num_train_rows, seed=10))
    val_images, val_labels = tensors(synthetic.draw(max(num_val_rows, 1), seed=11))
    pixels = images.float() / 255
    own, own_val = (slice(rank.rank, count, rank.world_size) for count in (num_train_rows, num_val_rows))
    batches = resident_batches(config, images[own], labels[own], rank, config.steps_per_epoch(num_train_rows))
    val = val_images[own_val], val_labels[own_val]
    shards = Shards(batches, val, num_train_rows, num_val_rows, float(pixels.mean()), float(pixels.std()))
    return TrainingRun(config, shards, rank, wrap)


def wrap(network: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> WrappedModel:
    if not dist.is_initialized():
        return without_ddp(network, optimizer, precision)
    with without_compiler():
        return DistributedDataParallel(network, broadcast_buffers=False), optimizer.step, "gloo"


def train_and_save(run: TrainingRun, save: Callable[[], object]) -> None:
    """Train what remains, and call `save` at every synchronisation point and after every epoch."""
    for progress in run.train():
        if progress.is_sync_point:
            assert run.synchronise(wants_save=True)
        if progress.is_sync_point or progress.metrics is not None:
            save()


def without_times(history: list[Metrics]) -> list[Metrics]:
    return [{key: value for key, value in metrics.items() if not key.endswith("_s")} for metrics in history]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("depth", "ema_decay"), [("vgg", 0.0), ("deep-bn", 0.9)])
def test_a_run_that_goes_on_ends_with_the_same_bits(
    one_thread: None, depth: Depth, ema_decay: float, precision: Precision
) -> None:
    """Between epochs and within; everything that draws at random is on, and statistics of batch normalisation are in
    mid-flow.
    """
    config = TrainConfig(
        preset="smoke",
        epochs=2,
        global_batch_size=4,
        dropout_conv=0.1,
        dropout_fc=0.2,
        shift=1,
        erase=0.3,
        depth=depth,
        padding="learned",
        ema_decay=ema_decay,
        tta="flip",
        precision=precision,
    )
    whole = run_of(config, 48, num_val_rows=20)
    saved: dict[tuple[int, int], dict[str, bytes]] = {}

    def save() -> None:
        saved[whole.epochs_done, whole.step] = whole.encode()

    train_and_save(whole, save)
    history = whole.history
    steps = [[step for epochs_done, step in saved if epochs_done == epoch and step] for epoch in (0, 1)]
    for each in steps:
        assert (each[0], each[-1]) == (1, 12), "synchronised after the first step and after the last"
        assert max(late - early for early, late in itertools.pairwise(each)) <= sync.MAX_STEPS_BETWEEN_SYNCS["cpu"]
    saved_at = [(epoch, each[at]) for epoch, each in enumerate(steps) for at in (len(each) // 2, -1)]
    for epoch_and_step in [*saved_at, (1, 0), (2, 0)]:
        files = saved[epoch_and_step]
        again = run_of(config, 48, num_val_rows=20)
        again.restore(files.__getitem__)
        assert (again.epochs_done, again.step) == epoch_and_step
        assert len(list(again.epochs())) == 2 - epoch_and_step[0]
        assert without_times(again.history) == without_times(history)
        for one, other in ((whole.model, again.model), (whole.evaluated, again.evaluated)):
            found = other.state_dict()
            for name, expected in one.state_dict().items():
                assert torch.equal(expected, found[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "precision"), [("vgg", "fp32"), ("deep-bn", "fp32"), ("deep-bn", "bf16")])
def test_what_is_judged_on_val_is_what_a_checkpoint_holds(one_thread: None, depth: Depth, precision: Precision) -> None:
    """The average; the weights that are trained are others, lie beside it, and without an average are not there."""
    config = TrainConfig(
        preset="smoke",
        epochs=1,
        global_batch_size=8,
        depth=depth,
        ema_decay=0.9,
        tta="flip",
        precision=precision,
    )
    run = run_of(config, 64, num_val_rows=50)
    [metrics] = run.epochs()
    files = run.encode()
    losses = {}
    for name in (checkpoint.WEIGHTS, checkpoint.TRAINED):
        model = build_model(config, 0.0, 1.0)
        model.load_state_dict(checkpoint.fitting_weights(files[name], model, name))
        batches = plain_batches(*run.shards.val, EVAL_BATCH_SIZE)
        judged = place(model, torch.device("cpu"))
        sums = loop.evaluate(judged, batches, precision=run.precision, device=torch.device("cpu"), tta="flip")
        losses[name] = sums.loss
    assert losses[checkpoint.WEIGHTS] == metrics["val_loss"] != losses[checkpoint.TRAINED]
    plain = run_of(TrainConfig(preset="smoke", epochs=1, global_batch_size=8), 64)
    assert checkpoint.TRAINED not in plain.encode()
    assert plain.evaluated is plain.model


@pytest.mark.slow
def test_an_average_moves_after_every_step_needs_no_val_and_leaves_training_as_it_is(one_thread: None) -> None:
    """The weights that are trained are those of a run without an average, to the bit; steps count over the run."""
    settings = {"preset": "smoke", "epochs": 2, "global_batch_size": 8, "hold_out_val": False, "precision": "fp32"}
    averaged, plain = (run_of(TrainConfig(**settings, ema_decay=decay), 40, 0) for decay in (0.5, 0.0))
    expected = averaged.model.fc3.weight.detach().clone()

    def follow(epoch: int, step: int) -> None:
        number = 5 * (epoch - 1) + step
        share = min(0.5, (1 + number) / (10 + number))  # 0.5 from step 8 on
        expected.mul_(share).add_(averaged.model.fc3.weight.detach(), alpha=1 - share)

    for progress in averaged.train():
        if progress.metrics is None:
            follow(progress.epoch, progress.step)
        if progress.is_sync_point:
            averaged.synchronise(wants_save=False)
    plain_history = list(plain.epochs())
    for history in (averaged.history, plain_history):
        assert [set(metrics) & {"val_loss", "val_accuracy"} for metrics in history] == [set(), set()]
    assert torch.allclose(averaged.evaluated.fc3.weight, expected, atol=1e-7)
    assert not torch.allclose(averaged.evaluated.fc3.weight, averaged.model.fc3.weight, atol=1e-5)
    state = plain.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in averaged.model.state_dict().items())
    again = run_of(averaged.config, 40, 0)
    again.restore(averaged.encode().__getitem__)
    assert without_times(again.history) == without_times(averaged.history)


WORLD_SIZE = 2
CASES: tuple[tuple[bool, Precision], ...] = ((True, "fp32"), (True, "bf16"), (False, "fp32"))
"""Whether rows are held out for val, and the precision."""


def check_on_every_rank(rank: int, folder: str) -> None:
    """Check all cases in the same processes, which take as long to start as to train."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    for hold_out_val, precision in CASES:
        check_lives(rank, folder, hold_out_val, precision)
    dist.destroy_process_group()


def check_lives(rank: int, folder: str, hold_out_val: bool, precision: Precision) -> None:
    """Train, keep what rank 0 saves after the first step, go on from there on all ranks, compare."""
    config = TrainConfig(
        preset="smoke",
        epochs=1,
        global_batch_size=8,
        depth="deep-bn",
        padding="learned",
        erase=0.3,
        ema_decay=0.9,
        hold_out_val=hold_out_val,
        precision=precision,
    )
    whole, again = (run_of(config, 24, 9 if hold_out_val else 0, Rank(rank, WORLD_SIZE)) for _ in range(2))
    saved = Path(folder, f"saved-{hold_out_val}-{precision}")

    def save() -> None:
        if rank == 0 and whole.step == 1:
            torch.save(whole.encode(), saved)

    train_and_save(whole, save)
    histories = [whole.history]
    dist.barrier()
    again.restore(torch.load(saved).__getitem__)
    assert again.step == 1
    histories.append(list(again.epochs()))
    assert without_times(histories[0]) == without_times(histories[1])
    names = (checkpoint.WEIGHTS, checkpoint.TRAINED)
    contents = [run.encode() for run in (whole, again)]
    sums = [hashlib.sha256(files[name]).hexdigest() for name in names for files in contents]
    found: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(found, sums)
    assert found[0] == found[1], "ranks differ"
    assert sums[0] == sums[1] != sums[2] == sums[3], (hold_out_val, precision)


@pytest.mark.slow
def test_all_ranks_end_with_the_same_networks(tmp_path: Path) -> None:
    """The one that is trained and its average, both with the statistics of all rows; in one life or two."""
    torch.multiprocessing.spawn(check_on_every_rank, (str(tmp_path),), WORLD_SIZE)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "epochs that do not follow each other": lambda progress: progress["history"].append({"epoch": 7}),
    "figures that are text": lambda progress: progress["history"][0].update(train_loss="0.5"),
    "no history": lambda progress: progress.pop("history"),
    "an unknown field": lambda progress: progress["epoch_states"][0].update(code="x"),
    "a step as text": lambda progress: progress["epoch_states"][0].update(step="10"),
    "a step beyond the epoch": lambda progress: progress["epoch_states"][0].update(step=21),
    "ranks at other steps": lambda progress: progress["epoch_states"].append(
        {**progress["epoch_states"][0], "step": 11}
    ),
    "states that are no base64": lambda progress: progress["epoch_states"][0].update(states=["?"]),
    "epoch states that are a number": lambda progress: progress.update(epoch_states=1),
}


@pytest.mark.slow
def test_a_progress_that_is_not_of_this_run_is_refused_and_changes_nothing(one_thread: None) -> None:
    config = TrainConfig(preset="smoke", epochs=2, global_batch_size=8, precision="fp32")
    run = run_of(config, 160)
    saved: list[dict[str, bytes]] = []
    train_and_save(run, lambda: saved.append(run.encode()) if run.step and run.epochs_done == 1 else None)
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
    before = [
        sync.EpochState(30, 1.5, 200, 240, 9.0, 0.1, ("x",)),
        sync.EpochState(30, 2.25, 210, 240, 9.0, 0.2, ("y",)),
    ]
    assert [sync.own_epoch_state(before, rank, 2) for rank in (0, 1)] == before
    after = [sync.own_epoch_state(before, rank, 3) for rank in (0, 1, 2)]
    assert [state.step for state in after] == [30, 30, 30]
    assert sum(state.num_rows for state in after) == 480
    assert sum(state.num_correct for state in after) == 410
    assert sum(state.loss_sum for state in after) == 3.75
    assert all(not state.states for state in after)


def tensors(rows: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> Batch:
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


@pytest.mark.quiet
def test_batches_are_ready_when_steps_want_them(one_thread: None) -> None:
    """With all that is drawn for each image, noise of erasing included. The first epoch makes what later ones use."""
    config = TrainConfig(
        preset="smoke", epochs=2, global_batch_size=16, flip="random", shift=1, erase=0.1, precision="fp32"
    )
    _, warm = run_of(config, 256).epochs()
    assert warm["data_wait_s"] < 0.05 * warm["epoch_time_s"]


@pytest.mark.slow
def test_the_network_learns_the_stand_in_but_not_fully(one_thread: None) -> None:
    """It must not be so easy that a broken recipe passes, nor so hard that a good one fails."""
    config = TrainConfig(preset="smoke", epochs=2, global_batch_size=50, precision="fp32")
    history = list(run_of(config, 1200, num_val_rows=500).epochs())
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert 0.75 < history[-1]["val_accuracy"] < 0.95, history[-1]
