"""Several hosts for real: a job's workers on different ones, a search over them, and hosts that die under both."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
from conftest import ROOT, real_source, run_job
from hosts import DASHBOARD, Host, Hosts

from fashion import data, report
from fashion.storage import Storage, open_storage

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not() or "hosts")]

SMALL = ("--preset", "smoke", "--max-train-rows", "256")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Data that all hosts see."""
    storage = open_storage(str(tmp_path_factory.mktemp("shared")))
    data.prepare(storage, real_source(), val_rows=100)
    return storage


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """Three hosts with a Ray node of one CPU each."""
    with hosts.open_cluster(3) as made:
        yield made


@pytest.fixture
def whole(cluster: Hosts) -> Hosts:
    """The same, those started again that an earlier test killed."""
    for host in cluster.hosts:
        if host.ray is None:
            cluster.start(host)
            cluster.wait(host)
    wait_for(lambda: len(alive(cluster)) == 3, "three nodes")
    return cluster


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {timeout_s} s"
        time.sleep(0.3)


def alive(cluster: Hosts) -> list[str]:
    """Return the addresses of the nodes that the head takes for alive."""
    done = cluster.run(cluster.head, "ray", "list", "nodes", "--format=json", "--filter=state=ALIVE")
    assert done.returncode == 0, done.stderr
    return [node["node_ip"] for node in json.loads(done.stdout)]


def submission(name: str, module: str, *flags: str) -> list[str]:
    """Return the command that submits a job as `fashion.head` does, and follows it."""
    submit = ["ray", "job", "submit", f"--address={DASHBOARD}", f"--submission-id={name}", f"--working-dir={ROOT}"]
    return [*submit, "--", "python", "-m", module, *flags]


def train(cluster: Hosts, storage: Storage, run_id: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Submit a run with two workers and wait for it."""
    command = submission(
        run_id, "jobs.train", "--storage", storage.uri, "--run-id", run_id, *SMALL, "--num-workers", "2", *flags
    )
    return cluster.run(cluster.head, *command)


def scores(storage: Storage, run_id: str) -> dict[tuple[int, str], tuple[float, float]]:
    """Return loss and accuracy of each epoch and split."""
    rows = report.read_table(storage, "epochs", run_id)
    return {(row["epoch"], row["split"]): (row["loss"], row["accuracy"]) for row in rows}


def hosts_of(cluster: Hosts, *marks: str) -> set[str]:
    """Return the names of the hosts with a process whose command line has one of `marks`."""
    return {
        host.name
        for host in cluster.hosts
        if any(mark in line for line in cluster.processes(host).values() for mark in marks)
    }


def test_every_host_is_one_of_its_own(cluster: Hosts) -> None:
    names = [cluster.run(host, "hostname").stdout.strip() for host in cluster.hosts]
    assert names == ["host1", "host2", "host3"]
    resolved = cluster.run(cluster.head, "getent", "hosts", "host1").stdout.split()
    assert resolved[0] == "127.0.1.1", "as on Debian: what gloo would take by itself leads nowhere"
    assert sorted(alive(cluster)) == [host.address for host in cluster.hosts]
    strange = cluster.run(cluster.hosts[1], "ray", "status", RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert strange.returncode != 0, "a node that does not know the token is let in"


def test_workers_on_different_hosts_train_as_on_one(whole: Hosts, prepared: Storage) -> None:
    spread = train(whole, prepared, "spread")
    assert spread.returncode == 0, spread.stdout + spread.stderr
    assert "SUCCEEDED" in spread.stdout + spread.stderr
    assert "3 node(s), 3 CPUs" in spread.stdout
    local = run_job("jobs.train", "--storage", prepared.uri, "--run-id", "local", *SMALL, "--num-workers", "2")
    assert local.returncode == 0, local.stderr
    far, near = (report.load_run(prepared, name) for name in ("spread", "local"))
    assert (far["exchange"], near["exchange"]) == ("gloo", "shared memory")
    assert (far["world_size"], far["status"], far["test_rows"]) == (2, "completed", 10_000)
    print(scores(prepared, "spread"), scores(prepared, "local"))
    print(far["test_loss"], near["test_loss"])
