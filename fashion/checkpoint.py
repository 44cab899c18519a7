"""Checkpoint folders: safetensors weights, weights-only optimizer state, progress as JSON, and a manifest of sums.

Nothing here unpickles what it is handed, and nothing is believed before its sum is checked.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
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


def encode(model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> dict[str, bytes]:
    """Return a checkpoint as files, name -> content. The manifest comes last: without it, a folder is no checkpoint."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    files = {
        WEIGHTS: save_safetensors(state),
        OPTIMIZER: buffer.getvalue(),
        PROGRESS: json.dumps(progress).encode(),
    }
    return files | {MANIFEST: manifest_of(files).encode()}


def save(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of a checkpoint into the existing, empty `folder`."""
    for name, data in files.items():
        write_synced(folder / name, data)


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


def load_weights(data: bytes) -> dict[str, Tensor]:
    """Parse safetensors bytes into a state dict on the CPU."""
    return load_safetensors(data)


def restore(read_file: Callable[[str], bytes], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore `model` and `optimizer` from verified files and return the progress.

    `read_file(name)` gives a file's content. Raises `DamagedCheckpoint`; nothing is changed then.
    """
    manifest = read_file(MANIFEST)
    weights, optimizer_file, progress_file = (verified(name, manifest, read_file(name)) for name in FILES)
    progress: dict[str, Any] = json.loads(progress_file)
    state = torch.load(io.BytesIO(optimizer_file), map_location="cpu", weights_only=True)
    model.load_state_dict(load_weights(weights))
    optimizer.load_state_dict(state)
    return progress


def files_of(folder: Path) -> Callable[[str], bytes]:
    """Return `read_file` for `restore` over a local folder."""

    def read_file(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {folder.name} lacks {name}") from error

    return read_file
