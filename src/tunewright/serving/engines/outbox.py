"""Outcomes on their way from an engine's thread to the event loops that wait for them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """What comes for one request; made in the event loop that waits for it.

    ``closed`` is set once that loop is: nobody waits any more.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.come: asyncio.Queue[T] = asyncio.Queue()
        self.closed = False


class Outbox(Generic[T]):
    """What one thread has for others' inboxes, until it is sent: a pass's outcomes wake an event loop once.

    To wake it for each row takes longer than to hand it its token, and keeps the interpreter from the next pass.
    """

    def __init__(self) -> None:
        self._outcomes: dict[asyncio.AbstractEventLoop, list[tuple[Inbox[T], T]]] = defaultdict(list)

    def put(self, inbox: Inbox[T], outcome: T) -> None:
        """Have it sent with the next ones."""
        self._outcomes[inbox.loop].append((inbox, outcome))

    def send(self) -> None:
        """Send what there is."""
        for loop, outcomes in self._outcomes.items():
            try:
                loop.call_soon_threadsafe(_hand_out, outcomes)
            except RuntimeError:  # it is closed
                for inbox, _ in outcomes:
                    inbox.closed = True
        self._outcomes.clear()


def _hand_out(outcomes: Sequence[tuple[Inbox[T], T]]) -> None:
    for inbox, outcome in outcomes:
        inbox.come.put_nowait(outcome)
