"""Nodes that do not see the storage, on a real cluster."""

import os
import shutil
from pathlib import Path

import pytest
import ray

from fashion.cluster import storage_access
from fashion.config import UserError
from fashion.storage import Storage

pytestmark = pytest.mark.ray


@pytest.fixture
def nodes(ray_cluster: None) -> list[dict[str, object]]:
    return [node for node in ray.nodes() if node["Alive"]]


def test_a_node_that_sees_the_storage_reads_the_marker(storage: Storage, nodes: list[dict[str, object]]) -> None:
    storage.write_bytes(b"words", "marker")
    assert storage_access.nodes_without_storage(storage, "marker", "words", nodes) == {}


def test_a_node_without_the_folder_is_named(storage: Storage, nodes: list[dict[str, object]]) -> None:
    """Gone once it was written: to the node that is asked, it is as if it was never there."""
    storage.write_bytes(b"words", "marker")
    shutil.rmtree(storage.uri)
    failures = storage_access.nodes_without_storage(storage, "marker", "words", nodes)
    address = nodes[0]["NodeManagerAddress"]
    assert failures == {address: "what was written there a moment ago is not there"}
    told = rf"--storage {storage.uri} is not seen by every node, not by {address} \(.*\); name one that all nodes share"
    with pytest.raises(UserError, match=told):
        storage_access.refuse_failures(storage, failures)


def test_a_node_that_may_not_enter_is_named_with_the_reason(storage: Storage, nodes: list[dict[str, object]]) -> None:
    storage.write_bytes(b"words", "marker")
    shutil.rmtree(storage.uri)
    Path(storage.uri).write_bytes(b"")
    [reason] = storage_access.nodes_without_storage(storage, "marker", "words", nodes).values()
    assert f"{storage.uri} is a file" in reason


def test_another_files_content_is_not_the_storage(storage: Storage, nodes: list[dict[str, object]]) -> None:
    storage.write_bytes(b"others", "marker")
    assert list(storage_access.nodes_without_storage(storage, "marker", "words", nodes).values()) == [
        "another file of that name is there"
    ]


def test_a_node_that_is_gone_is_no_obstacle(storage: Storage, nodes: list[dict[str, object]]) -> None:
    storage.write_bytes(b"words", "marker")
    gone = {"NodeID": "ab" * 28, "NodeManagerAddress": "192.0.2.1"}
    assert storage_access.nodes_without_storage(storage, "marker", "words", [*nodes, gone]) == {}


def test_this_machine_alone_is_not_asked(storage: Storage, nodes: list[dict[str, object]]) -> None:
    storage_access.check_every_node_sees(storage)
    assert not os.path.exists(storage.uri)
