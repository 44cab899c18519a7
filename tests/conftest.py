"""Fixtures: small data for unit tests, one Ray cluster for the whole session, the real data where it is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fashion import synthetic
from fashion.storage import Storage, open_storage

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data" / "FashionMNIST" / "raw"


def real_source() -> str:
    """Return the folder with the official archives, or `synthetic` where there is none."""
    named = os.environ.get("FASHION_MNIST_SOURCE", "")
    if named and Path(named).is_dir():
        return named
    return str(REAL_DATA) if REAL_DATA.is_dir() else "synthetic"


@pytest.fixture(scope="session")
def small_archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four archives of the drawn stand-in: 3,000 training and 500 test rows."""
    folder = tmp_path_factory.mktemp("archives")
    synthetic.write_archives(folder, num_train_rows=3000, num_test_rows=500)
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty storage."""
    return open_storage(str(tmp_path / "results"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests of the session, with token authentication.

    Two logical CPUs however many there are: Ray starts a process for each one that a task could use, and seven workers
    fit as well when each takes a fraction of a CPU.
    """
    import ray

    from fashion import cluster

    os.environ["RAY_ADDRESS"] = "local"
    cluster.connect(num_cpus=2)
    yield
    ray.shutdown()


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs.X ...` as a user would; returns the finished process with its output as text."""
    command = [sys.executable, "-m", *arguments]
    variables = job_environment() | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=600, check=False)


def job_environment() -> dict[str, str]:
    """Return what a command runs with: a cluster of its own, and the data that the tests prepare."""
    return {**os.environ, "RAY_ADDRESS": "local", "FASHION_MNIST_SOURCE": real_source()}
