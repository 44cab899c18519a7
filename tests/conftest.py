"""Fixtures: small data for unit tests, one Ray cluster for the whole session, the real data where it is."""

import contextlib
import functools
import gzip
import io
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from forkserver.run import FOLDER, forking

from fashion import cli
from fashion.data import archives as archives_module
from fashion.data import preparation, synthetic
from fashion.data.archives import ARCHIVES, file_sha256
from fashion.data.manifest import DATA_FOLDER, Manifest
from fashion.storage import Storage, open_storage

if TYPE_CHECKING:
    import drivers

ROOT = Path(__file__).resolve().parent.parent
# What every cluster of the tests runs with. Ray lowers the priority of its workers by 15; beside other lanes, those of
# a test would hardly run. It gives up a worker that takes a minute to start. Its log monitor lists the files of all
# processes ten times a second, and there are many here.
RAY_SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "1",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}
for name, value in RAY_SETTINGS.items():
    os.environ.setdefault(name, value)
# A thread that waits for another one sleeps: beside other lanes, that other one may not run for a long time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
REAL_DATA = ROOT.parent / "shared" / "data" / "FashionMNIST" / "raw"


def real_source() -> str:
    """Return the folder with the official archives, or `synthetic` where there is none."""
    named = os.environ.get("FASHION_MNIST_SOURCE", "")
    if named and Path(named).is_dir():
        return named
    return str(REAL_DATA) if REAL_DATA.is_dir() else "synthetic"


SLOW = ("slow", "commands", "ray", "cluster", "hosts", "faults", "quiet", "gpu")
# Tests that start processes of Ray last minutes where a machine is slow and other lanes keep it busy. No test waits so
# long unless it fails.
LONGEST_S = 3600
# Tests of one lane run one after the other in one process and share what is costly to start: a Ray cluster, a head
# node, hosts. Lanes run side by side, the longest first: most of their time is waiting for processes to start and end.
# By file, and where a test of a file has another lane, by its name. Any other test runs beside all others.
LANES = {
    "tests/distributed/test_hosts.py": "hosts",
    "tests/distributed/test_faults.py": "faults",
    "test_a_run_survives_a_kill_and_a_store_that_falls_silent": "faults",
    "test_what_it_left_is_evaluated_and_shown": "faults",
    "tests/search/test_search.py": "search",
    "tests/bench/test_scale.py": "scale",
    "test_a_run_shrinks_with_its_cluster_and_grows_again": "elastic",
    "test_ray_up_exec_and_down": "elastic",
    "tests/distributed/test_trainer.py": "distributed",
    "tests/data/test_loading.py": "distributed",
    "tests/test_storage_s3.py": "s3",
    "tests/distributed/test_engine.py": "engine",
    "tests/inference/test_predict.py": "predict",
    "tests/cluster/test_submit.py": "heads",
    "tests/inference/test_export.py": "export",
    "tests/inference/test_classifier.py": "classifier",
    "tests/jobs/test_tour.py": "tour",
    "tests/ablation/test_study.py": "study",
    "tests/cluster/test_storage_access.py": "cluster",
    "tests/cluster/test_address.py": "cluster",
    "tests/distributed/test_interfaces.py": "cluster",
    "tests/jobs/test_commands.py": "commands",
}
# They import Ray, which takes as long as many quick tests.
IMPORT_RAY = {
    f"test_{name}.py"
    for name in (
        *("classifier", "engine", "export", "predict", "scale", "storage_access", "search", "study", "trainer"),
    )
}


def lane_of(nodeid: str) -> str:
    """Return the lane of a test, which is a lane of its own if it needs none."""
    file, _, name = nodeid.partition("::")
    return LANES.get(name.partition("[")[0]) or LANES.get(file) or nodeid


def pytest_configure(config: pytest.Config) -> None:
    """Have Ray's processes and the project's commands forked from one that has imported torch, unless that is so
    already, only quick tests are wanted, or `FASHION_TESTS_FORK=no`.
    """
    wanted = hasattr(os, "sched_getaffinity") and os.environ.get("FASHION_TESTS_FORK") != "no"
    if not wanted or FOLDER in os.environ or config.option.markexpr == "quick":
        return
    server = contextlib.ExitStack()
    server.enter_context(forking())
    config.add_cleanup(server.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each lane to one process. xdist's own groups are not told apart under pytest 9."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane_of(nodeid)

    return Lanes(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests, and put the longest lanes first."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in SLOW):
            assert item.path.name not in IMPORT_RAY, (
                f"{item.nodeid} needs the mark ray: quick tests leave its file unread"
            )
            item.add_marker("quick")
        elif not item.get_closest_marker("timeout") and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(LONGEST_S))
    order = {lane: number for number, lane in enumerate(dict.fromkeys(LANES.values()))}
    items.sort(key=lambda item: order.get(lane_of(item.nodeid), len(order)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave Ray's modules unread where only the quick tests are wanted."""
    return True if config.option.markexpr == "quick" and collection_path.name in IMPORT_RAY else None


@pytest.fixture(scope="session")
def small_archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four archives of the drawn stand-in: 3,000 training and 500 test rows."""
    folder = tmp_path_factory.mktemp("archives")
    synthetic.write_archives(folder, num_train_rows=3000, num_test_rows=500)
    return folder


@pytest.fixture(scope="session")
def few_archives(tmp_path_factory: pytest.TempPathFactory, small_archives: Path) -> Path:
    """The same of the first 3,000 and 1,000 real rows, where these can be had."""
    source = Path(real_source())
    if not source.is_dir():
        return small_archives
    folder = tmp_path_factory.mktemp("few")
    for stem, rows in (("train", 3000), ("t10k", 1000)):
        for kind, magic, sizes in (("images-idx3", 2051, (28, 28)), ("labels-idx1", 2049, ())):
            name = f"{stem}-{kind}-ubyte.gz"
            content = archives_module.read_idx(source / name, magic=magic, shape=sizes)[:rows].tobytes()
            header = struct.pack(f">{2 + len(sizes)}I", magic, rows, *sizes)
            (folder / name).write_bytes(gzip.compress(header + content, 1))
    return folder


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch, small_archives: Path) -> Path:
    """The small archives, taken for the official ones."""
    take_for_official(monkeypatch, small_archives)
    return small_archives


def take_for_official(patch: pytest.MonkeyPatch, archives: Path) -> None:
    """Let the four archives in a folder be taken for the official ones: their sums, those of their rows, the order."""
    patch.setattr(archives_module, "ARCHIVES", {name: file_sha256(archives / name) for name in ARCHIVES})
    sums: dict[str, str] = {}
    order: dict[str, np.ndarray] = {}
    for stem in ("train", "t10k"):
        pair = archives_module.read_pair(
            *(archives / f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        )
        sums |= archives_module.rows_sha256(stem, pair)
        order[stem] = np.argsort(np.argsort(archives_module.row_keys(pair), kind="stable"), kind="stable")
    np.savez(archives / "order.npz", **order)
    patch.setattr(archives_module, "ROWS", sums)
    patch.setattr(archives_module, "ORDER_FILE", archives / "order.npz")


@pytest.fixture(scope="session")
def tiny_storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with 500 training and 200 test rows that other processes find prepared, as if official."""
    archives = tmp_path_factory.mktemp("archives")
    synthetic.write_archives(archives, num_train_rows=600, num_test_rows=200)
    storage = open_storage(str(tmp_path_factory.mktemp("tiny")))
    prepare_archives(storage, archives)
    return storage


def prepare_archives(storage: Storage, archives: Path, val_rows: int = 100) -> None:
    """Prepare `archives`, taken for the official ones: most of a short run on all rows would be its evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        take_for_official(patch, archives)
        preparation.prepare(storage, str(archives), val_rows=val_rows)


def split_paths(storage: Storage, manifest: Manifest, split: str) -> list[str]:
    """Return the paths of a split's Parquet files, in the order of their rows."""
    return [storage.path(*DATA_FOLDER, split, name) for name in manifest.files[split]]


@pytest.fixture(scope="session")
def small_storage(tmp_path_factory: pytest.TempPathFactory, small_archives: Path) -> Storage:
    """A storage for runs that are broken: see `drivers`."""
    storage = open_storage(str(tmp_path_factory.mktemp("faults")))
    prepare_archives(storage, small_archives)
    return storage


@pytest.fixture(scope="session")
def unbroken(small_storage: Storage) -> Callable[[str], "drivers.Outcome"]:
    """What a run gives that nothing happens to, in fp32 or bf16; trained when it is first asked for."""
    import drivers

    @functools.cache
    def outcome(precision: str) -> drivers.Outcome:
        run_id = f"unbroken-{precision}"
        driver = drivers.Driver(small_storage, run_id, precision=precision)
        said = driver.wait()
        assert driver.process.returncode == 0, said
        return drivers.outcome(small_storage, run_id)

    return outcome


@pytest.fixture(scope="module")
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All that the module's drivers started ends by itself, whatever became of them; waited for once, at the end.

    Nor do they leave temporary files or shared memory. Ray's logs stay where it keeps them, and torch its cache.
    """
    import drivers

    drivers.DRIVERS.clear()
    folder = tmp_path_factory.mktemp("temporary")
    shared = shared_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("RAY_TMPDIR", "/tmp")
        yield
    assert [driver.left() for driver in drivers.DRIVERS] == [[]] * len(drivers.DRIVERS)
    assert [name for name in os.listdir(folder) if not name.startswith("torchinductor_")] == []
    # Tests that run beside these have files there too, each for a moment.
    wait_for(lambda: shared_memory() <= shared, "end of the files in shared memory")


def shared_memory() -> set[str]:
    """Return the names of the files that workers of this project share memory by."""
    return {path.name for path in Path("/dev/shm").glob("fashion-*")}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty storage."""
    return open_storage(str(tmp_path / "results"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte; root alone may have it."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests of the session, with token authentication.

    Two logical CPUs however many there are: Ray starts a process for each one that a task could use, and seven workers
    fit as well when each takes a fraction of a CPU.
    """
    import ray

    from fashion.cluster import connection

    os.environ["RAY_ADDRESS"] = "local"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # epochs are short here, and each waits for a look
    connection.connect(num_cpus=2)
    yield
    ray.shutdown()


def wait_for(
    condition: Callable[[], Any], what: str, timeout_s: float = 900, job: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until `condition()` is true. If it is to become true while `job` runs, the end of that is a failure."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert job is None or job.poll() is None, f"the job was over before there was a {what}"
        assert time.monotonic() < deadline, f"no {what} in {timeout_s} s"
        time.sleep(0.3)


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs.X ...` as a user would; returns the finished process with its output as text."""
    command = [sys.executable, "-m", *arguments]
    variables = job_environment() | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=1800, check=False)


def call_job(main: Callable[[Sequence[str]], None], *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a command's `main` in this process, which is quicker; returns the same as `run_job`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.run(main, flags)
    assert isinstance(stop.value.code, int)
    return subprocess.CompletedProcess(flags, stop.value.code, out.getvalue(), err.getvalue())


def assert_refused(done: subprocess.CompletedProcess[str], told: str) -> None:
    """Check that a command ended as it does after a user's mistake: code 2 and one line that holds `told`."""
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def job_environment() -> dict[str, str]:
    """Return what a command runs with: a cluster of its own, and the data that the tests prepare."""
    return {**os.environ, "RAY_ADDRESS": "local", "FASHION_MNIST_SOURCE": real_source()}
