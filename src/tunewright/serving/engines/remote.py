"""An engine at an address: requests, deltas and errors as JSON over HTTP, and the gateway's side of it.

:mod:`.engine_server` is the other side, started by ``tunewright engine serve``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tunewright.core.errors import UserError
from tunewright.engines.protocol import (
    AdapterFailedError,
    ConstraintFailedError,
    Delta,
    EngineStoppedError,
    RequestFailedError,
    TokenSink,
    deliver_stream,
)
from tunewright.generation.requests import Request, TokenLogprob

PROTOCOL = 1
"""Of requests and events; an engine with another number is refused."""
FACTS = "/tunewright/engine"
GATEWAY = "x-tunewright-gateway"
"""The header with the id of the gateway, for which an engine keeps its adapters."""
TOKEN = "TUNEWRIGHT_ENGINE_TOKEN"
"""The environment variable with the secret that gateways and engines share."""
CONNECT_S, FACTS_S = 5.0, 5.0
CHANGE_S = 600.0
"""The longest load of an adapter: llama.cpp restarts for it."""
_PROBES = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _PROBES if hasattr(socket, name)),
]
"""Answers have no time limit here: the system notices a host that is gone after 25 seconds."""
_ERRORS = (RequestFailedError, ConstraintFailedError, EngineStoppedError, AdapterFailedError)

Event = dict[str, Any]
"""A delta, an error, or nothing: the end of a change that went well."""


@dataclass(frozen=True)
class EngineFacts:
    """An engine's description of itself.

    Args:
        instance: changes when its process is started again.
        engine: its kind, as in ``serve --engine``.
        base: the digest of the base's files.
        quantization: the precision of the base's weights.
        precision: the precision of its arithmetic.
        versions: of the packages that affect its numbers.
        device: its GPU or kind of processor.
        stopped: reason why it answers no requests now.
    """

    protocol: int
    instance: str
    engine: str
    base: str
    quantization: str
    precision: str
    versions: Mapping[str, str]
    device: str
    max_num_seqs: int
    context_length: int
    prefill_tokens: int
    unsupported: tuple[str, ...]
    stopped: str | None


class RemoteEngine:
    """The engine at one address, as :class:`.pool.EnginePool` uses it.

    Args:
        url: its address, without a path.
        gateway: the id of this gateway.
    """

    def __init__(self, url: str, gateway: str) -> None:
        self.url = url
        token = os.environ.get(TOKEN)
        self._headers = {GATEWAY: gateway} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.facts: EngineFacts | None = None
        """None until it has been admitted to the pool."""
        self.stopped: str | None = f"The engine {url} has not answered yet."
        self.adapters: set[str] = set()
        """Digests of the adapters that it has loaded."""
        self.loading: set[str] = set()
        self.changing = asyncio.Lock()
        """Held while an adapter is loaded or unloaded, so that the last change wins."""
        self.running = 0
        self.restarts = 0
        # A connection belongs to the event loop that opened it.
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._closing: set[asyncio.Future[None]] = set()

    @property
    def rows(self) -> int:
        """The number of requests that it computes at once; 0 before it is known."""
        return self.facts.max_num_seqs if self.facts else 0

    async def ask_facts(self) -> EngineFacts:
        """Ask the engine about itself.

        Raises:
            EngineStoppedError: nothing answers at the address.
            UserError: what answers is no engine of tunewright, or refuses this gateway's secret.
        """
        try:
            reply = await self._client().get(FACTS, timeout=FACTS_S)
        except httpx.TransportError as error:
            raise EngineStoppedError(
                f"The engine {self.url} does not answer ({error or type(error).__name__})."
            ) from error
        if reply.status_code in (401, 403):
            raise UserError(
                f"The engine {self.url} refuses this gateway's token",
                where="serve.engines",
                fix=f"Set {TOKEN} to the same value for the engine and for `tunewright serve`.",
            )
        try:
            found = reply.raise_for_status().json()
            protocol = found["protocol"]
            facts = (
                EngineFacts(**{**found, "unsupported": tuple(found["unsupported"])}) if protocol == PROTOCOL else None
            )
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.url} is not an engine of tunewright: it has no {FACTS}, so it may answer other routes and "
                "load other adapters",
                where="serve.engines",
                fix="Start the engine there with `tunewright engine serve`.",
            ) from error
        if facts is None:
            raise UserError(
                f"The engine {self.url} has protocol {protocol}, this gateway {PROTOCOL}",
                where="serve.engines",
                fix="Run the same version of tunewright on both.",
            )
        return facts

    async def change(self, method: str, body: Event) -> None:
        """Load or unload an adapter.

        Raises:
            UserError: the engine has no such adapter, or cannot hold it.
            AdapterFailedError: the engine failed to load or free it.
            EngineStoppedError: the engine is lost.
        """
        try:
            async with asyncio.timeout(CHANGE_S), aclosing(self._events(method, body)) as events:
                async for event in events:
                    if event:
                        raise self._error(event)
                    return
        except TimeoutError as error:
            what = f"The engine {self.url} did not {method} the adapter within {CHANGE_S:g} s."
            raise AdapterFailedError(what) from error
        raise EngineStoppedError(f"The engine {self.url} stopped while its adapters changed.")

    def submit(self, request: Request, sink: TokenSink, tenant: str) -> Callable[[], object]:
        """Start a request: see :meth:`tunewright.engines.protocol.Engine.submit`."""
        return deliver_stream(self._stream(request, tenant), sink)

    async def _stream(self, request: Request, tenant: str) -> AsyncGenerator[Delta, None]:
        assert not request.stop, "the gateway handles stop strings"
        async with aclosing(self._events("answer", _body(request, tenant))) as events:
            async for event in events:
                if "error" in event:
                    raise self._error(event)
                delta = _delta(event)
                yield delta
                if delta.finish:
                    return
        raise EngineStoppedError(f"The engine {self.url} ended an answer before it was complete.")

    async def _events(self, method: str, body: Event) -> AsyncGenerator[Event, None]:
        """Yield the events of a call; closing the generator closes the connection, which ends the call there."""
        client = self._client()
        try:
            reply = await client.send(client.build_request("POST", f"{FACTS}/{method}", json=body), stream=True)
            try:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    yield json.loads(line)
            finally:
                # The caller may be cancelled at this point, and a connection closed by half would stay.
                closing = asyncio.ensure_future(reply.aclose())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
                await asyncio.shield(closing)
        except httpx.HTTPError as error:
            self.stopped = f"The engine {self.url} does not answer ({error or type(error).__name__})."
            raise EngineStoppedError(self.stopped) from error

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            # No idle connection outlives its event loop, and no proxy is between a gateway and its engines.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=_ALIVE)
            timeout = httpx.Timeout(None, connect=CONNECT_S)
            self._clients[loop] = httpx.AsyncClient(
                base_url=self.url, headers=self._headers, transport=transport, timeout=timeout
            )
        return self._clients[loop]

    def _error(self, event: Event) -> Exception:
        what: str = event["what"]
        if event["error"] == "UserError":
            return UserError(f"The engine {self.url}: {what}", where=event["where"], fix=event["fix"])
        return next(kind for kind in _ERRORS if kind.__name__ == event["error"])(what)


def failure(error: Exception) -> Event:
    """Return an error as an event."""
    if isinstance(error, UserError):
        return {"error": "UserError", **error.as_dict()}
    return {"error": type(error).__name__, "what": str(error)}


def adapter_body(digest: str, folder: Path) -> Event:
    """Return the adapter to load as JSON: its name, for the engine's own store, and its digest, which must match."""
    checkpoint = folder.parent.name == "checkpoints"
    return {"digest": digest, "name": f"{folder.parent.parent.name}@{folder.name}" if checkpoint else folder.name}


def _body(request: Request, tenant: str) -> Event:
    """Return a request as JSON; the constraint as its rule, which the engine compiles for the same tokenizer."""
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


def _delta(event: Mapping[str, Any]) -> Delta:
    logprobs = tuple(
        TokenLogprob(logprob, tuple((token, value) for token, value in top)) for logprob, top in event["logprobs"]
    )
    return Delta(tuple(event["ids"]), event["finish"], logprobs)
