"""Runs on Ray: every row counted for any number of workers, the same bits for the same seed, honest failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import drivers
import pytest
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import assert_refused, call_job, prepare_archives, split_paths, wait_for
from torch import Tensor

import jobs.train
from fashion.cluster.plan import make_plan
from fashion.config import FaultConfig, Precision, ScaleConfig, TrainConfig, UserError, flag, preset
from fashion.data import synthetic
from fashion.data.manifest import load_manifest
from fashion.distributed import trainer, worker
from fashion.distributed.trainers import run_in_thread
from fashion.inference import evaluation
from fashion.reports import provenance
from fashion.reports.progress import ProgressBar
from fashion.reports.runs import find_run, load_run, stored_config
from fashion.reports.tables import read_table
from fashion.storage import Storage, open_storage
from fashion.training import batches, checkpoint
from fashion.training.checkpoint_manager import name_of
from fashion.training.run import PROGRESS_FORMAT, Rank, Shards, TrainingRun, build_model, without_ddp

pytestmark = pytest.mark.ray

# 84 divides by 1, 2, 3 and 7; 254 rows make three steps and leave two rows over.
TINY = TrainConfig(preset="smoke", epochs=1, max_train_rows=254, global_batch_size=84, precision="fp32")
TIMES = ("epoch_time_s", "data_wait_s", "images_per_s")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, few_archives: Path) -> Storage:
    """Real rows where they can be had, and a val that is small and divides by no number of workers."""
    storage = open_storage(str(tmp_path_factory.mktemp("train")))
    prepare_archives(storage, few_archives, val_rows=101)
    return storage


@dataclass
class Fitted:
    """A run without its evaluation on test."""

    row: dict[str, Any]
    epochs: list[dict[str, Any]]
    weights: dict[str, Tensor]

    def epochs_without_times(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in self.epochs]


def scale(num_workers: int | str) -> ScaleConfig:
    """Return a worker group that two CPUs hold, and what reads a stream; one worker alone takes them both."""
    return ScaleConfig(num_workers=str(num_workers), cpus_per_worker=2 if num_workers == 1 else 0.125)


def fit(storage: Storage, run_id: str, config: TrainConfig, num_workers: int | str) -> Fitted:
    """Train with `num_workers` workers, without the evaluation on test; return outcome and chosen weights."""
    manifest = load_manifest(storage)
    plan = make_plan(config, scale(num_workers), manifest)
    spec = trainer.RunSpec(run_id, config, scale(num_workers))
    rows = trainer.read_rows(storage, manifest, config)
    row = trainer.fit_and_choose(trainer.PlannedRun(storage, spec, plan, manifest, rows))
    assert row["status"] == "completed", row
    return Fitted(row, read_table(storage, "epochs", run_id), weights_of(storage, row))


def train(
    storage: Storage, run_id: str, config: TrainConfig, scale: ScaleConfig, **options: Any
) -> trainer.TrainResult:
    """Train as the command does, on the data that was prepared, be it real or the stand-in."""
    return trainer.train(storage, trainer.RunSpec(run_id, config, scale, **options))


def weights_of(storage: Storage, row: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a run's chosen checkpoint."""
    return weights_at(storage, row["checkpoint"])


def weights_at(storage: Storage, folder: str) -> dict[str, Tensor]:
    """Return the weights of the checkpoint in `folder`."""
    return checkpoint.load_weights(storage.read_bytes(folder, checkpoint.WEIGHTS))


def test_all_threads_of_a_worker_share_one_heap(ray_cluster: None) -> None:
    read = ray.remote(num_cpus=0)(lambda: os.environ["MALLOC_ARENA_MAX"])
    assert ray.get(read.remote()) == "1"


# Everything that draws at random is on.
RANDOM = TrainConfig(
    preset="smoke",
    epochs=2,
    max_train_rows=768,
    global_batch_size=32,
    dropout_conv=0.05,
    dropout_fc=0.1,
    flip="random",
    shift=1,
    erase=0.1,
    ema_decay=0.9,
    precision="fp32",
)
IN_BF16 = replace(RANDOM, precision="bf16", max_train_rows=96)


@pytest.fixture(scope="module")
def cut(ray_cluster: None, storage: Storage) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The command, ended by Ctrl-C after its first epoch, and the run's row then."""
    recipe = preset("smoke").to_dict()
    changed = {key: value for key, value in RANDOM.to_dict().items() if value != recipe[key]}
    flags = ["--preset=smoke", *(f"{flag(key)}={value}" for key, value in changed.items())]
    flags += ["--storage", storage.uri, "--source", "auto", "--run-id", "whole", "--cpus-per-worker", "0.25"]
    # Whoever starts the tests in the background may have them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt_after_an_epoch, args=(storage, "whole"), daemon=True).start()
    done = call_job(jobs.train.main, *flags)
    signal.signal(signal.SIGINT, before)
    return done, load_run(storage, "whole")


def interrupt_after_an_epoch(storage: Storage, run_id: str) -> None:
    deadline = time.monotonic() + 900
    while not read_table(storage, "epochs", run_id) and time.monotonic() < deadline:
        time.sleep(0.1)
    number = threading.main_thread().ident
    assert number is not None
    signal.pthread_kill(number, signal.SIGINT)


def test_ctrl_c_is_written_down_and_ends_the_workers(
    cut: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, row = cut
    assert done.returncode == 1, done.stderr
    assert "continue with --run-id whole --resume" in done.stderr
    assert row["status"] == "interrupted"
    wait_for(lambda: not workers_alive(), "end of its workers")


def workers_alive() -> list[str]:
    """Return the ids of Ray Train's workers that live."""
    everyone = ray._private.state.actors()
    return [
        number
        for number, each in everyone.items()
        if each["ActorClassName"] == "RayTrainWorker" and each["State"] == "ALIVE"
    ]


@pytest.fixture(scope="module")
def trained(cut: tuple[subprocess.CompletedProcess[str], dict[str, Any]], storage: Storage) -> trainer.TrainResult:
    """The same run to its end: trained in two lives, chosen on val, evaluated on test, reported."""
    return train(storage, "whole", RANDOM, ScaleConfig(num_workers="2"), resume=True)


def fitted(storage: Storage, run_id: str) -> Fitted:
    """Return what a run has left."""
    row = load_run(storage, run_id)
    return Fitted(row, read_table(storage, "epochs", run_id), weights_of(storage, row))


def assert_same(one: Fitted, two: Fitted) -> None:
    """Compare weights and `epochs` rows to the bit, times aside."""
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert one.epochs_without_times() == two.epochs_without_times()


def test_the_same_seed_gives_the_same_bits_interrupted_or_not(trained: trainer.TrainResult, storage: Storage) -> None:
    """And no process is started but the workers and the one they meet at."""
    assert 1 <= trained.row["resumed_from"] < RANDOM.epochs
    before = set(actors())
    assert_same(fit(storage, "same", RANDOM, 2), fitted(storage, "whole"))
    started = Counter(name for number, name in actors().items() if number not in before)
    assert started == {"RayTrainWorker": 2, "SynchronizationActor": 1}


def actors() -> dict[str, str]:
    """Return the class of every actor that the cluster has seen, by id."""
    return {number: entry["ActorClassName"] for number, entry in ray._private.state.actors().items()}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Storage:
    """A storage with few rows: a CPU without bf16 takes seconds for what others do in a tenth of one.

    Its test split has three batches of an evaluation.
    """
    archives = tmp_path_factory.mktemp("archives")
    synthetic.write_archives(archives, num_train_rows=300, num_test_rows=1_100)
    storage = open_storage(str(tmp_path_factory.mktemp("narrow")))
    prepare_archives(storage, archives, val_rows=50)
    return storage


@pytest.fixture(scope="module")
def in_bf16(narrow: Storage) -> Fitted:
    """A short run in bf16."""
    return fit(narrow, "bf16", IN_BF16, 2)


def test_the_same_seed_gives_the_same_bits_in_bf16(in_bf16: Fitted, narrow: Storage) -> None:
    again = fit(narrow, "bf16-again", IN_BF16, 2)
    assert_same(in_bf16, again)
    assert (again.row["precision"], again.row["exchange"]) == ("bf16", in_bf16.row["exchange"])


def test_the_number_of_workers_does_not_change_what_is_learned(ray_cluster: None, storage: Storage) -> None:
    """Each step sees all 256 rows whatever the width, so only rounding may differ.

    With plain SGD: Adam's steps have full size however small a gradient is, so they turn rounding into movement.
    """
    config = TrainConfig(
        preset="smoke",
        epochs=5,  # each is one step; with each step rounding grows, faster on some processors than on others
        max_train_rows=256,
        global_batch_size=256,
        optimizer="sgd",
        lr=0.012,
        flip="none",
        label_smoothing=0.0,
        precision="fp32",
        hold_out_val=False,  # so the last epoch is the chosen one
    )
    runs = {width: fit_last(storage, f"parity-{width}", config, width) for width in (1, 2, 4)}
    for width in (2, 4):
        differences = [(runs[1][name] - runs[width][name]).abs().max().item() for name in runs[1]]
        print(f"width {width}: weights differ by {max(differences):.1e}")
        assert max(differences) < 1e-4, (width, max(differences))
    first = fit_first(config)
    assert max((runs[1][name] - first[name]).abs().max().item() for name in first if "pixel" not in name) > 1e-2, (
        "it did learn"
    )


def fit_last(storage: Storage, run_id: str, config: TrainConfig, num_workers: int) -> dict[str, Tensor]:
    """Train; return the weights after the last step, which need not be the chosen ones."""
    fit(storage, run_id, config, num_workers)
    return weights_at(storage, f"runs/{run_id}/epoch-{config.epochs:04d}")


def fit_first(config: TrainConfig) -> dict[str, Tensor]:
    """Return the weights before the first step."""
    torch.manual_seed(batches.stream_seed(config.seed, 0, 0, 1))
    return build_model(config, 0.0, 1.0).state_dict()


def test_every_row_counts_once_for_any_number_of_workers(ray_cluster: None, storage: Storage) -> None:
    """With seven, streamed, where a range is asked for: it takes as many as there are. Others train with 1 to 4."""
    fitted = fit(storage, "seven", replace(TINY, data_mode="streaming"), "6:7")
    assert fitted.row["world_size"] == 7
    rows = [(row["split"], row["rows"]) for row in fitted.epochs]
    assert rows == [("train", 252), ("val", 101)]


def test_a_damaged_file_is_told_before_anything_is_written(
    ray_cluster: None, few_archives: Path, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path))
    prepare_archives(storage, few_archives)
    path = Path(split_paths(storage, load_manifest(storage), "test")[0])
    path.write_bytes(path.read_bytes()[:-1])
    for mode in ("resident", "streaming"):
        with pytest.raises(UserError, match=f"{path} is damaged; remove .* and prepare again"):
            train(storage, "broken", replace(TINY, data_mode=mode), scale(2))
    assert find_run(storage, "broken") is None
    assert not storage.exists("runs", "broken")


def test_a_diverged_run_stops_all_ranks_and_says_where(ray_cluster: None, storage: Storage) -> None:
    # One update with such a decay leaves weights that overflow in the next forward pass.
    config = replace(TINY, optimizer="adamw", weight_decay=1e30, schedule="constant", precision="fp32")
    with pytest.raises(trainer.RunFailed, match=r"run wild diverged: loss is not finite at epoch 1, step \d+"):
        train(storage, "wild", config, scale(3))
    row = load_run(storage, "wild")
    assert row["world_size"] == 3
    assert row["status"] == "diverged"
    assert "epoch 1, step" in row["error"]
    assert row["checkpoint"] is None


def test_what_the_cluster_cannot_hold_is_refused_with_the_numbers(ray_cluster: None, storage: Storage) -> None:
    with pytest.raises(UserError, match=r"--num-workers 3 needs 3 CPUs \(3 x 1\) and the cluster has 2; use fewer"):
        train(storage, "wide", TINY, ScaleConfig(num_workers="3"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--use-gpu yes needs 1 GPU\(s\).* the cluster has 0"):
            train(storage, "gpu", TINY, ScaleConfig(num_workers="1", use_gpu="yes"))
    flags = ["--storage", storage.uri, "--source", "auto", "--num-workers", "4"]
    assert_refused(call_job(jobs.train.main, *flags, "--run-id", "wide"), "needs 4 CPUs (4 x 1) and the cluster has 2")
    assert find_run(storage, "wide") is None
    assert not storage.exists("runs", "wide")


def test_nodes_that_never_come_are_waited_for_as_long_as_asked(ray_cluster: None, storage: Storage) -> None:
    """The run that waited is there to be resumed, on what the cluster has."""
    patient = ScaleConfig(num_workers="3", wait_for_nodes_s=2)
    with pytest.raises(trainer.RunFailed, match=r"run late: no room in 2 s .*: .* needs 3 CPUs .* has 2; .*--resume"):
        train(storage, "late", TINY, patient)
    assert load_run(storage, "late")["status"] == "failed"
    assert train(storage, "late", TINY, scale(2), resume=True).row["status"] == "completed"


def test_a_whole_run_learns_and_reports_everything(trained: trainer.TrainResult, storage: Storage) -> None:
    row = load_run(storage, "whole")
    assert row["status"] == "completed"
    assert row["test_rows"] == load_manifest(storage).rows["test"] >= 500
    assert row["num_parameters"] == 7_001_194
    assert row["test_accuracy"] > 0.6
    assert row["source_hash"] == provenance.source_hash()
    assert row["exchange"] == ("shared memory" if room_to_share() else "gloo")
    assert None not in [row[key] for key in ("images_per_s", "precision", "peak_memory_bytes", "wall_s", "finished_at")]
    # Said by the workers of their own machine, not by the command of its.
    assert row["hardware"] == provenance.hardware()
    assert "hardware" not in trainer.identity_columns(TINY, load_manifest(storage))
    assert row["peak_gpu_memory_bytes"] is None
    losses = [each["loss"] for each in read_table(storage, "epochs", "whole") if each["split"] == "train"]
    assert losses[-1] < losses[0]
    predictions = read_table(storage, "predictions", "whole")
    assert sorted(each["index"] for each in predictions) == list(range(row["test_rows"]))
    right = sum(each["label"] == each["predicted"] for each in predictions)
    assert row["test_accuracy"] == right / row["test_rows"]
    cells = read_table(storage, "confusion", "whole")
    assert sum(cell["count"] for cell in cells) == row["test_rows"]
    assert sum(cell["count"] for cell in cells if cell["label"] == cell["predicted"]) == right


def check_columns_of_unlike_machines(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    val = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    run = TrainingRun(TINY, Shards(lambda epoch: iter(()), val, 84, 8, 0.3, 0.35), Rank(rank, 2), without_ddp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "hardware", lambda: ("two cores", "a GPU and 16 cores")[rank])
        patch.setattr(worker, "peak_memory_bytes", lambda: (3_000, 2_000)[rank])
        patch.setattr(worker, "peak_gpu_memory_bytes", lambda device: (50_000, 60_000)[rank])
        found = worker.process_columns(run)
    told = {name: found[name] for name in ("device", "hardware", "peak_memory_bytes", "peak_gpu_memory_bytes")}
    assert told == {
        "device": "cpu",
        "hardware": "a GPU and 16 cores; two cores",
        "peak_memory_bytes": 3_000,
        "peak_gpu_memory_bytes": 60_000,
    }
    dist.destroy_process_group()


def test_workers_tell_their_own_machines_and_the_memory_of_the_largest(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_columns_of_unlike_machines, (str(tmp_path),), 2)


def room_to_share() -> bool:
    """Whether two workers find room for their gradients, in bf16 or fp32, twice each."""
    shared = Path("/dev/shm")
    return shared.is_dir() and shutil.disk_usage(shared).free > 4 * 7_001_194 * 4


def test_curves_for_tensorboard_lie_beside_the_run(trained: trainer.TrainResult, storage: Storage) -> None:
    values = drivers.curves_of(Path(storage.path("runs", "whole", "tensorboard")))  # a file of each life
    rows = read_table(storage, "epochs", "whole")
    for row in rows:
        assert values[f"{row['split']}_loss", row["epoch"]] == pytest.approx(row["loss"])
    assert any("_hparams_" in tag for tag, _ in values)


def test_training_again_under_the_same_name(trained: trainer.TrainResult, storage: Storage) -> None:
    config = stored_config(storage, "whole")
    with pytest.raises(UserError, match="--run-id whole exists already"):
        train(storage, "whole", config, ScaleConfig())
    again = train(storage, "whole", config, ScaleConfig(), resume=True)
    assert again.was_finished
    with pytest.raises(UserError, match=r"other settings: --lr 0.5 \(was"):
        train(storage, "whole", replace(config, lr=0.5), ScaleConfig(), resume=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_workers_evaluates_alike(in_bf16: Fitted, narrow: Storage, precision: Precision) -> None:
    """The same weights, to the bit, each of the rows once; a worker without a batch has nothing to do."""
    row = in_bf16.row | {"precision": precision}
    # Tasks of a CPU each take turns in two processes, which spares the tests the start of seven.
    plan = replace(make_plan(IN_BF16, scale(1), load_manifest(narrow)), cpus_per_worker=1)
    tables = [evaluation.predict(narrow, row, "test", replace(plan, num_workers=(width, width))) for width in (1, 2, 7)]
    assert tables[0]["index"].to_pylist() == list(range(1_100))
    assert all(table.equals(tables[0]) for table in tables[1:])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("num_rows", [1, 499, 500, 501, 10_000, 55_000])
def test_tasks_share_the_rows(num_workers: int, num_rows: int, storage: Storage) -> None:
    plan = make_plan(TINY, scale(1), load_manifest(storage))
    parts = evaluation.shards(num_rows, replace(plan, num_workers=(num_workers, num_workers)))
    assert [row for start, stop in parts for row in range(start, stop)] == list(range(num_rows))
    assert len(parts) <= num_workers


def test_both_ways_of_evaluating_agree(trained: trainer.TrainResult, storage: Storage) -> None:
    """In the training loop by ranks, and as batch inference; rounding may turn one row of 101."""
    plan = make_plan(TINY, scale(1), load_manifest(storage))
    scores = evaluation.evaluate_run(storage, "whole", trained.row, split="val", plan=plan)
    row = load_run(storage, "whole")
    assert scores.num_rows == 101
    assert row["val_accuracy"] == pytest.approx(scores.accuracy, abs=1.01 / 101)
    assert row["val_loss"] == pytest.approx(scores.loss, rel=0.01)
    config = json.dumps(replace(RANDOM, tta="flip").to_dict())
    mirrored = evaluation.evaluate_run(storage, "whole", trained.row | {"config_json": config}, split="val", plan=plan)
    assert mirrored.loss != scores.loss
    assert mirrored.loss == pytest.approx(scores.loss, rel=0.2)
    splits = {each["split"] for each in read_table(storage, "predictions", "whole")}
    assert splits == {"test", "val"}, "evaluating one split leaves the other's rows"


def test_a_finished_run_is_left_alone_by_the_command(trained: trainer.TrainResult, storage: Storage) -> None:
    done = call_job(jobs.train.main, "--storage", storage.uri, "--run-id", "whole", "--resume")
    assert done.returncode == 0, done.stderr
    assert "run whole is finished already; nothing to do" in done.stdout
    assert "0.9304" in done.stdout, "the published table is shown beside"
    assert f"{trained.row['test_accuracy']:.4f}" in done.stdout


def test_other_data_than_the_run_was_trained_on_is_refused(
    trained: trainer.TrainResult, storage: Storage, few_archives: Path, tmp_path: Path
) -> None:
    """With another split, val would hold rows that the run has trained on."""
    other = open_storage(str(tmp_path))
    prepare_archives(other, few_archives, val_rows=100)
    plan = make_plan(TINY, scale(1), load_manifest(other))
    with pytest.raises(UserError, match="is not what the run was trained on"):
        evaluation.evaluate_run(other, "whole", trained.row, split="val", plan=plan)


def test_an_interruption_has_the_time_it_needs() -> None:
    """Ray's handler of SIGTERM sets an alarm that aborts the process; whoever stops a run takes it off."""
    main = threading.main_thread().ident
    assert main is not None
    go_on = threading.Event()

    def work() -> None:
        # As soon as it is waited for: earlier, the interruption would reach the test itself.
        while "run_in_thread" not in {frame.name for frame in traceback.extract_stack(sys._current_frames()[main])}:
            time.sleep(0.01)
        time.sleep(0.5)
        signal.pthread_kill(main, signal.SIGINT)
        go_on.wait()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(3600)
    with pytest.raises(KeyboardInterrupt):
        run_in_thread(work, go_on.set)
    signal.signal(signal.SIGINT, before)
    assert go_on.is_set(), "it was stopped"
    assert signal.alarm(0) == 0, "no alarm was left"


def test_a_run_whose_workers_fail_becomes_a_row_with_the_reason(trained: trainer.TrainResult, storage: Storage) -> None:
    """A whole checkpoint of another form is no damage: nothing is trained over it."""
    place = f"runs/whole/{name_of(RANDOM.epochs)}"
    progress = json.loads(storage.read_bytes(place, checkpoint.PROGRESS)) | {"format": 99}
    files = {name: storage.read_bytes(place, name) for name in (*checkpoint.FILES, checkpoint.TRAINED)}
    files[checkpoint.PROGRESS] = json.dumps(progress).encode()
    for name, content in files.items() | {(checkpoint.MANIFEST, checkpoint.manifest_of(files).encode())}:
        storage.write_bytes(content, place, name)
    manifest = load_manifest(storage)
    plan = make_plan(RANDOM, scale(1), manifest)
    spec = trainer.RunSpec("whole", RANDOM, scale(1), faults=FaultConfig(max_failures=0))
    rows = trainer.read_rows(storage, manifest, spec.config)
    row = trainer.run_or_explain(trainer.PlannedRun(storage, spec, plan, manifest, rows))
    assert row["status"] == "failed"
    assert f"the checkpoint has form 99 and this code reads 4 and {PROGRESS_FORMAT}" in row["error"]


def test_a_line_may_quote_what_looks_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    line = "worker 0 failed: RuntimeError: [/__w/gloo/pair.cc:561] Connection closed by peer [10.77.0.2]:21720"
    with ProgressBar(1) as bar:
        bar.say(line)
    assert capsys.readouterr().out.strip() == line
