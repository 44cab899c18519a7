"""Networks with weights as they are drawn, in the forms in which trained ones are kept."""

from pathlib import Path
from typing import Any

import torch

from fashion.config import TrainConfig
from fashion.inference.classifier import SETTINGS, ModelFiles
from fashion.training import checkpoint
from fashion.training.run import build_model


def drawn_network(precision: str = "fp32", **settings: Any) -> ModelFiles:
    """Return a network of the settings."""
    torch.manual_seed(0)
    config = TrainConfig(**settings)
    return ModelFiles(checkpoint.encode_weights(build_model(config, 0.3, 0.4)), config.to_dict(), precision)


def write_export(model: ModelFiles, folder: Path) -> Path:
    """Write what a folder of `jobs.evaluate --export` holds of a network, apart from the program and the card."""
    contents = {checkpoint.WEIGHTS: model.weights, SETTINGS: model.settings()}
    contents[checkpoint.MANIFEST] = checkpoint.manifest_of(contents).encode()
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder
