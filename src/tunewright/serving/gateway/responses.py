"""Responses in OpenAI's format, complete or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunewright.generation.requests import Finish
from tunewright.serving.gateway.schemas import Usage

Answer = tuple[str, Finish]


class ResponseFormat(Protocol):
    """The documents of one response, which share an id."""

    def response(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return the complete response: a choice for each answer."""

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks that a stream begins with."""

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        """Return a chunk with some text of a choice."""

    def finish_chunk(self, index: int, finish: Finish) -> dict[str, Any]:
        """Return the last chunk of a choice, with its finish reason."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk with the usage, which has no choices."""


def _new_id() -> str:
    return uuid.uuid4().hex


def _now() -> int:
    return int(time.time())


@dataclass(frozen=True)
class ChatCompletionResponse:
    """The format of ``/v1/chat/completions``, where a request has one choice."""

    model: str
    id: str = field(default_factory=_new_id)
    created: int = field(default_factory=_now)

    def response(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return a ``chat.completion``."""
        choices = []
        for index, (text, finish) in enumerate(answers):
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": finish})
        return self._document("chat.completion", choices, usage=usage.as_dict())

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return a chunk with the role."""
        return [self._chunk(0, {"role": "assistant", "content": ""})]

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` with text."""
        return self._chunk(index, {"content": text})

    def finish_chunk(self, index: int, finish: Finish) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` without text."""
        return self._chunk(index, {}, finish)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` without choices."""
        return self._document("chat.completion.chunk", [], usage=usage.as_dict())

    def _chunk(self, index: int, delta: dict[str, str], finish: Finish | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._document("chat.completion.chunk", [choice])

    def _document(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


@dataclass(frozen=True)
class CompletionResponse:
    """The format of ``/v1/completions``, where chunks have the shape of complete responses."""

    model: str
    id: str = field(default_factory=_new_id)
    created: int = field(default_factory=_now)

    def response(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return a ``text_completion`` with all texts."""
        choices = [_choice(index, text, finish) for index, (text, finish) in enumerate(answers)]
        return self._document(choices, usage=usage.as_dict())

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return no chunks."""
        return []

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        """Return a ``text_completion`` with text."""
        return self._document([_choice(index, text, None)])

    def finish_chunk(self, index: int, finish: Finish) -> dict[str, Any]:
        """Return a ``text_completion`` with the finish reason."""
        return self._document([_choice(index, "", finish)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return a ``text_completion`` without choices."""
        return self._document([], usage=usage.as_dict())

    def _document(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"cmpl-{self.id}", "object": "text_completion", "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


def _choice(index: int, text: str, finish: Finish | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
