"""One driver at a time for a run or a search: a claim on its name that goes with the process that made it.

A folder of this machine, or one that it mounts, is claimed by a lock of the kernel, which no death of a process leaves
behind. An object store has no locks: there the owner renews a note, and whoever else wants the name watches for that.
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

from pyarrow import fs as pafs

from fashion.config import UserError
from fashion.storage import Storage

FOLDER = ".claims"
# A note is renewed so often, and counts as left behind when it stayed the same for three times as long.
BEAT_S = 5.0


class NameLock:
    """Within its `with` block, nobody else can claim the same name. Raises `UserError` if somebody has."""

    def __init__(self, storage: Storage, folder: str, name: str, flag: str, *, beat_s: float = BEAT_S) -> None:
        """Claim what will be called `name` in `folder` below the root; `flag` is how the user gave it."""
        self._storage = storage
        self._place = (folder, FOLDER, name)
        self._flag = f"{flag} {name}"
        self._beat_s = beat_s
        self._handle = -1
        self._key = secrets.token_hex(8)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        if isinstance(self._storage.fs, pafs.LocalFileSystem):
            self._lock()
        else:
            self._note()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            # Removed while it is still locked: whoever opened it meanwhile sees that it is no longer there.
            path = Path(self._storage.path(*self._place))
            path.unlink()
            os.close(self._handle)
            with suppress(OSError):  # others are in there
                path.parent.rmdir()
                path.parent.parent.rmdir()
        else:
            self._over.set()
            self._thread.join()
            with suppress(OSError):
                self._storage.fs.delete_file(self._storage.path(*self._place))

    def _lock(self) -> None:
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
            os.close(handle)  # its owner removed it in between
        os.truncate(handle, 0)
        os.write(handle, self._owner().encode())
        self._handle = handle

    def _note(self) -> None:
        before = self._read()
        if before:
            time.sleep(3 * self._beat_s)
            if self._read() != before:
                raise self._refusal(json.loads(before)["owner"])
        self._write(0)
        # Two that came at once: the later of their notes stands, and the other one sees it.
        time.sleep(self._beat_s / 5)
        now = json.loads(self._read() or b"{}")
        if now.get("key") != self._key:
            raise self._refusal(now.get("owner", "another process"))
        self._thread.start()

    def _renew(self) -> None:
        beat = 0
        while not self._over.wait(self._beat_s):
            beat += 1
            with suppress(OSError):  # the next one may get through, and a run is not ended for a note
                self._write(beat)

    def _write(self, beat: int) -> None:
        self._storage.write_bytes(
            json.dumps({"owner": self._owner(), "key": self._key, "beat": beat}).encode(), *self._place
        )

    def _read(self) -> bytes:
        try:
            return self._storage.read_bytes(*self._place)
        except FileNotFoundError:
            return b""

    def _owner(self) -> str:
        return f"process {os.getpid()} of {socket.gethostname()}"

    def _refusal(self, owner: str) -> UserError:
        return UserError(f"{self._flag} is in use by {owner}; wait for its end, or stop it first")
