"""The load of a server, which the number of its replicas follows."""

from __future__ import annotations

import time
from collections.abc import Collection
from math import inf

from tunewright.serving.engines.scaling import Demand
from tunewright.serving.gateway.admission import AdmissionQueue
from tunewright.serving.gateway.request_handler import RequestHandler


class LoadMeter:
    """Measures the requests of a server from look to look.

    Args:
        queue: has the requests that run and wait.
        handlers: the HTTP requests that are not answered yet; they change while the server runs.
    """

    def __init__(self, queue: AdmissionQueue, handlers: Collection[RequestHandler]) -> None:
        self._queue = queue
        self._handlers = handlers
        self._looked = inf  # nothing is kept before the first look: there may be none
        self._ended: list[float] = []

    def note_end(self, handler: RequestHandler) -> None:
        """Keep the time to first token of a request that ends between two looks."""
        first = handler.first_token_at
        if first is not None and first > self._looked:
            self._ended.append(first - handler.arrived)

    def look(self) -> Demand:
        """Return the requests now, and the first tokens since the last look."""
        now = time.monotonic()
        firsts, unanswered = self._ended, []
        for handler in self._handlers:
            if (first := handler.first_token_at) is None:
                unanswered.append(now - handler.arrived)
            elif first > self._looked:
                firsts.append(first - handler.arrived)
        self._looked, self._ended = now, []
        return Demand(self._queue.admitted, self._queue.waiting, tuple(firsts), tuple(unanswered))
