"""The commands as a user types them: quick help, one clear line for each mistake, exit code 2, nothing half-written."""

import errno
import functools
import shutil
import socket
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import assert_refused, call_job, run_job

from fashion import config
from fashion.cluster import connection
from fashion.data import archives, preparation, synthetic
from fashion.reports import runs, tables
from fashion.storage import Storage, open_storage
from jobs import bench, evaluate, prepare, train, tune

pytestmark = pytest.mark.commands


@pytest.mark.quiet
@pytest.mark.parametrize("job", ["prepare", "train", "tune", "evaluate", "predict", "report", "bench", "study"])
def test_help_comes_within_two_seconds(job: str) -> None:
    times: list[float] = []
    while len(times) < 3 and min(times, default=2) >= 2:  # a busy machine gets three tries
        started = time.perf_counter()
        done = run_job(f"jobs.{job}", "--help")
        times.append(time.perf_counter() - started)
        assert done.returncode == 0
        assert "--storage" in done.stdout
    assert min(times) < 2, times


MISTAKES = {
    "misspelt flag": (["--lerning-rate", "1"], "--lerning-rate"),
    "close flag": (["--dropout-fcc", "0.1"], "(perhaps --dropout-fc)"),
    "no number": (["--lr", "fast"], "--lr: could not convert string to float: 'fast'"),
    "missing value": (["--lr"], "--lr"),
    "unknown preset": (
        ["--preset", "bset"],
        "--preset bset does not exist; known are default, best, best-deep, seed, smoke",
    ),
    "batch not divisible": (["--num-workers", "3"], "--global-batch-size 128 is not divisible by 3 workers; take 126"),
    "negative lr": (["--lr", "-1"], "--lr -1.0 must be a finite number above 0"),
    "nan lr": (["--lr", "nan"], "--lr nan must be"),
    "dropout of one": (["--dropout-conv", "1"], "--dropout-conv 1.0 must lie in [0, 1)"),
    "unknown choice": (["--use-gpu", "maybe"], "'maybe'"),
    "unsafe run id": (["--run-id", "../x"], "--run-id '../x' must start with a letter"),
    "resume without id": (["--resume"], "--resume needs --run-id"),
    "resume of nothing": (["--resume", "--run-id", "nope"], "--run-id nope does not exist"),
    "no such source": (["--source", "/nowhere"], "--source /nowhere is neither"),
}


SEARCH_MISTAKES = {
    "misspelt flag": (["--num-sample", "1"], "--num-sample"),
    "range upside down": (["--lr", "0.1", "0.01"], "--lr 0.1 0.01 must be two finite numbers, the lower one first"),
    "one bound": (["--lr", "0.1"], "--lr"),
    "dropout of one": (["--dropout-fc", "0", "1"], "--dropout-fc 1.0 must lie in [0, 1)"),
    "no trials": (["--num-samples", "0"], "--num-samples 0 must lie between 1 and 10000"),
    "late rung": (["--grace-epochs", "9"], "--grace-epochs 9 must lie between 1 and 6"),
    "same flag twice": (["--first", "{}", "--first", "{}"], "--first is given 2 times; give it once"),
    "unknown setting": (["--first", '{"epochs": 2}'], "sets epochs; this search draws dropout_conv, dropout_fc, lr"),
    "unknown network": (["--depth", "resnet"], "'resnet'"),
    "batch not divisible": (["--workers-per-trial", "3"], "--global-batch-size 128 is not divisible by 3 workers"),
    "shared gpu": (["--workers-per-trial", "2", "--gpus-per-trial", "0.5"], "must be 0 or 2: one GPU for each worker"),
    "unsafe search id": (["--search-id", "../x"], "--search-id '../x' must start with a letter"),
    "resume without id": (["--resume"], "--resume needs --search-id"),
    "resume of nothing": (["--resume", "--search-id", "nope"], "--search-id nope does not exist"),
    "budget below zero": (["--time-budget-s", "-1"], "--time-budget-s -1.0 must be finite and at least 0"),
}


@pytest.mark.parametrize("case", SEARCH_MISTAKES)
def test_a_mistake_in_a_search_is_one_line_and_code_2(case: str, tmp_path: Path) -> None:
    flags, told = SEARCH_MISTAKES[case]
    storage = tmp_path / "results"
    assert_refused(call_job(tune.main, "--storage", str(storage), *flags), told)
    assert not storage.exists()


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_code_2_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    flags, told = MISTAKES[case]
    storage = tmp_path / "results"
    assert_refused(call_job(train.main, "--storage", str(storage), *flags), told)
    assert not storage.exists()


def test_a_mistake_ends_the_process_in_the_same_way(tmp_path: Path) -> None:
    assert_refused(run_job("jobs.train", "--storage", str(tmp_path), "--lr", "nan"), "--lr nan must be")


def test_train_does_not_take_the_stand_in_for_the_real_data(
    storage: Storage, small_archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = functools.partial(shutil.copytree, small_archives, dirs_exist_ok=True)
    monkeypatch.setattr(synthetic, "write_archives", small)
    preparation.prepare(storage, "synthetic", val_rows=500)
    told = "holds the drawn stand-in, not Fashion-MNIST; take it on purpose with --source synthetic"
    assert_refused(call_job(train.main, "--storage", storage.uri, "--source", "auto"), told)


def test_evaluate_needs_a_run(tmp_path: Path) -> None:
    assert_refused(call_job(evaluate.main, "--storage", str(tmp_path)), "--run-id")


COMMANDS = {
    "prepare": (prepare.main, ["--source", "synthetic"]),
    "train": (train.main, ["--source", "auto"]),
    "evaluate": (evaluate.main, ["--run-id", "done"]),
    "bench": (bench.main, []),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_storage_that_is_a_file(command: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    main, flags = COMMANDS[command]
    assert_refused(call_job(main, "--storage", str(file), *flags), "is a file; name another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "kept"


@pytest.mark.parametrize("command", COMMANDS)
def test_storage_that_is_read_only_is_found_out_before_the_work(
    command: str, finished: Storage, lenient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operating system's refusal is played: whoever runs these tests may be allowed to write everywhere."""

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def start() -> None:
        raise AssertionError("Ray was started")

    main, flags = COMMANDS[command]
    if command != "prepare":
        preparation.prepare(finished, str(lenient), val_rows=300)
    before = sorted(Path(finished.root).rglob("*"))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(connection, "connect", start)
    assert_refused(call_job(main, "--storage", finished.uri, *flags), "cannot be written ([Errno 30] Read-only file")
    assert sorted(Path(finished.root).rglob("*")) == before


def test_bench_writes_its_rows_where_it_is_told(
    finished: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fashion.bench import rows as library
    from fashion.bench.measurement import Measurement

    row = Measurement("b_job_vs_step", "images/s", [2.0, 4.0, 6.0], [2.0, 2.0, 2.0], 0.92, 1)
    monkeypatch.setitem(library.ROWS, "b", lambda *_: [row])
    monkeypatch.setattr(connection, "connect", lambda: None)
    out = tmp_path / "rows.parquet"
    done = call_job(bench.main, "--storage", finished.uri, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert pq.read_table(out).to_pylist()[0]["ratio"] == 2.0
    assert len(finished.list("reports", "bench")) == 1
    for place, told in ((tmp_path, "is a folder; name a file"), (tmp_path / "no" / "x", "does not exist; make it")):
        assert_refused(call_job(bench.main, "--storage", finished.uri, "--out", str(place)), told)


@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_without_a_network_both_ways_out_are_named(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror that refuses connections, and one that takes them and never answers."""
    from torchvision.datasets import FashionMNIST

    with socket.socket() as mirror:
        mirror.bind(("127.0.0.1", 0))
        if answer == "silent":
            mirror.listen()
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{mirror.getsockname()[1]}/"])
        monkeypatch.setattr(archives, "DOWNLOAD_TIMEOUT_S", 0.2)
        monkeypatch.setenv("no_proxy", "*")
        done = call_job(prepare.main, "--storage", str(tmp_path), "--source", "download")
    assert done.returncode == 2, done.stderr
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ("timed out" if answer == "silent" else "Connection refused") in last
    assert "--source DIR with the data" in last
    assert "--source synthetic" in last
    assert not (tmp_path / "data").exists()
    assert socket.getdefaulttimeout() is None


@pytest.fixture
def finished(storage: Storage) -> Storage:
    """A storage whose reports hold a finished run."""
    row = {"status": "completed", "config_json": runs.config_json(config.preset("smoke")), "checkpoint": "x"}
    tables.write_table(storage, "runs", "done", [row])
    return storage


def test_a_run_id_that_is_taken(finished: Storage) -> None:
    done = call_job(train.main, "--storage", finished.uri, "--run-id", "done")
    assert_refused(done, "--run-id done exists already")


def test_resume_with_other_settings_says_which(finished: Storage) -> None:
    flags = ["--storage", finished.uri, "--run-id", "done", "--resume", "--lr", "0.5", "--epochs", "9"]
    assert_refused(call_job(train.main, *flags), "--epochs 9 (was 2), --lr 0.5 (was")
    assert open_storage(finished.uri).exists("reports", "runs")
