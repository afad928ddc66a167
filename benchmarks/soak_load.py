"""The clients and the operator of `soak.py`: mixed requests, and tenants, keys and releases that change meanwhile.

Each request has the statuses that it may get; any other one is a fault. So is an answer of an adapter that does not
belong to the tenant.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.serving.gateway.app import ADAPTER_HEADER
from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import StateUnavailableError
from tunewright.serving.tenants.quota import Limits
from tunewright.serving.tenants.releases import Candidate, Grounds

REASON = Grounds(None, None, "a benchmark")
LASTING = 4
"""Tenants that stay; the last one has few requests per minute."""
PASSING = 4
"""Most tenants at a time that are made and ended meanwhile."""
LIMIT = 20
"""Requests per minute of that tenant."""
OVERLAP = 30.0
"""Seconds for which a rotated key stays valid."""
CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"

REQUESTS = {
    "chat": 30,
    "completion": 14,
    "stream": 22,
    "dropped stream": 8,
    "dropped request": 4,
    "dropped head": 2,
    "models": 6,
    "no key": 2,
    "wrong key": 4,
    "old key": 2,
    "invalid body": 2,
    "too long": 2,
    "unknown model": 2,
}
"""Kinds of requests, by how often they are sent."""
CHANGES = {
    "deploy": 5,
    "canary": 2,
    "shadow": 2,
    "promote": 3,
    "roll back": 4,
    "rotate a key": 3,
    "make a tenant": 3,
    "end a tenant": 3,
}
"""Kinds of the operator's changes, by how often they are made."""


@dataclass(eq=False)
class Tenant:
    """A tenant with one alias, and adapters that no other tenant has."""

    name: str
    alias: str
    key: str
    prefix: str
    adapters: Sequence[Adapter]
    limited: bool = False
    open: int = 0
    """Its requests in progress."""


@dataclass
class Load:
    """Everything that happens to the server.

    Args:
        state: the server's state, which the operator changes as the command line does.
        url: the server's address.
        adapters: a disjoint part of them belongs to each tenant.
    """

    state: State
    url: str
    adapters: Sequence[Adapter]
    seed: int
    rate: float
    """Requests per second, at random moments."""
    change_seconds: float
    """Average time between two changes."""
    counts: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._tenants: list[Tenant] = []
        self._old_keys: list[str] = []
        self._made = 0
        each = len(self.adapters) // (LASTING + 1)
        self._own = [self.adapters[n * each : (n + 1) * each] for n in range(LASTING + 1)]

    def prepare(self) -> None:
        """Make the lasting tenants and release an adapter for each."""
        for number in range(LASTING):
            limits = Limits(requests_per_minute=LIMIT if number == LASTING - 1 else None)
            self._tenants.append(self._make(f"lasting-{number}", self._own[number], limits))

    async def run(self, seconds: float) -> None:
        """Send requests and make changes for this time."""
        async with aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(total=120)) as self._session:
            operator = asyncio.create_task(self._operate())
            running: set[asyncio.Task[None]] = set()
            loop = asyncio.get_running_loop()
            due, end = loop.time(), loop.time() + seconds
            while (due := due + self._draw.expovariate(self.rate)) < end:
                await asyncio.sleep(max(0.0, due - loop.time()))
                (kind,) = self._draw.choices(list(REQUESTS), list(REQUESTS.values()))
                task = asyncio.create_task(self._request(kind, self._draw.choice(self._tenants)))
                running.add(task)
                task.add_done_callback(running.discard)
                if operator.done():
                    break
            await asyncio.gather(*running)
            operator.cancel()
            with suppress(asyncio.CancelledError):
                await operator

    # The operator.

    async def _operate(self) -> None:
        while True:
            await asyncio.sleep(self._draw.expovariate(1 / self.change_seconds))
            (kind,) = self._draw.choices(list(CHANGES), list(CHANGES.values()))
            try:
                if await self._change(kind):
                    self.changes[kind] += 1
            except (StateUnavailableError, aiohttp.ClientError, TimeoutError) as error:
                self.faults[f"{kind}: {type(error).__name__} {error}"] += 1

    async def _change(self, kind: str) -> bool:
        """Make a change; False if there is nothing to change in this way."""
        if kind == "make a tenant":
            if len(self._tenants) == LASTING + PASSING:
                return False
            self._made += 1
            tenant = await asyncio.to_thread(self._make, f"passing-{self._made}", self._own[LASTING], Limits())
            await self._until_served(tenant)
            self._tenants.append(tenant)
            return True
        if kind == "end a tenant":
            if len(self._tenants) == LASTING:
                return False
            await self._end(self._tenants.pop(LASTING))
            return True
        tenant = self._draw.choice(self._tenants)
        if kind == "rotate a key":
            await self._rotate(tenant)
            return True
        live = (await asyncio.to_thread(self.state.releases.live))[tenant.alias]
        others = [one for one in tenant.adapters if one.digest not in live.digests]
        chosen = self._draw.choice(others)
        releases = self.state.releases
        if kind == "deploy":
            await asyncio.to_thread(releases.deploy, tenant.alias, chosen.name, chosen.digest, REASON)
        elif kind in ("canary", "shadow"):
            candidate = Candidate(chosen.name, chosen.digest, 0.3 if kind == "canary" else None)
            await asyncio.to_thread(releases.start_candidate, tenant.alias, candidate, REASON)
        elif kind == "promote":
            if live.candidate is None:
                return False
            await asyncio.to_thread(releases.promote, tenant.alias)
        else:
            assert kind == "roll back"
            try:
                await asyncio.to_thread(releases.rollback, tenant.alias)
            except UserError:  # the first adapter is live
                return False
        return True

    def _make(self, name: str, adapters: Sequence[Adapter], limits: Limits) -> Tenant:
        alias = f"model-{name}"
        chosen = self._draw.choice(list(adapters))
        self.state.releases.deploy(alias, chosen.name, chosen.digest, REASON)
        self.state.tenants.add(name, [alias], limits)
        key, stored = self.state.keys.create(name)
        return Tenant(name, alias, key, stored.prefix, adapters, limits.requests_per_minute is not None)

    async def _until_served(self, tenant: Tenant) -> None:
        async with asyncio.timeout(60):
            while True:
                async with self._session.get(MODELS, headers=_bearer(tenant.key), raise_for_status=True) as reply:
                    if (await reply.json())["data"]:
                        return
                await asyncio.sleep(0.2)

    async def _end(self, tenant: Tenant) -> None:
        while tenant.open:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.state.releases.undeploy, tenant.alias, "a benchmark")
        await asyncio.to_thread(self.state.tenants.disable, tenant.name)
        self._old_keys = [*self._old_keys[-20:], tenant.key]

    async def _rotate(self, tenant: Tenant) -> None:
        old = tenant.key
        tenant.key, stored = await asyncio.to_thread(self.state.keys.rotate, tenant.prefix, overlap=OVERLAP)
        tenant.prefix = stored.prefix
        asyncio.get_running_loop().call_later(2 * OVERLAP, self._old_keys.append, old)

    # The clients.

    async def _request(self, kind: str, tenant: Tenant) -> None:
        tenant.open += 1
        try:
            async with asyncio.timeout(150):
                outcome = await self._send(kind, tenant)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.faults[f"{kind}: {type(error).__name__} {error}"] += 1
            outcome = type(error).__name__
        finally:
            tenant.open -= 1
        self.counts[f"{kind}: {outcome}"] += 1

    async def _send(self, kind: str, tenant: Tenant) -> str:
        headers = _bearer(tenant.key)
        messages = [{"role": "user", "content": self._text()}]
        body: dict[str, Any] = {"model": tenant.alias, "messages": messages, "max_tokens": self._draw.randint(2, 24)}
        usual = (200, 429) if tenant.limited else (200,)
        if kind == "chat":
            return await self._post(kind, CHAT, body, headers, usual, tenant)
        if kind == "completion":
            text = {"model": tenant.alias, "prompt": self._text(), "max_tokens": body["max_tokens"]}
            return await self._post(kind, COMPLETIONS, text, headers, usual, tenant)
        if kind == "stream":
            return await self._post(kind, CHAT, {**body, "stream": True}, headers, usual, tenant)
        if kind == "dropped stream":
            return await self._dropped({**body, "stream": True, "max_tokens": 200}, headers, usual)
        if kind == "dropped request":
            return await self._abandoned({**body, "max_tokens": 200}, headers)
        if kind == "dropped head":
            return await self._half_a_head()
        if kind == "models":
            async with self._session.get(MODELS, headers=headers) as reply:
                await reply.read()
                return self._status(kind, reply.status, usual)
        if kind == "no key":
            return await self._post(kind, CHAT, body, {}, (401,))
        if kind == "wrong key":
            last = "x" if tenant.key[-1] != "x" else "y"
            return await self._post(kind, CHAT, body, _bearer(tenant.key[:-1] + last), (401,))
        if kind == "old key":
            key = self._draw.choice(self._old_keys) if self._old_keys else "none"
            return await self._post(kind, CHAT, body, _bearer(key), (401,))
        refused = (429,) if tenant.limited else ()
        if kind == "invalid body":
            return await self._post(kind, CHAT, {**body, "temperature": "hot"}, headers, (400, *refused))
        if kind == "too long":
            messages[0]["content"] *= 500
            return await self._post(kind, CHAT, body, headers, (400, *refused))
        assert kind == "unknown model"
        return await self._post(kind, CHAT, {**body, "model": "nobody"}, headers, (404, *refused))

    def _text(self) -> str:
        return " ".join(
            self._draw.choices(("red", "green", "blue", "amber", "teal", "court"), k=self._draw.randint(2, 9))
        )

    async def _post(
        self,
        kind: str,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str],
        expected: Sequence[int],
        tenant: Tenant | None = None,
    ) -> str:
        async with self._session.post(path, json=body, headers=headers) as reply:
            answer = await reply.read()
            if reply.status == 200 and tenant is not None:
                digest = reply.headers[ADAPTER_HEADER]
                if digest not in {one.digest for one in tenant.adapters}:
                    self.faults[f"{kind}: {tenant.name} was answered by {digest}"] += 1
                if body.get("stream") and not answer.endswith(b"data: [DONE]\n\n"):
                    self.faults[f"{kind}: a stream ended with {answer[-200:]!r}"] += 1
            return self._status(kind, reply.status, expected)

    async def _dropped(self, body: dict[str, Any], headers: dict[str, str], expected: Sequence[int]) -> str:
        async with self._session.post(CHAT, json=body, headers=headers) as reply:
            await reply.content.readany()
            reply.close()
            return self._status("dropped stream", reply.status, expected)

    async def _abandoned(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        try:
            async with (
                asyncio.timeout(self._draw.uniform(0.001, 0.1)),
                self._session.post(CHAT, json=body, headers=headers) as reply,
            ):
                await reply.read()
                return "answered"
        except TimeoutError:
            return "abandoned"

    async def _half_a_head(self) -> str:
        """Send half of a request's head; half of these clients wait for the server to end the connection."""
        at = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        try:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nAuthoriz")
            await writer.drain()
            if self._draw.random() < 0.5:
                return "left"
            return (await reader.read()).split(b"\r\n")[0].decode()
        finally:
            writer.close()

    def _status(self, kind: str, status: int, expected: Sequence[int]) -> str:
        if status not in expected:
            self.faults[f"{kind}: status {status}"] += 1
        return str(status)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
