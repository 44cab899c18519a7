"""The rows of `jobs.bench` without Ray: counted operations, ratios, sides that take turns, the reference programs."""

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fashion.bench import reference_ddp, reference_keras, reference_process, startup
from fashion.bench.measurement import Measurement, alternate, inverse
from fashion.bench.reference_process import ReferenceProcess
from fashion.bench.steps import step_flops
from fashion.config import ScaleConfig, UserError
from fashion.data import preparation, synthetic
from fashion.data.rows import Split
from fashion.model.network import NUM_PARAMETERS, FashionCNN, count_parameters
from fashion.reports import console
from fashion.storage import Storage


@pytest.mark.slow
def test_the_operations_of_a_step_are_those_that_torch_counts() -> None:
    model = FashionCNN(pixel_mean=0.3, pixel_std=0.4)
    # In bf16, where minimal filtering is not used: torch computes the products that are counted.
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).sum().backward()
    assert step_flops(model) * 2 == counter.get_total_flops()
    assert step_flops(model) == pytest.approx(0.777e9, rel=1e-3)


def test_sides_take_turns_and_the_first_of_each_warms_up() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[int], float]:
        return lambda repeat: order.append(name) or float(repeat)

    assert alternate({"a": side("a"), "b": side("b")}, 3) == {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}
    assert order == ["a", "b"] * 4


def test_a_ratio_is_the_median_of_the_repeats_own() -> None:
    row = Measurement("x", "1/h", inverse([1.0, 2.0, 6.0]), inverse([2.0, 2.0, 2.0]), 0.9, 2).columns()
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (1.0, pytest.approx(1 / 3), 2.0)
    assert (row["ours"], row["reference"], row["repeats"], row["met"]) == (1800.0, 1800.0, 3, True)


def test_a_row_without_a_reference_does_not_meet_its_target() -> None:
    assert Measurement("x", "1/h", [1.0], [math.nan], 0.9, 1).columns()["met"] is False


def test_a_row_without_a_target_is_not_called_met(capsys: pytest.CaptureFixture[str]) -> None:
    aims = Measurement("aims", "1/h", [2.0], [1.0], 1.5, 1)
    does_not = Measurement("does_not", "1/h", [2.0], [1.0], 0.0, 1)
    assert does_not.columns()["met"] is None
    console.print_bench([aims.columns(), does_not.columns()])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "yes" in lines["aims"]
    assert "yes" not in lines["does_not"]
    assert "no" not in lines["does_not"].split()


class Learner:
    """Stands in for the Keras model: each `fit` takes 0.1 s, by its own clock, and raises the accuracy by 0.1."""

    accuracy, seconds = 0.5, 0.0

    def fit(self, *rows: object, **options: object) -> None:
        self.seconds += 0.1
        self.accuracy += 0.1

    def evaluate(self, *rows: object, **options: object) -> tuple[float, float]:
        return 0.0, self.accuracy


@pytest.mark.parametrize(("accuracy", "seconds", "epochs"), [(0.75, 60.0, 3), (9.9, 0.25, 3), (0.55, 60.0, 1)])
def test_keras_trains_until_the_accuracy_or_until_time_is_over(
    accuracy: float,
    seconds: float,
    epochs: int,
    lenient: Path,
    storage: Storage,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preparation.prepare(storage, str(lenient), val_rows=300)
    capsys.readouterr()
    learner = Learner()
    monkeypatch.setattr(reference_keras, "time", SimpleNamespace(perf_counter=lambda: learner.seconds))
    reference_keras.train_until(learner, storage, 8, accuracy, seconds)
    assert len(capsys.readouterr().out.splitlines()) == epochs


def test_the_network_under_torchrun_is_the_published_one() -> None:
    network = reference_ddp.network()
    assert count_parameters(network) == NUM_PARAMETERS["vgg"] == reference_keras.NUM_PARAMETERS
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    assert shapes == [tuple(p.shape) for p in FashionCNN(pixel_mean=0.3, pixel_std=0.4).parameters()]
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_rows_under_torchrun_are_those_of_the_storage() -> None:
    images, labels = synthetic.draw(20, seed=0)
    dataset = reference_ddp.torchvision_dataset(Split(images, labels, np.arange(20, dtype=np.int32)), 0.3, 0.4)
    image, label = dataset[7]
    assert torch.allclose(image[0], (torch.tensor(images[7]) / 255 - 0.3) / 0.4)
    assert (image.shape, label) == ((1, 28, 28), labels[7])
    batches = reference_ddp.DataLoader(dataset, batch_size=8)
    assert next(iter(batches))[0].shape == (8, 1, 28, 28)


def test_commands_of_the_reference_programs() -> None:
    command = reference_process.torchrun_command("/s", 64, 2, "--tuned")
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[5:] == ["-m", "fashion.bench.reference_ddp", "--storage", "/s", "--batch-size", "64", "--tuned"]
    assert reference_process.keras_command("/s", 128, "--until", "0.9")[2:] == [
        *("fashion.bench.reference_keras", "--storage", "/s", "--batch-size", "128"),
        *("--until", "0.9"),
    ]
    flags = reference_process.job_flags(
        "/s", ScaleConfig(num_workers="4", cpus_per_worker=0.5), "r", "--preset", "smoke"
    )
    assert flags == [
        *("--storage", "/s", "--run-id", "r", "--num-workers", "4", "--cpus-per-worker", "0.5", "--use-gpu", "auto"),
        *("--preset", "smoke"),
    ]


def test_reference_programs_run_without_the_variables_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_ARENA_MAX", "RANK", "RAY_AUTH_TOKEN", "OMP_NUM_THREADS", "KEPT"):
        monkeypatch.setenv(name, "1")
    environment = reference_process.environment_without_ray(OMP_NUM_THREADS="2")
    assert environment["KEPT"] == "1"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert not {"MALLOC_ARENA_MAX", "RANK", "RAY_AUTH_TOKEN"} & set(environment)


def test_without_keras_the_row_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--rows e needs Keras on TensorFlow.* --group keras"):
        reference_process.require_keras("e")


def test_a_moment_is_that_of_the_slowest_process(tmp_path: Path) -> None:
    for moment in ("loop", "step"):
        startup.record_moment(str(tmp_path / "moments"), moment)
    text = (tmp_path / "moments").read_text() + "loop 5e12\n"
    moments = startup.read_moments(text)
    assert moments["loop"] == 5e12
    assert moments["step"] == pytest.approx(time.time(), abs=60)


@pytest.mark.commands
def test_the_start_of_a_run_is_measured_to_the_end_of_its_first_step(tiny_storage: Storage) -> None:
    from fashion.bench import programs

    moments = programs.start_job(tiny_storage, ScaleConfig(num_workers="1"), "startup-0")
    assert list(moments) == ["started", "imported", "connected", "loop", "step"]
    assert list(moments.values()) == sorted(moments.values())


def test_a_reference_program_responds_and_one_that_exits_says_why() -> None:
    script = (
        "from fashion.bench.reference_process import requests, respond\nfor steps in requests(): respond(2 * steps)"
    )
    with ReferenceProcess([sys.executable, "-c", script], dict(os.environ)) as reference:
        assert [reference.measure(1), reference.measure(20)] == [2.0, 40.0]
    with (
        ReferenceProcess([sys.executable, "-c", "raise SystemExit('no such thing')"], dict(os.environ)) as reference,
        pytest.raises(RuntimeError, match="ended: no such thing"),
    ):
        reference.measure(1)


@pytest.mark.commands
def test_torchrun_trains_and_responds(lenient: Path, storage: Storage) -> None:
    preparation.prepare(storage, str(lenient), val_rows=300)
    command = reference_process.torchrun_command(storage.uri, 8, 1, "--tuned", "--precision", "bf16")
    with ReferenceProcess(command, reference_process.environment_without_ray(OMP_NUM_THREADS="1")) as reference:
        assert reference.measure(2) > 0
        assert reference.measure(1) > 0
