"""Answers in OpenAI's shape: whole, or as the pieces of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunewright.serving.protocol import Usage


class Envelope(Protocol):
    """What all documents about one answer have in common."""

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """A whole answer."""

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""

    def piece(self, text: str) -> dict[str, Any]:
        """Some text of a streamed answer."""

    def end(self, finish: str) -> dict[str, Any]:
        """Why a streamed answer ended."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The piece after the last, for who asked for it."""


def _number() -> str:
    return uuid.uuid4().hex


def _now() -> int:
    return int(time.time())


@dataclass(frozen=True)
class ChatEnvelope:
    """Of ``/v1/chat/completions``."""

    model: str
    number: str = field(default_factory=_number)
    created: int = field(default_factory=_now)

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """A ``chat.completion``."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._document("chat.completion", [choice], usage=usage.as_dict())

    def opening(self) -> list[dict[str, Any]]:
        """The role."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, text: str) -> dict[str, Any]:
        """A ``chat.completion.chunk`` with text."""
        return self._chunk({"content": text})

    def end(self, finish: str) -> dict[str, Any]:
        """A ``chat.completion.chunk`` without."""
        return self._chunk({}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """A ``chat.completion.chunk`` without choices."""
        return self._document("chat.completion.chunk", [], usage=usage.as_dict())

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._document("chat.completion.chunk", [choice])

    def _document(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"chatcmpl-{self.number}", "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


@dataclass(frozen=True)
class CompletionEnvelope:
    """Of ``/v1/completions``, where whole answers and pieces look the same."""

    model: str
    number: str = field(default_factory=_number)
    created: int = field(default_factory=_now)

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """The text with its usage."""
        return self._document(text, finish, usage=usage.as_dict())

    def opening(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """Some text."""
        return self._document(text, None)

    def end(self, finish: str) -> dict[str, Any]:
        """No text, and why it ended."""
        return self._document("", finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """No choice."""
        return {**self._head(), "choices": [], "usage": usage.as_dict()}

    def _document(self, text: str, finish: str | None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return {**self._head(), "choices": [choice], **more}

    def _head(self) -> dict[str, Any]:
        named = {"id": f"cmpl-{self.number}", "object": "text_completion"}
        return {**named, "created": self.created, "model": self.model}
