"""Nodes that do not see the storage, on a real cluster."""

import os
import shutil
from pathlib import Path

import pytest
import ray

from fashion.cluster import storage_access
from fashion.config import UserError
from fashion.storage import Storage, open_storage

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


def test_the_flag_that_named_the_storage_is_told(tmp_path: Path) -> None:
    out = open_storage(str(tmp_path), "--out")
    with pytest.raises(UserError, match=rf"--out {tmp_path} is not seen by every node, not by 192\.0\.2\.1 \(why\)"):
        storage_access.refuse_failures(out, {"192.0.2.1": "why"})
    told = storage_access.read_marker(str(tmp_path / "a" / "b"), "--out", "marker", "words")
    assert told == "what was written there a moment ago is not there"


def test_another_file_than_the_users_is_told(tmp_path: Path) -> None:
    """Whatever its folder is called: Ray hands on bytes, and not every name is text."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    (folder / "a.png").write_bytes(b"12345")
    storage = open_storage(str(folder), "--images")
    state = storage_access.file_state(storage, str(folder / "a.png"))
    assert state is not None and state[0] == 5

    def told(name: str, size: int, changed_ns: int) -> str:
        names = os.fsencode(storage.uri), storage.flag, os.fsencode(folder / name)
        return storage_access.compare_file(*names, size, changed_ns)

    assert told("a.png", *state) == ""
    assert told("b.png", *state) == "b.png is not there"
    assert told("a.png", 6, state[1]) == "a.png has 5 bytes there, not 6"
    assert told("a.png", 5, state[1] - 5_000_000_000) == "a.png was changed at another time there"
    assert storage_access.file_state(storage, str(folder / "a.png" / "b.png")) is None


def test_a_node_without_the_images_is_named(
    tmp_path: Path, nodes: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file that is there is looked for; a link that leads nowhere is nowhere else either."""
    monkeypatch.setattr(storage_access, "nodes_to_ask", lambda: nodes)
    storage = open_storage(str(tmp_path), "--images")
    (tmp_path / "a.png").symlink_to("nowhere")
    (tmp_path / "b.png").write_bytes(b"12345")
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    storage_access.check_every_node_finds(storage, paths)
    storage_access.check_every_node_finds(storage, paths[:1])
    monkeypatch.setattr(storage_access, "file_state", lambda storage, path: (6, 0) if path == paths[1] else None)
    told = rf"--images {tmp_path} is not seen by every node, not by {nodes[0]['NodeManagerAddress']} \(b\.png has 5 "
    with pytest.raises(UserError, match=told):
        storage_access.check_every_node_finds(storage, paths)
