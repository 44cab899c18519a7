"""Connect to a Ray cluster, or start one on this machine with token authentication."""

import logging
import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import Any

import ray

from fashion.cluster.address import WAYS_OUT, check_address, check_token
from fashion.config import RAY_ENVIRONMENT, UserError

# The longest temporary folder, in bytes, in which Ray's sockets get a path of the 107 bytes that the kernel takes.
LONGEST_TEMPORARY_FOLDER = 107 - len("/ray/session_2026-01-31_09-30-00_123456_1234567/sockets/plasma_store")

STARTS = 3
TOO_SLOW = "The current node timed out during startup"
"""What Ray says then."""


def connect(num_cpus: int | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one here with token authentication and no dashboard.

    A cluster that starts here has `num_cpus` logical CPUs, by default as many as the machine. Does nothing more than
    silence Ray's libraries if this process is connected already. A variable of the environment that the user has set
    stays as it is. Raises `UserError` if no cluster answers at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers run in the driver's environment; without this Ray would build it anew under `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if not ray.is_initialized():
        # Workers' output stays in Ray's log folder: what a person needs comes back as rows, results and exceptions.
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = os.environ.get("RAY_ADDRESS", "").strip() or "local"
        check_token()
        if address == "local":
            provide_token()
            provide_temporary_folder()
            options |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
            python = shlex.quote(sys.executable)
            if python != sys.executable:
                # Ray 2.60 does not quote the path of Python in the shell command of a worker: in a folder whose name
                # holds a blank, workers would never start, and a search would wait for them for ever.
                options["runtime_env"] = {"py_executable": python}
            # Nobody preempts this machine, so Ray need not watch for that.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # This cluster's GCS is never restarted: when it is gone, as after a crash of this process, Ray's other
            # processes end after 10 s instead of waiting for it.
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
            for name, value in RAY_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        else:
            check_address(address)
        start(address, options)
    quieten()


def start(address: str, options: dict[str, Any]) -> None:
    """Call `ray.init`; raises `UserError` if the cluster at `address` refuses, as one of another Python does.

    Ray compares the versions of Ray and Python, to the third number, when it connects.
    """
    if address == "local":
        start_here(options)
        return
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"RAY_ADDRESS={address}: Ray says {told!r}; {WAYS_OUT}") from None


def start_here(options: dict[str, Any]) -> None:
    """Start a cluster on this machine, up to `STARTS` times: Ray gives it half a minute, too little on a busy one."""
    for starts_left in reversed(range(STARTS)):
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises no kind of its own
            if not starts_left or TOO_SLOW not in str(error):
                raise
            print("warning: Ray did not start in the time that it gives itself; it is started again", file=sys.stderr)
            ray.shutdown()
        else:
            return


def quieten() -> None:
    """Keep the progress messages of Ray Data and Ray Train out of this process's output; warnings stay."""
    import ray.data  # takes 2 s, so only processes that call this function pay for it

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # These loggers warn that the progress bars are off, which is intended, of a damaged file, whose name follows
    # elsewhere, of more than 16 paths, which are looked at by 16 threads, and of CPUs that are all taken, of which
    # tasks that read need none.
    datasource = ("_internal.datasource.parquet_datasource", "datasource.file_meta_provider")
    for name in ("_internal.progress", "dataset", *datasource):
        logging.getLogger(f"ray.data.{name}").setLevel(logging.ERROR)


def provide_token() -> None:
    """Make a token for a cluster that starts here, unless the user has one.

    Ray 2.60 turns token authentication on for such a cluster by itself, and would write a token into the home folder.
    """
    has_file = (Path.home() / ".ray" / "auth_token").exists()
    if not has_file and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def provide_temporary_folder() -> None:
    """Let Ray keep its files in /tmp if the path of the temporary folder is too long for its sockets, and say so."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    size = len(os.fsencode(os.environ.get(name, "")))
    if size > LONGEST_TEMPORARY_FOLDER:
        print(
            f"warning: {name} has {size} bytes, and Ray's sockets leave room for {LONGEST_TEMPORARY_FOLDER}: "
            "Ray keeps its files in /tmp/ray",
            file=sys.stderr,
        )
        os.environ["RAY_TMPDIR"] = "/tmp"  # noqa: S108 - it is Ray's own default
