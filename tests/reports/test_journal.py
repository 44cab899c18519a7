"""The journal: events are durable in order, whatever kills it; a slow store holds its caller up, no error is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ROOT

from fashion.config import UserError
from fashion.reports import journal
from fashion.reports.journal import Event, Journal, read_journal
from fashion.storage import Storage, open_storage

FOLDER = ("searches", "s", "journal")
KILLS = int(os.environ.get("FAULT_KILLS", "3"))
SEED = int(os.environ.get("FAULT_SEED", "0"))


@dataclass(frozen=True)
class SlowStorage(Storage):
    """A storage that writes only while `is_open` is set."""

    is_open: threading.Event = field(default_factory=threading.Event)

    def write_bytes(self, data: bytes | pa.Buffer, *parts: str) -> None:
        """Write as `Storage` does, later."""
        self.is_open.wait(60)
        super().write_bytes(data, *parts)


@dataclass(frozen=True)
class FullStorage(Storage):
    """A storage that takes nothing any more."""

    def write_bytes(self, data: bytes | pa.Buffer, *parts: str) -> None:
        """Fail as a full disk does."""
        raise OSError(28, "No space left on device")


def number(value: int) -> Event:
    return {"number": value}


def numbers(events: list[Event]) -> list[int]:
    return [event["number"] for event in events]


def keep(_: Any) -> None:
    """Take no notice."""


class Tables:
    """What a journal's owner keeps: the events in a file that is replaced at each compaction."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        kept = json.loads(storage.read_bytes("table")) if storage.exists("table") else {"last": 0, "numbers": []}
        events, self.last = read_journal(storage, FOLDER, kept["last"])
        self.numbers: list[int] = kept["numbers"] + numbers(events)

    def apply(self, event: Event) -> None:
        self.numbers.append(event["number"])

    def compact(self, last: int) -> None:
        self.storage.write_bytes(json.dumps({"last": last, "numbers": self.numbers}).encode(), "table")

    def start(self) -> Journal:
        return Journal(self.storage, FOLDER, self.last, self.apply, self.compact)


def test_events_are_compacted_and_segments_removed_at_the_end(storage: Storage) -> None:
    for start in (0, 500):
        tables = Tables(storage)
        assert tables.numbers == list(range(start))
        writer = tables.start()
        for value in range(start, start + 500):
            writer.put(number(value))
        writer.close()
    assert Tables(storage).numbers == list(range(1000))
    assert not storage.list(*FOLDER)


def test_many_events_make_few_segments(storage: Storage) -> None:
    seen: list[int] = []
    started = time.monotonic()
    writer = Journal(storage, FOLDER, 0, keep, seen.append)
    for value in range(5000):
        writer.put(number(value))
    writer.close()
    assert seen[-1] <= 2 + (time.monotonic() - started) / journal.LINGER_S


def test_tables_follow_while_nothing_more_comes(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "COMPACT_EVERY_S", 0.2)
    tables = Tables(storage)
    writer = tables.start()
    writer.put(number(0))
    deadline = time.monotonic() + 60
    while not storage.exists("table") or storage.list(*FOLDER):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert Tables(storage).numbers == [0]
    writer.close()


def test_who_waits_for_an_event_is_called_once_it_is_durable(storage: Storage) -> None:
    found: dict[int, list[int]] = {}

    def look(value: int) -> None:
        found[value] = numbers(read_journal(storage, FOLDER, 0)[0])

    def compact(_: int) -> None:
        deadline = time.monotonic() + 60
        while len(found) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)  # segments stay until all have looked

    writer = Journal(storage, FOLDER, 0, keep, compact)
    for value in range(20):
        writer.put(number(value), lambda value=value: look(value))  # type: ignore[misc]
        time.sleep(0.01)
    writer.close()
    assert sorted(found) == list(range(20))
    assert all(value in seen for value, seen in found.items())


def test_a_store_that_is_slower_than_the_events_holds_the_caller_up(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "CAPACITY", 10)
    slow = SlowStorage(storage.uri, storage.fs, storage.root)
    tables = Tables(slow)
    writer = tables.start()
    put: list[int] = []

    def put_all() -> None:
        for value in range(100):
            writer.put(number(value))
            put.append(value)

    caller = threading.Thread(target=put_all)
    caller.start()
    time.sleep(1.0)
    assert 10 <= len(put) <= 20, "ten wait in the queue, and at most ten are being written"
    slow.is_open.set()
    caller.join(60)
    writer.close()
    assert len(put) == 100
    assert Tables(storage).numbers == list(range(100))


def test_an_error_of_the_thread_reaches_the_caller(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CAPACITY", 10)
    writer = Journal(FullStorage(storage.uri, storage.fs, storage.root), FOLDER, 0, keep, keep)

    def put_all() -> None:
        for value in range(1000):  # more than the queue holds: a caller that waits is told as well
            writer.put(number(value))

    with pytest.raises(OSError, match="No space left on device"):
        put_all()
    with pytest.raises(OSError, match="No space left on device"):
        writer.close()


def test_an_error_of_what_is_called_reaches_the_caller_and_events_are_kept(storage: Storage) -> None:
    def fail() -> None:
        raise PermissionError("not allowed")

    tables = Tables(storage)
    writer = tables.start()
    writer.put(number(0), fail)
    with pytest.raises(PermissionError, match="not allowed"):
        writer.close()
    assert Tables(storage).numbers == [0]


def test_what_comes_while_the_thread_looks_at_the_end_is_written(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event that is put, and the close after it, between a look into an empty queue and the decision to end."""
    tables, take = Tables(storage), Journal._take

    def take_late(self: Journal) -> list[Any]:
        batch = take(self)
        if not batch and not tables.numbers:
            with self._changed:
                self._queue.append((json.dumps(number(0)), number(0), None))
        return batch

    monkeypatch.setattr(Journal, "_take", take_late)
    tables.start().close()
    assert Tables(storage).numbers == [0]


def test_what_is_put_after_the_end_is_no_error(storage: Storage) -> None:
    """Tune's loop may go on for a moment after Ctrl-C."""
    writer = Tables(storage).start()
    writer.close()
    writer.put(number(0))
    assert Tables(storage).numbers == []


def write_segments(storage: Storage, count: int) -> None:
    for value in range(count):
        content = journal.encode_segment([json.dumps(number(2 * value)), json.dumps(number(2 * value + 1))])
        storage.write_bytes(content, *FOLDER, journal.segment_name(value + 1))


def test_a_damaged_or_half_segment_is_told_with_its_name(storage: Storage) -> None:
    write_segments(storage, 3)
    path = Path(storage.path(*FOLDER, "00000002"))
    whole = path.read_bytes()
    told = r"journal/00000002 is damaged \(.*\); remove it and those with higher numbers, and resume again"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=told):
            read_journal(storage, FOLDER, 0)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="00000002 is damaged"):
            read_journal(storage, FOLDER, 0)
    path.unlink()
    with pytest.raises(UserError, match="00000002 is missing; remove those with higher numbers"):
        read_journal(storage, FOLDER, 0)
    Path(storage.path(*FOLDER, "00000003")).unlink()
    assert read_journal(storage, FOLDER, 0) == ([number(0), number(1)], 1)


def test_segments_that_the_tables_hold_are_not_read_again(storage: Storage) -> None:
    """A crash between a compaction and the removal of its segments, or in the middle of that."""
    write_segments(storage, 4)
    Path(storage.path(*FOLDER, "00000002")).unlink()
    Path(storage.path(*FOLDER, ".00000005.0123.tmp")).touch()
    assert read_journal(storage, FOLDER, 3) == ([number(6), number(7)], 4)
    assert read_journal(storage, FOLDER, 4) == ([], 4)
    assert read_journal(storage, FOLDER, 9) == ([], 9)


# What is killed: it puts numbers, prints those that are durable, and compacts often.
WRITE = """
import random, sys, time
sys.path.insert(0, "tests/reports")
from test_journal import Tables, number
from fashion.reports import journal
from fashion.storage import open_storage

journal.LINGER_S, journal.COMPACT_EVERY_S, journal.COMPACT_SHARE = 0.002, 0.03, 0.5
tables = Tables(open_storage(sys.argv[1]))
writer = tables.start()
first = len(tables.numbers)
print("start", flush=True)
for value in range(first, first + 100_000):
    writer.put(number(value), lambda value=value: print(f"durable {value}\\n", end="", flush=True))
    time.sleep(random.expovariate(1000))
"""


def test_killed_at_any_moment_it_has_every_event_up_to_one(tmp_path: Path) -> None:
    """SIGKILL again and again: what was durable is there, in order, and nothing after a gap."""
    chance = random.Random(SEED)
    storage = open_storage(str(tmp_path / "results"))
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITE, storage.uri],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "start\n"
            time.sleep(chance.uniform(0.05, 1.0))
            process.send_signal(signal.SIGKILL)
            durable = [int(value) for value in re.findall(r"durable (\d+)\n", process.stdout.read())]
        found = Tables(storage).numbers
        assert found == list(range(len(found)))
        assert max(durable, default=-1) < len(found)
    assert len(found) > 0
