"""An engine at an address: requests, deltas and errors as JSON over HTTP, and the gateway's side of it.

``serving/engine_service`` is the other side, started by ``tunewright engine serve``.

A request goes to an engine that has its adapter, the same one each time:

*Affinity.* An adapter's engines are tried in its rendezvous order (Thaler and Ravishankar 1998, "Using name-based
mappings to increase hit rates", IEEE/ACM Transactions on Networking 6:1): each address is scored by a hash of it and
the adapter's digest. So the prefixes of a tenant's prompts are cached on one engine and not on all, and a new engine
takes over 1/N of the adapters.

*Load.* An engine is passed over while over half of its rows are in use and it has 1.25 times the mean load, as in
consistent hashing with bounded loads (Mirrokni et al. 2018, SODA, arXiv 1608.01350).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tunewright.core.errors import UserError
from tunewright.engines.child import LoopClients
from tunewright.engines.protocol import (
    AdapterFailedError,
    ConstraintFailedError,
    Delta,
    EngineStoppedError,
    RequestFailedError,
)
from tunewright.generation.requests import Request, TokenLogprob

PROTOCOL = 1
"""The version of requests and events; an engine with another version is refused."""
FACTS = "/tunewright/engine"
GATEWAY = "x-tunewright-gateway"
"""The header with the id of the gateway, for which an engine keeps its adapters."""
TOKEN = "TUNEWRIGHT_ENGINE_TOKEN"
"""The environment variable with the secret that gateways and engines share."""
FACTS_S = 5.0
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
        base: the digest of the base's files.
        precision: of its arithmetic; ``quantization`` is the base's.
        versions: of the packages that affect its numbers.
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


class RemoteEngine(LoopClients):
    """The engine at one address, as :class:`.pool.EnginePool` uses it."""

    def __init__(self, url: str, gateway: str) -> None:
        self.url = url
        token = os.environ.get(TOKEN)
        headers = {GATEWAY: gateway} | ({"Authorization": f"Bearer {token}"} if token else {})
        super().__init__(url, headers, socket_options=_ALIVE)
        self.facts: EngineFacts | None = None
        """None until the engine has been admitted to the pool."""
        self.stopped: str | None = f"The engine {url} has not answered yet."
        self.adapters: set[str] = set()
        """Digests of the adapters that it has loaded."""
        self.loading: set[str] = set()
        self.changing = asyncio.Lock()
        """Held while an adapter is loaded or unloaded, so that the last change wins."""
        self.running = 0
        self.restarts = 0

    @property
    def rows(self) -> int:
        """The number of requests that it computes at once; 0 before it is known."""
        return self.facts.max_num_seqs if self.facts else 0

    @property
    def up(self) -> bool:
        """True if it takes requests."""
        return self.facts is not None and self.stopped is None

    async def ask_facts(self) -> EngineFacts:
        """Ask the engine about itself."""
        try:
            reply = await self.client().get(FACTS, timeout=FACTS_S)
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
            if protocol == PROTOCOL:
                return EngineFacts(**{**found, "unsupported": tuple(found["unsupported"])})
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.url} is not an engine of tunewright: it has no {FACTS}, so it may answer other routes and "
                "load other adapters",
                where="serve.engines",
                fix="Start the engine there with `tunewright engine serve`.",
            ) from error
        raise UserError(
            f"The engine {self.url} has protocol {protocol}, this gateway {PROTOCOL}",
            where="serve.engines",
            fix="Run the same version of tunewright on both.",
        )

    async def change(self, method: str, body: Event) -> None:
        """Load or unload an adapter."""
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

    async def stream(self, request: Request, tenant: str) -> AsyncGenerator[Delta, None]:
        """Yield a request's deltas; closing the generator also ends the request in the engine."""
        assert not request.stop, "the gateway handles stop strings"
        # The constraint is sent as its rule, which the engine compiles for the same tokenizer.
        rule = None if request.constraint is None else request.constraint.grammar.rule
        body = {**vars(request), "constraint": rule, "tenant": tenant}
        del body["stop"]
        async with aclosing(self._events("answer", body)) as events:
            async for event in events:
                if "error" in event:
                    raise self._error(event)
                logprobs = (
                    TokenLogprob(logprob, tuple((token, value) for token, value in top))
                    for logprob, top in event["logprobs"]
                )
                yield Delta(tuple(event["ids"]), event["finish"], tuple(logprobs))
                if event["finish"]:
                    return
        raise EngineStoppedError(f"The engine {self.url} ended an answer before it was complete.")

    async def _events(self, method: str, body: Event) -> AsyncGenerator[Event, None]:
        """Yield the events of a call; closing the generator closes the connection, which ends the call."""
        try:
            async with self.post(f"{FACTS}/{method}", body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    yield json.loads(line)
        except httpx.HTTPError as error:
            self.stopped = f"The engine {self.url} does not answer ({error or type(error).__name__})."
            raise EngineStoppedError(self.stopped) from error

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


FREE = 0.5
"""An engine with at most this share of its rows in use is never passed over."""
BALANCE = 1.25
"""Above that, an engine with this many times the mean load is passed over."""


def choose(adapter: str | None, engines: Sequence[RemoteEngine]) -> RemoteEngine:
    """Return the engine for a request: the adapter's first idle engine, or for the base the least loaded."""
    loads = {engine.url: engine.running / max(1, engine.rows) for engine in engines}
    if adapter is None:
        return min(engines, key=lambda engine: loads[engine.url])
    busy_above = max(FREE, BALANCE * sum(loads.values()) / len(loads))

    def weight(engine: RemoteEngine) -> bytes:
        return hashlib.blake2b(f"{adapter}\0{engine.url}".encode(), digest_size=16).digest()

    order = sorted(engines, key=weight, reverse=True)
    # The least loaded engine is at most at the mean, so one is found.
    return next(engine for engine in order if loads[engine.url] <= busy_above)


def resolved(url: str) -> list[str]:
    """Return an address for each IP address of the name in ``url``, empty if it cannot be resolved.

    With TLS the name stays, for its certificate. A name with addresses of both families is one
    engine for each address of the first family.
    """
    parts = urlsplit(url)
    if parts.scheme == "https":
        return [url]
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError:
        return []
    family = min(entry[0] for entry in found)
    found = [entry for entry in found if entry[0] == family]
    hosts = dict.fromkeys(f"[{entry[4][0]}]" if entry[0] == socket.AF_INET6 else str(entry[4][0]) for entry in found)
    return [f"http://{host}:{parts.port or 80}" for host in hosts]
