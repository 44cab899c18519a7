"""An `s3://` storage, spoken to over HTTP: moto's server, a process of its own, on a port of this machine.

The tests install it into an environment of its own, `.moto`: botocore, which it is built on, wants an older
python-dateutil than `uv.lock` has. Its version is fixed: pyarrow took the end of every upload to 5.2.1 for a failure.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, assert_refused, prepare_archives, run_job, wait_for
from drivers import Driver, Unbroken, assert_unharmed
from networks import drawn_network, write_export
from photographs import content
from PIL import Image
from pyarrow import fs as pafs

from fashion.cluster.lock import NameLock
from fashion.config import UserError
from fashion.inference.classifier import Classifier
from fashion.reports import runs, tables
from fashion.reports.page import reading
from fashion.storage import Storage, open_storage, read_parquet
from fashion.training.checkpoint_manager import CheckpointManager

MOTO = "moto[server]==5.2.5"
pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("nothing_is_left", "moto"),
]

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
# A mistake in --storage is told within so many seconds, the start of the command included.
TOLD_WITHIN_S = 240.0
# Within pyarrow's patience, which is ten tries of 3 s and more.
SILENT_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def uri_of(port: int, place: str) -> str:
    return f"s3://{place}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


MOTO_SERVER = ROOT / ".moto" / "bin" / "moto_server"


@pytest.fixture(scope="module")
def moto() -> None:
    """The server's program, installed where it is not; skips where it cannot be had."""
    if MOTO_SERVER.exists():
        return
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip(f"{MOTO} cannot be installed: there is no uv")
    folder = MOTO_SERVER.parents[1]
    for command in (
        ["venv", "--clear", "--python", sys.executable, folder],
        ["pip", "install", "--python", folder, MOTO],
    ):
        done = subprocess.run([uv, *command], capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            pytest.skip(f"{MOTO} cannot be installed: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def server(**environment: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server; gives its port and its process."""
    port = free_port()
    process = subprocess.Popen(
        [str(MOTO_SERVER), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )

    def answers() -> bool:
        assert process.poll() is None, f"{MOTO_SERVER} ended by itself"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, "server")
        yield port, process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(300)


@pytest.fixture(scope="module")
def store(moto: None) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server with the bucket `bucket`, and its keys in the environment."""
    with pytest.MonkeyPatch.context() as patch, server() as (port, process):
        for name, value in KEYS.items():
            patch.setenv(name, value)
        make_bucket(port, "bucket")
        yield port, process


@pytest.fixture(scope="module")
def port(store: tuple[int, subprocess.Popen[bytes]]) -> int:
    return store[0]


def make_bucket(port: int, name: str) -> None:
    store = pafs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    store.create_dir(name)


@pytest.fixture(params=["folder", "a folder/with spaces", ""])
def place(request: pytest.FixtureRequest, port: int) -> Storage:
    """A storage in a bucket of its own, down to the bucket itself."""
    bucket = f"unit-{time.monotonic_ns()}"
    make_bucket(port, bucket)
    return open_storage(uri_of(port, "/".join(filter(None, (bucket, request.param.replace(" ", "%20"))))))


# --- the storage itself ---------------------------------------------------------------------------------------------


def test_files_come_and_go_as_in_a_folder(place: Storage) -> None:
    assert place.list() == place.list("runs") == []
    place.check_writable("runs", "reports")
    assert place.list() == []
    assert not place.exists("runs")
    with pytest.raises(FileNotFoundError):
        place.read_bytes("runs", "one", "no such file")
    for name in ("a file", "b+c=d&e.txt"):
        place.write_bytes(name.encode(), "runs", "one of them", name)
    place.write_bytes(b"old", "runs", "two", "file")
    place.write_bytes(b"new", "runs", "two", "file")
    assert place.read_bytes("runs", "two", "file") == b"new"
    assert place.list("runs") == ["one of them", "two"]
    assert place.list("runs", "one of them") == ["a file", "b+c=d&e.txt"]
    assert place.read_bytes("runs", "one of them", "b+c=d&e.txt") == b"b+c=d&e.txt"
    place.delete_folder("runs", "one of them")
    place.delete_folder("runs", "one of them")
    assert not place.exists("runs", "one of them")
    assert place.exists("runs", "two")
    assert place.list("runs") == ["two"]


def test_a_file_is_no_storage(port: int) -> None:
    open_storage(uri_of(port, "bucket/files")).write_bytes(b"", "file")
    with pytest.raises(UserError, match="is a file; name a folder"):
        open_storage(uri_of(port, "bucket/files/file"))


def test_it_shows_a_place_as_a_uri_that_opens(place: Storage) -> None:
    place.write_bytes(b"here", "runs", "file")
    assert open_storage(place.show("runs")).read_bytes("file") == b"here"


def test_a_lock_is_renewed_and_refused_and_lapses(port: int) -> None:
    place = open_storage(uri_of(port, "bucket/locks"))

    def lock_name() -> NameLock:
        return NameLock(place, "runs", "mine", "--run-id", heartbeat_s=3.0)

    with lock_name():
        owner = rf"--run-id mine is in use by process {os.getpid()} of .+; wait for its end, or stop it first"
        with pytest.raises(UserError, match=owner), lock_name():
            pass
    assert not place.exists("runs", ".locks", "mine")
    lock_name()._write_object(7)  # of somebody who was killed
    with lock_name():
        pass


# --- nothing is seen in part ----------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """What Ctrl-C and SIGTERM are to a command: raised in the main thread, wherever it is."""


def test_a_write_that_is_interrupted_leaves_the_old_or_the_new(port: int) -> None:
    place = open_storage(uri_of(port, "bucket/interrupted"))
    chance = random.Random(0)
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    started = time.monotonic()
    place.write_bytes(b"old", "file")
    took = time.monotonic() - started
    interrupted = 0
    for _ in range(60):
        place.write_bytes(b"old", "file")
        timer = threading.Timer(chance.uniform(0, took), os.kill, (os.getpid(), signal.SIGUSR1))
        try:
            armed = True
            timer.start()
            place.write_bytes(b"new", "file")
            armed = False
        except Interrupted:
            armed = False
            interrupted += 1
        timer.join()
        assert place.read_bytes("file") in (b"old", b"new")
    signal.signal(signal.SIGUSR1, before)
    assert interrupted >= 10


def test_a_reader_sees_a_table_whole_while_it_is_replaced(port: int) -> None:
    """By longer ones and by shorter ones; a healthy file that is called damaged might be removed. The writer rests
    between two, three writes' time at most: one that never rests would leave a reader no time.
    """
    place = open_storage(uri_of(port, "bucket/replaced"))
    row = {"split": "val", "loss": 0.5, "accuracy": 0.5, "rows": 100}
    over, chance = threading.Event(), random.Random(0)

    def write() -> None:
        for number in itertools.count():
            for count in (1, 400, 40):  # none twice with the same content, which a reader takes for the same file
                rows = [row | {"epoch": epoch + 1, "lr": float(number)} for epoch in range(count)]
                started = time.monotonic()
                tables.write_table(place, "epochs", "mine", rows)
                over.wait(chance.uniform(0, 3) * (time.monotonic() - started))
            if over.is_set():
                return

    tables.write_table(place, "epochs", "mine", [row | {"epoch": 1}])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {len(tables.read_table(place, "epochs", "mine")) for _ in range(40)}
        seen |= {len(rows) for _ in range(40) for rows in reading.read_files(place, "epochs")}
    finally:
        over.set()
        writer.join()
    assert seen <= {1, 40, 400}
    assert len(seen) > 1


# --- what is wrong is told before anything is trained ---------------------------------------------------------------


def refused_in_time(uri: str, told: str, **environment: str) -> None:
    started = time.monotonic()
    done = run_job("jobs.train", "--storage", uri, "--run-id", "never", "--preset", "smoke", **environment)
    took = time.monotonic() - started
    assert_refused(done, told)
    assert done.stderr.startswith(f"error: --storage {uri} ")
    assert took < TOLD_WITHIN_S
    print(f"{took:.1f} s: {done.stderr.strip()}")


def test_a_missing_bucket_is_told(port: int) -> None:
    refused_in_time(uri_of(port, "nowhere/results"), "is in bucket nowhere, which does not exist; make it")


def test_no_bucket_is_told(port: int) -> None:
    with pytest.raises(UserError, match="names no bucket; use s3://BUCKET/FOLDER"):
        open_storage(uri_of(port, ""))


def test_refused_permission_is_told() -> None:
    """This server takes only keys that it gave out, and ours it did not."""
    with server(INITIAL_NO_AUTH_ACTION_COUNT="0") as (strict, _):
        refused_in_time(uri_of(strict, "bucket/results"), "ACCESS_DENIED", **KEYS)


@pytest.fixture(scope="module")
def read_only(moto: None) -> Iterator[tuple[int, dict[str, str]]]:
    """A server that enforces permissions, and keys that may read everything and write nothing."""

    def iam(**fields: str) -> str:
        body = urllib.parse.urlencode(fields | {"Version": "2010-05-08"}).encode()
        told = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/iam/aws4_request"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/", body, told)) as answer:
            return str(answer.read().decode())

    with pytest.MonkeyPatch.context() as patch, server() as (strict, _):
        for name, value in KEYS.items():
            patch.setenv(name, value)
        address = f"http://127.0.0.1:{strict}"
        make_bucket(strict, "bucket")
        iam(Action="CreateUser", UserName="reader")
        rule = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
        iam(Action="PutUserPolicy", UserName="reader", PolicyName="reads", PolicyDocument=policy)
        told = iam(Action="CreateAccessKey", UserName="reader")
        number, secret = (re.findall(f"<{tag}>(.*?)</{tag}>", told)[0] for tag in ("AccessKeyId", "SecretAccessKey"))
        enforce = urllib.request.Request(f"{address}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(enforce).close()
        yield strict, {"AWS_ACCESS_KEY_ID": number, "AWS_SECRET_ACCESS_KEY": secret}


@pytest.mark.parametrize("command", ["jobs.prepare", "jobs.train", "jobs.tune"])
def test_keys_that_may_only_read_are_told(read_only: tuple[int, dict[str, str]], command: str) -> None:
    """Nor may they ask for the bucket, as with keys for one folder of it: that alone is nobody's mistake."""
    port, keys = read_only
    uri = uri_of(port, "bucket/results")
    done = run_job(command, "--storage", uri, "--source", "synthetic", **keys)
    assert_refused(done, f"error: --storage {uri} cannot be written (")
    assert "ACCESS_DENIED" in done.stderr


def test_a_closed_port_is_told() -> None:
    refused_in_time(uri_of(free_port(), "bucket/results"), "Could not connect to server", **KEYS)


def test_a_server_that_never_answers_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        refused_in_time(uri_of(silent.getsockname()[1], "bucket/results"), "Timeout was reached", **KEYS)


# --- the whole flow -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(port: int, small_archives: Path) -> Storage:
    storage = open_storage(uri_of(port, "bucket/whole%20flow"))
    prepare_archives(storage, small_archives)
    return storage


def test_a_run_survives_a_kill_and_a_store_that_falls_silent(
    remote: Storage, store: tuple[int, subprocess.Popen[bytes]], small_storage: Storage, unbroken: Unbroken
) -> None:
    """Its end is, to the bit, that of an unbroken run in a folder."""
    expected = unbroken("fp32")
    done = run_job("jobs.prepare", "--storage", remote.uri, "--source", "auto", "--val-rows", "100")
    assert "already prepared" in done.stdout, done.stderr
    first = Driver(remote, "one", every_s=0)
    first.wait_for(lambda: len(first.workers()) == 2)
    workers = first.workers()
    for worker in workers:  # the run goes on when its lock has been looked at
        worker.suspend()
    owner = f"--run-id one is in use by process {first.pid} of"
    with pytest.raises(UserError, match=owner), NameLock(remote, "runs", "one", "--run-id", heartbeat_s=4.0):
        pass  # it renews its note each 5 s, and is watched for 12
    for worker in workers:
        worker.resume()
    manager = CheckpointManager(remote, ("runs", "one"), newest=2)
    earlier = first.wait_for(lambda: manager.newest_whole()[0])
    first.process.kill()
    first.wait()
    assert runs.load_run(remote, "one")["status"] == "running"
    again = Driver(remote, "one")
    again.wait_for(lambda: manager.newest_whole()[0] != earlier)
    store[1].send_signal(signal.SIGSTOP)
    time.sleep(SILENT_S)
    store[1].send_signal(signal.SIGCONT)
    said = again.wait()
    assert again.process.returncode == 0, said
    assert said.count("goes on from checkpoint epoch-") == 1, "the silence was waited out, without another try"
    assert_unharmed(remote, "one", expected)
    far, near = runs.load_run(remote, "one"), runs.load_run(small_storage, "unbroken-fp32")
    assert (far["world_size"], far["test_loss"], far["test_rows"]) == (2, near["test_loss"], 500)


def test_what_it_left_is_evaluated_and_shown(remote: Storage, tmp_path: Path) -> None:
    """After the test of the run."""
    done = run_job("jobs.evaluate", "--storage", remote.uri, "--run-id", "one", "--split", "val", "--num-workers", "1")
    assert done.returncode == 0, done.stderr
    assert "val: 100 rows, accuracy" in done.stdout
    assert not remote.exists("runs", ".locks", "one")
    page = tmp_path / "page.html"
    done = run_job("jobs.report", "--storage", remote.uri, "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "one" in page.read_text()


def test_images_are_predicted_from_there_to_there(remote: Storage, tmp_path: Path) -> None:
    """Of a folder, of a glob, of Parquet, and once more: nothing is done twice. A network of a folder here."""
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for number, image in enumerate(images):
        remote.write_bytes(content(Image.fromarray(image)), "photos", "a b", f"{number}.png")
    remote.write_bytes(b"<html>", "photos", "c.png")
    remote.write_bytes(b"else", "photos", "notes.txt")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [content(Image.fromarray(image)) for image in images]}), sink)
    remote.write_bytes(sink.getvalue(), "rows", "a.parquet")
    model = write_export(drawn_network(), tmp_path / "model")
    expected = Classifier.load(model=str(model)).predict(images).labels.tolist()
    base = remote.uri.partition("?")[0]
    for place, out, paths in (
        ("photos", "one", [*(f"{base}/photos/a b/{number}.png" for number in range(3)), f"{base}/photos/c.png"]),
        ("photos/*/[02].png", "two", [f"{base}/photos/a b/0.png", f"{base}/photos/a b/2.png"]),
        ("rows/a.parquet", "three", [f"{base}/rows/a.parquet"] * 3),
    ):
        command = ["jobs.predict", "--images", remote.show(*place.split("/")), "--out", remote.show("predicted", out)]
        done = run_job(*command, "--model", str(model), "--num-workers", "1")
        assert done.returncode == 0, done.stderr
        rows = read_parquet(remote.read_bytes("predicted", out, "part-000000.parquet"))
        assert rows["path"].to_pylist() == paths
        chosen = [expected[0], expected[2]] if out == "two" else expected
        assert rows["label"].to_pylist() == [*chosen, None][: len(rows)]
    again = run_job(*command, "--model", str(model))
    assert "nothing to do" in again.stdout, again.stderr
    none = run_job("jobs.predict", "--images", remote.show("none"), "--out", remote.show("x"), "--model", str(model))
    assert_refused(none, "does not exist; name a file, a folder, a glob or a URI")


def test_a_search_keeps_its_trials_there(remote: Storage) -> None:
    flags = ["--preset=smoke", "--num-samples=2", "--max-epochs=2", "--max-train-rows=256", "--source=auto"]
    done = run_job("jobs.tune", "--storage", remote.uri, "--search-id", "few", *flags)
    assert done.returncode == 0, done.stderr
    for table in ("epochs", "runs", "trials"):
        assert "few.parquet" in remote.list("reports", table)
        assert tables.read_table(remote, table, "few-t0001")
    assert not remote.list("searches", "few", "journal")
    assert not remote.exists("searches", "few", "t0000", "checkpoints")
    of_the_search = pafs.FileSelector(remote.path("searches", "few"), recursive=True)
    names = [info.base_name for info in remote.fs.get_file_info(of_the_search) if info.type == pafs.FileType.File]
    assert names == ["search.json"], "Tune's files are not there"


def test_a_small_file_is_written_in_one_request(port: int) -> None:
    from fashion.bench.scale import slow_store

    with slow_store.proxy(f"127.0.0.1:{port}", 3.0) as address:
        place = open_storage(uri_of(int(address.rpartition(":")[2]), "bucket/few"))
        started = time.monotonic()
        place.write_bytes(b"content", "file")
        assert 3.0 <= time.monotonic() - started < 6.0
    assert open_storage(uri_of(port, "bucket/few")).read_bytes("file") == b"content"
