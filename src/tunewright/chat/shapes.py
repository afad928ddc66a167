"""Ordinary conversations of the same shape, whose control tokens a conversation must have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from tunewright.chat.tool_calls import declared_functions, is_builtin
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, Role

Shape = tuple[Message, ...]

PROBES: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)
"""Roles of conversations that show a template's control tokens."""


def of_roles(roles: Sequence[Role]) -> Shape:
    """Return an ordinary conversation of these roles."""
    return tuple(Message(role, "x") for role in roles)


def shape_of(messages: Sequence[Message]) -> Shape:
    """Return an ordinary conversation of the same shape: roles, calls of each turn and functions.

    Functions and calls stay that Llama's templates render in a form of their own.
    """
    builtin = {f["name"] for f in declared_functions(messages) if is_builtin(f)}
    return tuple(_ordinary(message, builtin) for message in messages)


def _ordinary(message: Message, builtin: set[str]) -> Message:
    if message.role == "tools":
        return Message("tools", _ordinary_functions(message.content))
    if not message.calls:
        return Message(message.role, "x", call_id=message.call_id)
    calls = tuple(
        replace(call, arguments='{"query":"x"}')
        if call.name in builtin
        else replace(call, name="x", arguments='{"x":"x"}')
        for call in message.calls
    )
    return Message(message.role, "x" if message.content else "", calls=calls)


@lru_cache(maxsize=1024)
def _ordinary_functions(content: str) -> str:
    functions = declared_functions([Message("tools", content)])
    return declarations(f["name"] if is_builtin(f) else "x" for f in functions)


def declarations(names: Iterable[str]) -> str:
    """Return declarations of functions with these names and one parameter, as a message of role ``tools`` has them."""
    return canonical_json(
        [
            {"type": "function", "function": {"name": name, "description": "x", "parameters": _PARAMETERS}}
            for name in names
        ]
    )


_PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}
