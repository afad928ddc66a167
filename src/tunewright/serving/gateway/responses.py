"""HTTP responses: documents in OpenAI's format, and events of a stream; bodies are read and clients watched in time."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tunewright.chat.call_stream import CallDelta
from tunewright.chat.tool_calls import Call
from tunewright.engines.protocol import EngineStoppedError, RequestFailedError
from tunewright.generation.requests import Finish
from tunewright.serving.gateway.errors import ApiError, as_api_error
from tunewright.serving.gateway.request import GenerationRequest, ScoredToken, TextChunk
from tunewright.serving.gateway.request_handler import RequestHandler
from tunewright.serving.gateway.schemas import ChatRequest, CompletionRequest, TokenUsage

Document = dict[str, Any]


class ResponseFormat(Protocol):
    """The documents of one response, which share an id."""

    @property
    def response_id(self) -> str:
        """The id, as the client receives it."""

    @property
    def end(self) -> str:
        """The last event of a stream."""

    def response(self, answers: Sequence[GenerationRequest], usage: TokenUsage) -> Document:
        """Return the complete response: a choice for each answer."""

    def first_chunks(self, usage: TokenUsage) -> list[Document]:
        """Return the chunks that a stream begins with; the usage has only the prompt's tokens."""

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:
        """Return the chunks with some text of a choice."""

    def reasoning_chunk(self, index: int, text: str) -> list[Document]:
        """Return the chunks with some text of a choice's thinking; empty in formats that leave it out."""

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:
        """Return the chunks with a piece of a choice's call."""

    def finish_chunks(self, index: int, answer: GenerationRequest) -> list[Document]:
        """Return the last chunks of a choice, with its finish reason."""

    def last_chunks(self, usage: TokenUsage) -> list[Document]:
        """Return the chunks that follow all choices."""

    def error_chunk(self, error: ApiError) -> Document:
        """Return the chunk that ends a stream with an error."""


def new_id() -> str:
    """Return a random id."""
    return uuid.uuid4().hex


def now() -> int:
    """Return the time of a response, in seconds since 1970."""
    return int(time.time())


@dataclass(frozen=True)
class _OpenAIResponse:
    """Common to both routes; ``body`` is the request."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    body: ChatRequest | CompletionRequest
    id: str = field(default_factory=new_id)
    created: int = field(default_factory=now)
    end: str = "data: [DONE]\n\n"

    @property
    def response_id(self) -> str:
        return f"{self.prefix}-{self.id}"

    def last_chunks(self, usage: TokenUsage) -> list[Document]:
        """Return a chunk with the usage and without choices, if the request asks for it."""
        return [self._document([], usage=usage.as_dict(), chunk=True)] if self.body.include_usage else []

    def error_chunk(self, error: ApiError) -> Document:
        """Return the error as in a response."""
        return error.body

    def _document(self, choices: list[Document], *, chunk: bool = False, **more: Any) -> Document:
        kind = self.chunk_kind if chunk else self.kind
        head = {"id": self.response_id, "object": kind, "created": self.created, "model": self.body.model}
        tier = {} if self.body.service_tier is None else {"service_tier": "default"}
        return {**head, "choices": choices, **more, **tier}


class ChatCompletionResponse(_OpenAIResponse):
    """The format of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def response(self, answers: Sequence[GenerationRequest], usage: TokenUsage) -> Document:
        choices = [
            {
                "index": index,
                "message": _message(answer),
                "logprobs": _chat_logprobs(answer.scored),
                "finish_reason": _finish_reason(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return self._document(choices, usage=usage.as_dict())

    def first_chunks(self, usage: TokenUsage) -> list[Document]:  # noqa: ARG002 - it comes last
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.body.choices)]

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:
        return [self._chunk(index, {"content": chunk.text}, chunk.scored)]

    def reasoning_chunk(self, index: int, text: str) -> list[Document]:
        """Return a ``chat.completion.chunk`` in the form of DeepSeek's API and vLLM's."""
        return [self._chunk(index, {"reasoning_content": text})]

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:
        """Return a ``chat.completion.chunk`` with a call's id and name, or with a piece of its arguments."""
        if delta.name is None:
            return [
                self._chunk(index, {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]})
            ]
        return [self._chunk(index, {"tool_calls": [{"index": delta.index, **_call((delta.name, delta.arguments))}]})]

    def finish_chunks(self, index: int, answer: GenerationRequest) -> list[Document]:
        return [self._chunk(index, {}, finish=_finish_reason(answer))]

    def _chunk(
        self,
        index: int,
        delta: Document,
        scored: Sequence[ScoredToken] | None = None,
        finish: str | None = None,
    ) -> Document:
        choice = {"index": index, "delta": delta, "logprobs": _chat_logprobs(scored), "finish_reason": finish}
        return self._document([choice], chunk=True)


def _message(answer: GenerationRequest) -> Document:
    message: Document = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message |= {"content": answer.text or None, "tool_calls": [_call(call) for call in answer.calls]}
    return message


def _call(call: Call) -> Document:
    """Return a call with a new id: the model's own ids are places, and repeat in each conversation."""
    function = dict(zip(("name", "arguments"), call, strict=True))
    return {"id": f"call_{new_id()[:24]}", "type": "function", "function": function}


def _finish_reason(answer: GenerationRequest) -> str:
    return "tool_calls" if answer.calls and answer.finish == "stop" else answer.finish


class CompletionResponse(_OpenAIResponse):
    """The format of ``/v1/completions``, where chunks have the shape of complete responses."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def response(self, answers: Sequence[GenerationRequest], usage: TokenUsage) -> Document:
        choices = [_choice(index, each.text, each.finish, each.scored) for index, each in enumerate(answers)]
        return self._document(choices, usage=usage.as_dict())

    def first_chunks(self, usage: TokenUsage) -> list[Document]:  # noqa: ARG002 - it comes last
        return []

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:
        return [self._document([_choice(index, chunk.text, None, chunk.scored)])]

    def reasoning_chunk(self, index: int, text: str) -> list[Document]:
        """Return nothing: this route has no chat template, and so no thinking."""
        raise AssertionError(f"a completion has no thinking: {index}, {text}")

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:
        """Return nothing: this route has no functions."""
        raise AssertionError(f"a completion has no calls: {index}, {delta}")

    def finish_chunks(self, index: int, answer: GenerationRequest) -> list[Document]:
        return [self._document([_choice(index, "", answer.finish, None)])]


def _choice(index: int, text: str, finish: Finish | None, scored: Sequence[ScoredToken] | None) -> Document:
    return {"index": index, "text": text, "logprobs": _completion_logprobs(scored), "finish_reason": finish}


def _chat_logprobs(scored: Sequence[ScoredToken] | None) -> Document | None:
    if scored is None:
        return None
    return {
        "content": [
            {
                **_token(token.piece, token.logprob),
                "top_logprobs": [_token(piece, logprob) for piece, logprob in token.top],
            }
            for token in scored
        ],
        "refusal": None,
    }


def _token(piece: bytes, logprob: float) -> Document:
    return {"token": _text(piece), "bytes": list(piece), "logprob": logprob}


def _completion_logprobs(scored: Sequence[ScoredToken] | None) -> Document | None:
    if scored is None:
        return None
    return {
        "tokens": [_text(token.piece) for token in scored],
        "token_logprobs": [token.logprob for token in scored],
        # The likeliest tokens and the chosen one.
        "top_logprobs": [
            {_text(piece): logprob for piece, logprob in [(token.piece, token.logprob), *token.top]} for token in scored
        ],
        "text_offset": [token.offset for token in scored],
    }


def _text(piece: bytes) -> str:
    """Return a token's text; U+FFFD for a part of a character."""
    return piece.decode(errors="replace")


T = TypeVar("T")

FLUSH_SECONDS = 5.0
"""Time for a client to read the error that ends a stream, after its deadline."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would create one for each event

_CLOSE = {"Connection": "close"}
"""The rest of the body is not read."""


async def read_body(http: HttpRequest, limit: int, seconds: float) -> bytes:
    """Return the request's body."""
    body = b""
    try:
        async with asyncio.timeout(seconds):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limit:
                    message = f"Request body too large (limit {limit} bytes)."
                    raise ApiError(message, status=413, code="body_too_large", headers=_CLOSE)
    except TimeoutError:
        message = f"Timed out after {seconds:g} s waiting for the request body."
        raise ApiError(message, status=408, code="body_timeout", headers=_CLOSE) from None
    except ClientDisconnect:
        raise ApiError("The client disconnected.", status=499, code="client_disconnected") from None
    return body


async def cancel_on_disconnect(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """Return the work's result; if the client disconnects first, cancel the work and return None."""

    async def disconnect() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


class EventStreamResponse(StreamingResponse):
    """A response of server-sent events.

    Args:
        until: when the client must have read it all, by the event loop's clock. Slower clients are disconnected.
        on_end: called at the end, even if the response was never started.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        headers: dict[str, str],
        *,
        until: float,
        on_end: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._until = until
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events), asyncio.timeout_at(self._until):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return  # the server closes the connection, so that an answer without its end does not look complete
        finally:
            await self._on_end()


async def sse_events(
    first: tuple[int, TextChunk],
    rest: AsyncGenerator[tuple[int, TextChunk], None],
    handler: RequestHandler,
    response_format: ResponseFormat,
) -> AsyncGenerator[str, None]:
    """Yield the answers as server-sent events; an error in between is the last event.

    Events available at the same moment are yielded together, since sending costs more than encoding.
    """
    documents = response_format.first_chunks(TokenUsage(handler.token_usage.prompt_tokens, 0))
    unfinished = len(handler.requests)
    try:
        item: tuple[int, TextChunk] | None = first
        while item is not None:
            index, chunk = item
            if chunk.reasoning:
                documents += response_format.reasoning_chunk(index, chunk.reasoning)
            if chunk.text or chunk.scored:
                documents += response_format.text_chunk(index, chunk)
            for delta in chunk.calls:
                documents += response_format.call_chunk(index, delta)
            if chunk.finish:
                documents += response_format.finish_chunks(index, handler.requests[index])
                unfinished -= 1
            if not unfinished:
                documents += response_format.last_chunks(handler.token_usage)
            yield "".join(map(_sse, documents)) + ("" if unfinished else response_format.end)
            documents = []
            item = await anext(rest, None)
    except (ApiError, RequestFailedError, EngineStoppedError) as error:
        yield _sse(response_format.error_chunk(as_api_error(error)))


def _sse(document: dict[str, Any]) -> str:
    """Return an event; an event with a type (of responses and messages) is also named by the type."""
    name = f"event: {document['type']}\n" if "type" in document else ""
    return f"{name}data: {_ENCODER.encode(document)}\n\n"
