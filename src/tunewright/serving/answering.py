"""One request's way: its turn, its answer in pieces, and what it came to, told exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from tunewright.models.decoding import Finish, Request
from tunewright.models.text_stream import Decode, TextStream
from tunewright.serving.access import Admission, Target
from tunewright.serving.engines.protocol import Delta, Engine, EngineStoppedError, RequestFailedError
from tunewright.serving.fairness import FairQueue
from tunewright.serving.protocol import Usage
from tunewright.serving.state.meter import Outcome, Used

_Outcome = Delta | RequestFailedError | EngineStoppedError


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; the last piece (``finish`` set) may be empty."""

    text: str
    finish: Finish | None
    tokens: int  # generated so far


@dataclass(frozen=True)
class Order:
    """A request that has passed all checks."""

    target: Target
    request: Request
    stops: tuple[str, ...]
    include_usage: bool

    def usage(self, last: Piece) -> Usage:
        """OpenAI's ``usage`` of the whole answer."""
        return Usage(len(self.request.prompt_ids), last.tokens)


class Answering:
    """An admitted request.

    Args:
        tenant: whose turn it waits for.
        arrived: by the monotonic clock.
    """

    def __init__(
        self,
        engine: Engine,
        queue: FairQueue,
        decode: Decode,
        order: Order,
        admission: Admission,
        tenant: str,
        arrived: float,
    ) -> None:
        self.order = order
        self._engine = engine
        self._queue = queue
        self._decode = decode
        self.admission = admission
        self._tenant = tenant
        self._arrived = arrived
        self._turn: float | None = None
        self._first: float | None = None
        self._tokens = 0
        self._outcome: Outcome = "hung up"
        self._settled = False
        self.text = ""

    @property
    def finished(self) -> bool:
        """Whether there is a whole answer, in ``text``."""
        return self._outcome in ("stop", "length")

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer's text as it comes; leaving early takes the row out of the batch.

        Raises:
            RequestFailedError: this request could not be computed.
            EngineStoppedError: the engine has stopped, before or meanwhile.
        """
        deltas: asyncio.Queue[_Outcome] = asyncio.Queue()
        # A task of its own, so that a client that reads slowly does not keep its place at the engine.
        asking = asyncio.create_task(self._ask(deltas))
        text, tokens = TextStream(self._decode, self.order.stops), 0
        try:
            while True:
                delta = await deltas.get()
                if not isinstance(delta, Delta):
                    self._outcome = "failed"
                    raise delta
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

    async def answer(self) -> tuple[str, Piece]:
        """The whole text, and its last piece."""
        pieces = [piece async for piece in self.pieces()]
        return "".join(piece.text for piece in pieces), pieces[-1]

    async def _ask(self, deltas: asyncio.Queue[_Outcome]) -> None:
        try:
            async with self._queue.place(self._tenant):
                self._turn = time.monotonic()
                self._queue.charge(self._tenant, prompt=len(self.order.request.prompt_ids))
                async with aclosing(self._engine.stream(self.order.request, whose=self._tenant)) as stream:
                    async for delta in stream:
                        self._count(delta)
                        deltas.put_nowait(delta)
        except (RequestFailedError, EngineStoppedError) as error:
            deltas.put_nowait(error)

    def _count(self, delta: Delta) -> None:
        if delta.ids and self._first is None:
            self._first = time.monotonic()
        self._tokens += len(delta.ids)
        self._queue.charge(self._tenant, answer=len(delta.ids))

    def settle(self) -> None:
        """Tell what the request came to; more calls than one tell nothing new."""
        if self._settled:
            return
        self._settled = True
        now = time.monotonic()
        self.admission.settle(
            Used(
                prompt_tokens=0 if self._turn is None else len(self.order.request.prompt_ids),
                completion_tokens=self._tokens,
                queued_s=(self._turn or now) - self._arrived,
                first_token_s=None if self._first is None else self._first - self._arrived,
                total_s=now - self._arrived,
                outcome=self._outcome,
            )
        )
