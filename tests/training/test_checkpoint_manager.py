"""The checkpoints of a run in a storage: ten ways to damage the newest one, and which are kept."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fashion.storage import Storage, open_storage
from fashion.training import checkpoint
from fashion.training.checkpoint_manager import CheckpointManager, CheckpointTimer, name_of, progress_of

FOLDER = ("runs", "mine")


class Run:
    """What a checkpoint manager asks of a run: how far it is, its history, its files."""

    def __init__(self, epochs_done: int, step: int = 0, accuracies: tuple[float, ...] = ()) -> None:
        self.epochs_done = epochs_done
        self.step = step
        self.history = [
            {"epoch": epoch, "val_accuracy": accuracy, "val_loss": 1.0} for epoch, accuracy in enumerate(accuracies, 1)
        ]

    def encode(self) -> dict[str, bytes]:
        torch.manual_seed(self.epochs_done * 1000 + self.step)
        model = nn.Linear(64, 8)
        return checkpoint.encode(model, torch.optim.AdamW(model.parameters()), {"epochs": self.epochs_done})


def save(manager: CheckpointManager, *runs: Run) -> None:
    for run in runs:
        manager.save(run)  # type: ignore[arg-type]
        manager.wait()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    """Put the contents of two files in each other's place."""
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights truncated": lambda folder: flip_length(folder / checkpoint.WEIGHTS, -1),
    "weights with a bit flipped": lambda folder: flip(folder / checkpoint.WEIGHTS),
    "optimizer with a bit flipped": lambda folder: flip(folder / checkpoint.OPTIMIZER),
    "optimizer missing": lambda folder: (folder / checkpoint.OPTIMIZER).unlink(),
    "progress empty": lambda folder: (folder / checkpoint.PROGRESS).write_bytes(b""),
    "weights and optimizer swapped": lambda folder: swap(folder / checkpoint.WEIGHTS, folder / checkpoint.OPTIMIZER),
    "weights of the one before": lambda folder: shutil.copy(
        folder.parent / "epoch-0001" / checkpoint.WEIGHTS, folder / checkpoint.WEIGHTS
    ),
    "manifest missing": lambda folder: (folder / checkpoint.MANIFEST).unlink(),
    "manifest truncated": lambda folder: flip_length(folder / checkpoint.MANIFEST, -40),
    "all files gone": lambda folder: [path.unlink() for path in folder.iterdir()],
    "progress longer": lambda folder: flip_length(folder / checkpoint.PROGRESS, 1),
}


def flip_length(path: Path, by: int) -> None:
    """Make a file shorter or longer by some bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:by] if by < 0 else content + b" " * by)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_it_is_used(storage: Storage, damage: str) -> None:
    manager = CheckpointManager(storage, FOLDER, newest=2)
    save(manager, Run(1), Run(1, 10))
    assert manager.newest_whole() == ("epoch-0002-step-000010", [])
    DAMAGES[damage](Path(storage.path(*FOLDER, "epoch-0002-step-000010")))
    chosen, notes = manager.newest_whole()
    assert chosen == "epoch-0001"
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint epoch-0002-step-000010 is damaged: checkpoint ")


def test_names_say_how_far_a_run_was_and_sort_so() -> None:
    places = [(1, 0), (1, 50), (1, 100), (2, 0), (9999, 0), (9999, 1), (10_000, 0)]
    assert [progress_of(name_of(*place)) for place in places] == places
    assert progress_of("epoch-0002-step-000150") == (1, 150)
    others = ["tensorboard", "epoch-1", "epoch-0001.tmp", "checkpoint_manager_snapshot.json", "epoch-0001-step-", ""]
    assert [progress_of(name) for name in others] == [None] * len(others)


def test_the_newest_two_and_the_best_are_kept(storage: Storage) -> None:
    manager = CheckpointManager(storage, FOLDER, newest=2)
    storage.write_bytes(b"{}", *FOLDER, "snapshot.json")
    save(manager, Run(1, 0, (0.5,)), Run(1, 10, (0.5,)), Run(2, 0, (0.5, 0.9)))
    assert manager.names() == ["epoch-0002-step-000010", "epoch-0002"]
    save(manager, Run(2, 10, (0.5, 0.9)), Run(2, 20, (0.5, 0.9)), Run(3, 0, (0.5, 0.9, 0.8)))
    assert manager.names() == ["epoch-0002", "epoch-0003-step-000020", "epoch-0003"]
    assert storage.exists(*FOLDER, "snapshot.json")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(small_disk: Path) -> None:
    manager = CheckpointManager(open_storage(str(small_disk)), FOLDER, newest=1)
    save(manager, Run(1))
    small_disk.joinpath("filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    with pytest.raises(OSError, match="No space left on device"):
        save(manager, Run(2))
    assert manager.newest_whole()[0] == "epoch-0001"
    small_disk.joinpath("filler").unlink()
    save(manager, Run(2))
    assert manager.names() == ["epoch-0002"]


def test_a_save_is_due_before_the_next_look_would_be_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fashion.training.checkpoint_manager.time.monotonic", lambda: now[0])
    timer = CheckpointTimer(every_s=10.0)
    answers = []
    for now[0] in (3.0, 6.0, 9.0):
        answers.append(timer.is_due(0.0))
    assert answers == [False, False, True]  # at 12 it would be too late
    timer.restart()
    now[0] = 12.0
    assert not timer.is_due(3.0)
    now[0] = 13.0
    assert timer.is_due(6.0)  # after another second, and written 6 s later: 11 s after what was saved


@pytest.mark.parametrize("every_s", [0.0, 1e-9])
def test_no_time_to_lose_means_at_every_look(every_s: float) -> None:
    timer = CheckpointTimer(every_s)
    assert timer.is_due(0.0)
    timer.restart()
    assert timer.is_due(0.0)
