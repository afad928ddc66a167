"""Conversations with functions, which every artifact has to render as training would."""

from __future__ import annotations

from collections.abc import Iterator

from tunewright.chat import ChatFormat
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id

_PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": 'Town\'s "name", e.g. Łódź'},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "unit": {"type": "string", "enum": ["°C", "°F"]},
    },
    "required": ["city"],
}
_DECLARED = canonical_json(
    [
        {"type": "function", "function": {"name": name, "description": text, "parameters": _PARAMETERS}}
        for name, text in (("weather", "Weather & temperature of a <place>."), ("clock_time", "d'été\n2nd line"))
    ]
)
_SYSTEM = "Be brief."


def function_conversations(chat: ChatFormat, system_prompt: str | None) -> tuple[tuple[Message, ...], ...]:
    """Return conversations with declarations, a call, parallel calls and results, as far as the format has forms.

    Args:
        chat: the format; it says whether a turn may have several calls, or text before its calls.
        system_prompt: system turn of the conversations. None: some have a system turn, others have none.

    Raises:
        UserError: the format has no form of functions.
    """
    declared = Message("tools", _DECLARED)
    _ = chat.tool_form  # refuse before any conversation is tried
    found = []
    for turns in _conversations(chat):
        for system in (_SYSTEM, None) if system_prompt is None else (system_prompt,):
            conversation = (declared, *([Message("system", system)] if system else []), *turns)
            try:
                chat.prompt(conversation)
            except UserError:
                continue  # no system turns, or one result a turn (Mistral v2)
            found.append(conversation)
    return tuple(found)


def _conversations(chat: ChatFormat) -> Iterator[tuple[Message, ...]]:
    """Return conversations that wait for an answer, without declarations and system turn."""
    asked = Message("user", "How warm is it?")
    called = (
        _called("", _call(0, "weather", city='Łódź "x" <&>', days=[1, 20])),
        Message("tool", '{"t": "12°C"}', call_id=call_id(0)),
    )
    answered = (asked, *called, Message("assistant", "12°C."), Message("user", "And there, d'été?"))
    yield (asked,)
    yield (asked, *called)
    yield answered
    if chat.tool_form.parallel:
        both = _called("", _call(1, "clock_time"), _call(2, "weather", city="Oslo", unit=None, more={"a": [1.5, True]}))
        results = (Message("tool", "18:00", call_id=call_id(1)), Message("tool", "4\n5", call_id=call_id(2)))
        yield (*answered, both, *results)
    if chat.tool_form.with_text:
        yield (
            asked,
            _called("Let me see.", _call(0, "clock_time", city="Oslo")),
            Message("tool", "8", call_id=call_id(0)),
        )


def _called(content: str, *calls: ToolCall) -> Message:
    return Message("assistant", content, calls=calls)


def _call(place: int, name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, canonical_json(arguments), call_id(place))
