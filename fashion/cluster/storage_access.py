"""Check, before anything is trained, that every node of the cluster sees the storage.

A path such as `./results` opens on every machine but is another folder on each. Without this check a run would notice
late, when workers miss the data, or never, when they write checkpoints where nobody looks.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fashion.config import UserError
from fashion.reports.progress import last_line
from fashion.storage import Storage, open_storage

# A node may have to unpack the submitted code and to start a process first.
SECONDS_TO_ANSWER = 120.0


def check_every_node_sees(storage: Storage) -> None:
    """Raise `UserError` with the address of each node that does not see `storage`.

    Nodes that join later are not checked, nor is a cluster whose only node is this machine.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return
    marker, content = f".seen-{secrets.token_hex(8)}", secrets.token_hex(16)
    storage.write_bytes(content.encode(), marker)
    try:
        failures = nodes_without_storage(storage, marker, content, nodes)
    finally:
        storage.fs.delete_file(storage.path(marker))
    refuse_failures(storage, failures)


def nodes_without_storage(
    storage: Storage, marker: str, content: str, nodes: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Return the addresses of the `nodes` that do not find `content` in the file `marker`, each with the reason.

    A task on each node reads the file, all of them at once; they reserve no CPU, so they run beside anything else.
    Nodes that left the cluster meanwhile are left out: nothing will run there.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(read_marker)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=strategy).remote(storage.uri, marker)] = node
    finished, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    failures = {}
    for reference, node in asked.items():
        read, reason = "", f"no answer in {SECONDS_TO_ANSWER:g} s"
        if reference in finished:
            try:
                read, reason = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = last_line(error)
        if read != content and node["NodeID"] in alive:
            failures[node["NodeManagerAddress"]] = reason or "another file of that name is there"
    return failures


def read_marker(uri: str, marker: str) -> tuple[str, str]:
    """Return the marker's content and an empty text, or an empty text and why this node cannot read the marker."""
    try:
        return open_storage(uri).read_bytes(marker).decode(errors="replace"), ""
    except FileNotFoundError:
        return "", "what was written there a moment ago is not there"
    except (OSError, UserError) as error:
        return "", last_line(error)


def refuse_failures(storage: Storage, failures: dict[str, str]) -> None:
    """Raise `UserError` if any node does not see the storage; `failures` holds addresses and reasons."""
    if failures:
        listed = ", ".join(f"{address} ({reason})" for address, reason in sorted(failures.items()))
        raise UserError(
            f"--storage {storage.uri} is not seen by every node, not by {listed}; "
            "name one that all nodes share, such as an NFS mount or s3://..."
        )
