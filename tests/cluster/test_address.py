"""The address of a cluster: each wrong one is told in a line, before Ray would wait for it."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, job_environment

from fashion.cluster import address as address_module
from fashion.cluster.address import SETTINGS_FRAME, check_address, check_token, parse_address
from fashion.config import UserError

FORMS = {
    "nonsense": "names no port",
    "localhost": "names no port",
    "localhost:": "names no port",
    "localhost:0": "names no port",
    "localhost:abc": "is no HOST:PORT",
    "localhost:99999": "is no HOST:PORT",
    ":6379": "is no HOST:PORT",
    "localhost:6379/": "is no HOST:PORT",
    "a b:6379": "is no HOST:PORT",
    "user@localhost:6379": "is no HOST:PORT",
    "localhost:6379,localhost:6380": "is no HOST:PORT",
    "[::1:6379": "is no HOST:PORT",
    "http://127.0.0.1:8265": "begins with http://",
    "https://head:8265": "begins with https://",
    "anyscale://cluster": "begins with anyscale://",
    "tcp://head:6379": "begins with tcp://",
    "redis://head:6379": "begins with redis://",
    "AUTO": "names no port",
    "localhost:-1": "is no HOST:PORT",
    "::1:6379": "is no HOST:PORT",
    "localhost:6379?token=x": "is no HOST:PORT",
    "localhost:6379#head": "is no HOST:PORT",
    "ray://user:word@head:10001": "is no HOST:PORT",
    "ray://": "is no HOST:PORT",
    "ray://head": "names no port",
}


@pytest.mark.parametrize("address", FORMS)
def test_another_form_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=FORMS[address]) as refusal:
        check_address(address)
    assert str(refusal.value).startswith(f"RAY_ADDRESS={address} ")
    assert "unset it" in str(refusal.value)


def test_good_forms() -> None:
    assert parse_address("head.cluster:6379") == ("", "head.cluster", 6379)
    assert parse_address("[::1]:6379") == ("", "::1", 6379)
    assert parse_address("ray://10.0.0.1:10001") == ("ray", "10.0.0.1", 10001)


@contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """A port that answers each connection with `answer`, or with nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            kept = []
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                if answer is not None:
                    kept[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])


def refused_in(seconds: float, address: str, told: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=told):
        check_address(address)
    assert time.monotonic() - started < seconds


def test_nothing_that_answers_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    refused_in(60, f"127.0.0.1:{port}", "nothing answers there .Connection refused")
    refused_in(60, f"ray://127.0.0.1:{port}", "nothing answers there .Connection refused")
    refused_in(60, f"[::1]:{port}", "nothing answers there|host ::1 is unknown")
    refused_in(60, "head..cluster:6379", "host head..cluster is unknown .no name of a host")
    refused_in(60, f"{'x' * 64}:6379", "is unknown .no name of a host")
    refused_in(60, "[fe80::1%nope]:6379", "host fe80::1%nope is unknown")


def test_a_name_that_nobody_knows_or_tells_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that is silent is not waited for."""

    def late(*arguments: object, **options: object) -> None:
        time.sleep(4)
        raise socket.gaierror(socket.EAI_AGAIN, "late")

    monkeypatch.setattr(address_module, "SECONDS_TO_CONNECT", 1.0)
    refused_in(60, "no-such-host.invalid:6379", "host no-such-host.invalid is unknown|timed out")
    monkeypatch.setattr(socket, "getaddrinfo", late)
    refused_in(4, "no-such-host.invalid:6379", "nothing answers there .timed out")
    time.sleep(4)  # the thread ends before the test does


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_answers_otherwise_is_told(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_module, "SECONDS_TO_CONNECT", 4.0)
    for answer in (None, b"SSH-2.0-OpenSSH_9.2\r\n", b"-ERR unknown command\r\n", b"\x15\x03\x01\x00\x02\x02F", b"\0"):
        with listening(answer) as port:
            refused_in(60, f"{scheme}127.0.0.1:{port}", "listens, but is no Ray head node")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused_in(60, f"{scheme}127.0.0.1:{server.server_port}", "8265 is a dashboard's port")
        server.shutdown()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_head_node_that_speaks_tls_is_left_to_ray(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers the words of HTTP/2 by an alert of TLS."""
    asked: list[str] = []
    monkeypatch.setattr(address_module, "ask_ray", asked.append)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with listening(b"\x15\x03\x03\x00\x02\x02F") as port:
        check_address(f"{scheme}127.0.0.1:{port}")
    assert asked == [f"{scheme}127.0.0.1:{port}"]


@pytest.mark.ray
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_speaks_http2_and_is_no_head_node_is_told(scheme: str) -> None:
    with listening(bytes([0, 0, 0, SETTINGS_FRAME, 0, 0, 0, 0, 0])) as port:
        refused_in(300, f"{scheme}127.0.0.1:{port}", "no Ray head node answered in 40 s|Ray says")


def test_a_file_of_the_token_without_a_token_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray would crash, with a hundred lines."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    check_token()
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(UserError, match=f"RAY_AUTH_TOKEN_PATH={file} cannot be read .No such file or directory"):
        check_token()
    file.write_text(" \n")
    with pytest.raises(UserError, match=f"RAY_AUTH_TOKEN_PATH={file} is empty"):
        check_token()
    file.write_text("0" * 64)
    check_token()


@pytest.mark.ray
def test_a_head_node_is_taken_and_with_another_token_refused(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    check_address(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    refused_in(300, address, "Ray says .*[Tt]oken")


@pytest.mark.ray
@pytest.mark.parametrize("address", ["localhost:1", "http://127.0.0.1:8265"])
def test_a_command_ends_with_one_line(address: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.train", "--storage", str(tmp_path / "results"), "--source", "synthetic"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=job_environment() | {"RAY_ADDRESS": address},
        cwd=ROOT,
        timeout=900,
        check=False,
    )
    assert_refused(done, f"RAY_ADDRESS={address}")


@pytest.mark.ray
def test_a_temporary_folder_with_a_long_path_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    code = "from fashion.cluster import connection; connection.connect(num_cpus=1)"
    variables = {key: value for key, value in os.environ.items() if key != "RAY_TMPDIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=variables | {"RAY_ADDRESS": "local", "TMPDIR": str(folder)},
        cwd=ROOT,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("warning: TMPDIR has ") and line.endswith("Ray keeps its files in /tmp/ray")
