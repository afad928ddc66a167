"""Responses in OpenAI's format, complete or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from tunewright.chat.call_stream import CallDelta
from tunewright.chat.tool_calls import Call
from tunewright.generation.requests import Finish
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.request import ScoredToken, TextChunk
from tunewright.serving.gateway.schemas import ChatRequest, CompletionRequest, Usage

Document = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One complete answer.

    Args:
        scored: None if the request does not ask for log probabilities.
        stop: the request's stop string that ended it.
    """

    text: str
    finish: Finish
    scored: tuple[ScoredToken, ...] | None = None
    calls: tuple[Call, ...] = ()
    stop: str | None = None


class ResponseFormat(Protocol):
    """The documents of one response, which share an id."""

    @property
    def end(self) -> str:
        """The last event of a stream."""

    def response(self, answers: Sequence[Answer], usage: Usage) -> Document:
        """Return the complete response: a choice for each answer."""

    def first_chunks(self, usage: Usage) -> list[Document]:
        """Return the chunks that a stream begins with; the usage has the prompt's tokens alone."""

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:
        """Return the chunks with some text of a choice."""

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:
        """Return the chunks with a piece of a choice's call."""

    def finish_chunks(self, index: int, answer: Answer) -> list[Document]:
        """Return the last chunks of a choice, with its finish reason."""

    def last_chunks(self, usage: Usage) -> list[Document]:
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

    def last_chunks(self, usage: Usage) -> list[Document]:
        """Return a chunk with the usage and without choices, if the request asks for it."""
        return [self._document([], usage=usage.as_dict(), chunk=True)] if self.body.include_usage else []

    def error_chunk(self, error: ApiError) -> Document:
        """Return the error as in a response."""
        return error.body

    def _document(self, choices: list[Document], *, chunk: bool = False, **more: Any) -> Document:
        kind = self.chunk_kind if chunk else self.kind
        head = {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.body.model}
        tier = {} if self.body.service_tier is None else {"service_tier": "default"}
        return {**head, "choices": choices, **more, **tier}


class ChatCompletionResponse(_OpenAIResponse):
    """The format of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def response(self, answers: Sequence[Answer], usage: Usage) -> Document:
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

    def first_chunks(self, usage: Usage) -> list[Document]:  # noqa: ARG002 - it comes last
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.body.choices)]

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:
        return [self._chunk(index, {"content": chunk.text}, chunk.scored)]

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:
        """Return a ``chat.completion.chunk`` with a call's id and name, or with a piece of its arguments."""
        if delta.name is None:
            return [
                self._chunk(index, {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]})
            ]
        return [self._chunk(index, {"tool_calls": [{"index": delta.index, **_call((delta.name, delta.arguments))}]})]

    def finish_chunks(self, index: int, answer: Answer) -> list[Document]:
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


def _message(answer: Answer) -> Document:
    message: Document = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.calls:
        message |= {"content": answer.text or None, "tool_calls": [_call(call) for call in answer.calls]}
    return message


def _call(call: Call) -> Document:
    """Return a call with a new id: the model's own ids are places, and repeat in each conversation."""
    function = dict(zip(("name", "arguments"), call, strict=True))
    return {"id": f"call_{new_id()[:24]}", "type": "function", "function": function}


def _finish_reason(answer: Answer) -> str:
    return "tool_calls" if answer.calls and answer.finish == "stop" else answer.finish


class CompletionResponse(_OpenAIResponse):
    """The format of ``/v1/completions``, where chunks have the shape of complete responses."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def response(self, answers: Sequence[Answer], usage: Usage) -> Document:
        choices = [_choice(index, each.text, each.finish, each.scored) for index, each in enumerate(answers)]
        return self._document(choices, usage=usage.as_dict())

    def first_chunks(self, usage: Usage) -> list[Document]:  # noqa: ARG002 - it comes last
        return []

    def text_chunk(self, index: int, chunk: TextChunk) -> list[Document]:
        return [self._document([_choice(index, chunk.text, None, chunk.scored)])]

    def call_chunk(self, index: int, delta: CallDelta) -> list[Document]:
        """Return nothing: this route has no functions."""
        raise AssertionError(f"a completion has no calls: {index}, {delta}")

    def finish_chunks(self, index: int, answer: Answer) -> list[Document]:
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
