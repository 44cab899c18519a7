"""Before anything is trained: does every node of the cluster see the storage? Knows Ray.

A path such as `./results` opens everywhere and is another folder on every machine: found out late, by workers that
miss the data or leave their checkpoints where nobody looks.
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

# A node may have to unpack the submitted code and to start a process before it can look.
SECONDS_TO_ANSWER = 120.0


def check_every_node_sees(storage: Storage) -> None:
    """Raise `UserError` with the address of each node that does not see `storage`; nodes that join later are not asked.

    A cluster that is this machine alone is not asked at all.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return
    marker, content = f".seen-{secrets.token_hex(8)}", secrets.token_hex(16)
    storage.write_bytes(content.encode(), marker)
    try:
        blind = find_blind(storage, marker, content, nodes)
    finally:
        storage.fs.delete_file(storage.path(marker))
    refuse_blind(storage, blind)


def find_blind(storage: Storage, marker: str, content: str, nodes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the addresses of the `nodes` that do not find `content` in the file `marker`, each with the reason.

    All look at once, whatever runs on them. Only a node itself can tell, so its task runs there or not at all.
    """
    look = ray.remote(num_cpus=0, max_retries=0)(read_marker)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[look.options(scheduling_strategy=there).remote(storage.uri, marker)] = node["NodeManagerAddress"]
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    blind = {}
    for reference, address in asked.items():
        found, reason = "", f"no answer in {SECONDS_TO_ANSWER:g} s"
        if reference in answered:
            try:
                found, reason = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = last_line(error)
        if found != content:
            blind[address] = reason or "another file of that name is there"
    return blind


def read_marker(uri: str, marker: str) -> tuple[str, str]:
    """Return the marker's content as this node sees it, or an empty text and why it does not."""
    try:
        return open_storage(uri).read_bytes(marker).decode(errors="replace"), ""
    except FileNotFoundError:
        return "", "what was written there a moment ago is not there"
    except (OSError, UserError) as error:
        return "", last_line(error)


def refuse_blind(storage: Storage, blind: dict[str, str]) -> None:
    """Raise `UserError` if any node does not see the storage."""
    if blind:
        told = ", ".join(f"{address} ({reason})" for address, reason in sorted(blind.items()))
        raise UserError(
            f"--storage {storage.uri} is not seen by every node, not by {told}; "
            "name one that all nodes share, such as an NFS mount or s3://..."
        )
