"""Background writes to the serving state."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import AsyncState, StateUnavailableError


def _failing(times: int, written: list[str]) -> Callable[[], None]:
    """A write that fails a number of times, as one to a database that is down."""
    left = times

    def write() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise StateUnavailableError("the database is down")
        written.append("usage")

    return write


def _run(tmp_path: Path, use: Callable[[AsyncState, list[str]], None]) -> list[str]:
    written: list[str] = []
    state = AsyncState(State(f"sqlite:///{tmp_path}/state.sqlite").database)
    use(state, written)
    state.close(lambda: written.append("last"))
    return written


def test_flush_keeps_a_write_that_fails_again(tmp_path: Path) -> None:
    async def flush(state: AsyncState, written: list[str]) -> None:
        state.write_later(_failing(2, written))
        await state.call(lambda: None)  # one thread: the first attempt has failed now
        with pytest.raises(StateUnavailableError):
            await state.flush()
        assert written == []
        await state.flush()
        assert written == ["usage"]
        await state.flush()

    assert _run(tmp_path, lambda state, written: asyncio.run(flush(state, written))) == ["usage", "last"]


def test_close_reports_records_that_are_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write_twice(state: AsyncState, written: list[str]) -> None:
        for _ in range(2):
            state.write_later(_failing(1000, written))

    assert _run(tmp_path, write_twice) == []
    assert "2 records of usage or shadow answers were lost: the state was unavailable" in caplog.messages


@pytest.mark.parametrize("state_url", ["postgresql"], indirect=True)
def test_reads_do_not_wait_for_threads_that_write(state_url: str) -> None:
    async def run(state: AsyncState) -> None:
        proceed = threading.Event()
        writes = [state.submit(proceed.wait) for _ in range(20)]
        try:
            assert await state.read(lambda: "answer") == "answer"
        finally:
            proceed.set()
        assert all(write.result() for write in writes)

    state = AsyncState(State(state_url).database)
    asyncio.run(run(state))
    state.close(lambda: None)


def test_answer_gives_up_and_drops_a_call_that_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright.serving.tenants.database.ANSWER_SECONDS", 0.05)
    proceed = threading.Event()
    called: list[str] = []

    async def run(state: AsyncState) -> None:
        state.submit(proceed.wait)  # the only thread
        waiting = state.submit(called.append, "too late")
        with pytest.raises(StateUnavailableError, match="did not answer within"):
            await state.answer(waiting)
        proceed.set()
        await state.call(lambda: None)

    state = AsyncState(State(f"sqlite:///{tmp_path}/state.sqlite").database)
    asyncio.run(run(state))
    state.close(lambda: None)
    assert called == []


def test_write_of_a_cancelled_flush_is_written_at_close(tmp_path: Path) -> None:
    proceed = threading.Event()

    async def cancel(state: AsyncState, written: list[str]) -> None:
        state.write_later(_failing(1, written))
        await state.call(lambda: None)  # one thread: the first attempt has failed now
        state.submit(proceed.wait)
        flushing = asyncio.create_task(state.flush())
        await asyncio.sleep(0.05)  # it waits for the thread
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
        proceed.set()

    assert _run(tmp_path, lambda state, written: asyncio.run(cancel(state, written))) == ["usage", "last"]
