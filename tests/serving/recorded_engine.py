"""A scripted engine with adapters at an address, for tests of pools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from engine_kinds import COMPILER, TOKENIZER
from scripted_engine import ScriptedEngine

from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.engines.pool import EnginePool
from tunewright.engines.protocol import Delta, Engine, EngineStoppedError, RequestFailedError, stream
from tunewright.generation.requests import Request
from tunewright.serving.engine_service import EngineApp, EngineOrigin
from tunewright.serving.gateway.server import serving

BASE = "b" * 64
ORIGIN = EngineOrigin(BASE, "none", "float32", {}, "x86_64")
PROMPTS = [tuple(TOKENIZER(text).input_ids) for text in ("Mobile County", "Where is it?", "a")]
ONE, TWO, THREE = ("1" * 64, "2" * 64, "3" * 64)


class Recorded(ScriptedEngine):
    """A scripted engine with its adapters, which can stop."""

    def __init__(self, waits: Sequence[float] = (0.0, 0.0), max_num_seqs: int = 8) -> None:
        super().__init__(waits, max_num_seqs)
        self.loaded: list[str] = []
        self.changes: list[str] = []
        self.can_load = asyncio.Event()
        self.can_load.set()
        self.stops = 0
        self.most = 0
        """The most adapters that were loaded at one time."""

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Fail as an engine does that has stopped, or has another adapter."""
        if request.adapter is not None and request.adapter not in self.loaded:
            raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
        async with aclosing(super().deltas(request)) as deltas:
            async for delta in deltas:
                if self.stopped:
                    raise EngineStoppedError(self.stopped)
                yield delta

    async def load(self, digest: str, folder: Path) -> None:
        """Load it once it may."""
        while not self.can_load.is_set():
            await asyncio.sleep(0.001)
        if self.stopped:
            raise EngineStoppedError(self.stopped)
        if digest in self.loaded:
            return
        self.loaded.append(digest)
        self.changes.append(f"+{digest[0]}")
        self.most = max(self.most, len(self.loaded))

    async def unload(self, digest: str) -> None:
        """Unload it."""
        if digest in self.loaded:
            self.loaded.remove(digest)
            self.changes.append(f"-{digest[0]}")

    def stop(self) -> None:
        """Stop."""
        self.stopped = "stopped"
        self.stops += 1


@contextmanager
def at_address(engine: Engine, missing: Collection[str] = ()) -> Iterator[str]:
    """Serve an engine as `tunewright engine serve` does, and yield its address; it has all adapters but some."""

    def locate(name: str, digest: str) -> Path:
        if digest in missing:
            raise UserError(f"The released adapter {name} ({digest[:12]}) is missing")
        return Path(name)

    app = EngineApp(engine, ORIGIN, locate, COMPILER).app
    with serving(app) as url:
        yield url


@contextmanager
def pooled(urls: Sequence[str], reporter: Reporter | None = None) -> Iterator[EnginePool]:
    """Several addresses as one engine."""
    pool = EnginePool(urls, BASE, "none", reporter or LogReporter())
    try:
        yield pool
    finally:
        pool.stop()


async def answer(engine: Engine, request: Request) -> tuple[int, ...]:
    async with aclosing(stream(engine, request)) as deltas:
        return tuple([token async for delta in deltas for token in delta.ids])


def asked(digest: str | None, tokens: int = 2) -> Request:
    return Request(PROMPTS[0], digest, tokens)


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 300))
