"""Checkpoints: complete, verified, and never unpickled."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fashion import checkpoint
from fashion.checkpoint import DamagedCheckpoint, OtherVersion
from fashion.keeper import Keeper
from fashion.storage import open_storage

PROGRESS = {"format": 3, "history": [{"epoch": 1}]}


def reader(folder: Path) -> Callable[[str], bytes]:
    """Return what reads a file of the checkpoint in `folder`, as `keeper` does."""
    return Keeper(open_storage(str(folder.parent)), (), newest=1).reader(folder.name)


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model, optimizer = make(0)
    step(model, optimizer)
    folder = tmp_path / "epoch-0001"
    folder.mkdir()
    for name, content in checkpoint.encode(model, optimizer, PROGRESS).items():
        (folder / name).write_bytes(content)
    return folder, model, optimizer


def test_a_restored_run_goes_on_to_the_bit(saved: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = saved
    other, other_optimizer = make(1)
    assert checkpoint.restore(reader(folder), other, other_optimizer, form=3) == PROGRESS
    for pair in ((model, optimizer), (other, other_optimizer)):
        step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.PROGRESS, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_damage_is_noticed_before_anything_is_believed(saved: tuple[Path, Any, Any], name: str, damage: str) -> None:
    path = saved[0] / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()
    model, optimizer = make(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DamagedCheckpoint):
        checkpoint.restore(reader(saved[0]), model, optimizer, form=3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_another_form_is_told_from_damage(saved: tuple[Path, Any, Any]) -> None:
    with pytest.raises(OtherVersion, match="the checkpoint has form 3 and this code reads 4"):
        checkpoint.restore(reader(saved[0]), *make(1), form=4)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("sprung",)


def test_a_booby_trapped_optimizer_state_does_not_run(
    saved: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even with sums that fit, as whoever hands over a checkpoint could make them."""
    folder, _, _ = saved
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"state": Trap()}, buffer)
    names = (checkpoint.WEIGHTS, checkpoint.PROGRESS)
    files = {checkpoint.OPTIMIZER: buffer.getvalue()} | {name: (folder / name).read_bytes() for name in names}
    (folder / checkpoint.OPTIMIZER).write_bytes(files[checkpoint.OPTIMIZER])
    (folder / checkpoint.MANIFEST).write_text(checkpoint.manifest_of(files))
    model, optimizer = make(1)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint.restore(reader(folder), model, optimizer, form=3)
    assert not Path("sprung").exists()
