"""Check the address of a cluster before Ray is asked: where nobody answers, Ray itself warns for eight minutes.

`RAY_ADDRESS` is `local` (a cluster of the command's own), `auto` (the one on this machine), `HOST:PORT` (the GCS of a
head node, the process that knows the cluster; port 6379 by default), or `ray://HOST:PORT` (Ray Client).
"""

import os
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

from fashion.config import UserError, require
from fashion.reports.progress import last_line

# To resolve a name, to connect to one of its addresses, and to get an answer.
SECONDS_TO_CONNECT = 10.0
# A command of Ray imports for some seconds before it asks.
SECONDS_TO_ANSWER = 40.0
# What every gRPC client says first, and an empty frame of settings: RFC 9113, section 3.4.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS_FRAME = 4
WAYS_OUT = "set it to HOST:6379 of a head node that runs, or unset it for a cluster of this machine's own"


def check_address(address: str) -> None:
    """Raise `UserError`, in a minute at most, unless a Ray cluster answers at `address`."""
    if address != "auto":
        _, host, port = parse_address(address)
        answer = first_answer(address, host, port)
        # Who speaks TLS has no answer to this; Ray itself asks below. The length of a frame takes three bytes, its kind
        # the fourth.
        require(
            uses_tls() or answer[3:4] == bytes([SETTINGS_FRAME]),
            f"RAY_ADDRESS={address} listens, but is no Ray head node (8265 is a dashboard's port); {WAYS_OUT}",
        )
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # else the cluster itself has started this process
        ask_ray(address)


def uses_tls() -> bool:
    """Tell whether Ray encrypts what it sends, as it does in a cluster that was started so."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def parse_address(address: str) -> tuple[str, str, int]:
    """Return scheme (`ray` or empty), host and port; raises `UserError` for an address of another form."""
    scheme, _, rest = address.rpartition("://")
    require(
        scheme in ("", "ray"),
        f"RAY_ADDRESS={address} begins with {scheme}://, as addresses for `ray job submit` do; {WAYS_OUT}",
    )
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS={address} is no HOST:PORT ({error}); {WAYS_OUT}") from None
    require(
        bool(host) and parts.netloc == rest and " " not in rest and "," not in rest and "@" not in rest,
        f"RAY_ADDRESS={address} is no HOST:PORT; {WAYS_OUT}",
    )
    require(bool(port), f"RAY_ADDRESS={address} names no port from 1 to 65535; {WAYS_OUT}")
    assert host
    assert port
    return scheme, host, port


def first_answer(address: str, host: str, port: int) -> bytes:
    """Return what comes back over TCP after the first words of a gRPC client, at most nine bytes.

    Raises `UserError` if the name is unknown or nothing listens; returns nothing if nothing comes back. A resolver that
    does not answer, and a name of many addresses, take no longer than `SECONDS_TO_CONNECT`.
    """
    found: queue.SimpleQueue[bytes | OSError] = queue.SimpleQueue()
    threading.Thread(target=lambda: found.put(connect_and_read(host, port)), daemon=True).start()
    try:
        answer = found.get(timeout=SECONDS_TO_CONNECT)
    except queue.Empty:
        answer = TimeoutError("timed out")
    if isinstance(answer, socket.gaierror):
        raise UserError(f"RAY_ADDRESS={address}: host {host} is unknown ({answer.strerror}); {WAYS_OUT}") from None
    if isinstance(answer, OSError):
        reason = answer.strerror or str(answer)
        raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({reason}); {WAYS_OUT}") from None
    return answer


def connect_and_read(host: str, port: int) -> bytes | OSError:
    """Return the first answer of who listens, nothing if that one is silent for half the time, or why none came."""
    try:
        connection = socket.create_connection((host, port), timeout=SECONDS_TO_CONNECT)
    except OSError as error:
        return error
    except UnicodeError:  # a part of the name is empty or longer than 63 bytes
        return socket.gaierror(socket.EAI_NONAME, "no name of a host")
    with connection:
        connection.settimeout(SECONDS_TO_CONNECT / 2)
        try:
            connection.sendall(HTTP2_PREFACE)
            return connection.recv(9)
        except OSError:
            return b""


def check_token() -> None:
    """Raise `UserError` if the environment names a file of the token that holds none: Ray would crash at it."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or os.environ.get("RAY_AUTH_TOKEN"):
        return
    try:
        is_empty = not Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"RAY_AUTH_TOKEN_PATH={path} cannot be read ({getattr(error, 'strerror', None) or error}); "
            "name the file of the cluster's token, or unset it"
        ) from None
    require(not is_empty, f"RAY_AUTH_TOKEN_PATH={path} is empty; name the file of the cluster's token, or unset it")


def ask_ray(address: str) -> None:
    """Let a command of Ray ask the head node, in a process that can be ended; raises `UserError` if that fails.

    It fails where something else than a GCS listens, with another token, and with another version of Ray.
    """
    if address.startswith("ray://"):  # a command of Ray would ask a GCS
        command = [sys.executable, "-c", "import sys, ray; ray.init(sys.argv[1])", address]
    else:
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray head node answered in {SECONDS_TO_ANSWER:g} s; {WAYS_OUT}"
        ) from None
    if done.returncode:
        raise UserError(f"RAY_ADDRESS={address}: Ray says {last_line(done.stderr or done.stdout)!r}; {WAYS_OUT}")
