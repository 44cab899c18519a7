"""Wait for nodes: a cluster with an autoscaler starts them when something asks, and may keep none up until then."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.autoscaler import sdk

from fashion.cluster.plan import NoRoom, live_nodes

# How long a run waits by default where an autoscaler runs: to start a machine and its Ray takes a cloud some minutes.
DEFAULT_WAIT_S = 600.0
# If the autoscaler starts nothing for this long, it can bring no more. It decides every 5 s.
SECONDS_WITHOUT_A_START = 30.0
SECONDS_BETWEEN_LOOKS = 1.0
# `ray status` takes two seconds of a CPU.
SECONDS_BETWEEN_STATUSES = 6.0
SECONDS_FOR_A_STATUS = 60.0
# Ray calls nodes that no autoscaler has started by their ids.
NODE_ID = re.compile(r"node_[0-9a-f]{20,}|local_\S+")

T = TypeVar("T")


class NodesNotUp(RuntimeError):
    """The nodes that were waited for did not come in time."""


@dataclass(frozen=True)
class AutoscalerStatus:
    """What `ray status` tells: whether an autoscaler starts nodes here, and how many it is starting."""

    is_there: bool
    num_starting: int
    reported_at: str = ""
    """When the autoscaler said so, as text: one that has died says the same for ever."""


NO_AUTOSCALER = AutoscalerStatus(is_there=False, num_starting=0)


def wait_for_room(make_plan: Callable[[], T], wait_s: float | None) -> T:
    """Return `make_plan()`, which raises `NoRoom` while the cluster is too small.

    Waits up to `wait_s` seconds for nodes, and asks the autoscaler for them; None waits `DEFAULT_WAIT_S` where there is
    an autoscaler, and not at all elsewhere. Prints a line that says what is waited for. Raises `NoRoom` (a `UserError`)
    if nothing is waited for, or if the autoscaler has brought what it can, and `NodesNotUp` when the time is over.
    """
    try:
        return make_plan()
    except NoRoom as error:
        shortage = error
    status = autoscaler_status()
    limit = wait_s if wait_s is not None else DEFAULT_WAIT_S * status.is_there
    if limit <= 0:
        raise shortage
    print(f"waiting for nodes, at most {limit:g} s: {shortage}", flush=True)
    started = changed = looked = time.monotonic()
    known = len(live_nodes())
    with requested(shortage.bundles):
        while time.monotonic() - started < limit:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                return make_plan()
            except NoRoom as error:
                shortage = error
            now, before = time.monotonic(), status
            if now - looked > SECONDS_BETWEEN_STATUSES:
                status, looked = autoscaler_status(), now
            is_starting = status.num_starting > 0 and status.reported_at != before.reported_at
            if is_starting or len(live_nodes()) != known:
                known, changed = len(live_nodes()), now
            if status.is_there and now - changed > SECONDS_WITHOUT_A_START:
                raise NoRoom(f"{shortage}; the cluster's autoscaler brings no more", shortage.bundles)
    raise NodesNotUp(f"no room in {limit:g} s (--wait-for-nodes-s): {shortage}")


def request_resources(bundles: list[dict[str, float]]) -> None:
    """Ask the autoscaler for room for all `bundles` at once, in place of whatever was asked before."""
    sdk.request_resources(bundles=bundles)


@contextlib.contextmanager
def requested(bundles: list[dict[str, float]]) -> Iterator[None]:
    """Ask the autoscaler for room for all `bundles` until the block ends."""
    request_resources(bundles)
    try:
        yield
    finally:
        request_resources([])


def autoscaler_status() -> AutoscalerStatus:
    """Return what the command `ray status` of the connected cluster tells; its text is the same for all autoscalers."""
    if os.environ.get("RAY_ADDRESS", "").strip() in ("", "local"):
        return NO_AUTOSCALER  # a cluster of this command's own
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "status",
        "--address",
        ray.get_runtime_context().gcs_address,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_A_STATUS, check=False)
    except subprocess.TimeoutExpired:
        return NO_AUTOSCALER  # nobody who could start nodes answers
    return parse_status(done.stdout)


def parse_status(text: str) -> AutoscalerStatus:
    """Read the text of `ray status`: below `Active:`, `Idle:` and `Pending:` it has a line for each type of node.

    Without an autoscaler, each node is a type of its own, called by its id. One that has started nothing yet may list
    no node at all.
    """
    listed: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z][\w ]*:", line):
            lines = listed.setdefault(line.rstrip(":"), [])
        elif line.startswith(" ") and not line.strip().startswith("("):
            lines.append(line.strip())
    nodes = [re.sub(r"^\d+ ", "", line) for name in ("Active", "Idle") for line in listed.get(name, [])]
    is_there = "Active" in listed and not any(NODE_ID.match(node) for node in nodes)
    time_of_report = re.search(r"Autoscaler status: (.*?) =", text)
    return AutoscalerStatus(is_there, len(listed.get("Pending", [])), time_of_report[1] if time_of_report else "")
