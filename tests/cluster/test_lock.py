"""Locks on names: in a folder of this machine, and in an object store, which has no locks of its own."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from pyarrow import fs as pafs

from fashion.cluster.lock import NameLock
from fashion.config import UserError
from fashion.storage import Storage, open_storage

# Who wants a lock watches three heartbeats of its owner's; on a busy machine, each may come late.
HEARTBEAT_S = 0.6
HOLD = """
import sys, time
from fashion.cluster.lock import NameLock
from fashion.storage import open_storage
with NameLock(open_storage(sys.argv[1]), "runs", "mine", "--run-id"):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def without_locks(storage: Storage) -> Storage:
    """The same folder through a file system that is not known to be local, as an object store's is."""
    Path(storage.path("runs", ".locks")).mkdir(parents=True)  # an object store has no folders to make
    return replace(storage, fs=pafs.SubTreeFileSystem("/", storage.fs))


def lock_name(storage: Storage, name: str = "mine") -> NameLock:
    return NameLock(storage, "runs", name, "--run-id", heartbeat_s=HEARTBEAT_S)


@pytest.mark.parametrize("kind", ["storage", "without_locks"])
def test_the_second_is_refused_and_told_who_has_it(request: pytest.FixtureRequest, kind: str) -> None:
    place: Storage = request.getfixturevalue(kind)
    with lock_name(place), lock_name(place, "other"):
        owner = rf"--run-id mine is in use by process {os.getpid()} of .+; wait for its end, or stop it first"
        with pytest.raises(UserError, match=owner), lock_name(place):
            pass
    with lock_name(place):
        pass
    assert not place.exists("runs", ".locks", "mine")


def test_a_claim_leaves_nothing_behind(storage: Storage) -> None:
    with lock_name(storage):
        pass
    assert not storage.exists("runs")


@pytest.mark.slow
def test_a_killed_owner_holds_no_lock(storage: Storage) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, storage.uri], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"process {holder.pid} of"), lock_name(storage):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with lock_name(storage):
        pass


def test_an_owner_without_heartbeats_has_no_lock(without_locks: Storage) -> None:
    left = lock_name(without_locks)
    left._write_object(7)
    with lock_name(without_locks):
        pass


def test_of_many_that_come_at_once_one_gets_it(storage: Storage) -> None:
    outcomes: list[str] = []
    all_refused = threading.Event()

    def compete() -> None:
        try:
            with lock_name(open_storage(storage.uri)):
                outcomes.append("had it")
                assert all_refused.wait(300)
        except UserError:
            outcomes.append("refused")
            if outcomes.count("refused") == 7:
                all_refused.set()

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["had it"] + ["refused"] * 7
