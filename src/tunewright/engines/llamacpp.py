"""The engine ``llamacpp`` in the gateway's process.

llama.cpp gets token ids and returns token ids. It tokenizes nothing, since its file of the base has no tokenizer. So
the model sees the same ids as in training.

Each request selects its adapter: its ``lora`` list has every loaded adapter, all but one with a scale of 0. Adapters
alternate (:class:`CacheSlots`), so that llama.cpp has requests of one adapter only at any time. No key or value
outlives its request.

llama.cpp cannot load a further adapter. So a change of adapters starts a second child with the new list. The
second child takes all later requests, and the first one ends after its last answer. The base is in memory once,
since both map the same file. The cost is the start, and a second cache until the older answers have ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tunewright.adapters.registry import require_digest
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.engines.child import Child, Plan, refusal, socket_in
from tunewright.engines.protocol import (
    PREFILL_TOKENS,
    Delta,
    EngineStoppedError,
    RequestFailedError,
    TokenSink,
    checked,
    deliver_stream,
)
from tunewright.generation.requests import Finish, Request, TokenLogprob

BLOCK = 256
"""Tokens of an answer for which cache is reserved ahead."""
_SLACK = 8
"""One part of the cache in this many is spare, for aborted requests that llama.cpp has not noticed yet."""
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class LlamaCppSettings:
    """Settings of llama.cpp."""

    base: Path
    lora_file: Callable[[str, Path], Path]
    max_num_seqs: int
    context: int
    tokens: int
    threads: int

    def plan(self, folder: Path, loras: Collection[Path]) -> Plan:
        """Return the plan of a child with these adapters' files."""
        settings = {
            "model": str(self.base),
            "loras": [str(path) for path in loras],
            "host": str(socket_in(folder)),
            "rows": self.max_num_seqs,
            "tokens": self.tokens + self.tokens // _SLACK,
            "threads": self.threads,
        }
        # Settings of llama.cpp in the caller's environment (LLAMA_ARG_…) are not inherited.
        variables = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return Plan(
            "llama.cpp", [sys.executable, "-m", f"{__name__}_worker", json.dumps(settings)], variables, "llamacpp:"
        )


class _Generation:
    """A child, and the adapters that it was started with."""

    def __init__(self, settings: LlamaCppSettings, loras: Mapping[str, Path], reporter: Reporter) -> None:
        self.loras = dict(loras)
        self.numbers = {digest: number for number, digest in enumerate(loras)}
        self.slots = CacheSlots(settings.max_num_seqs, settings.tokens)
        self.users = 0
        self.child = Child(
            lambda folder: settings.plan(folder, loras.values()), lambda: bool(self.slots.running), reporter
        )
        self.retired = False

    def scales(self, adapter: str | None) -> list[dict[str, float]]:
        """Return a request's list of adapters; llama.cpp numbers them from 0."""
        return [{"id": number, "scale": float(digest == adapter)} for digest, number in self.numbers.items()]


class LlamaCppEngine:
    """llama.cpp in a child process."""

    name = "llamacpp"
    # llama.cpp's own penalties also count the prompt's tokens.
    unsupported = frozenset({"presence_penalty", "frequency_penalty"})
    prefill_tokens = PREFILL_TOKENS

    def __init__(
        self,
        settings: LlamaCppSettings,
        adapters: Mapping[str, Path],
        *,
        stop_ids: Collection[int],
        reporter: Reporter,
    ) -> None:
        self.max_num_seqs = settings.max_num_seqs
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
        return self._now.child.failure_reason

    @property
    def permanently_stopped(self) -> bool:
        return self._now.child.given_up

    @property
    def in_flight(self) -> tuple[int, int]:
        """The number of requests in llama.cpp, and of requests that wait for a slot."""
        all_slots = [generation.slots for generation in (self._now, *self._retired)]
        return sum(len(slots.running) for slots in all_slots), sum(len(slots.waiting) for slots in all_slots)

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:  # noqa: ARG002
        """Start a request: see :meth:`tunewright.engines.protocol.Engine.submit`.

        Nothing is kept from one request to the next, so the tenant makes no difference here. An answer that runs out of
        cache gives its slot up and resumes later; if it is sampled, its remaining tokens are drawn with another seed.
        A constrained answer cannot resume, since llama.cpp begins its grammar with each call: it reserves cache for its
        full length.
        """
        return deliver_stream(checked(self._stream(request), request), sink)

    async def _stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        assert not request.stop, "the gateway handles stop strings"
        assert not request.presence_penalty and not request.frequency_penalty, "the gateway refuses penalties"
        if len(request.prompt_ids) + request.max_new_tokens > self.context_length:
            raise RequestFailedError(
                f"The context length is {self.context_length} tokens for prompt and answer together."
            )
        with self._counting:
            generation = self._now
            generation.users += 1
        try:
            if generation.child.failure_reason:
                raise EngineStoppedError(generation.child.failure_reason)
            if request.adapter is not None and request.adapter not in generation.numbers:
                raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
            async with aclosing(self._pieces(generation, request)) as pieces:
                async for delta in pieces:
                    yield delta
        except httpx.TransportError as error:
            failure_reason = generation.child.failure_reason or "llama.cpp crashed and is restarting."
            raise EngineStoppedError(failure_reason) from error
        finally:
            with self._counting:
                generation.users -= 1
            if generation.retired:
                # A process takes its time to end, and would block the event loop.
                threading.Thread(target=self._stop_if_unused, args=(generation,), daemon=True).start()

    async def load(self, digest: str, folder: Path) -> None:
        """Add an adapter: a second child takes over."""

        def change() -> None:
            with self._changing:
                if digest in self._now.loras:
                    return
                loras = {**self._now.loras, digest: self._lora(digest, folder)}
                try:
                    self._replace(loras)
                except UserError as error:
                    raise UserError(f"llama.cpp cannot load it: {error.what}", where=str(folder)) from error

        await asyncio.to_thread(change)

    async def unload(self, digest: str) -> None:
        """Free an adapter: a second child without it takes over."""

        def change() -> None:
            with self._changing:
                if digest in self._now.loras:
                    self._replace({one: path for one, path in self._now.loras.items() if one != digest})

        await asyncio.to_thread(change)

    def stop(self) -> None:
        with self._changing:
            for generation in (*self._retired, self._now):
                generation.child.stop()

    def _lora(self, digest: str, folder: Path) -> Path:
        require_digest(folder, digest)
        return self._settings.lora_file(digest, folder)

    def _replace(self, loras: Mapping[str, Path]) -> None:
        before = self._now
        if before.child.stopping:
            raise EngineStoppedError(before.child.failure_reason or "The server is shutting down.")
        fresh = _Generation(self._settings, loras, self._reporter)
        with self._counting:
            self._now = fresh
            before.retired = True
            self._retired.append(before)
        self._stop_if_unused(before)

    def _stop_if_unused(self, generation: _Generation) -> None:
        with self._counting:
            if generation.users or generation not in self._retired:
                return
            self._retired.remove(generation)
        generation.child.stop()

    async def _pieces(self, generation: _Generation, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the answer, over as many calls as it takes."""
        ids: list[int] = []
        while True:
            ahead = request.max_new_tokens if request.constraint else len(ids) + BLOCK
            tokens = len(request.prompt_ids) + min(ahead, request.max_new_tokens)
            async with (
                generation.slots.slot(request.adapter, tokens, resumed=bool(ids)) as slot,
                aclosing(self._asked(generation, request, ids)) as deltas,
            ):
                async for delta in deltas:
                    ids += delta.ids
                    yield delta
                    if delta.finish:
                        return
                    more = len(request.prompt_ids) + min(len(ids) + BLOCK, request.max_new_tokens)
                    full = len(request.prompt_ids) + len(ids) >= slot.tokens
                    if full and not generation.slots.extend(slot, more):
                        break

    async def _asked(self, generation: _Generation, request: Request, before: list[int]) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of one call of llama.cpp, which continues the answer so far."""
        body = self._body(generation, request, before)
        async with generation.child.post("/completion", body) as reply:
            if reply.status_code != 200:
                raise RequestFailedError(refusal("llama.cpp", await reply.aread()))
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                delta = self._delta(json.loads(line.removeprefix("data: ")), request.logprobs)
                if delta.ids or delta.finish:
                    yield delta
                if delta.finish:
                    return
        raise EngineStoppedError(generation.child.failure_reason or "llama.cpp ended an answer before it was complete.")

    def _body(self, generation: _Generation, request: Request, before: list[int]) -> dict[str, Any]:
        body = {
            "prompt": [*request.prompt_ids, *before],
            "n_predict": request.max_new_tokens - len(before),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "samplers": ["temperature", "top_p"],  # without the samplers that llama.cpp adds by default
            # It has 32 bits, and all ones (-1) mean a random seed.
            "seed": -1 if request.seed is None else (request.seed + len(before)) % (2**32 - 1),
            "lora": generation.scales(request.adapter),
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        if request.logit_bias:
            body["logit_bias"] = [list(pair) for pair in request.logit_bias]
        if request.logprobs is not None:
            body["n_probs"] = max(1, request.logprobs)  # 0 would report nothing
        if request.constraint is not None:
            # Where only one text can follow, llguidance forces its usual tokens. It does not know them here, since the
            # file has no merges, and would force single characters: the model chooses among all tokens of the text.
            body["grammar"] = f'%llguidance {{"no_forcing": true}}\n{request.constraint.rules}'
        return body

    def _delta(self, event: dict[str, Any], logprobs: int | None) -> Delta:
        if "error" in event:
            raise RequestFailedError(f"llama.cpp could not compute this request: {event['error'].get('message')}")
        ids = tuple(event["tokens"])
        if self._stop_ids.intersection(ids):
            (_,) = ids
            return Delta((), "stop")
        found = tuple(
            TokenLogprob(
                token["logprob"], tuple((top["id"], top["logprob"]) for top in token["top_logprobs"][:logprobs])
            )
            for token in event.get("completion_probabilities", ())
            if logprobs is not None
        )
        if not event["stop"]:
            return Delta(ids, None, found)
        finishes: dict[str, Finish] = {"limit": "length", "eos": "stop"}
        if event["stop_type"] not in finishes:
            raise RequestFailedError(f"llama.cpp ended this request early ({event['stop_type']}).")
        return Delta(ids, finishes[event["stop_type"]], found)


def cache_tokens(config: Mapping[str, Any], context: int, max_num_seqs: int) -> int:
    """Return the tokens of a small 16-bit key/value cache: a whole context or 2,048 for each row; 4 GiB at most."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    # Keys and values, of 2 bytes each.
    per_token: int = 2 * 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
    tokens = min(max(context, 2048 * max_num_seqs), (4 << 30) // per_token)
    assert tokens >= BLOCK, "no Llama takes 16 MB per token"
    return tokens // BLOCK * BLOCK


@dataclass(eq=False)
class CacheSlot:
    """A request's part of the cache: it may fill this many tokens."""

    adapter: str | None
    tokens: int
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class CacheSlots:
    """Slots in llama.cpp's key/value cache, given out for one adapter at a time, in one event loop.

    This is a constraint of llama.cpp, and no scheduling policy. It computes the requests of different adapters in
    separate passes, and takes the adapter of the first busy slot each time: a slot that is always busy would starve all
    other adapters. So adapters alternate. When all answers of one adapter have ended, the adapter that has waited
    longest is next, with all of its waiting requests. While others wait, no later request joins the running adapter.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows = rows
        self.tokens = tokens
        self.running: list[CacheSlot] = []
        self.waiting: deque[CacheSlot] = deque()

    @asynccontextmanager
    async def slot(self, adapter: str | None, tokens: int, *, resumed: bool = False) -> AsyncIterator[CacheSlot]:
        """Wait for a slot, and keep it for the block.

        Args:
            resumed: the request had given up its slot to make room, and is next in line.
        """
        assert tokens <= self.tokens
        slot = CacheSlot(adapter, tokens)
        (self.waiting.appendleft if resumed else self.waiting.append)(slot)
        self._admit()
        try:
            await slot.admitted
            yield slot
        finally:
            if slot in self.running:
                self.running.remove(slot)
            else:
                self.waiting.remove(slot)
            self._admit()

    def extend(self, slot: CacheSlot, tokens: int) -> bool:
        """Change a running request's tokens if there is room; return whether there was (alone it always has room)."""
        assert tokens <= self.tokens
        if tokens - slot.tokens > self._free:
            return False
        slot.tokens = tokens
        return True

    @property
    def _free(self) -> int:
        return self.tokens - sum(slot.tokens for slot in self.running)

    def _admit(self) -> None:
        while self.waiting:
            adapter = (self.running or self.waiting)[0].adapter
            if self.running and any(slot.adapter != adapter for slot in self.waiting):
                return
            if not self._admit_adapter(adapter):
                return

    def _admit_adapter(self, adapter: str | None) -> bool:
        """Admit an adapter's waiting requests in their order while there is room; return whether any were admitted."""
        admitted = False
        for slot in [slot for slot in self.waiting if slot.adapter == adapter]:
            if len(self.running) >= self.rows or slot.tokens > self._free:
                break
            self.waiting.remove(slot)
            self.running.append(slot)
            admitted = True
            if not slot.admitted.done():  # a cancelled request removes itself
                slot.admitted.set_result(None)
        return admitted
