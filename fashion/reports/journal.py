"""A journal: events that one thread makes durable, beside a loop that may not wait for the storage.

The loop puts events into a queue in memory. The thread takes all that has come, writes it as the next numbered segment,
`<folder>/<number>`, and only then calls back those that wait for an event to be durable. Now and then it compacts: its
owner writes tables that hold all events so far, and the segments are removed. Who reads the tables and then the
segments that they do not hold yet has every durable event, in order. A crash loses the newest events alone: those in
the queue, and those in a segment that is not complete, which no reader sees. Imports neither Ray nor torch.
"""

import hashlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fashion.config import UserError, parse_object, require
from fashion.storage import Storage

Event = dict[str, Any]
"""What happened, as JSON can hold it."""

CAPACITY = 10_000
"""Most events that wait in memory, about 10 MB; with so many, `Journal.put` waits for the thread."""
LINGER_S = 0.1
"""Time that the thread lets events gather before it writes them: it bounds the number of segments."""
COMPACT_EVERY_S = 10.0
"""Time between two compactions, at least: readers of the tables see events about so much later."""
COMPACT_SHARE = 0.05
"""Most of the thread's time that goes into compactions, whose cost grows with the number of events so far."""
MAX_SEGMENTS = 256
"""Segments after which the journal is compacted whatever the time, so that it is read back quickly."""
THREADS = 16
"""Threads that call back, and that read segments: in an object store, each of these waits for the network."""

AGAIN = "what they say happens again"


class Journal:
    """Makes events durable in the order in which they are put. One thread puts; `close` ends the journal.

    A write has the patience of `Storage.write_bytes`. If it fails all the same, or if anything else in the thread does,
    the next `put`, or `close`, raises that error.
    """

    def __init__(
        self,
        storage: Storage,
        folder: tuple[str, ...],
        number: int,
        apply: Callable[[Event], None],
        compact: Callable[[int], None],
    ) -> None:
        """Start the thread. The first segment has a number above `number`, that of the last one that was read.

        In the thread, `apply(event)` is called for each durable event, and `compact(number)` when all events up to
        segment `number` shall be written elsewhere: once the call has returned, the segments are removed.
        """
        self._storage, self._folder, self._number = storage, folder, number
        self._apply, self._compact = apply, compact
        self._queue: deque[tuple[str, Event, Callable[[], None] | None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._segments = 0
        self._compacted_at, self._compaction_s = time.monotonic(), 0.0
        self._callers = ThreadPoolExecutor(THREADS, "journal")
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, event: Event, then: Callable[[], None] | None = None) -> None:
        """Put an event, which nobody changes afterwards; `then()` is called in another thread once it is durable.

        Waits while `CAPACITY` events wait. Raises the error of the journal's thread, or that of an earlier `then`. What
        is put after `close`, as by Tune's loop after Ctrl-C, is lost like all that happens after a crash.
        """
        line = json.dumps(event)
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) < CAPACITY or self._error is not None)
            if self._error is not None:
                raise self._error
            if self._closing:
                return
            self._queue.append((line, event, then))
            if len(self._queue) in (1, CAPACITY // 2):
                self._changed.notify_all()

    def close(self) -> None:
        """Make durable what was put, wait for all that is called back, compact; raises as `put` does."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._callers.shutdown()
        if self._error is not None:
            raise self._error

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                batch = self._take()
                if batch:
                    self._write(batch)
                elif self._closing and not self._queue:  # nothing is put any more
                    break
                if self._segments and self._is_due():
                    self._write_tables()
            self._write_tables()
        except BaseException as error:  # raised where the caller will see it
            self._fail(error)

    def _take(self) -> list[tuple[str, Event, Callable[[], None] | None]]:
        """Return all events that wait; none at the end, or if none comes until a compaction is due."""
        with self._changed:
            due_s = max(0.0, self._due_at() - time.monotonic()) if self._segments else None
            self._changed.wait_for(lambda: self._queue or self._closing, due_s)
            if self._queue:
                self._changed.wait_for(lambda: self._closing or len(self._queue) >= CAPACITY // 2, LINGER_S)
            batch = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        return batch

    def _write(self, batch: list[tuple[str, Event, Callable[[], None] | None]]) -> None:
        self._storage.write_bytes(
            encode_segment([line for line, _, _ in batch]), *self._folder, segment_name(self._number + 1)
        )
        self._number += 1
        self._segments += 1
        for _, event, then in batch:
            self._apply(event)
            if then is not None:
                self._callers.submit(then).add_done_callback(self._called)

    def _called(self, call: Future[None]) -> None:
        error = call.exception()
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _due_at(self) -> float:
        return self._compacted_at + max(COMPACT_EVERY_S, self._compaction_s / COMPACT_SHARE)

    def _is_due(self) -> bool:
        return self._segments >= MAX_SEGMENTS or time.monotonic() >= self._due_at()

    def _write_tables(self) -> None:
        started = time.monotonic()
        self._compact(self._number)
        self._storage.empty_folder(*self._folder)
        self._segments = 0
        self._compacted_at = time.monotonic()
        self._compaction_s = self._compacted_at - started


# --- segments ---------------------------------------------------------------------------------------------------------


def segment_name(number: int) -> str:
    """Return the name of a segment's file, such as `00000012`."""
    return f"{number:08d}"


def encode_segment(lines: list[str]) -> bytes:
    """Return a segment: a line of JSON per event, and before them one with the SHA-256 of the others."""
    body = "".join(f"{line}\n" for line in lines).encode()
    return json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body


def decode_segment(content: bytes) -> list[Event]:
    """Return the events of a segment; raises `ValueError` if a byte of it is not as it was written."""
    head, _, body = content.partition(b"\n")
    if parse_object(head).get("sha256") != hashlib.sha256(body).hexdigest():
        raise ValueError("its SHA-256 is another")
    return [parse_object(line) for line in body.splitlines()]


def read_journal(storage: Storage, folder: tuple[str, ...], after: int) -> tuple[list[Event], int]:
    """Return the events of all segments with numbers above `after`, in order, and the last number, or `after`.

    Raises `UserError` if a segment is damaged, missing or cannot be read.
    """
    named = [int(name) for name in storage.list(*folder) if re.fullmatch("[0-9]{8,}", name)]
    numbers = sorted(number for number in named if number > after)
    for number, found in enumerate(numbers, after + 1):
        missing = storage.show(*folder, segment_name(number))
        require(number == found, f"{missing} is missing; remove those with higher numbers, and resume again: {AGAIN}")

    def read(number: int) -> list[Event]:
        place = (*folder, segment_name(number))
        try:
            return decode_segment(storage.read_bytes(*place))
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{storage.show(*place)} cannot be read ({reason}); see to the storage") from error
        except ValueError as error:
            told = f"{storage.show(*place)} is damaged ({error}); remove it and those with higher numbers"
            raise UserError(f"{told}, and resume again: {AGAIN}") from error

    with ThreadPoolExecutor(THREADS) as pool:
        segments = list(pool.map(read, numbers))
    return [event for events in segments for event in events], after + len(numbers)
