"""The crowd of `crowd.py`, in a process that imports little: idle connections, and requests always in progress.

    python benchmarks/crowd_clients.py URL KEY MODEL IDLE GREEDY TOKENS

It prints ``ready`` when all are there. When its input ends, it prints the answers' statuses and the number of idle
connections that the server has closed.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections import Counter
from urllib.parse import urlsplit

import aiohttp


async def main(url: str, key: str, model: str, idle: int, greedy: int, tokens: int) -> None:
    """Be the crowd until the input ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    at = urlsplit(url)
    health = f"GET /health HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # After a request, since a connection without any is closed in 10 seconds.
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        writer.write(health)
        await reader.readuntil(b"}")
        return reader, writer

    connections = [await connect() for _ in range(idle)]
    messages = [{"role": "user", "content": "Everything about courts, at once."}]
    body = {"model": model, "messages": messages, "max_tokens": tokens}
    headers = {"Authorization": f"Bearer {key}"}
    statuses: Counter[int] = Counter()
    begun = asyncio.Event()
    connector, patient = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=patient) as session:

        async def one_after_another() -> None:
            while True:
                async with session.post("/v1/chat/completions", json=body, headers=headers) as reply:
                    await reply.read()
                statuses[reply.status] += 1
                begun.set()

        tasks = [asyncio.create_task(one_after_another()) for _ in range(greedy)]
        if tasks:
            await begun.wait()
        print("ready", flush=True)
        ended = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        assert not ended
        closed = sum(reader.at_eof() for reader, _ in connections)
        print(json.dumps({"statuses": statuses, "closed_by_server": closed}), flush=True)


if __name__ == "__main__":
    server, bearer, alias, *counts = sys.argv[1:]
    asyncio.run(main(server, bearer, alias, *map(int, counts)))
