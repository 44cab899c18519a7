"""Several hosts for real: a job's workers on different ones, a search over them, and hosts that die under both."""

import concurrent.futures
import contextlib
import json
import math
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
from conftest import ROOT, call_job, wait_for
from hosts import DASHBOARD, Host, Hosts

import jobs.train
from fashion.reports import runs, tables
from fashion.storage import Storage

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not() or "hosts")]

SMALL = ("--source", "auto", "--preset", "smoke", "--max-train-rows", "128")
EPOCHS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """Three hosts with a Ray node of one CPU each."""
    with hosts.open_cluster(3) as made:
        yield made


@pytest.fixture
def whole(cluster: Hosts) -> Hosts:
    """The same, those started again that an earlier test killed, or left without a Ray node."""
    there = alive(cluster)
    for host in cluster.hosts:
        if host.address not in there or host.ray is None:
            cluster.kill(host)
            cluster.start(host)
            cluster.wait(host)
    wait_for(lambda: len(alive(cluster)) == 3, "three nodes")
    return cluster


def ask(cluster: Hosts, path: str) -> Any:
    """Return the head's JSON answer to `path`, asked where its dashboard is: on its own loopback."""
    script = f"""
import os, sys, urllib.request
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
request = urllib.request.Request("{DASHBOARD}{path}", headers={{"Authorization": f"Bearer {{token}}"}})
sys.stdout.write(urllib.request.urlopen(request, timeout=300).read().decode())
"""
    done = cluster.run(cluster.head, "python", "-c", script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def alive(cluster: Hosts) -> dict[str, str]:
    """Return the nodes that the head takes for alive: address -> id."""
    nodes = ask(cluster, "/api/v0/nodes?limit=100")["data"]["result"]["result"]
    return {node["node_ip"]: node["node_id"] for node in nodes if node["state"] == "ALIVE"}


def submission(name: str, module: str, *flags: str) -> list[str]:
    """Return the command that submits a job as `fashion.cluster.head` does, and follows it."""
    submit = ["ray", "job", "submit", f"--address={DASHBOARD}", f"--submission-id={name}", f"--working-dir={ROOT}"]
    return [*submit, "--", "python", "-m", module, *flags]


def train_flags(
    storage: Storage, run_id: str, *, workers: str = "2", epochs: int = EPOCHS, precision: str = "fp32"
) -> list[str]:
    """Return the flags of a run."""
    flags = ["--storage", storage.uri, "--run-id", run_id, *SMALL, "--precision", precision]
    return [*flags, "--num-workers", workers, "--epochs", str(epochs)]


def scores(storage: Storage, run_id: str) -> dict[tuple[int, str], tuple[float, float]]:
    """Return loss and accuracy of each epoch and split."""
    rows = tables.read_table(storage, "epochs", run_id)
    return {(row["epoch"], row["split"]): (row["loss"], row["accuracy"]) for row in rows}


def hosts_of(cluster: Hosts, mark: str) -> set[str]:
    """Return the names of the hosts with a process whose command line has `mark`."""
    return {host.name for host in cluster.hosts if any(mark in line for line in cluster.processes(host).values())}


def test_every_host_is_one_of_its_own(cluster: Hosts) -> None:
    names = [cluster.run(host, "hostname").stdout.strip() for host in cluster.hosts]
    assert names == ["host1", "host2", "host3"]
    resolved = cluster.run(cluster.head, "getent", "hosts", "host1").stdout.split()
    assert resolved[0] == "127.0.1.1", "as on Debian: what gloo would take by itself leads nowhere"
    assert sorted(alive(cluster)) == [host.address for host in cluster.hosts]
    strange = cluster.run(cluster.hosts[1], "ray", "status", RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert strange.returncode != 0, "a node that does not know the token is let in"


def start(cluster: Hosts, name: str, module: str, *flags: str, **settings: str) -> subprocess.Popen[bytes]:
    """Start a job on the head, with `settings` of Ray; its log is a file named after it in the hosts' folder."""
    return cluster.popen(cluster.head, "python", "-m", module, *flags, log=log_of(cluster, name), **settings)


def log_of(cluster: Hosts, name: str) -> Path:
    """Return the file with the output of the job that `start` named so."""
    return cluster.folder / f"{name}.log"


def host_of(cluster: Hosts, mark: str, job: subprocess.Popen[bytes]) -> Host:
    """Return a host, not the head's, that has a process of `job` whose command line has `mark`."""
    names: set[str] = set()

    def found() -> set[str]:
        names.update(hosts_of(cluster, mark) - {cluster.head.name})
        return names

    wait_for(found, f"process like {mark}", job=job)
    return next(host for host in cluster.hosts if host.name in names)


def steps(storage: Storage, run_id: str) -> list[str]:
    """Return the names of the run's checkpoints in the middle of an epoch."""
    return [name for name in storage.list("runs", run_id) if "-step-" in name]


def workers(cluster: Hosts) -> set[int]:
    """Return the numbers of the workers on all hosts."""
    processes = [process for host in cluster.hosts for process in cluster.processes(host).items()]
    return {number for number, line in processes if "ray::RayTrainWorker" in line}


@contextlib.contextmanager
def slowed(cluster: Hosts, mark: str) -> Iterator[None]:
    """Stop the processes of all hosts whose command line has `mark` for most of each second: whatever the machine, a
    run is not over before the test has done to its cluster what it wants to do.
    """
    over = threading.Event()

    def take_turns() -> None:
        while not over.is_set():
            lines = {number: line for host in cluster.hosts for number, line in cluster.processes(host).items()}
            stopped = [number for number, line in lines.items() if mark in line]
            for number, wait_s in ((signal.SIGSTOP, 0.8), (signal.SIGCONT, 0.2)):
                for process in stopped:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, number)
                over.wait(wait_s)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        turns = pool.submit(take_turns)
        try:
            yield
        finally:
            over.set()
            turns.result()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_workers_on_different_hosts_train_as_on_one(
    whole: Hosts, tiny_storage: Storage, ray_cluster: None, precision: str
) -> None:
    spread, local = f"spread-{precision}", f"local-{precision}"
    done = whole.run(
        whole.head, *submission(spread, "jobs.train", *train_flags(tiny_storage, spread, precision=precision))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Job '{spread}' succeeded" in done.stdout
    assert "3 node(s), 3 CPUs" in done.stdout
    alone = call_job(jobs.train.main, *train_flags(tiny_storage, local, precision=precision))
    assert alone.returncode == 0, alone.stderr
    far, near = (runs.load_run(tiny_storage, name) for name in (spread, local))
    assert (far["exchange"], near["exchange"]) == ("gloo", "shared memory")
    assert far["precision"] == near["precision"] == precision
    assert (far["world_size"], far["status"], far["test_rows"]) == (2, "completed", 200)
    assert scores(tiny_storage, spread) == scores(tiny_storage, local)
    assert far["test_loss"] == near["test_loss"]


def test_a_host_out_of_reach_costs_a_run_one_epoch(whole: Hosts, tiny_storage: Storage) -> None:
    """Its cable is pulled: its worker lives on, and nobody hears of it. After the unbroken run it is compared with."""
    job = start(whole, "cut-off", "jobs.train", *train_flags(tiny_storage, "cut-off"), "--checkpoint-every-s=0")
    wait_for(lambda: steps(tiny_storage, "cut-off"), "checkpoint in an epoch", job=job)
    with slowed(whole, "ray::RayTrainWorker"):
        wait_for(lambda: tables.read_table(tiny_storage, "epochs", "cut-off"), "first epoch", job=job)
        lost = host_of(whole, "ray::RayTrainWorker", job)
        whole.cut(lost)
    assert job.wait(1800) == 0, log_of(whole, "cut-off").read_text()
    assert scores(tiny_storage, "cut-off") == scores(tiny_storage, "spread-fp32"), "as without the accident"
    whole.mend(lost)
    wait_for(lambda: not whole.processes(lost), "end of what was cut off")
    whole.kill(lost)


def test_a_host_about_to_be_taken_away_is_left_with_a_checkpoint(whole: Hosts, tiny_storage: Storage) -> None:
    """The notice that a cloud gives of a spot machine: checkpoints come of epochs' ends and of the notice alone."""
    epochs = 5
    flags = [*train_flags(tiny_storage, "warned", epochs=epochs), "--global-batch-size=8"]
    flags += ["--checkpoint-every-s=1000000"]
    watched = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    job = start(whole, "warned", "jobs.train", *flags, **watched)
    wait_for(lambda: tables.read_table(tiny_storage, "epochs", "warned"), "first epoch", job=job)
    drain = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds"]
    with slowed(whole, "ray::RayTrainWorker"):
        lost = host_of(whole, "ray::RayTrainWorker", job)
        done = whole.run(whole.head, "ray", "drain-node", "--node-id", alive(whole)[lost.address], *drain, "60")
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for(lambda: steps(tiny_storage, "warned"), "checkpoint in an epoch", job=job)
    assert job.wait(1800) == 0, log_of(whole, "warned").read_text()
    assert runs.load_run(tiny_storage, "warned")["epochs_done"] == epochs
    whole.kill(lost)


def test_a_run_shrinks_with_its_cluster_and_grows_again(whole: Hosts, tiny_storage: Storage, ray_cluster: None) -> None:
    epochs = 12
    flags = [*train_flags(tiny_storage, "elastic", workers="1:2", epochs=epochs), "--resize-every-s", "3"]
    # Ray Train may ask for a worker on a host that is gone; by default it waits a minute before it asks for one less.
    job = start(whole, "elastic", "jobs.train", *flags, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="15")
    wait_for(lambda: tables.read_table(tiny_storage, "epochs", "elastic"), "first epoch", job=job)
    with slowed(whole, "ray::RayTrainWorker"):
        before = workers(whole)
        assert len(before) == 2
        assert job.poll() is None
        for host in whole.hosts[1:]:
            whole.kill(host)
        wait_for(lambda: len(workers(whole) - before) == 1, "worker on the host that is left", job=job)
        whole.start(whole.hosts[1])
        whole.wait(whole.hosts[1])
        wait_for(lambda: len(workers(whole)) == 2, "second worker", job=job)
    assert job.wait(1800) == 0, log_of(whole, "elastic").read_text()
    row = runs.load_run(tiny_storage, "elastic")
    assert (row["status"], row["epochs_done"], row["world_size"]) == ("completed", epochs, 2)
    rows = tables.read_table(tiny_storage, "epochs", "elastic")
    fixed = call_job(jobs.train.main, *train_flags(tiny_storage, "fixed", epochs=epochs))
    assert fixed.returncode == 0, fixed.stderr
    accuracies = [runs.load_run(tiny_storage, name)["test_accuracy"] for name in ("elastic", "fixed")]
    print("test accuracy: elastic {:.4f}, fixed {:.4f}".format(*accuracies))
    assert accuracies[1] - accuracies[0] < 3 * math.sqrt(2 * accuracies[1] * (1 - accuracies[1]) / 200)
    assert {each["rows"] for each in rows if each["split"] == "train"} == {128}, "each epoch has all its rows"
    assert [each["epoch"] for each in rows if each["split"] == "val"] == list(range(1, epochs + 1))


def test_a_trials_workers_are_on_different_hosts(whole: Hosts, tiny_storage: Storage) -> None:
    search = ["--search-id", "wide", "--num-samples", "1", "--max-epochs", "1", "--workers-per-trial", "2"]
    job = start(whole, "wide", "jobs.tune", "--storage", tiny_storage.uri, *SMALL, *search)
    wait_for(lambda: len(hosts_of(whole, "ray::RayTrainWorker")) == 2, "worker on each of two hosts", job=job)
    assert job.wait(1800) == 0, log_of(whole, "wide").read_text()
    [row] = tables.read_table(tiny_storage, "trials", "wide-t0000")
    assert (row["status"], row["epochs_done"]) == ("completed", 1)
    assert runs.load_run(tiny_storage, "wide-t0000")["exchange"] == "gloo"


def test_a_host_that_dies_costs_a_search_no_trial(whole: Hosts, tiny_storage: Storage) -> None:
    search = ["--search-id", "sought", "--num-samples", "4", "--max-epochs", "2", "--grace-epochs", "2", "--refit"]
    search += ["--global-batch-size", "16"]
    job = start(whole, "sought", "jobs.tune", "--storage", tiny_storage.uri, *SMALL, *search)
    wait_for(lambda: len(hosts_of(whole, "ray::ImplicitFunc.train")) > 1, "trial on each of two hosts", job=job)
    whole.kill(host_of(whole, "ray::ImplicitFunc.train", job))
    assert job.wait(1800) == 0, log_of(whole, "sought").read_text()
    for number in range(4):
        [row] = tables.read_table(tiny_storage, "trials", f"sought-t{number:04d}")
        assert (row["status"], row["epochs_done"]) == ("completed", 2)
    refit = runs.load_run(tiny_storage, "sought-refit")
    assert (refit["kind"], refit["status"], refit["test_rows"]) == ("refit", "completed", 200)
