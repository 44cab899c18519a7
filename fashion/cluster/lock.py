"""A lock on the name of a run or a search, so that one driver at a time works on it. It ends with its process.

In a folder, local or mounted, this is a lock of the kernel on a file, which the kernel releases when the process ends.
An object store has no locks: there the owner rewrites an object every few seconds, and another process that wants the
name waits to see whether that object still changes.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from fashion.config import UserError
from fashion.storage import Storage

# Earlier versions lock in a folder of another name, and so do not see this lock: two versions that work on one run at a
# time do not keep out of each other's way.
FOLDER = ".locks"
# Seconds between two heartbeats in an object store; the object of an owner that missed three of them is ignored.
HEARTBEAT_S = 5.0


class NameLock:
    """Context manager: inside its `with` block, no other process can lock the same name.

    Entering raises `UserError`, naming the owner, if another process holds the lock.
    """

    def __init__(
        self, storage: Storage, folder: str, name: str, flag: str, *, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        """Prepare to lock `name` in `folder` below the storage's root; `flag`, as in `--run-id`, is for messages."""
        self._storage = storage
        self._place = (folder, FOLDER, name)
        self._flag = f"{flag} {name}"
        self._heartbeat_s = heartbeat_s
        self._handle = -1
        self._key = secrets.token_hex(8)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True)

    def __enter__(self) -> Self:
        if self._storage.is_folder:
            self._lock_file()
        else:
            self._lock_object()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            # The file is removed while it is locked: a process that has opened it meanwhile sees that it is gone.
            path = Path(self._storage.path(*self._place))
            path.unlink()
            os.close(self._handle)
            with suppress(OSError):  # the folders are not empty
                path.parent.rmdir()
                path.parent.parent.rmdir()
        else:
            self._released.set()
            self._thread.join()
            with suppress(OSError):
                self._storage.fs.delete_file(self._storage.path(*self._place))

    def _lock_file(self) -> None:
        path = Path(self._storage.path(*self._place))
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 500).decode(errors="replace")
                os.close(handle)
                raise self._refusal(owner) from None
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
            os.close(handle)  # its owner removed the file before it was locked here: try again with a new one
        os.truncate(handle, 0)
        os.write(handle, self._owner().encode())
        self._handle = handle

    def _lock_object(self) -> None:
        before = self._read_object()
        if before:
            time.sleep(3 * self._heartbeat_s)
            if self._read_object() != before:
                raise self._refusal(json.loads(before)["owner"])
        self._write_object(0)
        # If two processes wrote at the same time, the later object stays, and the other process sees that here.
        time.sleep(self._heartbeat_s / 5)
        now = json.loads(self._read_object() or b"{}")
        if now.get("key") != self._key:
            raise self._refusal(now.get("owner", "another process"))
        self._thread.start()

    def _send_heartbeats(self) -> None:
        beat = 0
        while not self._released.wait(self._heartbeat_s):
            beat += 1
            with suppress(OSError):  # the next heartbeat may succeed; a missed one is no reason to end a run
                self._write_object(beat)

    def _write_object(self, beat: int) -> None:
        self._storage.write_bytes(
            json.dumps({"owner": self._owner(), "key": self._key, "beat": beat}).encode(), *self._place
        )

    def _read_object(self) -> bytes:
        try:
            return self._storage.read_bytes(*self._place)
        except FileNotFoundError:
            return b""

    def _owner(self) -> str:
        return f"process {os.getpid()} of {socket.gethostname()}"

    def _refusal(self, owner: str) -> UserError:
        return UserError(f"{self._flag} is in use by {owner}; wait for its end, or stop it first")
