"""The texts of a message that are searched: its content, and keys and values inside of declarations and arguments.

Values are searched apart, so that a replaced one leaves valid JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tunewright.core.io import canonical_json
from tunewright.data.examples import Message


def message_texts(message: Message) -> list[tuple[str, str]]:
    """Return the texts, each with the key that names it ("" for none), since some secrets are recognised by it."""
    if message.role == "tools":
        return list(_texts(json.loads(message.content)))
    arguments = (text for call in message.calls for text in _texts(json.loads(call.arguments)))
    return [("", message.content), *arguments]


def with_texts(message: Message, texts: Sequence[str]) -> Message:
    """Return the message with other texts, in the order of ``message_texts``; a changed number becomes a text."""
    left = iter(texts)
    if message.role == "tools":
        return replace(message, content=canonical_json(_replaced(json.loads(message.content), left)))
    content = next(left)
    calls = tuple(
        replace(call, arguments=canonical_json(_replaced(json.loads(call.arguments), left))) for call in message.calls
    )
    return replace(message, content=content, calls=calls)


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield "", key
            yield from _texts(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, name)
    elif value is not None and not isinstance(value, bool):
        yield name, str(value)


def _replaced(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, dict):
        return {next(texts): _replaced(inner, texts) for inner in value.values()}
    if isinstance(value, list):
        return [_replaced(inner, texts) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    text = next(texts)
    return value if text == str(value) else text
