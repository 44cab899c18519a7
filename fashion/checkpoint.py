"""Checkpoint folders: safetensors weights, weights-only optimizer state, progress as JSON, and a manifest of sums.

Nothing here unpickles what it is handed, and nothing is believed before its sum is checked.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
PROGRESS = "progress.json"
MANIFEST = "manifest.json"
FILES = (WEIGHTS, OPTIMIZER, PROGRESS)


class DamagedCheckpoint(RuntimeError):
    """A checkpoint folder whose files are missing or differ from their sums."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write a checkpoint into the existing, empty `folder`; the manifest goes last."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    files = {
        WEIGHTS: save_safetensors(state),
        OPTIMIZER: buffer.getvalue(),
        PROGRESS: json.dumps(progress).encode(),
    }
    for name, data in files.items():
        write_synced(folder / name, data)
    write_synced(folder / MANIFEST, manifest_of(files).encode())


def manifest_of(files: dict[str, bytes]) -> str:
    """Return the manifest's text: file name -> SHA-256 of its content."""
    return json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def verified(name: str, manifest: bytes, data: bytes) -> bytes:
    """Return `data` if its sum is the one that `manifest` gives for the file `name`; else raise `DamagedCheckpoint`."""
    try:
        expected: Any = json.loads(manifest)[name]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"checkpoint manifest does not name {name}") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise DamagedCheckpoint(f"checkpoint file {name} differs from its sum")
    return data


def read(folder: Path, name: str) -> bytes:
    """Return a checkpoint file's verified content."""
    try:
        return verified(name, (folder / MANIFEST).read_bytes(), (folder / name).read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {folder.name} lacks {Path(error.filename or name).name}") from error


def load_weights(data: bytes) -> dict[str, Tensor]:
    """Parse safetensors bytes into a state dict on the CPU."""
    return load_safetensors(data)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore `model` and `optimizer` from `folder`; return the progress. Raises `DamagedCheckpoint`."""
    weights = load_weights(read(folder, WEIGHTS))
    optimizer_state = torch.load(io.BytesIO(read(folder, OPTIMIZER)), map_location="cpu", weights_only=True)
    progress: dict[str, Any] = json.loads(read(folder, PROGRESS))
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    return progress
