"""Submission for real: a head node with token authentication, `ray job submit`, the same reports; no token, no job."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from fashion.reports import runs, tables
from fashion.storage import Storage

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that a head node of the user's own is left alone."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("fashion", "jobs", ".rayignore", ".gitignore", "Makefile", "pyproject.toml"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder / name)
    # The copy differs from what is installed, so that a job which ran the installed code would be found out.
    (folder / "fashion" / "__init__.py").write_text('"""A copy."""\n')
    return folder


def run(project: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy, without the user's own settings of Ray and make."""
    foreign = ("RAY_", "MAKE", "MFLAGS")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | environment
    return subprocess.run(
        command, capture_output=True, text=True, cwd=project, env=variables, timeout=1800, check=False
    )


def make(project: Path, target: str, *variables: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `make` with the environment that runs these tests: nothing is installed."""
    python = f"RUN={sys.executable} -m"
    return run(project, "make", "-o", ".venv/.installed", target, python, *variables, **environment)


def head(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the module behind the targets: its exit code is not make's."""
    return run(project, sys.executable, "-m", "fashion.cluster.head", *arguments, **environment)


@pytest.fixture(scope="module")
def running(project: Path) -> Iterator[str]:
    """The address of a head node that runs for this module's tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Somebody else's process, in the same folder, that looks like a head node of Ray.
    script = "import time; time.sleep(3600)"
    other = subprocess.Popen([sys.executable, "-c", script, "ray", "start", "--head", "--block"], cwd=project)
    try:
        up = make(project, "up", DASHBOARD_PORT=port)
        assert up.returncode == 0, up.stderr
        yield f"http://127.0.0.1:{port}"
        down = make(project, "down")
        assert "Ray is down" in down.stdout, down.stderr
        assert other.poll() is None, "make down stopped a process that is not its own"
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(port))) != 0, "make down left the head node running"
    finally:
        other.kill()
        other.wait()
    assert make(project, "down").stdout.startswith("Ray is not up")


def test_a_second_up_starts_nothing(project: Path, running: str) -> None:
    assert "Ray runs already" in make(project, "up").stdout


def test_the_package_is_the_code_and_small(project: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

    (project / "results").mkdir(exist_ok=True)
    (project / "results" / "large").write_bytes(bytes(4_000_000))
    excludes = get_runtime_env_default_excludes()
    before = get_uri_for_directory(str(project), include_gitignore=True, excludes=excludes)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.zip"
        create_package(str(project), package, include_gitignore=True, excludes=excludes)
        assert package.stat().st_size < 2 * 2**20
        names = set(zipfile.ZipFile(package).namelist())
    assert {"fashion/distributed/trainer.py", "jobs/train.py"} <= names
    assert {name.split("/")[0] for name in names} == {"fashion", "jobs"}
    source = project / "fashion" / "__init__.py"
    source.write_text('"""Another copy."""\n')
    after = get_uri_for_directory(str(project), include_gitignore=True, excludes=excludes)
    assert before != after, "the package's name follows the code, so old code never runs in place of new"


def test_the_same_job_runs_when_submitted(project: Path, running: str, tiny_storage: Storage) -> None:
    flags = [f"STORAGE={tiny_storage.uri}", "SOURCE=auto", "PRESET=smoke", "RUN_ID=sent"]
    done = make(project, "submit-train", *flags, "EPOCHS=1", "MAX_TRAIN_ROWS=256")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCEEDED" in done.stdout
    assert "epoch 1/1" in done.stdout
    row = runs.load_run(tiny_storage, "sent")
    assert (row["status"], row["test_rows"], row["world_size"]) == ("completed", 200, 2)
    assert row["source_hash"] == source_hash_of(project)
    for table in ("epochs", "predictions", "classes", "confusion"):
        assert tables.read_table(tiny_storage, table, "sent"), table


def test_a_search_runs_when_submitted(project: Path, running: str, tiny_storage: Storage) -> None:
    flags = [f"STORAGE={tiny_storage.uri}", "SOURCE=auto", "PRESET=smoke", "SEARCH_ID=submitted", "REFIT=no"]
    done = make(
        project, "submit-tune", *flags, "NUM_SAMPLES=2", "MAX_EPOCHS=1", "MAX_TRAIN_ROWS=256", "ARGS=--max-concurrent 1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCEEDED" in done.stdout
    for trial in ("submitted-t0000", "submitted-t0001"):
        [row] = tables.read_table(tiny_storage, "trials", trial)
        assert (row["search_id"], row["status"], row["epochs_done"]) == ("submitted", "completed", 1)
        assert len(tables.read_table(tiny_storage, "epochs", trial)) == 2
        assert runs.load_run(tiny_storage, trial)["source_hash"] == source_hash_of(project)


def source_hash_of(project: Path) -> str:
    code = "from fashion.reports import provenance; print(provenance.source_hash())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project, check=True)
    return done.stdout.strip()


def test_a_job_that_fails_fails_the_command(project: Path, running: str, storage: Storage) -> None:
    done = head(project, "submit", "jobs.train", "--storage", storage.uri, "--lr", "nan")
    assert done.returncode == 1
    assert "--lr nan must be a finite number" in done.stdout + done.stderr
    assert "FAILED" in done.stdout


def test_without_the_token_nothing_is_accepted(project: Path, running: str) -> None:
    wrong = head(project, "submit", "jobs.train", RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode == 2
    assert "refused the token" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ray = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory() as home:
        bare = subprocess.run(
            [ray, "job", "submit", "--address", running, "--", "true"],
            capture_output=True,
            text=True,
            env=variables | {"HOME": home},
            timeout=900,
            check=False,
        )
    assert bare.returncode != 0
    assert "Missing authentication token" in bare.stdout + bare.stderr
