"""An engine with scripted timing, for tests of time limits and scheduling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from making.tiny_bases import byte_tokenizer
from tunewright.config import GatewayConfig
from tunewright.data.examples import Message
from tunewright.engines.protocol import PREFILL_TOKENS, Delta, TokenSink, deliver_stream
from tunewright.generation.constraints import GrammarCompiler
from tunewright.generation.requests import Request
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import Auth

A = ord("a")
MODELS = {"base": None, "courts": "one"}
LIMITS = GatewayConfig()


def render(messages: Sequence[Message]) -> tuple[int, ...]:
    """Return the bytes of the messages: these tests need no tokenizer."""
    return tuple("\n".join(f"{message.role}: {message.content}" for message in messages).encode())


TOKENIZATION = Tokenization(
    render,
    lambda text: tuple(text.encode()),
    lambda ids: bytes(ids).decode(errors="replace"),
    GrammarCompiler(byte_tokenizer(), {0}),
)


class ScriptedEngine:
    """Delivers a token after each of ``waits`` seconds, then ends the answer.

    Args:
        waits: seconds before each token.
        max_num_seqs: requests that the gateway may send at once.
    """

    name = "scripted"
    unsupported: frozenset[str] = frozenset()
    prefill_tokens = PREFILL_TOKENS

    def __init__(self, waits: Sequence[float] = (0.0, 0.0), max_num_seqs: int = 8, context: int = 2000) -> None:
        self.waits = list(waits)
        self.max_num_seqs = max_num_seqs
        self.context_length = context
        self.stopped: str | None = None
        self.permanently_stopped = False
        self.asked: list[tuple[Request, str]] = []
        self.begun = 0
        self.aborted = 0
        self.held_at = 0
        """The number of the token that no answer gets until this is 0 again."""

    @property
    def in_flight(self) -> tuple[int, int]:
        """Requests at work."""
        return self.begun, 0

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:
        """Answer as the script says."""
        self.asked.append((request, tenant))
        return deliver_stream(self.deltas(request), sink)

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the scripted tokens."""
        self.begun += 1
        whole = False
        try:
            for number, wait in enumerate(self.waits, 1):
                await asyncio.sleep(wait)
                while number == self.held_at:
                    await asyncio.sleep(0.001)
                yield Delta((A,), "length" if number == len(self.waits) else None)
            whole = True
        finally:
            self.begun -= 1
            self.aborted += not whole

    async def load(self, digest: str, folder: Path) -> None:
        """Nothing."""

    async def unload(self, digest: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


@contextmanager
def scripted_server(
    engine: ScriptedEngine,
    auth: Auth | None = None,
    tokenization: Tokenization = TOKENIZATION,
    /,
    **limits: float | int,
) -> Iterator[httpx.Client]:
    """Yield a client of a server with this engine and these limits."""
    config = GatewayConfig.model_validate(limits)
    gateway = Gateway(engine, auth or AnonymousAuth(MODELS), tokenization, config)
    with serving(gateway.app, limits=config) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield client


def until(holds: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for what happens in the background."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.02)
