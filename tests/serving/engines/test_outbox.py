"""Outcomes from a thread to those who wait for them in event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tunewright.serving.engines.outbox import Inbox, Outbox


def test_what_is_put_comes_in_its_order_once_it_is_sent_and_wakes_the_loop_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        box, inboxes = Outbox[int](), [Inbox[int]() for _ in range(3)]
        loop, woken = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(callback: Callable[..., Any], *arguments: Any) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(callback, *arguments)

        def fill_and_send() -> None:
            for number in range(6):
                box.put(inboxes[number % 3], number)
            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            box.send()
            box.send()  # nothing is left
            monkeypatch.undo()

        await asyncio.to_thread(fill_and_send)
        async with asyncio.timeout(10):
            assert [[await inbox.come.get(), await inbox.come.get()] for inbox in inboxes] == [[0, 3], [1, 4], [2, 5]]
        assert (woken, all(inbox.come.empty() for inbox in inboxes)) == (1, True)

    asyncio.run(run())


def test_a_loop_that_has_ended_keeps_nothing_from_another_and_is_told_to_the_sender() -> None:
    async def inbox() -> Inbox[int]:
        return Inbox()

    async def run() -> None:
        box, here = Outbox[int](), await inbox()
        gone = await asyncio.to_thread(lambda: asyncio.run(inbox()))
        box.put(gone, 1)
        box.put(here, 2)
        box.send()
        async with asyncio.timeout(10):
            assert await here.come.get() == 2
        assert (gone.closed, here.closed) == (True, False)

    asyncio.run(run())
