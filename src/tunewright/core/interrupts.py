"""Blocks that Ctrl-C and SIGTERM wait for, and servers that handle signals themselves."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_finishing: list[str] = []


@contextmanager
def finishing(what: str) -> Iterator[None]:
    """Make a stop wait for this block, which must end soon by itself."""
    _finishing.append(what)
    try:
        yield
    finally:
        _finishing.pop()


def pending_work() -> str | None:
    """Return the work that a stop would wait for now, or None."""
    return _finishing[-1] if _finishing else None


@contextmanager
def leave_signals_to_server() -> Iterator[None]:
    """Leave signals to a server that handles and reports them itself. Main thread only."""
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end and return its result; in a second thread if this one runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(work)
    # A notebook's cells run inside the kernel's own loop, which asyncio.run refuses.
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def awaited() -> T:
        running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await work

    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(asyncio.run, awaited()).result()
        except KeyboardInterrupt:  # only the main thread gets the signal, and the pool would wait for the other thread
            with suppress(RuntimeError, TimeoutError):  # the thread has ended meanwhile, or never begun
                loop, task = running.result(timeout=5)
                assert task is not None
                loop.call_soon_threadsafe(task.cancel)
            raise


def _run_here(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in this thread; a SIGTERM that raises KeyboardInterrupt, as in commands, cancels it first.

    asyncio.run does so for SIGINT. Raised within a task the exception would end the loop with the other tasks in
    progress, each of which prints a traceback.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.default_int_handler:
        return asyncio.run(work)
    stopped = False

    async def awaited() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def stop(_number: int, _frame: FrameType | None) -> None:
            nonlocal stopped
            if stopped or task is None:
                raise KeyboardInterrupt
            stopped = True
            task.cancel()
            loop.call_soon_threadsafe(lambda: None)  # after a signal's handler the loop waits on for its events

        signal.signal(signal.SIGTERM, stop)
        try:
            return await work
        finally:
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    try:
        return asyncio.run(awaited())
    except asyncio.CancelledError:
        if stopped:
            raise KeyboardInterrupt from None
        raise
