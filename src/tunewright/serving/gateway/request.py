"""One prompt on its way through the gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal

from tunewright.chat.call_stream import CallDelta
from tunewright.chat.tool_calls import Call
from tunewright.config import GatewayConfig
from tunewright.core import tracing
from tunewright.engines.protocol import (
    ConstraintFailedError,
    Delta,
    Engine,
    EngineStoppedError,
    Event,
    RequestFailedError,
)
from tunewright.generation.requests import Finish, Request, TokenLogprob
from tunewright.generation.text_stream import Decode, TextStream
from tunewright.serving.gateway.auth import Target
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.fair_scheduler import AdmissionQueue, Slot
from tunewright.serving.gateway.schemas import ChatRequest, RequestBody
from tunewright.serving.gateway.tools import AnswerReader, as_turn
from tunewright.serving.tenants.quota import Outcome, RequestUsage

SystemSource = Literal["adapter", "request", "none"]
"""The origin of a request's system message: the prompt that its adapter was trained with, or the request itself."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of an answer with its log probability.

    Args:
        offset: where its text begins in the answer's text.
        top: the likeliest tokens in its place with their log probabilities.
    """

    piece: bytes
    offset: int
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class TextChunk:
    """Some text of an answer; the last chunk has ``finish`` set and may be empty."""

    text: str
    finish: Finish | None
    scored: tuple[ScoredToken, ...] | None = None
    """The tokens whose text begins in this chunk; None if the request does not ask for log probabilities."""
    calls: tuple[CallDelta, ...] = ()
    """Pieces of calls."""
    reasoning: str = ""
    """Some text of the thinking before the answer."""


Failure = RequestFailedError | EngineStoppedError | ApiError
"""An error that ends a request."""


class GenerationRequest:
    """One prompt: the engine's request, and the sink of its tokens.

    The engine delivers tokens here, in the gateway's event loop. Each delivery is counted, decoded and emitted as
    text, without any task or queue in between. All times are of the monotonic clock.
    """

    def __init__(
        self,
        body: RequestBody,
        target: Target,
        engine_request: Request,
        stops: tuple[str, ...],
        *,
        decode: Decode,
        piece: Callable[[int], bytes],
        reader: AnswerReader | None = None,
        limits: GatewayConfig,
        tenant: str,
        arrived: float,
    ) -> None:
        self.body = body
        self.target = target
        self.engine_request = engine_request
        self.stops = stops
        self.tenant = tenant
        self.text = ""
        """The answer's text without its thinking and its calls."""
        self.reasoning = ""
        """The thinking before the answer."""
        self.tokens = 0
        self.outcome: Outcome = "disconnected"  # unless the answer ends in another way
        self._limits = limits
        self._stream = TextStream(decode, stops)
        self._piece = piece
        self._reader = reader
        self._sent = 0  # characters before calls
        self._unsent: list[ScoredToken] = []
        """Tokens whose text is held back."""
        self.scored: list[ScoredToken] | None = None if engine_request.logprobs is None else []
        self.arrived = arrived
        self._queued_at = arrived
        self._admitted_at: float | None = None
        self.first_token_at: float | None = None
        self._last_token_at: float | None = None
        self._slot: Slot | None = None
        self._emit: Callable[[TextChunk | Failure], None] = lambda _event: None
        self._ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.engine_request.prompt_ids)

    @property
    def system_source(self) -> SystemSource:
        """The origin of the system message."""
        return system_source(self.body, self.target.system_prompt)

    @property
    def waiting(self) -> bool:
        """True if it has no slot at the engine yet."""
        return self._admitted_at is None

    @property
    def finished(self) -> bool:
        """True if the answer is complete: ``text``, ``calls``, ``scored``, ``stop`` and ``finish``."""
        return self.outcome in ("stop", "length")

    @property
    def finish(self) -> Finish:
        """The reason why the complete answer ended."""
        assert self.outcome == "stop" or self.outcome == "length"
        return self.outcome

    def restart_queue_time(self) -> None:
        """Count the time in the queue from now: until now it was behind other prompts of its own HTTP request."""
        self._queued_at = time.monotonic()

    def emit_to(self, emit: Callable[[TextChunk | Failure], None]) -> None:
        """Set the receiver of the text: every chunk, and finally one with ``finish`` or an error."""
        self._emit = emit

    async def generate(self, engine: Engine, queue: AdmissionQueue) -> None:
        """Wait for a slot, submit the request to the engine, and keep the slot until it has ended.

        The slot is given back when the *engine* has ended, however slowly the client reads. Cancelling this coroutine
        aborts the request.
        """
        if self._ended.is_set():  # the request was aborted before it began
            return
        self._watch()
        try:
            async with AsyncExitStack() as held:
                with tracing.span("queue"):
                    self._slot = await held.enter_async_context(queue.slot(self.tenant, self.prompt_tokens))
                if self._ended.is_set():  # the request timed out in the queue
                    return
                self._admitted_at = time.monotonic()
                self._watch()
                facts: dict[str, tracing.Value | None] = {
                    "tunewright.engine": engine.name,
                    "tunewright.adapter": self.target.digest,
                    "gen_ai.usage.input_tokens": self.prompt_tokens,
                }
                # The engine sends the current span's id along, if it is another process that can trace.
                with tracing.span("engine", facts) as span:
                    abort = engine.submit(self.engine_request, self, tenant=self.tenant)
                    try:
                        await self._ended.wait()
                    finally:
                        abort()
                        span.set({"gen_ai.usage.output_tokens": self.tokens, "tunewright.outcome": self.outcome})
        finally:
            self._unwatch()

    def deliver(self, event: Event) -> None:
        """Take an event of the engine: see :class:`tunewright.engines.protocol.TokenSink`."""
        if self._ended.is_set():  # tokens that were on their way when a stop string or a timeout ended it
            return
        if not isinstance(event, Delta):
            self._end("failed", self._named(event))
            return
        assert self._slot is not None
        self._slot.record_tokens(len(event.ids))
        if event.ids:
            self._last_token_at = time.monotonic()
            if self.first_token_at is None:
                self.first_token_at = self._last_token_at
                self._watch()
        text = ""
        for place, token in enumerate(event.ids):
            self.tokens += 1
            if self.scored is not None:
                self._unsent.append(self._scored(token, event.logprobs[place]))
            if self._reader is not None:
                self._reader.push(token, self._stream.decoded)
            text += self._stream.push(token)
            if self._stream.stopped:
                break
        if event.finish and not self._stream.stopped:
            text += self._stream.flush()
        finish: Finish | None = "stop" if self._stream.stopped else event.finish
        reasoning, deltas = "", tuple[CallDelta, ...]()
        before_calls = self._reader is None or not self._reader.begun
        if self._reader is not None:
            reasoning, text, deltas = self._reader.read(text, finish)
        self.text += text
        self.reasoning += reasoning
        self._sent += len(text) if before_calls else 0
        if self.reasoning and self._reader is not None and before_calls:
            self._sent = self._reader.taken  # log probabilities are those of all tokens, thinking included
        if finish or text or deltas or reasoning:
            chunk = TextChunk(text, finish, self._sent_with(finish), deltas, reasoning)
            if finish:
                self._end(finish, chunk)
            else:
                self._emit(chunk)

    @property
    def thinking_tokens(self) -> int:
        """Tokens of the thinking so far."""
        return 0 if self._reader is None else self._reader.thinking_tokens

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls so far."""
        return () if self._reader is None else self._reader.calls

    @property
    def stop(self) -> str | None:
        """The request's own stop string that ended the answer; None means that it ended otherwise."""
        return self._stream.stop if self._stream.stop in (self.body.stop or ()) else None

    @property
    def recorded(self) -> str:
        """The whole answer as one text: one line of JSON for each call."""
        return as_turn(self.text, self.calls).text

    @property
    def answer(self) -> dict[str, Any]:
        """The answer so far as JSON, with the reason why it ended."""
        answer: dict[str, Any] = {"content": self.text, "finish": self.outcome}
        if self.reasoning:
            answer["reasoning_content"] = self.reasoning
        if self.calls:
            answer["tool_calls"] = [{"name": name, "arguments": arguments} for name, arguments in self.calls]
        return answer

    def _scored(self, token: int, found: TokenLogprob) -> ScoredToken:
        top = tuple((self._piece(likely), logprob) for likely, logprob in found.top[: self.engine_request.logprobs])
        return ScoredToken(self._piece(token), self._stream.decoded, found.logprob, top)

    def _sent_with(self, finish: Finish | None) -> tuple[ScoredToken, ...] | None:
        """Return the tokens whose text begins in the text sent so far; at the end also tokens without text."""
        if self.scored is None:
            return None
        whole = finish is not None and not self._stream.stopped and not self.calls
        sent = tuple(each for each in self._unsent if whole or each.offset < self._sent)
        self._unsent = self._unsent[len(sent) :]
        self.scored += sent
        return sent

    def _named(self, failure: RequestFailedError | EngineStoppedError) -> Failure:
        """Return the failure; an answer's constraint that turned out too complex is the client's fault."""
        if isinstance(failure, ConstraintFailedError):
            own = "tools" if isinstance(self.body, ChatRequest) and self.body.may_call else "model"
            param = own if self.body.form is None else self.body.form.param
            return ApiError(f"{param} is too complex: {failure}.", param=param, code="constraint_too_complex")
        return failure

    def fail(self, error: ApiError) -> None:
        """End the request with an error, after the text that was computed so far."""
        if not self._ended.is_set():
            self._end("failed", error)

    def usage(self) -> RequestUsage:
        """Return the request's usage so far."""
        now = time.monotonic()
        return RequestUsage(
            prompt_tokens=0 if self._admitted_at is None else self.prompt_tokens,
            completion_tokens=self.tokens,
            queued_s=(self._admitted_at or now) - self.arrived,
            first_token_s=None if self.first_token_at is None else self.first_token_at - self.arrived,
            total_s=now - self.arrived,
            outcome=self.outcome,
        )

    def _end(self, outcome: Outcome, event: TextChunk | Failure) -> None:
        self.outcome = outcome
        self._ended.set()
        self._unwatch()
        self._emit(event)

    def _watch(self) -> None:
        """Set the timer for the next deadline.

        A further token only moves the deadline. The timer finds that out when it rings, so no token
        pays for setting a timer.
        """
        self._unwatch()
        loop, (at, error) = asyncio.get_running_loop(), self._deadline()
        if loop.time() >= at:
            self._end("timed out", error)
        else:
            self._timer = loop.call_at(at, self._watch)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _deadline(self) -> tuple[float, ApiError]:
        """Return the time of the next deadline, and the response: 503 (retry) if the engine has not begun, else 504."""
        limits = self._limits
        message = f"Timed out: the answer took over {limits.total_timeout_s:g} s."
        total = self.arrived + limits.total_timeout_s, ApiError(message, status=504, code="total_timeout")
        if self._admitted_at is None:
            message = f"Timed out after {limits.queue_timeout_s:g} s in the queue."
            error = ApiError(message, status=503, code="queue_timeout", headers={"Retry-After": "1"})
            stage = self._queued_at + limits.queue_timeout_s, error
        elif self._last_token_at is None:
            message = f"Timed out after {limits.first_token_timeout_s:g} s without a first token."
            error = ApiError(message, status=504, code="first_token_timeout")
            stage = self._admitted_at + limits.first_token_timeout_s, error
        else:
            message = f"Timed out after {limits.inter_token_timeout_s:g} s without a further token."
            error = ApiError(message, status=504, code="idle_timeout")
            stage = self._last_token_at + limits.inter_token_timeout_s, error
        return min(stage, total, key=lambda deadline: deadline[0])


def system_source(body: RequestBody, system_prompt: str | None) -> SystemSource:
    """Return the origin of a request's system message if its adapter was trained with ``system_prompt``.

    A text to continue has no messages, so nothing is put before it.
    """
    if not isinstance(body, ChatRequest):
        return "none"
    if any(message.role == "system" for message in body.messages):
        return "request"
    return "none" if system_prompt is None else "adapter"
