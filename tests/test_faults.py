"""Runs that are really broken: kills at random moments, a worker that stops, a disk that fills up, two at once.

Each is compared to the bit with a run that nothing happened to. `FAULT_KILLS=20` makes as many kills; `FAULT_SEED`
chooses other moments.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT, job_environment
from torch import Tensor

from fashion import checkpoint, data, report
from fashion.keeper import Keeper, name_of
from fashion.storage import Storage, open_storage

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]

EPOCHS = 2
EVERY_S = 2.0
# Everything that draws at random is on; 25 steps an epoch, looked at after each ten.
RECIPE = (
    "--preset=smoke --epochs=2 --max-train-rows=800 --global-batch-size=32 --dropout-conv=0.05 --dropout-fc=0.1 "
    f"--flip=random --shift=1 --start-or-resume --checkpoint-every-s={EVERY_S}"
).split()
TIMES = ("epoch_time_s", "data_wait_s", "images_per_s")
KILLS = int(os.environ.get("FAULT_KILLS", "3"))
SEED = int(os.environ.get("FAULT_SEED", "0"))
# With its driver a cluster's GCS is gone: a raylet looks for it for 10 s, its agent tries to tell it so for 60 s.
LEFT_AFTER_S = 120


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, small_archives: Path) -> Storage:
    storage = open_storage(str(tmp_path_factory.mktemp("faults")))
    prepare_small(storage, small_archives)
    return storage


def prepare_small(storage: Storage, archives: Path) -> None:
    """Prepare few rows, test's too: most of a short run would be its evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ARCHIVES", {name: data.file_sha256(archives / name) for name in data.ARCHIVES})
        data.prepare(storage, str(archives), val_rows=100)


DRIVERS: list["Driver"] = []


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """All that the module's drivers started ends by itself, whatever became of them; waited for once, at the end."""
    DRIVERS.clear()
    yield
    assert [driver.left() for driver in DRIVERS] == [[]] * len(DRIVERS)


class Driver:
    """`jobs.train` as a process, and all that it starts."""

    def __init__(self, storage: Storage, run_id: str, *flags: str, recipe: Sequence[str] = RECIPE) -> None:
        command = [sys.executable, "-m", "jobs.train", "--storage", storage.uri, "--run-id", run_id]
        self.process = subprocess.Popen(
            [*command, *recipe, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=job_environment() | {"FASHION_MNIST_SOURCE": "auto"},
            cwd=ROOT,
        )
        self.seen: dict[int, psutil.Process] = {}
        self.said = ""
        self._me = psutil.Process(self.process.pid)
        DRIVERS.append(self)

    def look(self) -> list[psutil.Process]:
        """Return what it has started and what lives, and remember it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= {each.pid: each for each in self._me.children(recursive=True)}
        return [each for each in self.seen.values() if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def workers(self) -> list[psutil.Process]:
        return [each for each in self.look() if command_of(each).startswith("ray::RayTrainWorker")]

    def victim(self, kind: str, chance: random.Random) -> psutil.Process | None:
        """Return a worker, the driver or its node's raylet; None if there is none any more."""
        if kind == "driver":
            return self._me if self._me.is_running() else None
        chosen = self.workers() if kind == "worker" else [each for each in self.look() if is_raylet(each)]
        return chance.choice(chosen) if chosen else None

    def wait(self) -> str:
        """Wait for its end; return what it said."""
        while self.process.poll() is None and self.process.stdout is not None:
            self.look()
            self.said += self.process.stdout.readline()
        self.said += self.process.communicate(timeout=600)[0]
        return self.said

    def wait_for(self, what: Callable[[], Any], seconds: float = 240.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, "it did not come to that"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.1)
        return found

    def left(self) -> list[str]:
        """Return the commands of what it started and what does not end by itself."""
        deadline = time.monotonic() + LEFT_AFTER_S
        while (left := self.look()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [command_of(each) for each in left]


def is_raylet(process: psutil.Process) -> bool:
    return command_of(process).partition(" ")[0].endswith("raylet/raylet")


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def outcome(storage: Storage, run_id: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return a finished run's `epochs` rows without the times, and the weights after its last step."""
    row = report.load_run(storage, run_id)
    assert row["status"] == "completed", row
    rows = [
        {name: value for name, value in each.items() if name not in TIMES}
        for each in report.read_table(storage, "epochs", run_id)
    ]
    content = storage.read_bytes("runs", run_id, name_of(EPOCHS), checkpoint.WEIGHTS)
    return rows, checkpoint.load_weights(content)


@pytest.fixture(scope="module")
def unbroken(storage: Storage) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What a run gives that nothing happens to."""
    driver = Driver(storage, "unbroken")
    said = driver.wait()
    assert driver.process.returncode == 0, said
    return outcome(storage, "unbroken")


def assert_unharmed(storage: Storage, run_id: str, unbroken: tuple[list[dict[str, Any]], dict[str, Tensor]]) -> None:
    rows, weights = outcome(storage, run_id)
    assert rows == unbroken[0]
    assert len(rows) == 2 * EPOCHS
    assert all(torch.equal(weights[name], unbroken[1][name]) for name in unbroken[1])


def age_of_newest(storage: Storage, run_id: str) -> float | None:
    """Return the seconds since the newest whole checkpoint was begun to be written: what a kill now would cost."""
    keeper = Keeper(storage, ("runs", run_id), newest=2)
    name, _ = keeper.newest_whole()
    if name is None:
        return None
    return time.time() - Path(storage.path("runs", run_id, name, checkpoint.WEIGHTS)).stat().st_mtime


@pytest.mark.parametrize("number", range(KILLS))
def test_a_kill_at_a_random_moment_costs_no_bit(
    storage: Storage, unbroken: tuple[list[dict[str, Any]], dict[str, Tensor]], number: int
) -> None:
    """A worker that dies is started anew by the run itself; a driver or a node by the same command."""
    chance, run_id = random.Random(f"{SEED}/{number}"), f"broken-{number}"
    driver = Driver(storage, run_id)
    driver.wait_for(driver.workers)
    kind, moment = ("worker", "driver", "node")[number % 3], chance.uniform(-0.2, 1.0)
    if moment > 0:  # else they are killed while they start
        driver.wait_for(lambda: Path(storage.path("runs", run_id)).exists())
        driver.wait_for(lambda: age_of_newest(storage, run_id) is not None)
    time.sleep(abs(moment) * seconds_of_training(storage))
    lost = age_of_newest(storage, run_id)
    victim = driver.victim(kind, chance)
    was_over = driver.process.poll() is not None or victim is None
    if victim is not None:
        victim.kill()
    said = driver.wait()
    if kind == "worker" or was_over:
        assert driver.process.returncode == 0, said
    else:
        assert driver.process.returncode != 0, said
        again = Driver(storage, run_id)
        said = again.wait()
        assert again.process.returncode == 0, said
    told = [line for line in said.splitlines() if "goes on from" in line]
    age = "none" if lost is None else f"{lost:.1f} s old"
    print(f"{number} {kind} at {moment:.2f} of the training, newest checkpoint {age}, {told}", flush=True)
    assert_unharmed(storage, run_id, unbroken)


def seconds_of_training(storage: Storage) -> float:
    """Return how long the epochs of the unbroken run took."""
    rows = report.read_table(storage, "epochs", "unbroken")
    return float(sum(row["epoch_time_s"] for row in rows))


def test_a_worker_that_stops_is_noticed_and_replaced(
    storage: Storage, unbroken: tuple[list[dict[str, Any]], dict[str, Tensor]]
) -> None:
    """SIGSTOP: it is alive and does nothing; the rank that waits for it leaves its stacks."""
    driver = Driver(storage, "stopped", "--hang-timeout-s=8")
    driver.wait_for(lambda: Keeper(storage, ("runs", "stopped"), newest=2).newest_whole()[0])
    victim = driver.workers()[0]
    victim.send_signal(signal.SIGSTOP)
    said = driver.wait()
    assert driver.process.returncode == 0, said
    assert "goes on from checkpoint epoch-" in said
    left = [storage.read_bytes("runs", "stopped", "stacks", name) for name in storage.list("runs", "stopped", "stacks")]
    assert any(b"train_one_epoch" in stacks for stacks in left), left
    assert_unharmed(storage, "stopped", unbroken)


@pytest.fixture
def filling_disk(tmp_path: Path) -> Iterator[Storage]:
    """A storage on a disk with room for the data and one checkpoint, but not for two."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=180m", "none", str(place)], check=True)
    yield open_storage(str(place))
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_when_there_is_room(
    filling_disk: Storage, small_archives: Path, unbroken: tuple[list[dict[str, Any]], dict[str, Tensor]]
) -> None:
    prepare_small(filling_disk, small_archives)
    filler = Path(filling_disk.path("filler"))
    filler.write_bytes(bytes(40_000_000))
    driver = Driver(filling_disk, "full", "--max-failures=0")
    said = driver.wait()
    assert driver.process.returncode == 1, said
    assert "No space left on device" in said
    assert report.load_run(filling_disk, "full")["status"] == "failed"
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=600m", filling_disk.uri], check=True)
    again = Driver(filling_disk, "full")
    said = again.wait()
    assert again.process.returncode == 0, said
    assert_unharmed(filling_disk, "full", unbroken)


def test_a_second_driver_of_the_same_run_is_refused(storage: Storage) -> None:
    first = Driver(storage, "twice")
    first.wait_for(first.workers)
    second = Driver(storage, "twice")
    said = second.wait()
    assert second.process.returncode == 2, said
    assert f"error: --run-id twice is in use by process {first.process.pid} of" in said
    said = first.wait()
    assert first.process.returncode == 0, said
    assert report.load_run(storage, "twice")["status"] == "completed"
