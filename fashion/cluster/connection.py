"""Connect to a Ray cluster, or start one on this machine with token authentication."""

import logging
import os
import secrets
from pathlib import Path
from typing import Any

import ray

from fashion.config import RAY_ENVIRONMENT


def connect(num_cpus: int | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one here with token authentication and no dashboard.

    `num_cpus` gives a cluster that starts here so many logical CPUs in place of the machine's own number.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The workers run the environment that the driver runs; without this Ray would build it anew under `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if not ray.is_initialized():
        # Workers' output stays in Ray's log folder: what a person needs comes back as rows, results and exceptions.
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if os.environ.get("RAY_ADDRESS", "local") == "local":
            provide_token()
            options |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
            # Nobody reclaims this machine, so nobody need watch for it.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # Nor is its GCS ever started again: what misses it, as after the death of this process, may end soon.
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
            for name, value in RAY_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        ray.init(**options)
    quieten()


def quieten() -> None:
    """Keep Ray Data's and Ray Train's narration out of this process' output; warnings stay."""
    import ray.data  # takes 2 s, which a process that only evaluates is spared

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns that the bars are off, as was asked.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def provide_token() -> None:
    """Give a cluster that starts here a token of its own, unless the user has one.

    Ray 2.60 turns token authentication on for such a cluster by itself, and would write a token into the home folder.
    """
    has_file = (Path.home() / ".ray" / "auth_token").exists()
    if not has_file and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
