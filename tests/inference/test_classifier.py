"""The classifier for arrays: without Ray, from a run or an exported folder, with the bits of the evaluation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from networks import drawn_network, write_export
from PIL import Image

from fashion.config import CLASS_NAMES, TrainConfig, UserError
from fashion.data.rows import Split, to_table
from fashion.data.shards import StoredRows
from fashion.inference import classifier as classifier_module
from fashion.inference import evaluation
from fashion.inference.classifier import SETTINGS, Classifier, build_network, read_image
from fashion.reports import schemas, tables
from fashion.storage import Storage
from fashion.training import checkpoint

# `evaluation`, which this compares with, imports Ray.
pytestmark = pytest.mark.ray

IMAGES = np.random.default_rng(0).integers(0, 256, (1203, 28, 28), dtype=np.uint8)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return write_export(drawn_network(), tmp_path / "model")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"tta": "flip"}, {"depth": "deep-bn", "padding": "learned"}])
def test_it_gives_the_bits_of_the_evaluation(precision: str, settings: dict[str, Any]) -> None:
    model = drawn_network(precision, **settings)
    # Where a CPU has no bf16, torch plays it at a twentieth of the speed.
    number = 510 if precision == "fp32" else 12
    found = Classifier(model).predict(IMAGES[:number])
    network = build_network(model.weights, TrainConfig(**settings), torch.device("cpu"))
    rows = to_table(Split(IMAGES[:number], np.zeros(number, np.uint8), np.arange(number, dtype=np.int32)))
    parts = [
        evaluation.classify_batch(
            network,
            rows.slice(start, evaluation.ROWS_PER_BATCH),
            precision,
            torch.device("cpu"),
            settings.get("tta", "none"),
        )
        for start in range(0, number, evaluation.ROWS_PER_BATCH)
    ]
    expected = np.concatenate([part["probabilities"].combine_chunks().flatten().to_numpy() for part in parts])
    assert np.array_equal(found.probabilities.reshape(-1), expected)
    assert np.array_equal(found.labels, np.concatenate([part["predicted"].to_numpy() for part in parts]))
    assert found.names.tolist() == [CLASS_NAMES[label] for label in found.labels]
    assert np.ptp(found.probabilities, axis=0).max() > 0.01, "images differ"
    assert found.probabilities.dtype == np.float32 and found.labels.dtype == np.uint8
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)


def test_classes_are_computed_in_the_arithmetic_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a GPU has to be asked for, before it computes anything."""

    class Asked(Exception):
        """What a GPU would be asked for."""

    def ask(precision: str, deterministic: bool, device: torch.device) -> None:
        raise Asked(f"{precision}, {deterministic}, {device}")

    monkeypatch.setattr(classifier_module, "set_arithmetic", ask)
    monkeypatch.setattr(evaluation, "set_arithmetic", ask)
    model = drawn_network(deterministic=True)
    with pytest.raises(Asked, match="fp32, True, cpu"):
        Classifier(model).predict(IMAGES[:1])
    threads = torch.get_num_threads()
    spec = evaluation.ModelSpec(
        storage="", folder="", config=model.config, precision="tf32", threads=threads, use_gpu=True
    )
    with pytest.raises(Asked, match="tf32, True, cuda"):
        evaluation.classify(StoredRows.of_blocks([], []), spec)


def test_it_takes_any_number_of_images_in_any_layout() -> None:
    classifier = Classifier(drawn_network())
    empty = classifier.predict(np.empty((0, 28, 28), np.uint8))
    assert (empty.labels.shape, empty.names.shape, empty.probabilities.shape) == ((0,), (0,), (0, 10))
    turned = IMAGES[:5].transpose(0, 2, 1)
    read_only = np.ascontiguousarray(turned)
    read_only.setflags(write=False)
    assert np.array_equal(classifier.predict(turned).probabilities, classifier.predict(read_only).probabilities)
    assert classifier.predict(list(IMAGES[:2])).labels.shape == (2,)


@pytest.mark.parametrize(
    "wrong", [IMAGES[0], IMAGES[:2, :27], IMAGES[:2].astype(np.float32), IMAGES[:2, None], IMAGES[:2].astype(np.int8)]
)
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"expected uint8 \(N, 28, 28\)"):
        Classifier(drawn_network()).predict(wrong)


def test_loading_draws_nothing_from_the_callers_generator() -> None:
    model = drawn_network()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Classifier(model)
    assert torch.equal(torch.rand(3), expected)


def test_an_exported_folder_is_loaded_without_unpickling_and_without_ray(exported: Path, tmp_path: Path) -> None:
    """In a process that knows no `pickle.load`, and ends if anything imports Ray."""
    code = """
import pickle, sys

class Refused:
    def __init__(self, *arguments, **options): raise AssertionError("something is unpickled")

sys.modules["ray"] = None
import numpy as np
from fashion.inference import Classifier
import torch
pickle.load = pickle.loads = pickle.Unpickler = torch.load = Refused
images = np.load(sys.argv[2])
np.save(sys.argv[3], Classifier.load(model=sys.argv[1]).predict(images).probabilities)
"""
    np.save(tmp_path / "images.npy", IMAGES[:20])
    arguments = [str(exported), str(tmp_path / "images.npy"), str(tmp_path / "found.npy")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        np.load(tmp_path / "found.npy"), Classifier(drawn_network()).predict(IMAGES[:20]).probabilities, atol=1e-5
    )


DAMAGED = {
    "no weights": (checkpoint.WEIGHTS, None, "has no file model.safetensors; name a folder that jobs.evaluate"),
    "no settings": (SETTINGS, None, "has no file settings.json"),
    "other weights": (checkpoint.WEIGHTS, b"x", "is damaged (checkpoint file model.safetensors differs from its sum)"),
    "other settings": (SETTINGS, b"{}", "is damaged (checkpoint file settings.json differs from its sum)"),
    "no manifest": (checkpoint.MANIFEST, b"[]", "is damaged (checkpoint manifest does not name"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_refused(damage: str, exported: Path) -> None:
    name, content, told = DAMAGED[damage]
    if content is None:
        (exported / name).unlink()
    else:
        (exported / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Classifier.load(model=str(exported))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"precision": "fp8", "config": {}}, "precision 'fp8' must be"),
        ({"precision": "fp32", "config": {"depht": "vgg"}}, "unknown setting depht"),
        ({"precision": "fp32", "config": {"depth": "deep"}}, "cannot be used"),
        ({"precision": "fp32", "config": 3}, "must be a JSON object"),
    ],
)
def test_settings_of_another_network_are_refused(settings: dict[str, Any], told: str, exported: Path) -> None:
    contents = {checkpoint.WEIGHTS: drawn_network().weights, SETTINGS: json.dumps(settings).encode()}
    (exported / SETTINGS).write_bytes(contents[SETTINGS])
    (exported / checkpoint.MANIFEST).write_text(checkpoint.manifest_of(contents))
    with pytest.raises(UserError) as error:
        Classifier.load(model=str(exported))
    assert "is damaged" in str(error.value) and told in str(error.value)


def test_a_run_is_loaded_by_its_name(storage: Storage) -> None:
    model = drawn_network(tta="flip")
    contents = {checkpoint.WEIGHTS: model.weights}
    contents[checkpoint.MANIFEST] = checkpoint.manifest_of(contents).encode()
    folder = f"{schemas.RUNS_FOLDER}/mine/epoch-0001"
    for name, content in contents.items():
        storage.write_bytes(content, folder, name)
    row = {"status": "completed", "checkpoint": folder, "precision": "fp32", "config_json": json.dumps(model.config)}
    tables.write_table(storage, "runs", "mine", [row])
    found = Classifier.load(storage.uri, run_id="mine").predict(IMAGES[:9])
    assert np.array_equal(found.probabilities, Classifier(model).predict(IMAGES[:9]).probabilities)
    for names, told in (
        ({"run_id": "other"}, "--run-id other does not exist"),
        ({"run_id": "../x"}, "must start with a letter"),
        ({}, "either --run-id RUN or --model FOLDER"),
        ({"run_id": "mine", "model": "x"}, "either --run-id RUN or --model FOLDER"),
    ):
        with pytest.raises(UserError, match=told):
            Classifier.load(storage.uri, **names)


def test_files_become_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(IMAGES[0]).save(path)
    assert np.array_equal(read_image(path), IMAGES[0])
    path.write_text("<html>")
    with pytest.raises(UserError, match=r"a\.png: it is neither a PNG nor a JPEG"):
        read_image(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path / "none.png")
