"""The files of a checkpoint: safetensors weights, the optimizer's state, progress as JSON, a manifest of SHA-256 sums.

No file is used before its sum is checked. The optimizer's state is read with `weights_only`, after a check that its
pickle names nothing but tensors: reading a checkpoint never runs code from it.
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
from fashion.training.optimizer import state_names

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
PROGRESS = "progress.json"
MANIFEST = "manifest.json"
FILES = (WEIGHTS, OPTIMIZER, PROGRESS)
"""Files that every checkpoint has, besides the manifest."""
TRAINED = "trained.safetensors"
"""A further file of a run with `ema_decay`: the weights that the optimizer updates. `WEIGHTS` holds their average."""
GLOBALS = {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}
"""Everything that the pickle of an optimizer's state refers to. torch would allow more, such as `bytearray`, with which
twenty bytes can allocate any amount of memory.
"""


class DamagedCheckpoint(RuntimeError):
    """A checkpoint whose files are missing, differ from their sums, or have content that this run cannot use."""


class OtherVersion(RuntimeError):
    """An undamaged checkpoint in a format that this code does not read."""


def encode(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], trained: nn.Module | None = None
) -> dict[str, bytes]:
    """Return a checkpoint's files, name -> content. The manifest is the last one: a folder without it is no checkpoint.

    `model` is the network to evaluate. `trained` is the network that `optimizer` updates, if that is another one.
    """
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    files = {WEIGHTS: encode_weights(model)} | ({TRAINED: encode_weights(trained)} if trained is not None else {})
    files |= {OPTIMIZER: buffer.getvalue(), PROGRESS: json.dumps(progress).encode()}
    return files | {MANIFEST: manifest_of(files).encode()}


def encode_weights(model: nn.Module) -> bytes:
    """Return the state dict of `model` as the content of a safetensors file."""
    return save_safetensors({name: each.detach().cpu().contiguous() for name, each in model.state_dict().items()})


def manifest_of(files: dict[str, bytes]) -> str:
    """Return the manifest as JSON: file name -> SHA-256 of its content."""
    return json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def verified(name: str, manifest: bytes, data: bytes) -> bytes:
    """Return `data` if its SHA-256 is that of the file `name` in `manifest`; else raise `DamagedCheckpoint`."""
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
    except Exception as error:  # safetensors raises its own kind, torch others for wrong types and shapes
        raise damaged(name, error) from error


def fitting_weights(data: bytes, model: nn.Module, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Parse weights for `model`; raises `DamagedCheckpoint` unless names, shapes and dtypes are those of `model`."""
    weights, own = load_weights(data, name), model.state_dict()
    parsed, expected = ({key: (each.shape, each.dtype) for key, each in side.items()} for side in (weights, own))
    if parsed != expected:
        wrong = sorted(key for key in {*parsed, *expected} if parsed.get(key) != expected.get(key))
        raise damaged(name, f"{wrong[0]} is {parsed.get(wrong[0])}, the network has {expected.get(wrong[0])}")
    return weights


def load_state(data: bytes) -> Any:
    """Parse an optimizer's state dict as `torch.save` wrote it. Raises `DamagedCheckpoint`; runs no code from `data`.

    Refuses files that are compressed, or that refer to more than `GLOBALS`, before torch reads them; so this needs
    little more memory than the file's size.
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
    except Exception as error:  # the readers of zip files and pickles, and torch, raise errors of many kinds
        raise damaged(OPTIMIZER, error) from error


def fitting_state(data: bytes, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parse a state dict that `optimizer` can load and step with; raises `DamagedCheckpoint` for any other.

    The settings of the parameter groups are those of `optimizer`, not the stored ones: they follow from the run's
    settings, and the learning rate is set before every step.
    """
    stored, own = load_state(data), optimizer.state_dict()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    expected = [
        names for group, names in zip(own["param_groups"], state_names(optimizer), strict=True) for _ in group["params"]
    ]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        groups, own_groups = ([each["params"] for each in side["param_groups"]] for side in (stored, own))
        require(groups == own_groups, "its groups are another optimizer's")
        for index, values in stored["state"].items():
            require(type(index) is int and 0 <= index < len(parameters), "it knows more parameters")
            require(set(values) == set(expected[index]), "it is another optimizer's")
            state[index] = {}
            for name, value in values.items():
                like = parameters[index].detach() if expected[index][name] else torch.zeros(())
                require((value.shape, value.dtype) == (like.shape, torch.float32), "it has other shapes")
                # A copy with storage of its own: the loaded tensor may be a single number with strides of 0.
                state[index][name] = torch.empty_like(like, device="cpu").copy_(value.detach())
    except Exception as error:  # every stored value may be of any type
        raise damaged(OPTIMIZER, error) from error
    return own | {"state": state}


def damaged(name: str, reason: object) -> DamagedCheckpoint:
    """Return the error for a file whose content is not what it should be."""
    return DamagedCheckpoint(
        f"checkpoint file {name} cannot be used ({printable(' '.join(str(reason).split())[:200])})"
    )


def check(read_file: Callable[[str], bytes]) -> None:
    """Read all files of a checkpoint; raise `DamagedCheckpoint` if one is missing or differs from its sum.

    `read_file(name)` returns a file's content.
    """
    manifest = read_file(MANIFEST)
    for name in FILES:
        verified(name, manifest, read_file(name))
    if TRAINED in parse_object(manifest):
        verified(TRAINED, manifest, read_file(TRAINED))


def restore(
    read_file: Callable[[str], bytes],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    check_progress: Callable[[dict[str, Any]], None],
    trained: nn.Module | None = None,
) -> dict[str, Any]:
    """Restore `model`, `optimizer` and `trained` from the files that `encode` returned; return the progress.

    `read_file(name)` returns a file's content; `check_progress(progress)` raises if the run cannot resume from there.
    Raises `DamagedCheckpoint`, and then has changed nothing.
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
    check_progress(progress)
    weights = [fitting_weights(content, network, name) for name, content, network in networks]
    state = fitting_state(optimizer_file, optimizer)
    for (_, _, network), tensors in zip(networks, weights, strict=True):
        network.load_state_dict(tensors)
    optimizer.load_state_dict(state)
    return progress
