"""The engine ``peft`` in a child process: a replica that has its own interpreter, threads and GPU, and may crash."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tunewright.adapters.registry import require_digest
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.engines.child import Child, Plan, socket_in
from tunewright.engines.protocol import (
    PREFILL_TOKENS,
    AdapterFailedError,
    ConstraintFailedError,
    Delta,
    EngineStoppedError,
    RequestFailedError,
    TokenSink,
    deliver_stream,
)
from tunewright.generation.requests import Request, TokenLogprob
from tunewright.serving.engines import peft_worker

_CRASHED = "The engine peft crashed and is restarting."


@dataclass(frozen=True)
class PeftSettings:
    """Settings of the child.

    Args:
        base: the base's folder.
        architecture: its class in transformers.
        dtype: "bfloat16" or "float32".
        quantization: "none" or "nf4".
        stop_ids, pad_id, max_num_seqs, context_length: see :class:`tunewright.serving.engines.peft.PeftEngine`.
        affixes: see :class:`tunewright.generation.constraints.GrammarCompiler`.
        variables: further environment variables, such as the GPU and the number of threads.
    """

    base: Path
    architecture: str
    dtype: str
    quantization: str
    stop_ids: tuple[int, ...]
    pad_id: int
    max_num_seqs: int
    context_length: int
    affixes: tuple[str, str] = ("", "")
    variables: Mapping[str, str] = field(default_factory=dict)

    def plan(self, folder: Path) -> Plan:
        """Return the plan of a child with this private folder, without any adapter."""
        settings = asdict(self) | {
            "base": str(self.base),
            "socket": str(socket_in(folder)),
            "adapters": str(_listing(folder)),
        }
        del settings["variables"]
        write_json(_listing(folder), {})
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **self.variables}
        command = [sys.executable, "-m", peft_worker.__name__, json.dumps(settings)]
        return Plan("The engine peft", command, variables, peft_worker.METRICS)


class PeftChild:
    """The embedded engine in a child process, which loads its adapters again when it restarts.

    Raises:
        UserError: the child failed to start.
    """

    name = "peft"
    unsupported: frozenset[str] = frozenset()
    prefill_tokens = PREFILL_TOKENS

    def __init__(self, settings: PeftSettings, reporter: Reporter) -> None:
        self.max_num_seqs = settings.max_num_seqs
        self.context_length = settings.context_length
        self._listed: dict[str, Path] = {}
        self._running = 0
        self.child = Child(settings.plan, lambda: self._running > 0, reporter)

    @property
    def stopped(self) -> str | None:
        """Reason why the engine answers no requests now; None while it does."""
        return self.child.failure_reason

    @property
    def permanently_stopped(self) -> bool:
        """True if the child has crashed too often to be restarted."""
        return self.child.given_up

    @property
    def restarts(self) -> int:
        """The number of restarts after a crash or a hang."""
        return max(0, self.child.starts - 1)

    @property
    def in_flight(self) -> tuple[int, int]:
        """The number of requests in the child, and of those above its rows, which wait there."""
        rows = min(self._running, self.max_num_seqs)
        return rows, self._running - rows

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:  # noqa: ARG002
        """Start a request: see :meth:`tunewright.engines.protocol.Engine.submit`.

        Nothing is kept from one request to the next, so the tenant makes no difference here.
        """
        return deliver_stream(self._stream(request), sink)

    async def load(self, digest: str, folder: Path) -> None:
        """Add an adapter.

        Raises:
            UserError: the files do not match the digest, or the adapter cannot share a batch.
            AdapterFailedError: the adapter could not be loaded.
            EngineStoppedError: the child crashed or is restarting.
        """
        if digest in self._listed:
            return
        await asyncio.to_thread(require_digest, folder, digest)
        # Listed first: a child that restarts now loads it, too.
        self._list({**self._listed, digest: folder})
        try:
            await self._change("/load", {"digest": digest, "folder": str(folder.absolute())})
        except BaseException:
            self._list({one: path for one, path in self._listed.items() if one != digest})
            raise

    async def unload(self, digest: str) -> None:
        """Free an adapter that no running request needs.

        Raises:
            AdapterFailedError: the adapter could not be freed.
            EngineStoppedError: the child crashed or is restarting; the adapter is off its list nevertheless.
        """
        folder = self._listed.get(digest)
        if folder is None:
            return
        self._list({one: path for one, path in self._listed.items() if one != digest})
        try:
            await self._change("/unload", {"digest": digest})
        except AdapterFailedError:
            self._list({**self._listed, digest: folder})
            raise

    def stop(self) -> None:
        """Stop the child; unfinished requests receive :class:`EngineStoppedError`."""
        self.child.stop()

    def _list(self, adapters: dict[str, Path]) -> None:
        self._listed = adapters
        if not self.child.stopping:
            write_json(_listing(self.child.folder), {digest: str(path.absolute()) for digest, path in adapters.items()})

    async def _stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        assert not request.stop, "the gateway handles stop strings"
        if self.stopped:
            raise EngineStoppedError(self.stopped)
        if request.adapter is not None and request.adapter not in self._listed:
            raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
        self._running += 1
        try:
            async with self.child.post("/generate", _body(request)) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    delta = _delta(json.loads(line))
                    yield delta
                    if delta.finish:
                        return
            raise EngineStoppedError(self.stopped or _CRASHED)
        except httpx.HTTPError as error:
            raise EngineStoppedError(self.stopped or _CRASHED) from error
        finally:
            self._running -= 1

    async def _change(self, route: str, body: Mapping[str, str]) -> None:
        """Change the child's adapters.

        Raises:
            UserError, AdapterFailedError, EngineStoppedError: as the engine in the child does.
        """
        if self.stopped:
            raise EngineStoppedError(self.stopped)
        try:
            async with self.child.post(route, body) as reply:
                failure = json.loads(await reply.aread())
        except httpx.HTTPError as error:
            raise EngineStoppedError(self.stopped or _CRASHED) from error
        if failure:
            raise _failure(failure)


def _listing(folder: Path) -> Path:
    """Return the list of adapters that the child loads when it starts."""
    return folder / "adapters.json"


def _body(request: Request) -> dict[str, Any]:
    """Return a request as JSON; the constraint as its rule, which the child compiles for the same tokenizer."""
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
    }


def _delta(event: dict[str, Any]) -> Delta:
    """Return a line of the child's answer.

    Raises:
        RequestFailedError, EngineStoppedError: the line is an error.
    """
    if "error" in event:
        raise _failure(event)
    logprobs = tuple(
        TokenLogprob(logprob, tuple((token, value) for token, value in top)) for logprob, top in event["logprobs"]
    )
    return Delta(tuple(event["ids"]), event["finish"], logprobs)


def _failure(event: Mapping[str, Any]) -> Exception:
    what = event["what"]
    kinds = (RequestFailedError, ConstraintFailedError, EngineStoppedError, AdapterFailedError)
    for kind in kinds:
        if event["error"] == kind.__name__:
            return kind(what)
    return UserError(what, where=event["where"], fix=event["fix"])
