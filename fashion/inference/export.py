"""Exports a trained network: weights, a `torch.export` program that runs without this project, and a model card."""

import io
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fashion.config import CLASS_NAMES, TrainConfig, UserError, require
from fashion.data.manifest import Manifest, load_manifest
from fashion.inference.classifier import SETTINGS, ModelFiles, load_model
from fashion.inference.evaluation import Scores
from fashion.model.network import FashionCNN
from fashion.storage import Storage
from fashion.training import checkpoint, loop

PROGRAM = "model.pt2"
CARD = "README.md"


class ExportedNetwork(nn.Module):
    """The network as evaluation runs it: images (B, 1, 28, 28) uint8, 0 to 255, to logits (B, 10) float32, on a CPU."""

    def __init__(self, network: FashionCNN, precision: str, tta: str) -> None:
        super().__init__()
        self.network = network
        self.precision = precision
        self.tta = tta

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 10) float32 of `images` (B, 1, 28, 28) uint8."""
        return loop.classify(self.network, images, precision=self.precision, device=torch.device("cpu"), tta=self.tta)


def check_destination(folder: str) -> Path:
    """Return `folder` as a path; raises `UserError` unless it is a new or empty folder that can be written."""
    path = Path(folder).expanduser().absolute()
    require("://" not in folder, f"--export {folder} is a URI; name a folder of this machine")
    require(not path.exists() or path.is_dir(), f"--export {folder} is a file; name a folder")
    try:
        require(not path.is_dir() or not any(path.iterdir()), f"--export {folder} is not empty; name another folder")
        require(path.parent.is_dir(), f"--export {folder}: the folder {path.parent} does not exist; make it first")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--export {folder} cannot be written ({error}); name another folder") from error
    return path


def export(storage: Storage, run_id: str, row: dict[str, Any], scores: dict[str, Scores], path: Path) -> None:
    """Write the chosen checkpoint of the `runs` row `row` to the folder `path`, which appears whole or not at all.

    The model card lists the results in the row and in `scores`, evaluations by split.
    """
    config = TrainConfig.from_dict(json.loads(row["config_json"]))
    network = load_model(storage, row["checkpoint"], config, torch.device("cpu"))
    manifest = load_manifest(storage)
    weights = storage.read_bytes(row["checkpoint"], checkpoint.WEIGHTS)
    files = {
        checkpoint.WEIGHTS: weights,
        SETTINGS: ModelFiles(weights, config.to_dict(), row["precision"]).settings(),
        PROGRAM: export_program(ExportedNetwork(network, row["precision"], config.tta).eval()),
        CARD: model_card(run_id, row, config, scores, manifest).encode(),
    }
    files[checkpoint.MANIFEST] = checkpoint.manifest_of(files).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        os.replace(temporary, path)  # also replaces an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_program(network: ExportedNetwork) -> bytes:
    """Return the file content of a `torch.export` program that takes any number of images."""
    examples = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    with torch.no_grad():
        exported = torch.export.export(
            network, (examples,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch takes channels-last weights for slices of larger tensors. It warns, and saves them correctly.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(exported, buffer)
    return buffer.getvalue()


def model_card(
    run_id: str, row: dict[str, Any], config: TrainConfig, scores: dict[str, Scores], manifest: Manifest
) -> str:
    """Return the model card in Markdown: description, results, data, code and settings, limits."""
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in config.to_dict().items())
    held_out = "" if config.hold_out_val else " Val was trained on: its figures say nothing."
    measured = "\n".join(
        f"| {split} | {each.num_rows} | {each.accuracy:.4f} | {each.loss:.4f} |"
        for split, each in (scores_of_row(row, manifest) | scores).items()
    )
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(CLASS_NAMES))
    mirrored = " Logits are the mean over an image and its mirror image." if config.tta == "flip" else ""
    return f"""# {run_id}

A classifier of 28 x 28 grey images of clothing, trained on {manifest.dataset} by one run of `fashion`:
{row["num_parameters"]:,} parameters, the checkpoint of epoch {row["best_epoch"]} of {row["epochs_done"]}.

| file | what |
|---|---|
| `{PROGRAM}` | `torch.export` program: images (B, 1, 28, 28) uint8, 0 to 255, to logits (B, 10) float32, on a CPU |
| `{checkpoint.WEIGHTS}` | its weights |
| `{SETTINGS}` | the settings of the run and its precision, with which `fashion` loads the weights |
| `{checkpoint.MANIFEST}` | SHA-256 of each file; written last |

```python
import torch

classify = torch.export.load("{PROGRAM}").module()
images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)  # bright clothing on black, as in the archives
with torch.no_grad():
    print(classify(images).argmax(1))
```

Normalisation and padding are in the program; it computes in {row["precision"]}, as the evaluation did.{mirrored}
Classes: {classes}.

## How good it is

| split | rows | accuracy | loss (nats) |
|---|---|---|---|
{measured}

The epoch was chosen on val; test was not used for any choice.{held_out}

## What it was made of

Data: {manifest.dataset}, SHA-256 of the split `{manifest.sha256}`.
Code: sum of the sources `{row["source_hash"]}`, torch {row["torch_version"]}, Ray {row["ray_version"]}.
Trained on {row["hardware"]}, {row["world_size"]} worker(s), {row["wall_s"]:.0f} s in all.

| setting | value |
|---|---|
{settings}

## Limits

- It knows ten classes and names one of them for any image, clothing or not.
- Photographs are something else than these images: centred, cropped, without background, inverted to bright on black.
- Nobody has calibrated its probabilities.
"""


def scores_of_row(row: dict[str, Any], manifest: Manifest) -> dict[str, Scores]:
    """Return the results of the chosen checkpoint that a `runs` row holds, by split."""
    num_rows = {"val": manifest.val_rows, "test": row["test_rows"]}
    return {
        split: Scores(row[f"{split}_loss"], row[f"{split}_accuracy"], number)
        for split, number in num_rows.items()
        if row[f"{split}_accuracy"] is not None
    }
