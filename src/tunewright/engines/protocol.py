"""The interface between the gateway and an engine.

An engine knows no tenants, aliases or templates. It receives token ids, which the gateway renders with the function
that training uses, and the digest of the adapter to apply; it returns token ids. So every engine sees the same prompt,
and an alias that moves to another adapter cannot confuse an engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tunewright.core.errors import UserError
from tunewright.generation.requests import Finish, Request, TokenLogprob


@dataclass(frozen=True)
class Delta:
    """New tokens of one answer; ``finish`` is set on the last delta, which may have no tokens."""

    ids: tuple[int, ...]
    finish: Finish | None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, if the request asks for them."""


class RequestFailedError(Exception):
    """The model could not compute this request; the engine keeps running."""


class ConstraintFailedError(RequestFailedError):
    """The request's constraint is too complex for its engine; other requests are not affected."""


class AdapterFailedError(Exception):
    """An adapter could not be loaded or unloaded; the engine keeps running without that change."""


class EngineStoppedError(Exception):
    """The engine answers no requests: it has stopped, or is restarting after a crash."""


PREFILL_TOKENS = 128
"""``Engine.prefill_tokens`` on a processor, where a pass of 128 tokens takes several times as long as a pass of 16."""

Event = Delta | RequestFailedError | EngineStoppedError
"""An event of one request: some tokens, or the error that ended it."""


class TokenSink(Protocol):
    """The receiver of one request's events.

    A sink belongs to the event loop in which its request was submitted, and is called in that loop only.
    """

    def deliver(self, event: Event) -> None:
        """Take the next event; none follows an error or a delta with ``finish``."""


class Engine(Protocol):
    """A base and any number of its adapters, each addressed by its digest."""

    name: str
    """The name as in ``serve --engine``."""
    prefill_tokens: int
    """Prompt tokens that one tenant may have in prefill at once, since running answers wait for each pass."""
    context_length: int
    """Maximum number of tokens that a prompt and its answer may have together."""
    unsupported: frozenset[str]
    """Fields of :class:`tunewright.generation.requests.Request` that must have their defaults."""

    @property
    def max_num_seqs(self) -> int:
        """The number of requests that are computed at once."""

    @property
    def stopped(self) -> str | None:
        """Reason why the engine answers no requests now; None while it does."""

    @property
    def permanently_stopped(self) -> bool:
        """True if the engine stays stopped, so that the server has to be restarted."""

    @property
    def in_flight(self) -> tuple[int, int]:
        """The number of running requests, and of requests waiting inside the engine."""

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:
        """Start a request, and return a function that aborts it.

        No event arrives after the abort; to abort a request that has ended does nothing. Tokens
        that end an answer are not delivered. Errors are also delivered, never raised here.

        Args:
            request: its ``adapter`` is the digest of a loaded adapter, or None for the base; it has no stop strings.
            sink: receives the events in the running event loop.
            tenant: cached state of a request (prefixes, for example) is reused for the same tenant only.
        """

    async def load(self, digest: str, folder: Path) -> None:
        """Load an adapter; an adapter that is loaded already is kept.

        Raises:
            UserError: the files do not match the digest, or the engine cannot hold this adapter or any further one.
            AdapterFailedError: the engine failed to load it.
            EngineStoppedError: the engine has stopped.
        """

    async def unload(self, digest: str) -> None:
        """Free an adapter that no running request needs.

        Raises:
            EngineStoppedError: the engine has stopped.
        """

    def stop(self) -> None:
        """Stop immediately, and wait for the end; unfinished requests receive :class:`EngineStoppedError`."""


def deliver_stream(deltas: AsyncGenerator[Delta, None], sink: TokenSink) -> Callable[[], object]:
    """Deliver a generator's deltas to a sink from a separate task, and return a function that cancels the task."""

    async def run() -> None:
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    sink.deliver(delta)
        except (RequestFailedError, EngineStoppedError) as error:
            sink.deliver(error)

    return asyncio.get_running_loop().create_task(run()).cancel


async def checked(deltas: AsyncGenerator[Delta, None], request: Request) -> AsyncGenerator[Delta, None]:
    """Yield the deltas of an engine that compiles constraints itself, as the embedded engine would deliver them.

    An answer ends as soon as it matches and nothing can follow. A token or an end that the constraint does not allow
    fails the request (ConstraintFailedError): the engine has given the constraint up as too complex.
    """
    guide = request.constraint.start() if request.constraint else None
    async with aclosing(deltas):
        async for delta in deltas:
            if guide is None:
                yield delta
                continue
            for place, token in enumerate(delta.ids, 1):
                try:
                    guide.advance(token)
                except UserError as error:
                    raise ConstraintFailedError(error.what) from error
                if guide.complete:
                    yield Delta(delta.ids[:place], "stop", delta.logprobs[:place])
                    return
            if delta.finish == "stop" and not guide.accepting:
                raise ConstraintFailedError("the engine has ended the answer before it matches")
            yield delta


class _Queue(asyncio.Queue[Event]):
    """A sink to read from."""

    def deliver(self, event: Event) -> None:
        self.put_nowait(event)


async def stream(engine: Engine, request: Request, *, tenant: str = "") -> AsyncGenerator[Delta, None]:
    """Yield a request's deltas, or raise the error that ends it; closing the generator early aborts the request."""
    sink = _Queue()
    abort = engine.submit(request, sink, tenant=tenant)
    try:
        while True:
            event = await sink.get()
            if not isinstance(event, Delta):
                raise event
            yield event
            if event.finish:
                return
    finally:
        abort()
