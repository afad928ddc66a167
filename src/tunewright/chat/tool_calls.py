"""Function calls in answers: the forms that chat templates write, and how they are read back.

Reading is exact: an answer that is not calls from its first mark to its end is text, regardless of its look.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from tunewright.chat.encoder import Piece
from tunewright.core.io import canonical_json
from tunewright.core.strict_json import strict_decoder
from tunewright.data.examples import Message, ToolCall, call_id

BUILTIN = frozenset({"brave_search", "wolfram_alpha"})
"""Functions that Llama 3.1 and 3.3 know by name and call as ``brave_search.call(query="…")``."""

MARKS = (
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<tool_call>",
    "</tool_call>",
)
# Half a surrogate pair stands for a mark that is a control token: no text contains one.
_SIGNS = {mark: chr(0xD800 + place) for place, mark in enumerate(MARKS)}

_FIRST_KEYS = ("name", "type", "description", "enum", "properties", "required", "items", "parameters")

Call = tuple[str, str]
"""A function's name and its arguments as canonical JSON."""


@lru_cache(maxsize=1024)
def _functions(content: str) -> tuple[Mapping[str, Any], ...]:
    functions = [tool["function"] for tool in json.loads(content)]
    return tuple(_order_keys({key: f[key] for key in f if key != "strict"}) for f in functions)


def declared_functions(messages: Sequence[Message]) -> tuple[Mapping[str, Any], ...]:
    """Return the functions that a conversation declares: name, description and parameters, in a fixed order of keys.

    Keywords come as makers' documentation writes them (name, description, …; type, description, enum, …); other
    keywords and all property names are sorted. ``strict`` is left out: it is for the server, not for the model.
    """
    return _functions(messages[0].content) if messages and messages[0].role == "tools" else ()


def _order_keys(value: Any, *, names: bool = False) -> Any:
    """Order the keys of declarations; ``names`` are property names."""
    if isinstance(value, list):
        return [_order_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)  # sorted, as canonical JSON is; sorting again would order stand-ins differently from their texts
    if not names:
        keys.sort(key=lambda key: _FIRST_KEYS.index(key) if key in _FIRST_KEYS else len(_FIRST_KEYS))
    return {key: _order_keys(value[key], names=key == "properties" and not names) for key in keys}


def is_builtin(function: Mapping[str, Any]) -> bool:
    """Return whether a declared function is a built-in function of Llama 3.1, which has one parameter, ``query``."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return function["name"] in BUILTIN and isinstance(properties, dict) and list(properties) == ["query"]


class CallForm(ABC):
    """A way to write calls into an answer; marks that are not ``control`` tokens are ordinary text."""

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    """The marks it uses; the first begins calls."""

    def __init__(self, control: Mapping[str, int]) -> None:
        self.control = {mark: control[mark] for mark in self.marks if mark in control}
        self.signs = {mark: _SIGNS[mark] if mark in self.control else mark for mark in self.marks}
        """Each mark as :func:`signed` writes it."""

    @abstractmethod
    def read(self, text: str) -> tuple[str, list[Call]] | None:
        """Return content and calls of an answer in :func:`signed` form; None if it is not well-formed calls."""


def signed(pieces: Iterable[Piece], names: Mapping[int, str]) -> str:
    """Return pieces of an answer as text for :meth:`CallForm.read`; control tokens that are not marks are left out."""
    return "".join(piece if isinstance(piece, str) else _SIGNS.get(names.get(piece, ""), "") for piece in pieces)


def without_signs(text: str) -> str:
    """Return the text without marks that are control tokens."""
    return "".join(character for character in text if not "\ud800" <= character <= "\udfff")


class Llama(CallForm):
    """Llama 3.1 to 3.3: the answer is one JSON object, or ``<|python_tag|>brave_search.call(query="…")``."""

    name = "Llama 3"
    marks = ("<|python_tag|>",)

    def read(self, text: str) -> tuple[str, list[Call]] | None:
        tag = self.signs["<|python_tag|>"]
        body = text.strip()
        tagged = body.startswith(tag)
        body = body.removeprefix(tag).strip()
        if tagged and (found := re.fullmatch(r'(\w+)\.call\(query="(.*)"\)', body, re.DOTALL)):
            if found[1] in BUILTIN and without_signs(found[2]) == found[2]:
                return "", [(found[1], canonical_json({"query": found[2]}))]
            return None
        call = call_at(body, 0, "parameters")
        return ("", [call[0]]) if call and call[1] == len(body) else None


class Llama4(CallForm):
    """Llama 4: the content between ``<|python_start|>`` and ``<|python_end|>``, then JSON objects."""

    name = "Llama 4"
    marks = ("<|python_start|>", "<|python_end|>")

    def read(self, text: str) -> tuple[str, list[Call]] | None:
        body = text.strip()
        content, end, rest = body.removeprefix(self.signs["<|python_start|>"]).partition(self.signs["<|python_end|>"])
        if not body.startswith(self.signs["<|python_start|>"]) or not end:
            return None
        calls, place = [], 0
        while place < len(rest):
            call = call_at(rest, place, "parameters")
            if call is None:
                return None
            calls.append(call[0])
            place = _skip_space(rest, call[1])
        return (content, calls) if calls and without_signs(content) == content else None


class MistralList(CallForm):
    """Mistral v2, v3 and v7: ``[TOOL_CALLS]`` and a JSON list, from v3 on with the calls' ids."""

    name = "Mistral v3"
    marks = ("[TOOL_CALLS]",)

    def read(self, text: str) -> tuple[str, list[Call]] | None:
        content, mark, rest = text.partition(self.signs["[TOOL_CALLS]"])
        if not mark:
            return None
        place = _skip_space(rest, 0)
        found = _json_at(rest, place)
        if found is None or not isinstance(found[0], list) or _skip_space(rest, found[1]) < len(rest):
            return None
        calls = [_call(item, "arguments", {"id"}) for item in found[0]]
        whole = [call for call in calls if call is not None]
        return (content, whole) if whole and len(whole) == len(calls) else None


class MistralArguments(CallForm):
    """Mistral from v11 on: ``[TOOL_CALLS]name[ARGS]{…}`` for each call, in v11 with ``[CALL_ID]id``."""

    name = "Mistral v11"
    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def read(self, text: str) -> tuple[str, list[Call]] | None:
        content, *parts = text.split(self.signs["[TOOL_CALLS]"])
        calls = []
        for part in parts:
            head, _, arguments = part.partition(self.signs["[ARGS]"])
            name = head.partition(self.signs["[CALL_ID]"])[0].strip()
            found = _json_at(arguments, _skip_space(arguments, 0))
            call = _call({"name": name, "arguments": found[0]}, "arguments") if found else None
            if found is None or call is None or _skip_space(arguments, found[1]) < len(arguments):
                return None
            calls.append(call)
        return (content, calls) if calls else None


class Hermes(CallForm):
    """Hermes: each call as a JSON object in ``<tool_call></tool_call>``, after the content."""

    name = "Hermes"
    marks = ("<tool_call>", "</tool_call>")

    def read(self, text: str) -> tuple[str, list[Call]] | None:
        mark = self.signs["<tool_call>"]
        place = text.find(mark)
        while place >= 0:
            calls, end = self._calls(text, place)
            if end == len(text):
                return text[:place].removesuffix("\n"), calls
            place = text.find(mark, max(end, place + 1))
        return None

    def _calls(self, text: str, place: int) -> tuple[list[Call], int]:
        """Return the calls from this place on, and the place after the last one."""
        begin, end = self.signs["<tool_call>"], self.signs["</tool_call>"]
        calls = []
        while text.startswith(begin, place):
            call = call_at(text, _skip_space(text, place + len(begin)), "arguments")
            after = _skip_space(text, call[1]) if call else place
            if call is None or not text.startswith(end, after):
                break
            calls.append(call[0])
            place = _skip_space(text, after + len(end))
        return calls, place


FORMS: tuple[type[CallForm], ...] = (Hermes, MistralArguments, MistralList, Llama4, Llama)


def numbered(calls: Sequence[Call], conversation: Sequence[Message]) -> tuple[ToolCall, ...]:
    """Return the calls of the next answer, with ids by their place in the conversation."""
    earlier = sum(len(message.calls) for message in conversation)
    return tuple(ToolCall(name, text, call_id(place)) for place, (name, text) in enumerate(calls, start=earlier))


def call_at(text: str, place: int, key: str, more: Collection[str] = ("type",)) -> tuple[Call, int] | None:
    """Return the call that a JSON object at this place spells, and the place after it.

    ``key`` is the key of the arguments, and the object may have ``more`` keys.
    """
    found = _json_at(text, place)
    call = _call(found[0], key, more) if found else None
    return (call, found[1]) if found and call else None


def _call(value: Any, key: str, more: Collection[str] = ()) -> Call | None:
    if not isinstance(value, dict) or not {"name", key} <= value.keys() <= {"name", key, *more}:
        return None
    name, arguments = value["name"], value[key]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        call = name, canonical_json(arguments)
        "".join(call).encode()
    except (ValueError, RecursionError):  # infinity, half a surrogate pair, or too deep
        return None
    return call


def _json_at(text: str, place: int) -> tuple[Any, int] | None:
    try:
        value, end = strict_decoder.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
    return value, end


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
