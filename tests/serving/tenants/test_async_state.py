"""Background writes to the serving state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewright.serving.tenants import State, StateUnavailableError
from tunewright.serving.tenants.async_state import AsyncState


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
    state = AsyncState(State(f"sqlite:///{tmp_path}/state.sqlite"))
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


def test_close_writes_what_is_left_and_then_the_last(tmp_path: Path) -> None:
    assert _run(tmp_path, lambda state, written: state.write_later(_failing(1, written))) == ["usage", "last"]
