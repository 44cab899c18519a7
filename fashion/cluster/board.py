"""An actor beside the driver of a run, for what its workers and their controller have to tell it.

Imports the standard library alone: its process starts quickly and stays small.
"""

import asyncio
import secrets
from typing import Any


class Board:
    """An actor beside the driver: keeps values by key, and hands a controller's events to the driver one by one."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._events: dict[str, asyncio.Queue[tuple[int, Any] | None]] = {}
        self._answers: dict[tuple[str, int], asyncio.Future[None]] = {}

    async def put(self, key: str, value: bytes) -> None:
        self._values[key] = value

    async def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    async def delete(self, key: str) -> None:
        self._values.pop(key, None)

    def _queue(self, run: str) -> "asyncio.Queue[tuple[int, Any] | None]":
        return self._events.setdefault(run, asyncio.Queue())

    async def tell(self, run: str, event: Any) -> None:
        """Hand an event of `run` to its driver and wait until that has dealt with it; raises what that raises."""
        number = secrets.randbits(62)
        answer = self._answers[run, number] = asyncio.get_running_loop().create_future()
        self._queue(run).put_nowait((number, event))
        try:
            await answer
        finally:
            del self._answers[run, number]

    async def next(self, run: str) -> tuple[int, Any] | None:
        """Return the number of the next event of `run`, and the event; None after the last one."""
        return await self._queue(run).get()

    async def answer(self, run: str, number: int, error: str) -> None:
        """Let `tell` return, or raise `error` unless that is empty."""
        answer = self._answers.get((run, number))
        if answer is None or answer.done():
            return  # whoever asked is gone
        if error:
            answer.set_exception(RuntimeError(error))
        else:
            answer.set_result(None)

    async def end(self, run: str) -> None:
        """Say that `run` has no more events."""
        self._queue(run).put_nowait(None)
