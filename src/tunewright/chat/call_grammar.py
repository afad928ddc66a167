"""Grammars of answers that are function calls, with arguments by each function's JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tunewright.chat.format import ChatFormat
from tunewright.chat.tool_calls import CallForm, Hermes, Llama, Llama4, MistralArguments, MistralList, is_builtin
from tunewright.chat.tool_form import ToolForm
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.data.examples import call_id
from tunewright.data.tools import NO_PARAMETERS

if TYPE_CHECKING:
    from tunewright.generation.constraints import Grammar

_ANY = "/(?s:.*)/"
_ID = "/[a-zA-Z0-9]{9}/"
_SPACE = r"/[ \t\r\n]+/?"
# As transformers' `tojson` writes JSON in templates, and so in training.
_SPELLING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_text = partial(json.dumps, ensure_ascii=False)
"""Return a literal: Lark's have JSON's syntax."""


@dataclass(frozen=True)
class CallGrammars:
    """The grammars of function calls: one for each row or request, made from the functions that it declares."""

    choice: Literal["auto", "required"]

    @classmethod
    def from_rule(cls, rule: str) -> CallGrammars | None:
        """Return the grammars that this rule names; None for the rule of a text."""
        return next((named for named in (cls("auto"), cls("required")) if named.rule == rule), None)

    @property
    def rule(self) -> str:
        """Name the grammars, for digests and releases: the functions are part of the prompt."""
        return f"function calls: {self.choice}"

    @property
    def digest(self) -> str:
        """The SHA-256 of the rule, as evidence states it."""
        return digest(self.rule)


def call_grammar(
    chat: ChatFormat,
    functions: Sequence[Mapping[str, Any]],
    choice: str = "auto",
    *,
    parallel: bool = True,
    text: Grammar | None = None,
) -> Grammar:
    """Return the grammar of answers in the base's form of calls, for `declared_functions`.

    Calls are spelled as the template spells them, with the keys of arguments in the schema's order. The choice
    "auto" allows text or calls, "required" only calls, and a function's name calls of that function; ``parallel``
    allows several where the template does. ``text`` is the form of an answer without calls (None: any text).
    """
    chosen = [f for f in functions if choice in ("auto", "required", f["name"])]
    if not chosen:
        declared = ", ".join(f["name"] for f in functions)
        raise UserError(f"No declared function is named {choice} (declared: {declared})", where="tool_choice")
    form = chat.tool_form
    more = "*" if parallel and form.parallel and choice in ("auto", "required") else None
    either = text is not None and choice == "auto"
    rules = _calls(form, " | ".join(_call(chat, form, function, either=either) for function in chosen), more)
    if either:
        assert text is not None
        return _grammar("format | calls", {"format": text.rule, **rules})
    if choice == "auto":
        rules |= _with_text(form, more)
    rule = "calls" if choice != "auto" else "text | text_calls" if form.with_text else "text | calls"
    return _grammar(rule, rules)


def _grammar(start: str, rules: Mapping[str, str]) -> Grammar:
    from tunewright.generation.constraints import Grammar

    return Grammar("\n".join([start, *(f"{name}: {body}" for name, body in rules.items())]))


def _calls(form: ToolForm, call: str, more: str | None) -> dict[str, str]:
    """Return the rules ``calls`` and ``call``: one call, or several if ``more`` is a repetition."""
    kind = form.form
    if isinstance(kind, MistralList):
        mark = "[TOOL_CALLS]"
        gap = form.example[form.example.index(mark) + len(mark) :].partition("[")[0]
        following = f'(", " call){more}' if more else ""
        return {"calls": f'{_mark(kind, mark)} {_text(gap + "[")} call {following} "]"', "call": call}
    if isinstance(kind, Hermes):
        following = f'("\\n" call){more}' if more else ""
        return {"calls": f"call {following}", "call": f"{_mark(kind, '<tool_call>')} inside", "inside": call}
    following = f"call{more}" if more else ""
    before = f"{_mark(kind, '<|python_start|>')} {_mark(kind, '<|python_end|>')} " if isinstance(kind, Llama4) else ""
    return {"calls": f"{before}call {following}", "call": call}


def _call(chat: ChatFormat, form: ToolForm, function: Mapping[str, Any], *, either: bool) -> str:
    """Return the rule of one function's call; the answer may be ``either`` a call or text of some form."""
    kind = form.form
    name = json.dumps(function["name"], ensure_ascii=False)
    arguments = f"%json {json.dumps(_schema(function), ensure_ascii=False)}"
    if isinstance(kind, MistralArguments):
        numbered = f"{_mark(kind, '[CALL_ID]')} {_ID} " if call_id(0) in form.example else ""
        return f"{_mark(kind, '[TOOL_CALLS]')} {name} {numbered}{_mark(kind, '[ARGS]')} {arguments}"
    if isinstance(kind, Llama) and chat.template.has_builtin and is_builtin(function):
        query = _text(f'{function["name"]}.call(query="')
        return f'{_mark(kind, "<|python_tag|>")} {query} /(?s:[^"]*)/ {_text(chr(34) + ")")}'
    if isinstance(kind, Llama) and either:
        # llguidance's lexer takes the longest match: the literal `{"name": ` would forbid a JSON
        # text's other keys, and a fixed spelling of calls its white space.
        schema = {key: value for key, value in _schema(function).items() if key != "x-guidance"}
        parts = [
            *map(_text, ["{", '"name"', ":", name, ",", '"parameters"', ":"]),
            f"%json {json.dumps(schema)}",
            '"}"',
        ]
        return f" {_SPACE} ".join(parts)
    key = "parameters" if isinstance(kind, Llama | Llama4) else "arguments"
    head, tail = _text(f'{{"name": {name}, "{key}": '), '"}"'
    if isinstance(kind, MistralList) and call_id(0) in form.example:
        tail = f"{_text(', ' + chr(34) + 'id' + chr(34) + ': ' + chr(34))} {_ID} {_text(chr(34) + '}')}"
    if isinstance(kind, Hermes):
        return f'"\\n" {head} {arguments} {tail} "\\n" {_mark(kind, "</tool_call>")}'
    return f"{head} {arguments} {tail}"


def _with_text(form: ToolForm, more: str | None) -> dict[str, str]:
    """Return the rules ``text``, which begins no call, and ``text_calls``: calls, with or without text before them."""
    kind = form.form
    if isinstance(kind, Llama):
        return {"text": r"/(?s:\s*([^{\s].*)?)/"}
    if isinstance(kind, Hermes) and "<tool_call>" not in kind.control:
        # A greedy text would swallow the beginning of the mark.
        following = f'("\\n" call){more}' if more else ""
        return {
            "text": "NO_CALL",
            "NO_CALL": f"{_ANY} & ~/(?s:.*)<tool_call>(?s:.*)/",
            "text_calls": f"opening inside {following}",
            'opening[suffix="<tool_call>"]': _ANY,
        }
    return {"text": _ANY, "text_calls": "text calls"}


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a function's arguments, which are always an object."""
    parameters = function.get("parameters")
    if not isinstance(parameters, dict) or parameters in ({}, NO_PARAMETERS):
        # OpenAI: "Omitting parameters defines a function with an empty parameter list."
        parameters = {"properties": {}, "additionalProperties": False}
    return {**parameters, "type": "object", "x-guidance": _SPELLING}


def _mark(form: CallForm, mark: str) -> str:
    return f"<[{form.control[mark]}]>" if mark in form.control else _text(mark)
