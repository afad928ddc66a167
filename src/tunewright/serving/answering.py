"""Lifecycle of one prompt: its turn in the queue, its answer in pieces, and what it used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from tunewright.config import GatewayConfig
from tunewright.engines.protocol import Delta, Engine, EngineStoppedError, RequestFailedError
from tunewright.generation.requests import Finish
from tunewright.generation.text_stream import Decode, TextStream
from tunewright.serving.fairness import FairQueue
from tunewright.serving.orders import Order
from tunewright.serving.protocol import ApiError
from tunewright.serving.state.meter import Outcome, Used


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; the last piece (``finish`` set) may be empty."""

    text: str
    finish: Finish | None
    tokens: int  # generated so far


@dataclass(frozen=True)
class _Late:
    """A moment at which a request will have taken too long; by the monotonic clock."""

    at: float
    code: str
    message: str

    @property
    def error(self) -> ApiError:
        """What its client is told: 503 where nothing has been done for it yet, so that it may as well ask again."""
        if self.code == "queue_timeout":
            return ApiError(self.message, status=503, code=self.code, headers={"Retry-After": "1"})
        return ApiError(self.message, status=504, code=self.code)


_Event = Delta | RequestFailedError | EngineStoppedError | ApiError | _Late
"""What happens to a request."""


class Answering:
    """An admitted prompt.

    Args:
        limits: how long it waits for what.
        tenant: whose turn it waits for.
        arrived: by the monotonic clock, which event loops have, too.
    """

    def __init__(
        self,
        engine: Engine,
        queue: FairQueue,
        decode: Decode,
        order: Order,
        limits: GatewayConfig,
        tenant: str,
        arrived: float,
    ) -> None:
        self.order = order
        self._engine = engine
        self._queue = queue
        self._decode = decode
        self._limits = limits
        self.tenant = tenant
        self._arrived = arrived
        self._waits_from = arrived
        self._turn: float | None = None
        self._first: float | None = None
        self._last: float | None = None
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._tokens = 0
        self._outcome: Outcome = "hung up"
        self.text = ""

    @property
    def finished(self) -> bool:
        """True if there is a whole answer, in ``text``."""
        return self._outcome in ("stop", "length")

    @property
    def waits(self) -> bool:
        """True if its turn has not come yet."""
        return self._turn is None

    def wait_from_now(self) -> None:
        """Count the wait for a turn from now on: until now it was behind other prompts of its own request."""
        self._waits_from = time.monotonic()

    def abandon(self, error: ApiError) -> None:
        """End it, once what has been computed has been given out; who waits for it is told why."""
        self._events.put_nowait(error)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer's text as it comes; leaving early takes the row out of the batch.

        Raises:
            RequestFailedError: this request could not be computed.
            EngineStoppedError: the engine has stopped, before or meanwhile.
            ApiError: 503 or 504, it has taken too long or was abandoned.
        """
        # A task of its own, so that a client that reads slowly does not keep its place at the engine.
        asking = asyncio.create_task(self._ask())
        self._watch()
        text, tokens = TextStream(self._decode, self.order.stops), 0
        try:
            while True:
                delta = await self._next_delta()
                new = ""
                for token in delta.ids:
                    tokens += 1
                    new += text.push(token)
                    if text.stopped:
                        break
                if delta.finish and not text.stopped:
                    new += text.flush()
                finish: Finish | None = "stop" if text.stopped else delta.finish
                self.text += new
                if finish:
                    self._outcome, self._tokens = finish, tokens
                    yield Piece(new, finish, tokens)
                    return
                if new:
                    yield Piece(new, None, tokens)
        finally:
            asking.cancel()
            self._unwatch()

    async def _next_delta(self) -> Delta:
        event = await self._events.get()
        if isinstance(event, Delta):
            return event
        if isinstance(event, _Late):
            self._outcome = "timed out"
            raise event.error
        self._outcome = "failed"
        raise event

    def _watch(self) -> None:
        """See to it that it ends once it has taken too long for what it waits for now.

        One more token only moves that on, which the timer finds when it rings: none is set for each of them.
        """
        self._unwatch()
        loop, late = asyncio.get_running_loop(), self._lateness()
        if loop.time() >= late.at:
            self._events.put_nowait(late)
        else:
            self._timer = loop.call_at(late.at, self._watch)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _lateness(self) -> _Late:
        """When it will have taken too long for what it waits for now."""
        limits = self._limits
        total = _Late(
            self._arrived + limits.total_timeout_s,
            "total_timeout",
            f"The answer took over {limits.total_timeout_s:g} s.",
        )
        if self._turn is None:
            next_one = _Late(
                self._waits_from + limits.queue_timeout_s,
                "queue_timeout",
                f"Its turn did not come within {limits.queue_timeout_s:g} s.",
            )
        elif self._last is None:
            next_one = _Late(
                self._turn + limits.first_token_timeout_s,
                "first_token_timeout",
                f"The first token did not come within {limits.first_token_timeout_s:g} s.",
            )
        else:
            next_one = _Late(
                self._last + limits.inter_token_timeout_s,
                "idle_timeout",
                f"The next token did not come within {limits.inter_token_timeout_s:g} s.",
            )
        return min(next_one, total, key=lambda late: late.at)

    async def _ask(self) -> None:
        try:
            async with self._queue.place(self.tenant, len(self.order.request.prompt_ids)) as place:
                self._turn = time.monotonic()
                self._watch()
                async with aclosing(self._engine.stream(self.order.request, whose=self.tenant)) as stream:
                    async for delta in stream:
                        self._count(delta)
                        place.came(len(delta.ids))
                        self._events.put_nowait(delta)
        except (RequestFailedError, EngineStoppedError) as error:
            self._events.put_nowait(error)

    def _count(self, delta: Delta) -> None:
        if delta.ids:
            self._last = time.monotonic()
            if self._first is None:
                self._first = self._last
                self._watch()
        self._tokens += len(delta.ids)

    def used(self) -> Used:
        """Return what it has used until now."""
        now = time.monotonic()
        return Used(
            prompt_tokens=0 if self._turn is None else len(self.order.request.prompt_ids),
            completion_tokens=self._tokens,
            queued_s=(self._turn or now) - self._arrived,
            first_token_s=None if self._first is None else self._first - self._arrived,
            total_s=now - self._arrived,
            outcome=self._outcome,
        )
