"""The clients of `serve_load.py` and `serve_rivals.py`: requests over HTTP at their due times, and their outcomes.

They share the server's processors, so they do little work: chunks are stored raw with their times, and parsed at the
end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from arrivals import Answer, Ask

from tunewright.data.examples import Message
from tunewright.serving.gateway.app import ADAPTER_HEADER

Prompt = Sequence[Message]
COUNTED = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Reply:
    """The raw response of one request.

    Args:
        chunks: each with its time.
        end: time of its end.
    """

    ask: Ask
    status: int
    digest: str
    chunks: Sequence[tuple[float, bytes]]
    end: float

    @property
    def answer(self) -> Answer:
        """Parse the response; a refusal is an answer with its status."""
        times, text, counted, failed = [], "", 0, False
        for at, event in self._events():
            failed = failed or "error" in event  # a stream has its status before it is known how it ends
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            piece = event["choices"][0]["delta"].get("content") if event.get("choices") else None
            if piece:
                times.append(at)
                text += piece
        status = 503 if failed and self.status == 200 else self.status
        return Answer(self.ask.tenant, self.ask.at, tuple(times), self.end, text, self.digest, status, counted)

    def _events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        rest = b""
        for at, chunk in self.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield at, json.loads(line[6:])


@dataclass(frozen=True)
class Clients:
    """HTTP clients of all tenants.

    Args:
        keys, aliases: by tenant.
        clock: of the answers' times.
        fields: further fields of a request's body, by tenant; empty: those that make the server count the tokens.
    """

    url: str
    keys: Sequence[str]
    aliases: Sequence[str]
    clock: Callable[[], float] = time.perf_counter
    fields: Sequence[Mapping[str, Any]] = ()

    @asynccontextmanager
    async def connected(self, connections: int = 0) -> AsyncIterator[aiohttp.ClientSession]:
        """Open at most ``connections`` to the server (0: unlimited)."""
        connector, patient = aiohttp.TCPConnector(limit=connections), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(self.url, connector=connector, timeout=patient) as session:
            yield session

    async def open_loop(
        self, asks: Sequence[Ask], prompt: Callable[[int], Prompt], tokens: int
    ) -> tuple[list[Answer], float]:
        """Send each request at its due time, regardless of earlier ones.

        Args:
            prompt: of the n-th request.
            tokens: of each answer.

        Returns:
            The answers in the requests' order, and the seconds until the last one's end.
        """
        # A full collection takes a third of a second here, which would look like the server's.
        gc.collect()
        gc.freeze()
        async with self.connected() as session:
            began = time.perf_counter()

            async def due(number: int, ask: Ask) -> Reply:
                await asyncio.sleep(max(0.0, began + ask.at - time.perf_counter()))
                return await self.ask(session, ask, prompt(number), tokens, began)

            replies = await asyncio.gather(*(due(number, ask) for number, ask in enumerate(asks)))
        return [reply.answer for reply in replies], max(reply.end for reply in replies)

    async def ask(self, session: aiohttp.ClientSession, ask: Ask, prompt: Prompt, tokens: int, began: float) -> Reply:
        """Request one streamed answer; its times count from ``began``, by the clock."""
        body = {
            "model": self.aliases[ask.tenant],
            "messages": [message.as_dict() for message in prompt],
            "max_tokens": tokens,
            "stream": True,
            **(self.fields[ask.tenant] if self.fields else COUNTED),
        }
        headers = {"Authorization": f"Bearer {self.keys[ask.tenant]}"}
        try:
            reply = await session.post("/v1/chat/completions", json=body, headers=headers)
        except aiohttp.ClientConnectionError:  # the server has closed the idle connection: clients send it again
            reply = await session.post("/v1/chat/completions", json=body, headers=headers)
        chunks = []
        async with reply:
            async for chunk in reply.content.iter_any():
                chunks.append((self.clock() - began, chunk))
            digest = reply.headers.get(ADAPTER_HEADER, "")
        return Reply(ask, reply.status, digest, chunks, self.clock() - began)


async def cold_loads(
    clients: Clients, tenants: Sequence[int], release: Callable[[int], Awaitable[None]], every: float, began: float
) -> list[tuple[float, float]]:
    """Release the tenants' adapters one after the other, waiting until each is served; return begin and end times."""
    loads = []
    async with clients.connected() as session:
        for tenant in tenants:
            await asyncio.sleep(every)
            start = time.perf_counter()
            await release(tenant)
            while not await _models(session, clients.keys[tenant]):
                await asyncio.sleep(0.02)
            loads.append((start - began, time.perf_counter() - began))
    return loads


async def _models(session: aiohttp.ClientSession, key: str) -> list[Any]:
    """Return the models that a key may request."""
    async with session.get("/v1/models", headers={"Authorization": f"Bearer {key}"}, raise_for_status=True) as reply:
        found: list[Any] = (await reply.json())["data"]
    return found
