"""Checkpoint folders: safetensors weights, weights-only optimizer state, progress as JSON, and a manifest of sums.

Nothing here unpickles what it is handed, and nothing is believed before its sum is checked.
"""

import hashlib
import io
import json
from collections.abc import Callable
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


class OtherVersion(RuntimeError):
    """A whole checkpoint that other code than this wrote, in a form of its own."""


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


def manifest_of(files: dict[str, bytes]) -> str:
    """Return the manifest's text: file name -> SHA-256 of its content."""
    return json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


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


def check(read_file: Callable[[str], bytes]) -> None:
    """Read all files of a checkpoint and raise `DamagedCheckpoint` unless they are whole."""
    manifest = read_file(MANIFEST)
    for name in FILES:
        verified(name, manifest, read_file(name))


def restore(
    read_file: Callable[[str], bytes], model: nn.Module, optimizer: torch.optim.Optimizer, form: int
) -> dict[str, Any]:
    """Restore `model` and `optimizer` from verified files and return the progress, whose `format` must be `form`.

    `read_file(name)` gives a file's content. Raises `DamagedCheckpoint` or `OtherVersion`; nothing is changed then.
    """
    manifest = read_file(MANIFEST)
    weights, optimizer_file, progress_file = (verified(name, manifest, read_file(name)) for name in FILES)
    progress: dict[str, Any] = json.loads(progress_file)
    if progress.get("format") != form:
        raise OtherVersion(f"the checkpoint has form {progress.get('format')} and this code reads {form}")
    state = torch.load(io.BytesIO(optimizer_file), map_location="cpu", weights_only=True)
    model.load_state_dict(load_weights(weights))
    optimizer.load_state_dict(state)
    return progress
