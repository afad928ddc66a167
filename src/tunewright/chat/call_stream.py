"""Function calls in an answer while it is generated: names as soon as they are complete, arguments in pieces.

A call is certain once its function's name is complete and its arguments begin. From there on it stays a
call, as in OpenAI's API, regardless of what follows; :meth:`tunewright.chat.tool_calls.CallForm.read` reads
whole answers and accepts only calls that are well-formed to their end. Both agree on well-formed calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import regex

from tunewright.chat.tool_calls import (
    BUILTIN,
    Call,
    CallForm,
    Hermes,
    Llama,
    Llama4,
    MistralArguments,
    MistralList,
    call_at,
    without_signs,
)
from tunewright.core.io import canonical_json

# Bounded, so that the beginning of a call is matched again and again at a bounded cost.
_SPACE = r"\s{0,99}"
_MORE = rf'"(?:id|type)"{_SPACE}:{_SPACE}"[^"]{{0,99}}"'
_BUILTIN = "|".join(sorted(BUILTIN))

_compiled = partial(regex.compile, flags=regex.DOTALL)


@dataclass(frozen=True)
class CallDelta:
    """A piece of an answer's call: the first has the function's name, later pieces have text of its arguments."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True)
class _Syntax:
    """The patterns of a form of calls."""

    key: str  # the key of the arguments
    opening: str | None  # the mark that begins calls; None means that the answer begins with calls or has none
    first: regex.Pattern[str]  # the beginning of the first call, up to the brace of its arguments
    next: regex.Pattern[str] | None  # the beginning of a further call; None: an answer has at most one call
    tail: regex.Pattern[str]  # the text after the arguments of each call
    close: regex.Pattern[str] | None = None  # the text after all calls
    before: str = ""  # white space between a text and the mark


def _syntax(form: CallForm) -> _Syntax:
    mark = {text: regex.escape(sign) for text, sign in form.signs.items()}
    key = "parameters" if isinstance(form, Llama | Llama4) else "arguments"
    name = rf'"name"{_SPACE}:{_SPACE}(?P<name>"(?:[^"\\]|\\.){{1,256}}")'
    comma = f"{_SPACE},{_SPACE}"
    head = (
        rf"(?P<object>\{{){_SPACE}(?:(?:{_MORE}{comma})*{name}{comma}(?:{_MORE}{comma})*"
        rf'"{key}"{_SPACE}:{_SPACE}\{{|(?P<whole>"{key}"{_SPACE}:))'
    )
    tail = rf"(?:{comma}{_MORE})*{_SPACE}\}}"
    opening = form.signs[form.marks[0]]
    if isinstance(form, Hermes):
        first = f"{mark['<tool_call>']}{_SPACE}{head}"
        end = f"{tail}{_SPACE}{mark['</tool_call>']}"
        return _Syntax(key, opening, _compiled(first), _compiled(_SPACE + first), _compiled(end), before="\n")
    if isinstance(form, MistralList):
        first = rf"{mark['[TOOL_CALLS]']}{_SPACE}\[{_SPACE}{head}"
        following, close = _compiled(comma + head), _compiled(rf"{_SPACE}\]")
        return _Syntax(key, opening, _compiled(first), following, _compiled(tail), close)
    if isinstance(form, MistralArguments):
        first = (
            rf"{mark['[TOOL_CALLS]']}\s?(?P<plain>[^\ud800-\udfff\[\]{{}}\s]{{1,256}}){_SPACE}"
            rf"(?:{mark['[CALL_ID]']}[^\ud800-\udfff\[\]]{{0,99}})?{mark['[ARGS]']}{_SPACE}\{{"
        )
        return _Syntax(key, opening, _compiled(first), _compiled(_SPACE + first), _compiled(""))
    if isinstance(form, Llama4):
        # Text before this mark is content, and so is an answer without the mark.
        end = mark["<|python_end|>"]
        first = f"{end}{_SPACE}{head}"
        return _Syntax(key, form.signs["<|python_end|>"], _compiled(first), _compiled(_SPACE + head), _compiled(tail))
    assert isinstance(form, Llama)
    tag = mark["<|python_tag|>"]
    first = rf'{_SPACE}(?:{tag}{_SPACE}(?P<builtin>{_BUILTIN})\.call\(query="|(?:{tag})?{_SPACE}{head})'
    return _Syntax(key, None, _compiled(first), None, _compiled(tail))


class CallStream:
    """Splits one answer into content and calls, piece by piece; with ``calls_only`` it cannot have content."""

    def __init__(self, form: CallForm, *, calls_only: bool = False) -> None:
        self._syntax = _syntax(form)
        self._calls_only = calls_only
        self._calls: list[tuple[str, list[str]]] = []
        self._held = ""
        self._blank = ""  # white space before content: dropped if calls follow it
        self._spoken = False
        self._content = ""
        self._deltas: list[CallDelta] = []
        self._head = self._syntax.first
        self._json = _JsonEnd()
        self._step: Callable[[], bool] = self._in_text if self._syntax.opening else self._in_head

    @property
    def begun(self) -> bool:
        """True if there is a call."""
        return bool(self._calls)

    @property
    def calls(self) -> list[Call]:
        """The calls so far, with their arguments as the model spells them."""
        return [(name, "".join(arguments)) for name, arguments in self._calls]

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Return further content and pieces of calls that are certain after the next piece of ``signed`` text."""
        self._held += text
        while self._step():
            pass
        return self._take()

    def end(self, *, cut: bool) -> tuple[str, list[CallDelta]]:
        """Return the rest of the answer.

        If the token limit ``cut`` the answer, the beginning of a call without its complete name is
        dropped, and an incomplete call keeps its arguments so far.
        """
        held, self._held = self._held, ""
        if self._step == self._in_query:
            closed = regex.fullmatch(r'"\)\s*', held)
            if not cut or closed:
                self._add('"}' if closed else _escape(held))
        elif self._step == self._in_head and self._head is self._syntax.next:
            self._say("" if cut else held)
        elif self._step in (self._in_head, self._in_object):
            begun = self._syntax.opening is not None or '"name"' in held or without_signs(held) != held
            self._say("" if cut and (begun or self._step == self._in_object) else held)
        elif self._step == self._in_text:
            self._say("" if cut and self._calls_only else held)
        if not self._calls:
            self._content, self._blank = self._content + self._blank, ""
        return self._take()

    def _take(self) -> tuple[str, list[CallDelta]]:
        taken = self._content, self._deltas
        self._content, self._deltas = "", []
        return taken

    def _in_text(self) -> bool:
        opening = self._syntax.opening
        place = -1 if opening is None else self._held.find(opening)
        if opening is not None and place >= 0:
            self._say(self._held[:place].removesuffix(self._syntax.before))
            self._held, self._head, self._step = self._held[place:], self._syntax.first, self._in_head
            return True
        marks = [] if opening is None else [opening, self._syntax.before + opening]
        lengths = range(min(len(self._held), max(map(len, marks), default=0)), 0, -1)
        half = next((n for n in lengths if any(mark.startswith(self._held[-n:]) for mark in marks)), 0)
        certain = len(self._held) - half
        self._say(self._held[:certain])
        self._held = self._held[certain:]
        return False

    def _in_head(self) -> bool:
        match = self._head.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is None:
            self._not_a_call()
            return True
        found = match.groupdict()
        if found.get("whole"):
            self._held, self._json, self._step = self._held[match.start("object") :], _JsonEnd(), self._in_object
            self._read = 0
        elif builtin := found.get("builtin"):
            self._begin(builtin, '{"query":"')
            self._held, self._step = self._held[match.end() :], self._in_query
        else:
            name = found.get("plain")
            try:
                name = name or json.loads(match["name"])
                name.encode()
            except ValueError:  # an invalid escape, or half of a surrogate pair
                self._not_a_call()
                return True
            self._begin(name, "")
            self._held, self._json, self._step = self._held[match.end() - 1 :], _JsonEnd(), self._in_arguments
        return True

    def _not_a_call(self) -> None:
        """Continue with text: the mark, if it was to begin the first call, and what follows it."""
        if self._head is self._syntax.first:
            mark = self._syntax.opening or ""
            self._say(mark)
            self._held = self._held[len(mark) :]
        else:
            close = self._syntax.close and self._syntax.close.match(self._held)
            self._held = self._held[close.end() if close else 0 :]
        self._step = self._in_text

    def _in_object(self) -> bool:
        """Read a call whose arguments come before its name."""
        end = self._json.end(self._held[self._read :])
        if end is None:
            self._read = len(self._held)
            return False
        end += self._read
        call = call_at(self._held, 0, self._syntax.key, ("id", "type"))
        if call is None:
            self._say(self._held[:end])
            self._held, self._step = self._held[end:], self._in_text
            return True
        self._begin(*call[0])
        self._held, self._step = self._held[end - 1 :], self._in_tail
        return True

    def _in_arguments(self) -> bool:
        end = self._json.end(self._held)
        if end is None:
            self._add(self._held)
            self._held = ""
            return False
        self._add(self._held[:end])
        self._held, self._step = self._held[end:], self._in_tail
        return True

    def _in_query(self) -> bool:
        match = regex.search(r'"(?:\)\s*)?$', self._held)
        certain = match.start() if match else len(self._held)
        self._add(_escape(self._held[:certain]))
        self._held = self._held[certain:]
        return False

    def _in_tail(self) -> bool:
        match = self._syntax.tail.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is not None:
            self._held = self._held[match.end() :]
        if match is None or self._syntax.next is None:
            self._step = self._in_text
        else:
            self._head, self._step = self._syntax.next, self._in_head
        return True

    def _say(self, text: str) -> None:
        text = without_signs(text)
        if not self._spoken and not text.strip():
            self._blank += text
            return
        self._content += self._blank + text
        self._spoken, self._blank = True, ""

    def _begin(self, name: str, arguments: str) -> None:
        self._spoken, self._blank = False, ""
        self._calls.append((name, []))
        self._deltas.append(CallDelta(len(self._calls) - 1, name, ""))
        self._add(arguments)

    def _add(self, arguments: str) -> None:
        arguments = without_signs(arguments)
        if arguments:
            self._calls[-1][1].append(arguments)
            self._deltas.append(CallDelta(len(self._calls) - 1, None, arguments))


class _JsonEnd:
    """Finds the end of a JSON object, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Return the place after the object's last brace in the next piece; None if the piece lacks it."""
        for place, character in enumerate(text, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place
        return None


def _escape(text: str) -> str:
    """Return a text as it is spelled within a JSON string."""
    return canonical_json(text)[1:-1]
