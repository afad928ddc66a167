"""The serving state for coroutines: reads and writes that do not block the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from tunewright.serving.tenants import State, StateUnavailableError
from tunewright.serving.tenants.database import ANSWER_SECONDS

log = logging.getLogger("tunewright")

CLOSE_SECONDS = 10.0
"""The time for the last writes of a server that ends."""

P = ParamSpec("P")
T = TypeVar("T")


class AsyncState:
    """Threads in which the state is read and written."""

    def __init__(self, state: State) -> None:
        self._state = state
        # SQLite has one writer at a time: more threads would only wait for each other.
        self._threads = ThreadPoolExecutor(1 if state.is_sqlite else 8, thread_name_prefix="tunewright-state")
        # PostgreSQL's reads wait for no lock, and so must not wait for threads that do.
        self._readers = (
            self._threads if state.is_sqlite else ThreadPoolExecutor(4, thread_name_prefix="tunewright-read")
        )
        self._unwritten: deque[Callable[[], None]] = deque()

    async def read(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that only reads.

        An SQLite read waits for no writer and takes less time than a change of threads, so it runs in the event loop.
        """
        if self._state.is_sqlite:
            return function(*arguments)
        return await self.answer(self._readers.submit(function, *arguments))

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        """Start a call in a thread; it runs even if the coroutine that waits for it is cancelled."""
        return self._threads.submit(function, *arguments, **named)

    async def answer(self, call: Future[T]) -> T:
        """Wait for a call; if its time is over, it is cancelled unless it has begun."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.wrap_future(call)
        except TimeoutError:
            raise StateUnavailableError(
                f"The serving state did not answer within {ANSWER_SECONDS:g} s", where=self._state.name
            ) from None

    def write_later(self, write: Callable[[], None]) -> None:
        """Write in the background; if the database does not answer, :meth:`flush` tries again."""

        def attempt() -> None:
            try:
                write()
            except StateUnavailableError as error:
                log.warning("usage cannot be written now and will be retried: %s", error)
                self._unwritten.append(write)

        def keep(attempted: Future[None]) -> None:
            if attempted.cancelled():
                self._unwritten.append(write)
            elif (error := attempted.exception()) is not None:
                log.error("a record of usage or of a shadow answer was refused and is lost", exc_info=error)

        self._threads.submit(attempt).add_done_callback(keep)

    async def flush(self) -> None:
        """Repeat the writes that failed."""
        while self._unwritten:
            # Removed only once it is written: a server that ends cancels this, and writes the rest in `close`. Each of
            # these writes may be repeated.
            await self.call(self._unwritten[0])
            self._unwritten.popleft()

    def close(self, last: Callable[[], None]) -> None:
        """Finish all writes, then the last one, and close the state; what takes longer than `CLOSE_SECONDS` is lost."""

        def finish() -> None:
            with suppress(StateUnavailableError):
                while self._unwritten:
                    self._unwritten[0]()
                    self._unwritten.popleft()
                last()

        with suppress(TimeoutError):
            self._threads.submit(finish).result(CLOSE_SECONDS)
        for threads in (self._readers, self._threads):
            threads.shutdown(cancel_futures=True)
        if self._unwritten:
            lost = len(self._unwritten)
            log.warning("%d records of usage or shadow answers were lost: the state was unavailable", lost)
        self._state.close()
