"""The clients of `serve_load.py`: requests over HTTP when they are due, and what came of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from arrivals import Answer, Ask

from tunewright.data.examples import Message
from tunewright.serving.app import ADAPTER_HEADER

Prompt = Sequence[Message]


@dataclass(frozen=True)
class Clients:
    """Whoever asks in the tenants' names.

    Args:
        keys, aliases: by tenant.
    """

    url: str
    keys: Sequence[str]
    aliases: Sequence[str]

    @asynccontextmanager
    async def connected(self, connections: int | None = None) -> AsyncIterator[httpx.AsyncClient]:
        """Connections to the server, so many at most."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False) as client:
            yield client

    async def open_loop(
        self, asks: Sequence[Ask], prompt: Callable[[int], Prompt], tokens: int
    ) -> tuple[list[Answer], float]:
        """Each request when it is due, whatever became of those before.

        Args:
            prompt: of the n-th request.
            tokens: of each answer.

        Returns:
            The answers in the requests' order, and the seconds until the last one's end.
        """
        async with self.connected() as client:
            began = time.perf_counter()

            async def due(number: int, ask: Ask) -> Answer:
                await asyncio.sleep(max(0.0, began + ask.at - time.perf_counter()))
                return await self.ask(client, ask, prompt(number), tokens, began)

            answers = await asyncio.gather(*(due(number, ask) for number, ask in enumerate(asks)))
        return list(answers), max(answer.end for answer in answers)

    async def ask(self, client: httpx.AsyncClient, ask: Ask, prompt: Prompt, tokens: int, began: float) -> Answer:
        """One answer, streamed; a refusal is an answer with its status."""
        body = {
            "model": self.aliases[ask.tenant],
            "messages": [message.as_dict() for message in prompt],
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {self.keys[ask.tenant]}"}
        pieces, text, counted, failed = [], "", 0, False
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:  # a stream has its status before it is known how it ends
                    failed = True
                    break
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece:
                    pieces.append(time.perf_counter() - began)
                    text += piece
            digest, status = reply.headers.get(ADAPTER_HEADER, ""), 503 if failed else reply.status_code
        end = time.perf_counter() - began
        return Answer(ask.tenant, ask.at, tuple(pieces), end, text, digest, status, counted)


async def cold_loads(
    clients: Clients, tenants: Sequence[int], release: Callable[[int], Awaitable[None]], every: float, began: float
) -> list[tuple[float, float]]:
    """Release one tenant's adapter after the other, and wait until the server has it: from when to when."""
    loads = []
    async with clients.connected() as client:
        for tenant in tenants:
            await asyncio.sleep(every)
            start = time.perf_counter()
            await release(tenant)
            headers = {"Authorization": f"Bearer {clients.keys[tenant]}"}
            while not (await client.get("/v1/models", headers=headers)).raise_for_status().json()["data"]:
                await asyncio.sleep(0.02)
            loads.append((start - began, time.perf_counter() - began))
    return loads
