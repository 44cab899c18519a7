"""Export: the exported program predicts what the checkpoint does, and a destination that cannot work is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, call_job, prepare_archives
from safetensors.torch import load_file

from fashion.config import Precision, ScaleConfig, TrainConfig
from fashion.distributed import trainer
from fashion.inference import export
from fashion.inference.classifier import SETTINGS
from fashion.reports import tables
from fashion.storage import Storage, open_storage
from fashion.training.checkpoint import MANIFEST, WEIGHTS, manifest_of
from jobs import evaluate

pytestmark = pytest.mark.ray

OUTSIDE = """
import gzip, json, sys
import torch

assert "fashion" not in sys.modules
model, archive = sys.argv[1:]
with gzip.open(archive) as file:
    pixels = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
classify = torch.export.load(model).module()
with torch.no_grad():
    logits = torch.cat([classify(pixels[at:at + 1000]) for at in range(0, len(pixels), 1000)])
    alone = torch.cat([classify(pixels[at:at + 1]) for at in range(20)])
assert torch.allclose(alone, logits[:20], atol=0.05), "an image is classified by itself"
print(json.dumps(logits.argmax(1).tolist()))
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, few_archives: Path) -> Storage:
    """A storage with real test rows, where they can be had."""
    storage = open_storage(str(tmp_path_factory.mktemp("exported")))
    prepare_archives(storage, few_archives)
    return storage


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_program_predicts_what_the_checkpoint_does(
    precision: Precision, ray_cluster: None, storage: Storage, few_archives: Path, tmp_path: Path
) -> None:
    """All test images, by a process that knows nothing of this project."""
    run_id = f"exported-{precision}"
    config = TrainConfig(preset="smoke", epochs=1, max_train_rows=400, global_batch_size=20, precision=precision)
    row = trainer.train(storage, trainer.RunSpec(run_id, config, ScaleConfig(num_workers="1"))).row
    folder = tmp_path / "model"
    flags = ["--storage", storage.uri, "--run-id", run_id, "--split", "val", "--export", str(folder)]
    done = call_job(evaluate.main, *flags)
    assert done.returncode == 0, done.stderr
    assert f"exported: {folder}" in done.stdout
    assert sorted(os.listdir(folder)) == sorted([export.PROGRAM, export.CARD, SETTINGS, WEIGHTS, MANIFEST])
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    assert json.loads((folder / MANIFEST).read_text()) == json.loads(manifest_of(files))

    archive = few_archives / "t10k-images-idx3-ubyte.gz"
    command = [sys.executable, "-I", "-c", OUTSIDE, str(folder / export.PROGRAM), str(archive)]
    outside = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert outside.returncode == 0, outside.stderr
    predictions = [each for each in tables.read_table(storage, "predictions", run_id) if each["split"] == "test"]
    assert [each["index"] for each in predictions] == list(range(row["test_rows"]))
    assert json.loads(outside.stdout) == [each["predicted"] for each in predictions]
    assert len({each["predicted"] for each in predictions}) > 3, "it learned something"

    weights = load_file(folder / WEIGHTS)
    assert sum(weights[name].numel() for name in weights if "pixel" not in name) == row["num_parameters"]
    card = (folder / export.CARD).read_text()
    for fact in (row["dataset_sha256"], f"{row['test_accuracy']:.4f}", f"{row['val_loss']:.4f}", "| `lr` | 0.0015 |"):
        assert fact in card, fact


def test_a_destination_that_cannot_work_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for place, message in {
        "full": "is not empty; name another folder",
        "file": "is a file; name a folder",
        "none/deeper": "does not exist; make it first",
        "file/deeper": "does not exist; make it first",
    }.items():
        flags = ["--storage", str(tmp_path), "--run-id", "a", "--export", str(tmp_path / place)]
        assert_refused(call_job(evaluate.main, *flags), message)
    assert_refused(
        call_job(evaluate.main, "--storage", str(tmp_path), "--run-id", "a", "--export", "s3://bucket/model"),
        "is a URI; name a folder of this machine",
    )
    (tmp_path / "empty").mkdir()
    for good in ("empty", "new"):
        assert export.check_destination(str(tmp_path / good)) == tmp_path / good
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]


@pytest.mark.parametrize(("images", "tta"), [(1, "none"), (7, "flip")])
def test_the_program_takes_any_number_of_images(images: int, tta: str) -> None:
    from fashion.training.run import build_model

    torch.manual_seed(0)
    classifier = export.ExportedNetwork(build_model(TrainConfig(), 0.3, 0.4), "fp32", tta).eval()
    loaded = torch.export.load(io.BytesIO(export.export_program(classifier))).module()
    batch = torch.randint(0, 256, (images, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch), classifier(batch))
        mirrored = torch.allclose(loaded(batch), loaded(batch.flip(-1)), atol=1e-5)
    assert mirrored == (tta == "flip")
