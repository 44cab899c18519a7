"""Checkpoint folders: safetensors weights, weights-only optimizer state, progress as JSON, and a manifest of sums.

Nothing here unpickles what it is handed, and nothing is believed before its sum is checked.
"""

import hashlib
import io
import json
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from fashion.config import parse_object, printable, require
from fashion.training.optimizer import kept_names

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
PROGRESS = "progress.json"
MANIFEST = "manifest.json"
FILES = (WEIGHTS, OPTIMIZER, PROGRESS)
TRAINED = "trained.safetensors"
"""Where `WEIGHTS` are those of a moving average: the weights that the optimizer goes on from."""
GLOBALS = {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}
"""What an optimizer's state names. torch would call more, such as `bytearray`: twenty bytes that take any memory."""


class DamagedCheckpoint(RuntimeError):
    """A checkpoint folder whose files are missing, differ from their sums, or hold what this run cannot use."""


class OtherVersion(RuntimeError):
    """A whole checkpoint that other code than this wrote, in a form of its own."""


def encode(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], trained: nn.Module | None = None
) -> dict[str, bytes]:
    """Return a checkpoint as files, name -> content. The manifest comes last: without it, a folder is no checkpoint.

    `model` is what the checkpoint is evaluated by, `trained` what `optimizer` moves, where that is another one.
    """
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    files = {WEIGHTS: encode_weights(model)} | ({TRAINED: encode_weights(trained)} if trained is not None else {})
    files |= {OPTIMIZER: buffer.getvalue(), PROGRESS: json.dumps(progress).encode()}
    return files | {MANIFEST: manifest_of(files).encode()}


def encode_weights(model: nn.Module) -> bytes:
    """Return all that `model` saves, as safetensors."""
    return save_safetensors({name: each.detach().cpu().contiguous() for name, each in model.state_dict().items()})


def manifest_of(files: dict[str, bytes]) -> str:
    """Return the manifest's text: file name -> SHA-256 of its content."""
    return json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def verified(name: str, manifest: bytes, data: bytes) -> bytes:
    """Return `data` if its sum is the one that `manifest` gives for the file `name`; else raise `DamagedCheckpoint`."""
    try:
        expected: Any = parse_object(manifest)[name]
    except (ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"checkpoint manifest does not name {name}") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise DamagedCheckpoint(f"checkpoint file {name} differs from its sum")
    return data


def load_weights(data: bytes, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Parse the content of the safetensors file `name` into a state dict on the CPU. Raises `DamagedCheckpoint`."""
    try:
        return load_safetensors(data)
    except Exception as error:  # its own kind, and whatever torch says of types and shapes
        raise damaged(name, error) from error


def fitting_weights(data: bytes, model: nn.Module, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Parse weights as `model` takes them; raises `DamagedCheckpoint` if names, shapes or types are not its own."""
    weights, own = load_weights(data, name), model.state_dict()
    found, expected = ({key: (each.shape, each.dtype) for key, each in side.items()} for side in (weights, own))
    if found != expected:
        wrong = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise damaged(name, f"{wrong[0]} is {found.get(wrong[0])}, the network has {expected.get(wrong[0])}")
    return weights


def load_state(data: bytes) -> Any:
    """Parse what `torch.save` made of an optimizer's state. Raises `DamagedCheckpoint`; nothing in `data` is called.

    What is compressed, or names more than `GLOBALS`, is refused before torch reads it: memory stays near the file's.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = archive.infolist()
            require(sum(file.file_size for file in files) <= len(data), "it is compressed")
            require({file.compress_type for file in files} == {zipfile.ZIP_STORED}, "it is compressed")
            [program] = [file for file in files if file.filename.endswith("data.pkl")]
            for operation, argument, _ in pickletools.genops(archive.read(program)):
                called = "GLOBAL" in operation.name or operation.name == "INST"
                require(not called or argument in GLOBALS, f"it names {argument}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of zip files, of pickles, or torch stumbles over
        raise damaged(OPTIMIZER, error) from error


def fitting_state(data: bytes, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parse a state that `optimizer` can step on; raises `DamagedCheckpoint` if it holds anything else.

    The settings of its groups stay: they follow from the run's, and the learning rate is set before every step.
    """
    stored, own = load_state(data), optimizer.state_dict()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    kept = [
        names for group, names in zip(own["param_groups"], kept_names(optimizer), strict=True) for _ in group["params"]
    ]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        groups, own_groups = ([each["params"] for each in side["param_groups"]] for side in (stored, own))
        require(groups == own_groups, "its groups are another optimizer's")
        for index, values in stored["state"].items():
            require(type(index) is int and 0 <= index < len(parameters), "it knows more parameters")
            require(set(values) == set(kept[index]), "it is another optimizer's")
            state[index] = {}
            for name, value in values.items():
                like = parameters[index].detach() if kept[index][name] else torch.zeros(())
                require((value.shape, value.dtype) == (like.shape, torch.float32), "it has other shapes")
                # A copy: what is loaded may be one number that claims to be a whole tensor.
                state[index][name] = torch.empty_like(like, device="cpu").copy_(value.detach())
    except Exception as error:  # any value may be of any type
        raise damaged(OPTIMIZER, error) from error
    return own | {"state": state}


def damaged(name: str, reason: object) -> DamagedCheckpoint:
    """Return the error for a file whose content is not what it should be."""
    return DamagedCheckpoint(
        f"checkpoint file {name} cannot be used ({printable(' '.join(str(reason).split())[:200])})"
    )


def check(read_file: Callable[[str], bytes]) -> None:
    """Read all files of a checkpoint and raise `DamagedCheckpoint` unless they are whole."""
    manifest = read_file(MANIFEST)
    for name in FILES:
        verified(name, manifest, read_file(name))
    if TRAINED in parse_object(manifest):
        verified(TRAINED, manifest, read_file(TRAINED))


def restore(
    read_file: Callable[[str], bytes],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    look_at: Callable[[dict[str, Any]], None],
    trained: nn.Module | None = None,
) -> dict[str, Any]:
    """Restore what `encode` was given from verified files, and return the progress.

    `read_file(name)` gives a file's content; `look_at(progress)` raises if the run cannot go on from there. Raises
    `DamagedCheckpoint`; nothing is changed then.
    """
    manifest = read_file(MANIFEST)
    weights_file, optimizer_file, progress_file = (verified(name, manifest, read_file(name)) for name in FILES)
    networks = [(WEIGHTS, weights_file, model)]
    if trained is not None:
        networks.append((TRAINED, verified(TRAINED, manifest, read_file(TRAINED)), trained))
    try:
        progress = parse_object(progress_file)
    except ValueError as error:
        raise damaged(PROGRESS, error) from error
    look_at(progress)
    weights = [fitting_weights(content, network, name) for name, content, network in networks]
    state = fitting_state(optimizer_file, optimizer)
    for (_, _, network), tensors in zip(networks, weights, strict=True):
        network.load_state_dict(tensors)
    optimizer.load_state_dict(state)
    return progress
