"""Events from an engine's thread to sinks in event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tunewright.engines.peft import Subscription, TokenDispatch
from tunewright.engines.protocol import Delta, Event


class Sink:
    """Keeps what is delivered."""

    def __init__(self) -> None:
        self.tokens: asyncio.Queue[int] = asyncio.Queue()

    def deliver(self, event: Event) -> None:
        assert isinstance(event, Delta)
        self.tokens.put_nowait(event.ids[0])


def test_dispatch_delivers_in_order_and_wakes_the_loop_once_per_send(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        dispatch, sinks = TokenDispatch(), [Sink() for _ in range(3)]
        subscriptions = [Subscription(sink) for sink in sinks]
        loop, woken = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(callback: Callable[..., Any], *arguments: Any) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(callback, *arguments)

        def fill_and_send() -> None:
            for number in range(6):
                dispatch.put(subscriptions[number % 3], Delta((number,), None))
            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            dispatch.send()
            dispatch.send()  # nothing is left
            monkeypatch.undo()

        await asyncio.to_thread(fill_and_send)
        async with asyncio.timeout(10):
            assert [[await sink.tokens.get() for _ in range(2)] for sink in sinks] == [[0, 3], [1, 4], [2, 5]]
        assert (woken, all(sink.tokens.empty() for sink in sinks)) == (1, True)

    asyncio.run(run())


def test_dispatch_cancels_subscriptions_of_a_closed_loop_and_serves_the_others() -> None:
    async def subscribe(sink: Sink) -> Subscription:
        return Subscription(sink)

    async def run() -> None:
        dispatch, sink = TokenDispatch(), Sink()
        here = await subscribe(sink)
        gone = await asyncio.to_thread(lambda: asyncio.run(subscribe(Sink())))
        dispatch.put(gone, Delta((1,), None))
        dispatch.put(here, Delta((2,), None))
        dispatch.send()
        async with asyncio.timeout(10):
            assert await sink.tokens.get() == 2
        assert (gone.cancelled, here.cancelled) == (True, False)

    asyncio.run(run())


def test_an_exception_in_one_sink_costs_the_others_no_token() -> None:
    class Broken:
        def deliver(self, event: Event) -> None:
            raise RuntimeError("broken")

    async def run() -> None:
        dispatch, sink, crashes = TokenDispatch(), Sink(), []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: crashes.append(context["exception"]))
        dispatch.put(Subscription(Broken()), Delta((1,), None))
        dispatch.put(Subscription(sink), Delta((2,), None))
        dispatch.send()
        async with asyncio.timeout(10):
            assert await sink.tokens.get() == 2
        assert [type(crash) for crash in crashes] == [RuntimeError]

    asyncio.run(run())


def test_no_event_reaches_a_cancelled_subscription() -> None:
    async def run() -> None:
        dispatch, sink, other = TokenDispatch(), Sink(), Sink()
        cancelled = Subscription(sink)
        dispatch.put(cancelled, Delta((1,), None))
        dispatch.put(Subscription(other), Delta((2,), None))
        dispatch.send()
        cancelled.cancelled = True
        async with asyncio.timeout(10):
            await other.tokens.get()
        assert sink.tokens.empty()

    asyncio.run(run())
