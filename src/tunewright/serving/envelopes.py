"""Answers in OpenAI's shape: whole, or as the pieces of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunewright.generation.requests import Finish
from tunewright.serving.protocol import Usage

Answer = tuple[str, Finish]


class Envelope(Protocol):
    """What all documents about one answer have in common."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return a whole answer: a choice for each text."""

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Some text of a streamed choice."""

    def end(self, index: int, finish: Finish) -> dict[str, Any]:
        """Return why a streamed choice ended."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the piece after the last, for who asked for it."""


def _number() -> str:
    return uuid.uuid4().hex


def _now() -> int:
    return int(time.time())


@dataclass(frozen=True)
class ChatEnvelope:
    """Of ``/v1/chat/completions``, where a request has one choice."""

    model: str
    number: str = field(default_factory=_number)
    created: int = field(default_factory=_now)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return a ``chat.completion``."""
        choices = []
        for index, (text, finish) in enumerate(answers):
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": finish})
        return self._document("chat.completion", choices, usage=usage.as_dict())

    def opening(self) -> list[dict[str, Any]]:
        """Return the role."""
        return [self._chunk(0, {"role": "assistant", "content": ""})]

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` with text."""
        return self._chunk(index, {"content": text})

    def end(self, index: int, finish: Finish) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` without."""
        return self._chunk(index, {}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` without choices."""
        return self._document("chat.completion.chunk", [], usage=usage.as_dict())

    def _chunk(self, index: int, delta: dict[str, str], finish: Finish | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
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

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return the texts with their usage."""
        choices = [_choice(index, text, finish) for index, (text, finish) in enumerate(answers)]
        return self._document(choices, usage=usage.as_dict())

    def opening(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Some text."""
        return self._document([_choice(index, text, None)])

    def end(self, index: int, finish: Finish) -> dict[str, Any]:
        """No text, and why it ended."""
        return self._document([_choice(index, "", finish)])

    def usage(self, usage: Usage) -> dict[str, Any]:
        """No choice."""
        return self._document([], usage=usage.as_dict())

    def _document(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"cmpl-{self.number}", "object": "text_completion", "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


def _choice(index: int, text: str, finish: Finish | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
