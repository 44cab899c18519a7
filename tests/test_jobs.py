"""The commands as a user types them: quick help, one clear line for each mistake, exit code 2, nothing half-written."""

import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import real_source, run_job

from fashion import data, report
from fashion.storage import Storage, open_storage

pytestmark = pytest.mark.commands


@pytest.mark.parametrize("job", ["prepare", "train", "evaluate", "report", "bench"])
def test_help_comes_within_two_seconds(job: str) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = run_job(f"jobs.{job}", "--help")
        times.append(time.perf_counter() - started)
        assert done.returncode == 0
        assert "--storage" in done.stdout
    assert min(times) < 2, times


MISTAKES = {
    "misspelt flag": (["--lerning-rate", "1"], "--lerning-rate"),
    "close flag": (["--dropout-fcc", "0.1"], "(perhaps --dropout-fc)"),
    "no number": (["--lr", "fast"], "could not convert string to float: 'fast'"),
    "missing value": (["--lr"], "--lr"),
    "unknown preset": (["--preset", "bset"], "--preset bset does not exist; known are default, seed, smoke"),
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


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_code_2_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    flags, told = MISTAKES[case]
    storage = tmp_path / "results"
    done = run_job("jobs.train", "--storage", str(storage), *flags)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert not storage.exists()


def test_what_the_machine_lacks_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Real preflights: these commands start Ray here, see what there is, and stop."""
    cpus = len(os.sched_getaffinity(0))
    wide = ["--num-workers", str(2 * cpus), "--global-batch-size", str(64 * cpus)]
    cases = [(wide, f"needs {2 * cpus} CPUs ({2 * cpus} x 1) and the cluster has")]
    if shutil.which("nvidia-smi") is None:
        cases.append((["--use-gpu", "yes"], "--use-gpu yes needs 2 GPU(s), one for each worker, and the cluster has 0"))
    for flags, told in cases:
        done = run_job("jobs.train", "--storage", str(tmp_path), "--source", real_source(), *flags)
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "reports").exists()


def test_train_does_not_take_the_stand_in_for_the_real_data(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    data.prepare(storage, "synthetic", val_rows=500)
    done = run_job("jobs.train", "--storage", storage.uri, FASHION_MNIST_SOURCE="auto")
    assert done.returncode == 2
    assert "holds the drawn stand-in, not Fashion-MNIST; take it on purpose with --source synthetic" in done.stderr


def test_evaluate_needs_a_run(tmp_path: Path) -> None:
    done = run_job("jobs.evaluate", "--storage", str(tmp_path))
    assert done.returncode == 2
    assert "--run-id" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_storage_that_is_a_file_or_read_only(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = run_job("jobs.prepare", "--storage", str(file), "--source", "synthetic")
    assert (done.returncode, "is a file; name another folder" in done.stderr) == (2, True), done.stderr
    done = run_job("jobs.prepare", "--storage", "/proc/fashion", "--source", "synthetic")
    assert (done.returncode, "cannot be written" in done.stderr) == (2, True), done.stderr


def test_without_a_source_both_ways_out_are_named(tmp_path: Path) -> None:
    """A proxy that refuses everything stands for a machine without a network."""
    refused = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = run_job("jobs.prepare", "--storage", str(tmp_path), "--source", "download", **refused, no_proxy="")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "--source DIR with the four archives" in last
    assert "--source synthetic" in last
    assert not (tmp_path / "data").exists()


@pytest.fixture
def finished(storage: Storage) -> Storage:
    """A storage whose reports hold a finished run."""
    from fashion import config

    row = {"status": "completed", "config_json": report.config_json(config.preset("smoke")), "checkpoint": "x"}
    report.write_table(storage, "runs", "done", [row])
    return storage


def test_a_run_id_that_is_taken(finished: Storage) -> None:
    done = run_job("jobs.train", "--storage", finished.uri, "--run-id", "done")
    assert (done.returncode, "--run-id done exists already" in done.stderr) == (2, True), done.stderr


def test_resume_with_other_settings_says_which(finished: Storage) -> None:
    flags = ["--storage", finished.uri, "--run-id", "done", "--resume", "--lr", "0.5", "--epochs", "9"]
    done = run_job("jobs.train", *flags)
    assert done.returncode == 2
    assert "--epochs 9 (was 2), --lr 0.5 (was" in done.stderr
    assert open_storage(finished.uri).exists("reports", "runs")
