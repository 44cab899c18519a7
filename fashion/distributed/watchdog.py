"""A watchdog: kills this process when it makes no progress, after saving the stacks of its threads.

Imports the standard library alone. Ray takes a process that waits for another one for ever for a working one; it
restarts a process that has ended.
"""

import faulthandler
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

STANDARD_ERROR = 2  # the process's file descriptor, whatever `sys.stderr` is
CHECKS = 20
"""How often the watchdog checks within `timeout_s`."""
STUCK_SHARE = 0.5
"""If the watchdog's own thread cannot run, the process is ended this share of `timeout_s` later than otherwise."""


class Watchdog:
    """Context manager: kills this process when `beat` was not called for `timeout_s` seconds; with 0 it never does.

    First it calls `save_stacks(stacks)` with the stacks of all threads. If code that holds Python's global lock keeps
    the watchdog's thread from running, faulthandler writes the stacks to standard error and exits with code 1 instead.
    """

    def __init__(self, timeout_s: float, save_stacks: Callable[[str], None]) -> None:
        self._timeout_s = timeout_s
        self._save_stacks = save_stacks
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self) -> None:
        """Record that the process makes progress."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self.beat()
        if self._timeout_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._timeout_s:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._timeout_s / CHECKS):
            faulthandler.dump_traceback_later(self._timeout_s * (1 + STUCK_SHARE), exit=True, file=STANDARD_ERROR)
            if time.monotonic() - self._last > self._timeout_s:
                self._save_stacks(stacks())
                os.kill(os.getpid(), signal.SIGKILL)


def stacks() -> str:
    """Return the stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode()
