"""Runs that are really broken: kills at random moments, a worker that stops, a disk that fills up, two at once.

Each is compared to the bit with a run that nothing happened to. `FAULT_KILLS=20` makes as many kills; `FAULT_SEED`
chooses other moments.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import prepare_archives
from drivers import Driver, Unbroken, assert_unharmed

from fashion.reports import runs, tables
from fashion.storage import Storage, open_storage
from fashion.training import checkpoint
from fashion.training.checkpoint_manager import CheckpointManager

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200), pytest.mark.usefixtures("nothing_is_left")]

PRECISIONS = ("fp32", "bf16")
KILLS = int(os.environ.get("FAULT_KILLS", "3"))
SEED = int(os.environ.get("FAULT_SEED", "0"))


@pytest.fixture
def storage(small_storage: Storage) -> Storage:
    return small_storage


def age_of_newest(storage: Storage, run_id: str) -> float | None:
    """Return the seconds since the newest whole checkpoint was begun to be written: what a kill now would cost."""
    manager = CheckpointManager(storage, ("runs", run_id), newest=2)
    name, _ = manager.newest_whole()
    if name is None:
        return None
    return time.time() - Path(storage.path("runs", run_id, name, checkpoint.WEIGHTS)).stat().st_mtime


@pytest.mark.parametrize("number", range(KILLS))
def test_a_kill_at_a_random_moment_costs_no_bit(storage: Storage, unbroken: Unbroken, number: int) -> None:
    """A worker that dies is started anew by the run itself; a driver or a node by the same command."""
    chance, run_id, precision = random.Random(f"{SEED}/{number}"), f"broken-{number}", PRECISIONS[number % 2]
    expected = unbroken(precision)
    driver = Driver(storage, run_id, precision=precision)
    driver.wait_for(driver.workers)
    kind, moment = ("driver", "worker", "node")[number % 3], chance.uniform(-0.2, 1.0)
    if moment > 0:  # else they are killed while they start
        driver.wait_for(lambda: Path(storage.path("runs", run_id)).exists())
        driver.wait_for(lambda: age_of_newest(storage, run_id) is not None)
    time.sleep(abs(moment) * seconds_of_training(storage, f"unbroken-{precision}"))
    lost = age_of_newest(storage, run_id)
    victims = driver.victims(kind, chance)
    was_over = driver.process.poll() is not None or not victims
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):  # workers that their raylet has taken with it
            victim.kill()
    said = driver.wait()
    if kind == "worker" or was_over:
        assert driver.process.returncode == 0, said
    else:
        assert driver.process.returncode != 0, said
        again = Driver(storage, run_id, precision=precision)
        said = again.wait()
        assert again.process.returncode == 0, said
    told = [line for line in said.splitlines() if "goes on from" in line]
    age = "none" if lost is None else f"{lost:.1f} s old"
    print(
        f"{number} {kind} in {precision} at {moment:.2f} of the training, newest checkpoint {age}, {told}", flush=True
    )
    assert_unharmed(storage, run_id, expected)


def seconds_of_training(storage: Storage, run_id: str) -> float:
    """Return how long the epochs of a run took."""
    rows = tables.read_table(storage, "epochs", run_id)
    return float(sum(row["epoch_time_s"] for row in rows))


def test_a_worker_that_stops_is_noticed_and_replaced(storage: Storage, unbroken: Unbroken) -> None:
    """SIGSTOP: it is alive and does nothing; the rank that waits for it leaves its stacks."""
    expected = unbroken("bf16")
    # Beside other lanes, a worker that works may be silent for more than ten seconds.
    driver = Driver(storage, "stopped", "--hang-timeout-s=30", precision="bf16", every_s=0)
    driver.wait_for(lambda: CheckpointManager(storage, ("runs", "stopped"), newest=2).newest_whole()[0])
    victim = driver.workers()[0]
    victim.send_signal(signal.SIGSTOP)
    said = driver.wait()
    assert driver.process.returncode == 0, said
    assert "goes on from checkpoint epoch-" in said
    left = [storage.read_bytes("runs", "stopped", "stacks", name) for name in storage.list("runs", "stopped", "stacks")]
    # It waits in a step or at a synchronisation point, whichever the other one stopped before.
    assert any(b"distributed/worker.py" in stacks for stacks in left), left
    assert_unharmed(storage, "stopped", expected)


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
    filling_disk: Storage, small_archives: Path, unbroken: Unbroken
) -> None:
    prepare_archives(filling_disk, small_archives)
    filler = Path(filling_disk.path("filler"))
    filler.write_bytes(bytes(40_000_000))
    driver = Driver(filling_disk, "full", "--max-failures=0")
    said = driver.wait()
    assert driver.process.returncode == 1, said
    assert "No space left on device" in said
    assert runs.load_run(filling_disk, "full")["status"] == "failed"
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=600m", filling_disk.uri], check=True)
    again = Driver(filling_disk, "full")
    said = again.wait()
    assert again.process.returncode == 0, said
    assert_unharmed(filling_disk, "full", unbroken("fp32"))


def test_a_clock_that_is_set_costs_no_bit_no_second_and_no_lock(
    storage: Storage, unbroken: Unbroken, tmp_path: Path
) -> None:
    """Three hours ahead, in the middle of a run, for all of its processes: a library in front of libc's tells them.

    A second driver of the run, whose clock nobody set, is refused all the same.
    """
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, Path(__file__).with_name("clock.c"), "-ldl"], check=True
    )
    driver = Driver(storage, "late", every_s=0, LD_PRELOAD=str(library), CLOCK_OFFSET_FILE=str(offset))
    driver.wait_for(lambda: CheckpointManager(storage, ("runs", "late"), newest=2).newest_whole()[0])
    offset.write_text(str(3 * 3600))
    second = Driver(storage, "late")
    said = second.wait()
    assert second.process.returncode == 2, said
    assert f"error: --run-id late is in use by process {driver.pid} of" in said
    said = driver.wait()
    assert driver.process.returncode == 0, said
    row = runs.load_run(storage, "late")
    assert (row["finished_at"] - row["started_at"]).total_seconds() > 3 * 3600, "its clock was not set"
    assert row["wall_s"] < 3 * 3600
    assert all(each["epoch_time_s"] < 3 * 3600 for each in tables.read_table(storage, "epochs", "late"))
    assert_unharmed(storage, "late", unbroken("fp32"))
