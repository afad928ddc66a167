"""The way of events from an engine's thread to the event loops of their requests."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from tunewright.engines.protocol import Event, TokenSink


class Subscription:
    """A request's sink with its event loop; create it in that loop.

    ``cancelled`` is set by :meth:`cancel`, or by the dispatch once the loop is closed. The engine then drops the
    request, and no event reaches the sink any more.
    """

    def __init__(self, sink: TokenSink) -> None:
        self.loop = asyncio.get_running_loop()
        self.cancelled = False
        self._sink = sink

    def deliver(self, event: Event) -> None:
        """Hand an event to the sink; call it in the subscription's loop."""
        if not self.cancelled:
            self._sink.deliver(event)


class TokenDispatch:
    """Events of one engine step, collected in the engine's thread and sent together.

    Waking a loop from another thread costs more than delivering a token, and takes the interpreter away from the
    engine's next step. So each loop is woken once a step, however many rows it has (docs/decisions/0023).
    """

    def __init__(self) -> None:
        self._events: dict[asyncio.AbstractEventLoop, list[tuple[Subscription, Event]]] = defaultdict(list)

    def put(self, subscription: Subscription, event: Event) -> None:
        """Add an event to the next :meth:`send`."""
        self._events[subscription.loop].append((subscription, event))

    def send(self) -> None:
        """Send the collected events."""
        for loop, events in self._events.items():
            try:
                loop.call_soon_threadsafe(_deliver, loop, events)
            except RuntimeError:  # the loop is closed
                for subscription, _ in events:
                    subscription.cancelled = True
        self._events.clear()


def _deliver(loop: asyncio.AbstractEventLoop, events: Sequence[tuple[Subscription, Event]]) -> None:
    for subscription, event in events:
        # One callback each: an exception in one sink must not cost the other requests their tokens.
        loop.call_soon(subscription.deliver, event)
