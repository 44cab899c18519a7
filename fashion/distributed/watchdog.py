"""A watch over a process that ought to make progress: if it does not, its stacks are told and it is ended.

Standard library alone. A process that waits for another one for ever looks as if it worked; ended, it is one that Ray
starts anew.
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

STANDARD_ERROR = 2  # of the process, whatever Python's own has become
LOOKS = 20
"""SyncPoints within the time that a process may be silent for."""
STUCK_SHARE = 0.5
"""Of that time, how much longer Python itself may stand still before the process is ended from outside of it."""


class Watchdog:
    """Within its `with` block, ends this process when `beat` was not called for `timeout_s` seconds; 0 never does.

    `tell(stacks)` is given the stacks of all threads before. Code that holds Python's lock keeps this thread from
    looking: then the stacks go to standard error and the process exits with code 1.
    """

    def __init__(self, timeout_s: float, tell: Callable[[str], None]) -> None:
        self._timeout_s = timeout_s
        self._tell = tell
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self) -> None:
        """Say that there is progress."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self.beat()
        if self._timeout_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._timeout_s:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(self._timeout_s / LOOKS):
            faulthandler.dump_traceback_later(self._timeout_s * (1 + STUCK_SHARE), exit=True, file=STANDARD_ERROR)
            if time.monotonic() - self._last > self._timeout_s:
                self._tell(stacks())
                os.kill(os.getpid(), signal.SIGKILL)


def stacks() -> str:
    """Return the stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode()
