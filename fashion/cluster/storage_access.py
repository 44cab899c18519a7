"""Check, before any work begins, that every node of the cluster sees the storage, and the files of the user's.

A path such as `./results` opens on every machine but is another folder on each. Without this check a run would notice
late, when workers miss the data, or never, when they write checkpoints where nobody looks.
"""

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
import ray.exceptions
from pyarrow import fs as pafs
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fashion.config import UserError, printable
from fashion.reports.progress import last_line
from fashion.storage import Storage, open_storage

# A node may have to unpack the submitted code and to start a process first.
SECONDS_TO_ANSWER = 120.0
# File systems keep times as exactly as they can, and so mounts of one folder may differ: FAT has steps of two seconds.
NS_APART = 2_000_000_000


def check_every_node_sees(storage: Storage) -> None:
    """Raise `UserError` with the address of each node that does not see `storage`.

    Nodes that join later are not checked, nor is a cluster whose only node is this machine.
    """
    nodes = nodes_to_ask()
    if not nodes:
        return
    marker, content = f".seen-{secrets.token_hex(8)}", secrets.token_hex(16)
    storage.write_bytes(content.encode(), marker)
    try:
        failures = nodes_without_storage(storage, marker, content, nodes)
    finally:
        storage.fs.delete_file(storage.path(marker))
    refuse_failures(storage, failures)


def check_every_node_finds(storage: Storage, paths: Iterable[str]) -> None:
    """Raise `UserError` with the address of each node that does not find the first of `paths` that is a file here.

    `paths` are files below the storage, in the form that its file system takes. On each node the file must be as long
    as here, and a local one must have been changed at the same time: another of that name is not the user's.
    Nodes that join later are not checked, nor is a cluster whose only node is this machine.
    """
    nodes = nodes_to_ask()
    found = ((path, state) for path in paths if (state := file_state(storage, path)) is not None)
    path, state = next(found, ("", None)) if nodes else ("", None)
    if state is not None:
        # As bytes: Ray hands on no text that is not UTF-8, and a path may be that.
        names = os.fsencode(storage.uri), storage.flag, os.fsencode(path)
        refuse_failures(storage, failing_nodes(nodes, compare_file, *names, *state))


def nodes_to_ask() -> list[dict[str, Any]]:
    """Return the live nodes, none of a cluster whose only node is this machine: it sees what this process sees."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    is_alone = [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]
    return [] if is_alone else nodes


def nodes_without_storage(
    storage: Storage, marker: str, content: str, nodes: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Return the addresses of the `nodes` that do not find `content` in the file `marker`, each with the reason."""
    return failing_nodes(nodes, read_marker, storage.uri, storage.flag, marker, content)


def failing_nodes(nodes: Sequence[dict[str, Any]], look: Callable[..., str], *arguments: Any) -> dict[str, str]:
    """Return the addresses of the `nodes` on which `look(*arguments)` returns a reason, each with that.

    A task on each node looks, all of them at once; they reserve no CPU, so they run beside anything else.
    Nodes that left the cluster meanwhile are left out: nothing will run there.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=strategy).remote(*arguments)] = node
    finished, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    failures = {}
    for reference, node in asked.items():
        reason = f"no answer in {SECONDS_TO_ANSWER:g} s"
        if reference in finished:
            try:
                reason = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = last_line(error)
        if reason and node["NodeID"] in alive:
            failures[node["NodeManagerAddress"]] = reason
    return failures


def read_marker(uri: str, flag: str, marker: str, content: str) -> str:
    """Return why this node does not find `content` in the file `marker` of a storage, or an empty text if it does."""
    try:
        found = open_storage(uri, flag).read_bytes(marker)
    except FileNotFoundError:
        return "what was written there a moment ago is not there"
    except (OSError, UserError) as error:
        return printable(last_line(error))
    return "" if found == content.encode() else "another file of that name is there"


def compare_file(uri: bytes, flag: str, path: bytes, size: int, changed_ns: int) -> str:
    """Return why this node does not find the file of `size` bytes, last changed at `changed_ns` since 1970 (local
    files alone), or an empty text if it does; `uri` and `path` are those of a storage and a file below it.
    """
    name = printable(os.path.basename(os.fsdecode(path)))
    try:
        state = file_state(open_storage(os.fsdecode(uri), flag), os.fsdecode(path))
    except (OSError, UserError) as error:
        return printable(last_line(error))
    if state is None:
        return f"{name} is not there"
    if state[0] != size:
        return f"{name} has {state[0]} bytes there, not {size}"
    return "" if abs(state[1] - changed_ns) <= NS_APART else f"{name} was changed at another time there"


def file_state(storage: Storage, path: str) -> tuple[int, int] | None:
    """Return a file's size in bytes and the time of its last change in ns since 1970, 0 in an object store.

    Returns None if it is not there, or may not be looked at; raises `OSError` if the storage does not answer.
    """
    if not storage.is_folder:
        info = storage.fs.get_file_info(path)
        return (info.size, 0) if info.type == pafs.FileType.File else None
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise
        return None
    return found.st_size, found.st_mtime_ns


def refuse_failures(storage: Storage, failures: dict[str, str]) -> None:
    """Raise `UserError` if any node does not see the storage; `failures` holds addresses and reasons."""
    if failures:
        listed = ", ".join(f"{address} ({reason})" for address, reason in sorted(failures.items()))
        raise UserError(
            f"{storage.flag} {storage.uri} is not seen by every node, not by {listed}; "
            "name one that all nodes share, such as an NFS mount or s3://..."
        )
