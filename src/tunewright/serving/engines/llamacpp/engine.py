"""The engine ``llamacpp`` as the gateway sees it.

Ids go in, ids come out: llama.cpp neither encodes nor renders anything, its file of the base has no tokenizer, and
so what the model sees is what training saw.

Which adapter answers is said by each request (its ``lora`` list names every adapter that is loaded, all but one with
a scale of 0), and adapters take turns (:mod:`.turns`), so that llama.cpp has requests of one adapter only at any time.
No key or value outlives its request.

llama.cpp has no way to load a further adapter. So a change of adapters starts a second child with the new list beside
the first; it takes the requests that come from then on, and the first ends with its last answer. The base lies in
memory once: both map the same file. The cost is the start, and for as long as the older answers take a second cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tunewright.adapters.registry import require_digest
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.engines.child import Child, Plan, socket_in
from tunewright.engines.protocol import Delta, EngineStoppedError, RequestFailedError
from tunewright.generation.requests import Finish, Request
from tunewright.serving.engines.llamacpp.turns import AdapterTurns, Turn

BLOCK = 256
"""Tokens of an answer for which room is kept ahead."""
_SLACK = 8
"""One part in so many of the cache is for requests that llama.cpp has not yet noticed to be gone."""
_HANDED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class LlamaCppSettings:
    """How llama.cpp is started.

    Args:
        base: the GGUF file of the base.
        lora_file: an adapter's GGUF file, by its digest and folder.
        max_batch: the most requests at once.
        context: the most tokens of one of them, prompt and answer together.
        tokens: of all of them at once, at least ``context``.
        threads: that compute.
    """

    base: Path
    lora_file: Callable[[str, Path], Path]
    max_batch: int
    context: int
    tokens: int
    threads: int

    def plan(self, folder: Path, loras: Collection[Path]) -> Plan:
        """Return the child over these adapters' files."""
        told = {
            "model": str(self.base),
            "loras": [str(path) for path in loras],
            "socket": str(socket_in(folder)),
            "rows": self.max_batch,
            "tokens": self.tokens + self.tokens // _SLACK,
            "threads": self.threads,
        }
        # What the caller's environment says of llama.cpp (LLAMA_ARG_…) is not handed on.
        variables = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return Plan(
            "llama.cpp", [sys.executable, "-m", f"{__package__}.inside", json.dumps(told)], variables, "llamacpp:"
        )


class _Generation:
    """A child, and the adapters that it was started with."""

    def __init__(self, settings: LlamaCppSettings, loras: Mapping[str, Path], reporter: Reporter) -> None:
        self.loras = dict(loras)
        self.numbers = {digest: number for number, digest in enumerate(loras)}
        self.turns = AdapterTurns(settings.max_batch, settings.tokens)
        self.users = 0
        self.child = Child(
            lambda folder: settings.plan(folder, loras.values()), lambda: bool(self.turns.running), reporter
        )
        self.retired = False

    def scales(self, adapter: str | None) -> list[dict[str, float]]:
        """Return what a request says of each adapter: llama.cpp counts them from 0."""
        return [{"id": number, "scale": float(digest == adapter)} for digest, number in self.numbers.items()]


class LlamaCppEngine:
    """llama.cpp in a process of its own.

    Args:
        adapters: folders by digest, there from the start.
        stop_ids: tokens that end an answer; they are not part of it.

    Raises:
        UserError: an adapter's files are not those of its digest, or llama.cpp does not start.
    """

    name = "llamacpp"

    def __init__(
        self,
        settings: LlamaCppSettings,
        adapters: Mapping[str, Path],
        *,
        stop_ids: Collection[int],
        reporter: Reporter,
    ) -> None:
        self.max_batch = settings.max_batch
        self.context_length = settings.context
        self._settings = settings
        self._stop_ids = frozenset(stop_ids)
        self._reporter = reporter
        self._changing = threading.Lock()
        self._counting = threading.Lock()
        self._retired: list[_Generation] = []
        loras = {digest: self._lora(digest, folder) for digest, folder in adapters.items()}
        self._now = _Generation(settings, loras, reporter)

    @property
    def stopped(self) -> str | None:
        """Why the engine answers nothing now, or None while it does."""
        return self._now.child.trouble

    @property
    def dead(self) -> bool:
        """True if llama.cpp has died too often to be started again."""
        return self._now.child.given_up

    @property
    def under_way(self) -> tuple[int, int]:
        """Requests that llama.cpp has, and requests that wait for their adapter's turn."""
        turns = [generation.turns for generation in (self._now, *self._retired)]
        return sum(len(one.running) for one in turns), sum(len(one.waiting) for one in turns)

    async def stream(self, request: Request, *, whose: str = "") -> AsyncGenerator[Delta, None]:  # noqa: ARG002
        """Tokens as they come; closing the iterator early ends the request in llama.cpp, too.

        Nothing is remembered from one request to another, so it makes no difference ``whose`` it is. An answer that
        finds no more room in the cache gives its place up and is gone on with later; if it is sampled, by another draw
        than it would have had.

        Raises:
            RequestFailedError: this request could not be computed.
            EngineStoppedError: llama.cpp has died, or is being started again.
        """
        assert request.constraint is None and not request.stop, "the gateway looks for stop strings itself"
        if len(request.prompt_ids) + request.max_new_tokens > self.context_length:
            raise RequestFailedError(f"Prompt and answer may have {self.context_length} tokens together.")
        with self._counting:
            generation = self._now
            generation.users += 1
        try:
            if generation.child.trouble:
                raise EngineStoppedError(generation.child.trouble)
            if request.adapter is not None and request.adapter not in generation.numbers:
                raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
            async with aclosing(self._pieces(generation, request)) as pieces:
                async for delta in pieces:
                    yield delta
        except httpx.TransportError as error:
            trouble = generation.child.trouble or "llama.cpp has died while it answered and is being started again."
            raise EngineStoppedError(trouble) from error
        finally:
            self._left(generation)

    async def load(self, digest: str, folder: Path) -> None:
        """Put an adapter beside those that are there: a second child takes over.

        Raises:
            UserError: its files are not those of the digest, or llama.cpp does not have it.
            EngineStoppedError: the engine has been stopped.
        """

        def change() -> None:
            with self._changing:
                if digest in self._now.loras:
                    return
                loras = {**self._now.loras, digest: self._lora(digest, folder)}
                try:
                    self._replace(loras)
                except UserError as error:
                    raise UserError(f"llama.cpp does not take it: {error.what}", where=str(folder)) from error

        await asyncio.to_thread(change)

    async def unload(self, digest: str) -> None:
        """Let an adapter go: a second child without it takes over.

        Raises:
            EngineStoppedError: the engine has been stopped.
        """

        def change() -> None:
            with self._changing:
                if digest in self._now.loras:
                    self._replace({one: path for one, path in self._now.loras.items() if one != digest})

        await asyncio.to_thread(change)

    def stop(self) -> None:
        """End llama.cpp; what is under way gets :class:`EngineStoppedError`."""
        with self._changing:
            for generation in (*self._retired, self._now):
                generation.child.stop()

    def _lora(self, digest: str, folder: Path) -> Path:
        require_digest(folder, digest)
        return self._settings.lora_file(digest, folder)

    def _replace(self, loras: Mapping[str, Path]) -> None:
        before = self._now
        if before.child.stopping:
            raise EngineStoppedError(before.child.trouble or "The server is shutting down.")
        fresh = _Generation(self._settings, loras, self._reporter)
        with self._counting:
            self._now = fresh
            before.retired = True
            self._retired.append(before)
        self._end_if_unused(before)

    def _left(self, generation: _Generation) -> None:
        with self._counting:
            generation.users -= 1
        if generation.retired:
            # Ending a process takes its time, which the event loop does not have.
            threading.Thread(target=self._end_if_unused, args=(generation,), daemon=True).start()

    def _end_if_unused(self, generation: _Generation) -> None:
        with self._counting:
            if generation.users or generation not in self._retired:
                return
            self._retired.remove(generation)
        generation.child.stop()

    async def _pieces(self, generation: _Generation, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer, over as many turns as it takes."""
        ids: list[int] = []
        while True:
            tokens = len(request.prompt_ids) + min(len(ids) + BLOCK, request.max_new_tokens)
            async with (
                generation.turns.turn(request.adapter, tokens, again=bool(ids)) as turn,
                aclosing(self._asked(generation, request, ids)) as deltas,
            ):
                async for delta in deltas:
                    ids += delta.ids
                    yield delta
                    if delta.finish:
                        return
                    if not self._has_room(generation.turns, turn, request, len(ids)):
                        break

    def _has_room(self, turns: AdapterTurns, turn: Turn, request: Request, answered: int) -> bool:
        """Return whether the cache has room for another token."""
        used = len(request.prompt_ids) + answered
        if used < turn.tokens:
            return True
        return turns.extend(turn, len(request.prompt_ids) + min(answered + BLOCK, request.max_new_tokens))

    async def _asked(self, generation: _Generation, request: Request, before: list[int]) -> AsyncGenerator[Delta, None]:
        """One call of llama.cpp, which goes on from what was answered before."""
        body = self._body(generation, request, before)
        async with generation.child.post("/completion", body) as reply:
            if reply.status_code != 200:
                raise RequestFailedError(_refusal(await reply.aread()))
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                delta = self._delta(json.loads(line.removeprefix("data: ")))
                if delta.ids or delta.finish:
                    yield delta
                if delta.finish:
                    return
        raise EngineStoppedError(generation.child.trouble or "llama.cpp has ended an answer before it was whole.")

    def _body(self, generation: _Generation, request: Request, before: list[int]) -> dict[str, Any]:
        return {
            "prompt": [*request.prompt_ids, *before],
            "n_predict": request.max_new_tokens - len(before),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "samplers": ["temperature", "top_p"],  # and none of those that llama.cpp has by default
            "seed": _seed(request, len(before)),
            "lora": generation.scales(request.adapter),
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }

    def _delta(self, event: dict[str, Any]) -> Delta:
        if "error" in event:
            raise RequestFailedError(f"llama.cpp could not compute this request: {event['error'].get('message')}")
        ids = tuple(event["tokens"])
        if self._stop_ids.intersection(ids):
            (_,) = ids
            return Delta((), "stop")
        if not event["stop"]:
            return Delta(ids, None)
        finishes: dict[str, Finish] = {"limit": "length", "eos": "stop"}
        if event["stop_type"] not in finishes:
            raise RequestFailedError(f"llama.cpp ended this request early ({event['stop_type']}).")
        return Delta(ids, finishes[event["stop_type"]])


def _seed(request: Request, answered: int) -> int:
    """llama.cpp's seeds have 32 bits, of which all ones (-1) mean that it draws one itself."""
    if request.seed is None:
        return -1
    return (request.seed + answered) % (2**32 - 1)


def _refusal(body: bytes) -> str:
    """Return what an answer with an error says."""
    try:
        return f"llama.cpp refuses this request: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"llama.cpp refuses this request: {body[:500].decode(errors='replace')}"


def cache_tokens(config: Mapping[str, Any], context: int, max_batch: int) -> int:
    """Tokens that a small key/value cache in 16 bits has: a whole context or 2,048 for each row; 4 GiB at most.

    Args:
        config: the base's ``config.json``.
        context: the most tokens that llama.cpp can have of this base.
    """
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    per_token: int = 2 * 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
    tokens = min(max(context, 2048 * max_batch), (4 << 30) // per_token)
    assert tokens >= BLOCK, "no Llama has 16 MB a token"
    return tokens // BLOCK * BLOCK
