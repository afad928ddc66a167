"""Coroutines that a signal stops: all of them end, and nothing is printed."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator

import pytest

from tunewright.core.interrupts import run_async


@pytest.fixture
def as_in_commands() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_async_ends_all_tasks_when_it_is_stopped(
    number: signal.Signals, as_in_commands: None, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[int] = []

    async def wait(place: int) -> None:
        try:
            if place == 3:
                os.kill(os.getpid(), number)
            await asyncio.sleep(600)
        finally:
            ended.append(place)
            await asyncio.shield(asyncio.ensure_future(asyncio.sleep(0)))

    async def work() -> None:
        await asyncio.gather(*map(wait, range(4)))

    with pytest.raises(KeyboardInterrupt):
        run_async(work())
    gc.collect()
    assert sorted(ended) == [0, 1, 2, 3]
    assert not caplog.records
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
