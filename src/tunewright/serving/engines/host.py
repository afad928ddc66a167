"""An engine in another process than the gateway: requests, deltas and errors as JSON, on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunewright.adapters.registry import require_digest
from tunewright.core.errors import UserError
from tunewright.engines.protocol import (
    AdapterFailedError,
    ConstraintFailedError,
    Delta,
    Engine,
    EngineStoppedError,
    RequestFailedError,
    TokenSink,
    deliver_stream,
    stream,
)
from tunewright.generation.requests import Request, TokenLogprob

if TYPE_CHECKING:
    from tunewright.generation.constraints import Constraint, GrammarCompiler

_CONSTRAINTS = 32
_ERRORS = (RequestFailedError, ConstraintFailedError, EngineStoppedError, AdapterFailedError)

Event = dict[str, Any]
"""A delta, an error, or nothing: the end of a change that went well."""


class EngineHost:
    """The side of the engine.

    Args:
        engine: answers the requests.
        compiler: compiles constraints; called when the first one arrives.
    """

    def __init__(self, engine: Engine, compiler: Callable[[], GrammarCompiler]) -> None:
        self.engine = engine
        self._make_compiler = compiler
        self._constraint = lru_cache(_CONSTRAINTS)(self._compile)

    async def answer(self, body: Event) -> AsyncGenerator[Event, None]:
        """Yield the events of a request; closing the generator aborts it."""
        try:
            request = await self._request(body)
            async with aclosing(stream(self.engine, request, tenant=body["tenant"])) as deltas:
                async for delta in deltas:
                    logprobs = [[each.logprob, each.top] for each in delta.logprobs]
                    yield {"ids": delta.ids, "finish": delta.finish, "logprobs": logprobs}
        except (UserError, RequestFailedError, EngineStoppedError) as error:
            yield failure(error)

    async def load(self, body: Event) -> AsyncGenerator[Event, None]:
        """Load an adapter; yield one event."""
        yield await _changed(self.engine.load(body["digest"], Path(body["folder"])))

    async def unload(self, body: Event) -> AsyncGenerator[Event, None]:
        """Unload an adapter; yield one event."""
        yield await _changed(self.engine.unload(body["digest"]))

    async def facts(self) -> AsyncGenerator[Event, None]:
        """Yield the engine's limits."""
        engine = self.engine
        yield {
            "max_num_seqs": engine.max_num_seqs,
            "context_length": engine.context_length,
            "prefill_tokens": engine.prefill_tokens,
            "unsupported": sorted(engine.unsupported),
        }

    @property
    def healthy(self) -> bool:
        """False once the engine has to be started again from outside."""
        return not self.engine.permanently_stopped

    async def _request(self, body: Event) -> Request:
        rule = body["constraint"]
        constraint = None if rule is None else await asyncio.to_thread(self._constraint, rule)
        own = {name: value for name, value in body.items() if name not in ("tenant", "constraint")}
        own["prompt_ids"] = tuple(own["prompt_ids"])
        own["logit_bias"] = tuple((token, bias) for token, bias in own["logit_bias"])
        return Request(**own, constraint=constraint)

    def _compile(self, rule: str) -> Constraint:
        from tunewright.generation.constraints import Grammar

        return self._compiler.compile(Grammar(rule))

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return self._make_compiler()


async def _changed(change: Awaitable[None]) -> Event:
    try:
        await change
    except (UserError, AdapterFailedError, EngineStoppedError) as error:
        return failure(error)
    return {}


def failure(error: Exception) -> Event:
    """Return an error as an event."""
    if isinstance(error, UserError):
        return {"error": "UserError", **error.as_dict()}
    return {"error": type(error).__name__, "what": str(error)}


class Transport(Protocol):
    """The way to an :class:`EngineHost`."""

    @property
    def failure_reason(self) -> str | None:
        """Reason why the host does not answer now; None while it does."""

    @property
    def given_up(self) -> bool:
        """True if it will not answer any more."""

    @property
    def restarts(self) -> int:
        """The number of restarts after a crash or a hang."""

    def events(self, method: str, body: Event) -> AsyncGenerator[Event, None]:
        """Yield the events of a method of the host; closing the generator ends it there.

        Raises:
            EngineStoppedError: the host is lost.
        """

    def keep(self, adapters: Mapping[str, Path]) -> None:
        """Set the adapters that a restarted host loads before it answers."""

    def stop(self) -> None:
        """Stop the host and wait for it."""


class HostedEngine:
    """The side of the gateway.

    Args:
        name: the engine's kind.
        transport: the way to the engine's host.
        max_num_seqs, context_length, prefill_tokens, unsupported: see :class:`tunewright.engines.protocol.Engine`.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        *,
        max_num_seqs: int,
        context_length: int,
        prefill_tokens: int,
        unsupported: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        self.transport = transport
        self.max_num_seqs = max_num_seqs
        self.context_length = context_length
        self.prefill_tokens = prefill_tokens
        self.unsupported = unsupported
        self._listed: dict[str, Path] = {}
        self._running = 0

    @property
    def stopped(self) -> str | None:
        """Reason why the engine answers no requests now; None while it does."""
        return self.transport.failure_reason

    @property
    def permanently_stopped(self) -> bool:
        """True if the host has crashed too often to be restarted."""
        return self.transport.given_up

    @property
    def restarts(self) -> int:
        """The number of restarts after a crash or a hang."""
        return self.transport.restarts

    @property
    def in_flight(self) -> tuple[int, int]:
        """The number of requests at the host, and of those above its rows, which wait there."""
        rows = min(self._running, self.max_num_seqs)
        return rows, self._running - rows

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:
        """Start a request: see :meth:`tunewright.engines.protocol.Engine.submit`."""
        return deliver_stream(self._stream(request, tenant), sink)

    async def load(self, digest: str, folder: Path) -> None:
        """Add an adapter.

        Raises:
            UserError: the files do not match the digest, or the engine cannot hold the adapter.
            AdapterFailedError: the adapter could not be loaded.
            EngineStoppedError: the host crashed or is restarting.
        """
        if digest in self._listed:
            return
        await asyncio.to_thread(require_digest, folder, digest)
        # Listed first: a host that restarts now loads it, too.
        self._list({**self._listed, digest: folder})
        try:
            await self._change("load", {"digest": digest, "folder": str(folder.absolute())})
        except BaseException:
            self._list({one: path for one, path in self._listed.items() if one != digest})
            raise

    async def unload(self, digest: str) -> None:
        """Free an adapter that no running request needs.

        Raises:
            AdapterFailedError: the adapter could not be freed.
            EngineStoppedError: the host crashed or is restarting; the adapter is off its list nevertheless.
        """
        folder = self._listed.get(digest)
        if folder is None:
            return
        self._list({one: path for one, path in self._listed.items() if one != digest})
        try:
            await self._change("unload", {"digest": digest})
        except AdapterFailedError:
            self._list({**self._listed, digest: folder})
            raise

    def stop(self) -> None:
        """Stop the host; unfinished requests receive :class:`EngineStoppedError`."""
        self.transport.stop()

    def _list(self, adapters: dict[str, Path]) -> None:
        self._listed = adapters
        self.transport.keep(adapters)

    async def _stream(self, request: Request, tenant: str) -> AsyncGenerator[Delta, None]:
        assert not request.stop, "the gateway handles stop strings"
        self._require_up()
        if request.adapter is not None and request.adapter not in self._listed:
            raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
        self._running += 1
        try:
            async with aclosing(self.transport.events("answer", _body(request, tenant))) as events:
                async for event in events:
                    delta = _delta(event)
                    yield delta
                    if delta.finish:
                        return
            raise EngineStoppedError(self.stopped or "The engine ended an answer before it was complete.")
        finally:
            self._running -= 1

    async def _change(self, method: str, body: Event) -> None:
        self._require_up()
        async with aclosing(self.transport.events(method, body)) as events:
            async for event in events:
                if event:
                    raise _error(event)
                return
        raise EngineStoppedError(self.stopped or "The engine stopped while its adapters changed.")

    def _require_up(self) -> None:
        if self.stopped:
            raise EngineStoppedError(self.stopped)


def _body(request: Request, tenant: str) -> Event:
    """Return a request as JSON; the constraint as its rule, which the host compiles for the same tokenizer."""
    constraint = request.constraint
    return {
        "prompt_ids": request.prompt_ids,
        "adapter": request.adapter,
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "constraint": None if constraint is None else constraint.grammar.rule,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": request.logit_bias,
        "logprobs": request.logprobs,
        "tenant": tenant,
    }


def _delta(event: Event) -> Delta:
    """Return a delta.

    Raises:
        RequestFailedError, EngineStoppedError: the event is an error.
    """
    if "error" in event:
        raise _error(event)
    logprobs = tuple(
        TokenLogprob(logprob, tuple((token, value) for token, value in top)) for logprob, top in event["logprobs"]
    )
    return Delta(tuple(event["ids"]), event["finish"], logprobs)


def _error(event: Event) -> Exception:
    what: str = event["what"]
    if event["error"] == "UserError":
        return UserError(what, where=event["where"], fix=event["fix"])
    return next(kind for kind in _ERRORS if kind.__name__ == event["error"])(what)
