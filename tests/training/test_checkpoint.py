"""Checkpoints: complete, verified, and never unpickled."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fashion.storage import open_storage
from fashion.training import checkpoint
from fashion.training.checkpoint import DamagedCheckpoint
from fashion.training.checkpoint_manager import CheckpointManager

PROGRESS = {"history": [{"epoch": 1}]}


def whole(progress: dict[str, Any]) -> None:
    """Take any progress: what it holds is `fit`'s to judge."""


def reader(folder: Path) -> Callable[[str], bytes]:
    """Return what reads a file of the checkpoint in `folder`, as `CheckpointManager.reader` does."""
    return CheckpointManager(open_storage(str(folder.parent)), (), newest=1).reader(folder.name)


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
    assert checkpoint.restore(reader(folder), other, other_optimizer, whole) == PROGRESS
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
        checkpoint.restore(reader(saved[0]), model, optimizer, whole)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["weights", "a moment's shape", "a moment's name", "groups", "progress", "nested"])
def test_what_the_run_cannot_use_is_refused_though_its_sums_fit(saved: tuple[Path, Any, Any], case: str) -> None:
    _, model, optimizer = saved
    state = optimizer.state_dict()
    if case == "a moment's shape":
        state["state"][0]["exp_avg"] = torch.zeros(1)
    elif case == "a moment's name":
        state["state"][0] = {"momentum": torch.zeros(8, 4)}
    elif case == "groups":
        state["param_groups"] = []
    buffer = io.BytesIO()
    torch.save(state, buffer)
    weights = nn.Linear(4, 9) if case == "weights" else model
    files = checkpoint.encode(weights, optimizer, {}) | {checkpoint.OPTIMIZER: buffer.getvalue()}
    files |= {checkpoint.PROGRESS: {"progress": b"[]", "nested": b"[" * 100_000}.get(case, b"{}")}
    files[checkpoint.MANIFEST] = checkpoint.manifest_of({name: files[name] for name in checkpoint.FILES}).encode()
    other, other_optimizer = make(1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(DamagedCheckpoint, match="cannot be used"):
        checkpoint.restore(files.__getitem__, other, other_optimizer, whole)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert not other_optimizer.state_dict()["state"]


# --- with an average of the weights --------------------------------------------------------------------------------


def averaged() -> tuple[dict[str, bytes], nn.Module, nn.Module, torch.optim.Optimizer]:
    """Return a checkpoint, the average in it, the network that was trained, and its optimizer."""
    (ema, _), (trained, optimizer) = make(2), make(0)
    step(trained, optimizer)
    return checkpoint.encode(ema, optimizer, PROGRESS, trained), ema, trained, optimizer


def test_an_average_and_what_goes_on_are_restored_each_to_its_own() -> None:
    files, ema, trained, optimizer = averaged()
    assert list(files)[-1] == checkpoint.MANIFEST
    checkpoint.check(files.__getitem__)
    (other_ema, _), (other, other_optimizer) = make(3), make(4)
    checkpoint.restore(files.__getitem__, other_ema, other_optimizer, whole, other)
    for pair in ((trained, optimizer), (other, other_optimizer)):
        step(*pair)
    for one, two in ((ema, other_ema), (trained, other)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    # Whoever evaluates reads the average under the name that weights always have.
    found = checkpoint.load_weights(files[checkpoint.WEIGHTS])
    assert all(torch.equal(found[name], value) for name, value in ema.state_dict().items())


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "unnamed", "of another network"])
def test_damage_of_the_trained_weights_is_noticed_and_changes_nothing(damage: str) -> None:
    files, ema, trained, optimizer = averaged()
    content = bytearray(files[checkpoint.TRAINED])
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    files[checkpoint.TRAINED] = bytes(content)
    if damage == "of another network":
        files = checkpoint.encode(ema, optimizer, PROGRESS, nn.Linear(4, 9))
    elif damage == "unnamed":
        named = {name: files[name] for name in checkpoint.FILES}
        files[checkpoint.MANIFEST] = checkpoint.manifest_of(named).encode()
    elif damage == "missing":
        del files[checkpoint.TRAINED]

    def read_file(name: str) -> bytes:
        if name not in files:
            raise DamagedCheckpoint(f"checkpoint file {name} is missing")
        return files[name]

    if damage not in ("unnamed", "of another network"):  # whose sums fit
        with pytest.raises(DamagedCheckpoint, match=r"trained\.safetensors"):
            checkpoint.check(read_file)
    networks = nn.ModuleList([make(3)[0], trained])
    before = {key: value.clone() for key, value in networks.state_dict().items()}
    state = repr(optimizer.state_dict())
    with pytest.raises(DamagedCheckpoint, match=r"trained\.safetensors"):
        checkpoint.restore(read_file, networks[0], optimizer, whole, trained)
    assert all(torch.equal(before[key], value) for key, value in networks.state_dict().items())
    assert repr(optimizer.state_dict()) == state


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
    with pytest.raises(DamagedCheckpoint, match=r"optimizer.pt cannot be used \(it names posix mkdir\)"):
        checkpoint.restore(reader(folder), model, optimizer, whole)
    assert not Path("sprung").exists()
