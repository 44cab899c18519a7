"""A private Ray head node of this project: `python -m fashion.cluster.head up | down | status | submit MODULE FLAGS`.

Imports the standard library alone. Its files lie in `.ray/` (private, ignored by git), and Ray's in a folder with a
short path below /tmp, since the paths of Ray's sockets must stay under 108 bytes. Linux only: it looks for the head's
processes in /proc.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

from fashion.config import RAY_ENVIRONMENT

HOME = Path(".ray").resolve()
STATE, TOKEN, ENV, LOG = HOME / "head.json", HOME / "token", HOME / "env", HOME / "head.log"
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray then listens on 127.0.0.1 alone, on Linux too
# How long `up` waits for Ray, generously for a busy machine, and `down` for processes to end before it kills them.
START_TIMEOUT_S, STOP_TIMEOUT_S = 180, 10


def free_port() -> int:
    """Return a port of 127.0.0.1 that no process listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dashboard_port() -> int:
    """Return the dashboard's port: DASHBOARD_PORT, or 8265. Exits with one line if that is no port."""
    text = os.environ.get("DASHBOARD_PORT") or "8265"
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        refuse(f"DASHBOARD_PORT {text!r} must be a number from 1 to 65535")
    return int(text)


def own_pids(state: dict[str, Any]) -> list[int]:
    """Return the ids of the head's live processes: those of its session, and job drivers that run in its folder.

    Processes of the session count only while the session's leader is the head or is gone: otherwise another process
    has got the leader's id since.
    """
    leader = Path(f"/proc/{state['pid']}/cmdline")
    command = leader.read_bytes() if leader.exists() else b""
    session_is_ours = not command or state["temp_dir"].encode() in command
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            runs_in_folder = os.readlink(entry / "cwd").startswith(state["temp_dir"])
            is_ours = runs_in_folder or (session_is_ours and os.getsid(int(entry.name)) == state["pid"])
        except OSError:  # the process has ended, or belongs to another user
            continue
        if is_ours and not is_zombie:
            pids.append(int(entry.name))
    return pids


def read_settings() -> dict[str, Any] | None:
    """Return the state that `up` wrote, or None if there is none or that head is gone.

    Another process that has got the head's id since lacks the head's temporary folder on its command line.
    """
    if not STATE.exists():
        return None
    state: dict[str, Any] = json.loads(STATE.read_text())
    command = Path(f"/proc/{state['pid']}/cmdline")
    return state if command.exists() and state["temp_dir"].encode() in command.read_bytes() else None


def plain_python(temp_dir: str) -> Path:
    """Return this Python by a path that a shell reads as one word, if need be through a link in `temp_dir`.

    Ray 2.60 starts workers with `bash -c "exec PYTHON ..."` and does not quote PYTHON, so its processes would end in a
    folder whose name holds a blank.
    """
    if shlex.quote(sys.executable) == sys.executable:
        return Path(sys.executable)
    link = Path(temp_dir, "venv")
    link.symlink_to(sys.prefix)
    return link / Path(sys.executable).relative_to(sys.prefix)


def head_environment(python: Path) -> dict[str, str]:
    """Return the variables of a head that `python` runs; makes a token unless the user has set one."""
    os.umask(0o077)
    HOME.mkdir(exist_ok=True)
    env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    env = RAY_ENVIRONMENT | env
    if not env.get("RAY_AUTH_TOKEN") and not env.get("RAY_AUTH_TOKEN_PATH"):
        if not TOKEN.exists():
            TOKEN.write_text(secrets.token_hex(32))
        env["RAY_AUTH_TOKEN_PATH"] = str(TOKEN)
    env["PATH"] = f"{python.parent}:{env['PATH']}"  # so that a job's `python` is this one
    env |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    return env | LOOPBACK


def refuse(message: str) -> NoReturn:
    """Print `message` as the one line that a user's mistake gets, and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def up(extra: list[str]) -> str:
    """Start the head in a session of its own, with further flags `extra` of `ray start`, and wait until it is ready.

    Returns a line for the user. Exits with code 2 if Ray does not start.
    """
    port = dashboard_port()
    if state := read_settings():
        return f"Ray runs already at {state['url']} (pid {state['pid']})."
    down()  # removes what a head that crashed left behind
    temp_dir = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    python = plain_python(temp_dir)
    env = head_environment(python)
    command = [
        str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={temp_dir}",
        f"--port={free_port()}", f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0",
        "--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", *extra,
    ]  # fmt: skip
    with LOG.open("w") as log:
        head = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    state = {"pid": head.pid, "temp_dir": temp_dir, "url": f"http://127.0.0.1:{port}"}
    STATE.write_text(json.dumps(state))
    wait_until_ready(head)
    address = Path(temp_dir, "ray_current_cluster").read_text()
    exports = {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": state["url"], "RAY_AUTH_MODE": "token"} | LOOPBACK
    if path := env.get("RAY_AUTH_TOKEN_PATH"):
        exports["RAY_AUTH_TOKEN_PATH"] = path
    ENV.write_text("".join(f"export {key}={shlex.quote(value)}\n" for key, value in exports.items()))
    return f"Ray is up: dashboard {state['url']}, GCS {address}, pid {head.pid}, log {LOG}"


def wait_until_ready(head: subprocess.Popen[bytes]) -> None:
    """Wait until Ray's start message is in the log; stop everything and exit with code 2 if it does not come."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while "This command will now block" not in LOG.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            down()
            refuse(f"Ray did not start: {LOG.read_text().strip().splitlines()[-1]} (log {LOG})")
        time.sleep(0.2)


def down() -> str:
    """Stop the head that `up` started, its jobs, and no other process; return a line for the user."""
    if not STATE.exists():
        return "Ray is not up; nothing to stop."
    state = json.loads(STATE.read_text())
    if read_settings():
        os.kill(state["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := own_pids(state)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(state["temp_dir"], ignore_errors=True)
    for path in (STATE, ENV):
        path.unlink(missing_ok=True)
    return f"Ray is down{f'; {len(left)} processes had to be killed' if left else ''}."


def get_json(state: dict[str, Any], path: str) -> Any:
    """GET `path` from the head's dashboard, with the token, and return its JSON answer.

    Exits with one line and code 2 if there is no token, or the head refuses it or does not answer.
    """
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN)
    token = os.environ.get("RAY_AUTH_TOKEN") or (file.read_text().strip() if file.exists() else "")
    if not token:
        refuse(f"no token: {file} is missing or empty; set RAY_AUTH_TOKEN_PATH, or run `make down up` for a new one")
    request = urllib.request.Request(f"{state['url']}{path}", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        refuse(f"Ray at {state['url']} refused the token: {error.read().decode()} (HTTP {error.code})")
    except OSError as error:
        refuse(f"Ray at {state['url']} does not answer: {error}")


def running_head() -> dict[str, Any]:
    """Return the state of the running head; exits with one line unless it answers and accepts the token."""
    state = read_settings()
    if state is None:
        refuse("Ray is not up; run `make up`")
    get_json(state, "/api/version")
    return state


def submit(module: str, flags: list[str]) -> NoReturn:
    """Submit `python -m MODULE FLAGS`, follow its log, and exit with code 0 only if the job succeeded, else 1.

    Ctrl-C stops following, not the job. `ray job submit` exits with 0 for a stopped job too, so this asks for the
    job's status afterwards.
    """
    state = running_head()
    variables = dict(word.split("=", 1) for word in shlex.split(ENV.read_text()) if word != "export")
    name = f"{module.rpartition('.')[2]}-{secrets.token_hex(4)}"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--submission-id", name, "--working-dir", ".", "--", "python", "-m", module]
    try:
        code = subprocess.run([*command, *flags], env={**os.environ, **variables}, check=False).returncode
    except KeyboardInterrupt:
        ray_job = f". {shlex.quote(str(ENV))}; {shlex.quote(ray)} job"
        print(f"job {name} goes on without being followed", file=sys.stderr)
        print(f"follow it again: {ray_job} logs --follow {name}\nstop it: {ray_job} stop {name}", file=sys.stderr)
        sys.exit(1)
    final = get_json(state, f"/api/jobs/{name}")["status"]
    print(f"job {name}: {final}")
    sys.exit(0 if code == 0 and final == "SUCCEEDED" else 1)


def main(arguments: list[str]) -> None:
    """Run the command that the first of `arguments` names, and print its line; exits with code 2 on any other one."""
    match arguments:
        case ["up", *extra]:
            print(up(extra))
        case ["down"]:
            print(down())
        case ["status"]:
            state = running_head()
            print(f"Ray is up at {state['url']} (pid {state['pid']}) and takes the token.")
        case ["submit", module, *flags]:
            submit(module, flags)
        case _:
            refuse("usage: python -m fashion.cluster.head up | down | status | submit MODULE FLAGS")


if __name__ == "__main__":
    main(sys.argv[1:])
