"""Replies of an endpoint, each journalled as soon as it arrives, so that none is paid for twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import EndpointConfig
from tunewright.core.io import digest
from tunewright.core.log import journal, keep, read_journal

Message = dict[str, Any]
Conversation = tuple[Message, ...]

CHARACTERS_PER_TOKEN = 4
"""OpenAI's rule of thumb for English text, where the endpoint does not count tokens itself."""


def estimated_tokens(text: str) -> int:
    """Estimate the token count of ``text``."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class ChatRequest:
    """A conversation with parameters of its own, such as its functions.

    Equal requests are asked once; those of different ``sample`` numbers are sent alike and asked apart.
    """

    conversation: Conversation
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0

    @property
    def text(self) -> str:
        """Everything that counts as prompt tokens: contents, calls, and parameters such as functions."""
        parts = [str(message.get("content") or "") for message in self.conversation]
        parts += [json.dumps(message["tool_calls"]) for message in self.conversation if message.get("tool_calls")]
        parts += [json.dumps(dict(self.parameters), ensure_ascii=False)] if self.parameters else []
        return "".join(parts)


@dataclass(frozen=True)
class Reply:
    """The endpoint's answer to a conversation."""

    text: str
    finish: str | None
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    """The endpoint gave no token counts: they are guessed."""
    refused: str | None = None
    """Reason for refusing this one conversation; there is no text then, and it is asked again."""
    tool_calls: tuple[Any, ...] = ()
    """Function calls, as the endpoint wrote them."""
    model: str | None = None
    """The model's version, as the endpoint named it in the reply."""
    seconds: float | None = None
    """Time from sending the request to its whole reply, without earlier tries. None: a journal of an older version."""
    when: str | None = None
    """UTC, ISO 8601."""


def cost(endpoint: EndpointConfig, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Return the price of these tokens, or None if no prices are given."""
    if endpoint.price_input is None or endpoint.price_output is None:
        return None
    return (prompt_tokens * endpoint.price_input + completion_tokens * endpoint.price_output) / 1e6


class Journal:
    """Replies on disk, by a digest of everything that decides them: endpoint, model, parameters and conversation.

    A half-written line from a killed run is skipped, and its conversation is asked again.
    """

    def __init__(self, folder: Path, endpoint: EndpointConfig) -> None:
        self._asked: dict[str, Any] = {
            "url": endpoint.base_url,
            "model": endpoint.model,
            "parameters": endpoint.parameters,
        }
        self.path = folder / f"{digest(self._asked)[:16]}.jsonl"
        self.replies = dict(_read(self.path))

    def key(self, request: Conversation | ChatRequest) -> str:
        """Return the key of a reply to a request."""
        request = as_request(request)
        own: dict[str, Any] = {"own": dict(request.parameters)} if request.parameters else {}
        if request.sample:
            own["sample"] = request.sample
        return digest({**self._asked, **own, "messages": list(request.conversation)})

    def appending(self) -> AbstractContextManager[TextIO]:
        """Open the file for `keep`."""
        return journal(self.path)

    def keep(self, file: TextIO, key: str, reply: Reply) -> None:
        """Store a reply; refusals are not written to disk, since an endpoint may change its mind."""
        self.replies[key] = reply
        if reply.refused is None:
            keep(file, {"key": key, **asdict(reply)})


def as_request(request: Conversation | ChatRequest) -> ChatRequest:
    """Return the request; a conversation alone has no parameters of its own."""
    return request if isinstance(request, ChatRequest) else ChatRequest(request)


def _read(path: Path) -> Iterator[tuple[str, Reply]]:
    for row in read_journal(path):
        with suppress(KeyError, TypeError):  # a row of another form is asked again
            yield row.pop("key"), Reply(**{**row, "tool_calls": tuple(row.get("tool_calls", ()))})
