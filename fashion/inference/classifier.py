"""A trained network in this process, without Ray: loaded from a run or an exported folder, it classifies arrays."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fashion.config import (
    CLASS_NAMES,
    IMAGE_SIZE,
    NUM_CLASSES,
    RUN_ID_PATTERN,
    TrainConfig,
    UserError,
    check_run_id,
    parse_object,
    require,
)
from fashion.data.images.decoding import Unreadable, decode_image
from fashion.model.device import set_arithmetic
from fashion.model.network import FashionCNN, place
from fashion.reports import runs, schemas
from fashion.storage import Storage, open_storage
from fashion.training import checkpoint, loop
from fashion.training.run import build_model

# Batches hold the same rows for any number of workers, so every number of workers gives the same bits.
ROWS_PER_BATCH = 500
SETTINGS = "settings.json"
"""File of an exported folder: the run's settings and its precision, as `ModelFiles.settings` writes them."""


@dataclass(frozen=True)
class ModelFiles:
    """All that a process needs to classify as a run's evaluation did."""

    weights: bytes
    """Content of the safetensors file."""
    config: dict[str, Any]
    """The run's settings, as `TrainConfig.to_dict` gives them."""
    precision: str
    """fp32, tf32 or bf16, as the run computed."""

    @property
    def sha256(self) -> str:
        """SHA-256 of weights, settings and precision: models of equal sums give equal classes."""
        return hashlib.sha256(self.weights + self.settings()).hexdigest()

    def settings(self) -> bytes:
        """Return settings and precision as the content of the file `SETTINGS`."""
        return json.dumps({"precision": self.precision, "config": self.config}, indent=1, sort_keys=True).encode()


@dataclass(frozen=True)
class Predictions:
    """Classes of N images."""

    labels: NDArray[np.uint8]
    """(N,), 0 to 9 in the order of the data set; the class with the highest probability."""
    names: NDArray[np.str_]
    """(N,), such as `Sneaker`."""
    probabilities: NDArray[np.float32]
    """(N, 10), each row sums to 1."""


class Classifier:
    """A trained network that classifies arrays, on this machine and without Ray."""

    def __init__(self, files: ModelFiles, *, use_gpu: bool = False) -> None:
        """Load the network to the CPU or a GPU. Raises `checkpoint.DamagedCheckpoint` for another network's weights."""
        self._config = TrainConfig.from_dict(files.config)
        self._precision = files.precision
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._model = build_network(files.weights, self._config, self._device)

    @classmethod
    def load(cls, storage: str = "results", *, run_id: str = "", model: str = "", use_gpu: bool = False) -> Self:
        """Load the chosen checkpoint of the run `run_id` in `storage`, a local folder or a URI.

        Or, with `model`, a folder that `jobs.evaluate --export` has written. Nothing is unpickled. Raises `UserError`
        if both or neither are named, or if there is no whole checkpoint.
        """
        return cls(find_model(storage, run_id, model), use_gpu=use_gpu)

    def predict(self, images: ArrayLike) -> Predictions:
        """Classify `images` (N, 28, 28) uint8, bright clothing on black: see `read_image` for files.

        The classes are those of `jobs.evaluate` for the same images in the same order: batches are equal, and so are
        the bits of the logits. Raises `UserError` for an array of another shape or dtype.
        """
        array = np.asarray(images)
        require(
            array.dtype == np.uint8 and array.ndim == 3 and array.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE),
            f"images are {array.dtype} {array.shape}, expected uint8 (N, {IMAGE_SIZE}, {IMAGE_SIZE})",
        )
        # Others may have set another arithmetic for their own networks in this process since.
        set_arithmetic(self._precision, self._config.deterministic, self._device)
        probabilities = np.empty((len(array), NUM_CLASSES), np.float32)
        labels = np.empty(len(array), np.uint8)
        with torch.inference_mode():
            for start in range(0, len(array), ROWS_PER_BATCH):
                rows = slice(start, start + ROWS_PER_BATCH)
                logits = compute_logits(self._model, array[rows], self._precision, self._device, self._config.tta)
                probabilities[rows] = logits.softmax(1).cpu().numpy()
                labels[rows] = logits.argmax(1).cpu().numpy()
        return Predictions(labels, np.array(CLASS_NAMES)[labels], probabilities)


def read_image(path: str | Path, *, photo: bool = False) -> NDArray[np.uint8]:
    """Return a PNG or JPEG file as (28, 28) uint8; with `photo`, it is a photograph of a garment on a light ground.

    Raises `UserError`, which names the file, if it cannot be read: see `decoding.decode_image`.
    """
    try:
        return decode_image(Path(path).expanduser().read_bytes(), photo=photo)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a PNG or JPEG file") from error
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from error


def compute_logits(
    model: FashionCNN, images: NDArray[np.uint8], precision: str, device: torch.device, tta: str
) -> Tensor:
    """Return the logits (B, 10) float32 of one batch of `images` (B, 28, 28), on `device`."""
    batch = torch.from_numpy(np.array(images)).unsqueeze(1).to(device)
    return loop.classify(model, batch, precision=precision, device=device, tta=tta)


def find_model(storage: str, run_id: str, model: str) -> ModelFiles:
    """Return the files of a run's checkpoint or of an exported folder, checked; raises `UserError` for neither."""
    require(bool(run_id) != bool(model), "name a trained network: either --run-id RUN or --model FOLDER")
    if model:
        return files_of_export(model)
    check_run_id(run_id)
    opened = open_storage(storage)
    row = runs.load_run(opened, run_id)
    config = check_run(opened, run_id, row)
    return ModelFiles(weights_of(opened, row["checkpoint"]), config.to_dict(), row["precision"])


def files_of_export(folder: str) -> ModelFiles:
    """Return the files of a folder that `jobs.evaluate --export` has written; raises `UserError` for any other."""
    place = Path(folder).expanduser()
    way_out = "name a folder that jobs.evaluate --export has written"
    try:
        manifest = (place / checkpoint.MANIFEST).read_bytes()
        contents = [(place / name).read_bytes() for name in (checkpoint.WEIGHTS, SETTINGS)]
    except OSError as error:
        raise UserError(f"--model {folder} has no file {Path(error.filename or folder).name}; {way_out}") from error
    try:
        weights, settings = (
            checkpoint.verified(name, manifest, content)
            for name, content in zip((checkpoint.WEIGHTS, SETTINGS), contents, strict=True)
        )
        values = parse_object(settings)
        config = TrainConfig.from_dict(values.get("config", {}))
        precision = values.get("precision")
        require(precision in ("fp32", "tf32", "bf16"), f"precision {precision!r} must be fp32, tf32 or bf16")
        files = ModelFiles(weights, config.to_dict(), str(precision))
        build_network(weights, config, torch.device("cpu"))
    except (checkpoint.DamagedCheckpoint, ValueError) as error:
        raise UserError(f"--model {folder} is damaged ({error}); export it again") from error
    return files


def load_model(storage: Storage, folder: str, config: TrainConfig, device: torch.device) -> FashionCNN:
    """Return the network of the checkpoint in `folder` on `device`, in evaluation mode.

    Raises `checkpoint.DamagedCheckpoint` if the weights do not match their SHA-256 or the network, and `OSError` if a
    file is missing.
    """
    return build_network(weights_of(storage, folder), config, device)


def weights_of(storage: Storage, folder: str) -> bytes:
    """Return the content of the weights' file of the checkpoint in `folder`; raises as `load_model` does."""
    manifest = storage.read_bytes(folder, checkpoint.MANIFEST)
    return checkpoint.verified(checkpoint.WEIGHTS, manifest, storage.read_bytes(folder, checkpoint.WEIGHTS))


def build_network(weights: bytes, config: TrainConfig, device: torch.device) -> FashionCNN:
    """Return the network of `config` with `weights`, a safetensors file, on `device`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn first, which is no business of the caller's seed
        model = build_model(config, pixel_mean=0.0, pixel_std=1.0)  # the weights hold the real constants
    model.load_state_dict(checkpoint.fitting_weights(weights, model))
    return place(model, device).eval()


def check_run(storage: Storage, run_id: str, row: dict[str, Any]) -> TrainConfig:
    """Return a run's settings; raises `UserError` unless its `runs` row names a checkpoint that can be loaded.

    Reports may come from others, so the column `checkpoint` is accepted only if it names a folder of the run itself.
    """
    config = runs.config_of(storage, run_id, row)
    folder = row["checkpoint"]
    if not folder:
        raise UserError(f"--run-id {run_id} has no checkpoint (status {row['status']}); train it first")
    parent, _, name = folder.rpartition("/")
    require(
        parent == f"{schemas.RUNS_FOLDER}/{run_id}" and RUN_ID_PATTERN.fullmatch(name) is not None,
        f"--run-id {run_id} names the checkpoint {folder!r}, which is none of its own; train it again",
    )
    try:
        load_model(storage, folder, config, torch.device("cpu"))
    except (checkpoint.DamagedCheckpoint, OSError) as error:
        raise UserError(f"--run-id {run_id} has no whole checkpoint in {folder} ({error}); train it again") from error
    return config
