"""Functions, calls and results have the ids and masks of the model makers' own encoders.

The differences between an encoder and the published template are listed in docs/concepts/tokens.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, assume, given, settings

from making import makers
from making.makers import Mistral
from making.property_examples import examples
from making.tool_families import conversations, format_of, mistral_template, texts
from tunewright.chat import ChatFormat
from tunewright.chat.tool_calls import declared_functions
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id

Reference = Callable[[Sequence[Message]], list[int]]


def _assert_parity(chat: ChatFormat, reference: Reference, messages: list[Message]) -> None:
    """A turn's reference is the tokens that the makers' encoder adds to those of its prompt."""
    if messages[-1].role != "assistant":
        assert list(chat.prompt(messages)) == reference(messages)
        return
    whole = reference(messages)
    turns = [
        (reference(messages[:place]), reference(messages[: place + 1]))
        for place, message in enumerate(messages)
        if message.role == "assistant"
    ]
    grows = all(whole[: len(answered)] == answered for _, answered in turns)
    expected = [(whole, turns)] if grows else [(answered, [(prompt, answered)]) for prompt, answered in turns]
    try:
        rows = chat.rows(messages)
    except UserError as error:
        assume("reads as a function call" not in error.what)
        raise
    assert [list(row.ids) for row in rows] == [ids for ids, _ in expected]
    assert [list(row.loss_mask) for row in rows] == [_mask(ids, turns) for ids, turns in expected]


def _mask(ids: list[int], turns: list[tuple[list[int], list[int]]]) -> list[bool]:
    trained = {place for prompt, answered in turns for place in range(len(prompt), len(answered))}
    return [place in trained for place in range(len(ids))]


def _openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns as OpenAI's API has them, with the name of each result's function, which Mistral v2 writes."""
    names = {call.id: call.name for m in messages for call in m.calls}
    named = ({"name": names[m.call_id]} if m.call_id else {} for m in messages)
    return [m.as_dict() | name for m, name in zip(messages, named, strict=True) if m.role != "tools"]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


WITH_TOOLS: tuple[Mistral, ...] = tuple(version for version in get_args(Mistral) if version != "v1")
LARGE = ("tekken", "v7-tekken")
NUMBERS = {"tekken": "v3", "v7-tekken": "v7"}
ENCODED_RESULTS = ("v2", "v3", "tekken")
"""Versions whose encoder reads a result that is JSON, which the templates write as text."""


@cache
def _mistral(version: Mistral) -> ChatFormat:
    tokenizer = makers.mistral_tokenizer(version)
    if version not in makers.WRITTEN:
        tokenizer = copy.copy(tokenizer)
        spm = version not in LARGE
        tokenizer.chat_template = mistral_template(NUMBERS.get(version, version), sentencepiece=spm)
    return format_of(tokenizer)


@pytest.mark.parametrize(
    "version", [pytest.param(version, marks=pytest.mark.slow if version in LARGE else ()) for version in WITH_TOOLS]
)
def test_functions_calls_and_results_match_mistral_common(version: Mistral) -> None:
    chat = _mistral(version)
    results = texts.filter(lambda text: not _is_json(text)) if version in ENCODED_RESULTS else texts

    def reference(messages: Sequence[Message]) -> list[int]:
        tools = [{"type": "function", "function": dict(f)} for f in declared_functions(messages)]
        return makers.mistral_reference(version, _openai(messages), tools)

    @settings(examples(20, quick=10), suppress_health_check=list(HealthCheck))
    @given(conversations(parallel=version != "v2", results=results))
    def check(messages: list[Message]) -> None:
        _assert_parity(chat, reference, messages)

    check()


INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def _dumped(value: Any, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **how)


def _function_texts(messages: Sequence[Message], without: frozenset[str] = frozenset()) -> str:
    declared = [{"type": "function", "function": f} for f in declared_functions(messages) if f["name"] not in without]
    return "".join(f"{_dumped(function, indent=4)}\n\n" for function in declared)


def _raw(message: Message, *, encoded: bool, builtin: frozenset[str]) -> Any:
    """A turn as Meta's encoder takes it: with its call, or with the text that the published template makes of it."""
    from llama_models.datatypes import RawMessage, StopReason
    from llama_models.datatypes import ToolCall as RawCall

    stop = StopReason.end_of_message if builtin and message.calls else StopReason.end_of_turn
    if message.calls:
        (call,) = message.calls
        arguments = json.loads(call.arguments)
        if encoded or call.name in builtin:
            raw = RawCall.model_construct(call_id=call.id, tool_name=call.name, arguments=arguments)
            raw = RawCall.model_validate(raw.model_dump()) if call.name in builtin else raw
            return RawMessage.model_construct(role="assistant", content="", tool_calls=[raw], stop_reason=stop)
        text = f'{{"name": "{call.name}", "parameters": {_dumped(arguments)}}}'
        return RawMessage(role="assistant", content=text, stop_reason=stop)
    content = message.content
    if message.role == "tool":
        content = content if encoded else _dumped(content)
    return RawMessage(role=message.role, content=content)


def _meta3(messages: Sequence[Message], *, encoded: bool = False, builtin: frozenset[str] = frozenset()) -> list[int]:
    """Ids by Meta's ChatFormat of Llama 3; the texts of the system and first user turn are the published template's."""
    from llama_models.datatypes import ToolPromptFormat

    chat = makers.meta_chat_format()
    system = "Environment: ipython\n" + (f"Tools: {', '.join(sorted(builtin))}\n\n" if builtin else "") + DATES
    turns = [m for m in messages if m.role != "tools"]
    if turns[0].role == "system":
        system += turns.pop(0).content.strip()
    functions = _function_texts(messages, builtin)
    first = (INTRODUCTION + functions if functions else "") + turns[0].content.strip()
    turns = [replace(m, content=m.content.strip()) if m.role != "tool" else m for m in turns]
    turns[:1] = [Message("system", system), Message("user", first)]
    ids = [chat.tokenizer.special_tokens["<|begin_of_text|>"]]
    for turn in turns:
        raw = _raw(turn, encoded=encoded, builtin=builtin)
        made, _ = chat.encode_message(raw, ToolPromptFormat.json)
        if any(call.name in builtin for call in turn.calls):
            # Meta's documentation has this token before every built-in call, its encoder before Python code only.
            made.insert(len(chat._encode_header("assistant")), chat.tokenizer.special_tokens["<|python_tag|>"])
        ids += made
    return ids + (chat._encode_header("assistant") if turns[-1].role != "assistant" else [])


@cache
def _llama3(family: makers.Llama3, *, encoded: bool = False) -> ChatFormat:
    tokenizer = copy.copy(makers.llama3_tokenizer(family))
    if encoded:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            """'{"name": "' + tool_call.name""", """'{"type": "function", "name": "' + tool_call.name"""
        ).replace("message.content | tojson", "message.content")
    return format_of(tokenizer)


# Llama 3.3 has the tokenizer and the template of 3.1.
LLAMA3_WITH_TOOLS: tuple[makers.Llama3, ...] = ("llama3_1", "llama3_2")


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA3_WITH_TOOLS)
def test_json_calls_match_metas_chat_format(family: makers.Llama3) -> None:
    @settings(examples(20), suppress_health_check=list(HealthCheck))
    @given(conversations(parallel=False))
    def check(messages: list[Message]) -> None:
        _assert_parity(_llama3(family), _meta3, messages)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA3_WITH_TOOLS)
def test_published_templates_differ_from_metas_chat_format_in_three_places(family: makers.Llama3) -> None:
    """In the key "type" of a call, in quotes around results, and in escapes of arguments that are not ASCII."""

    def reference(messages: Sequence[Message]) -> list[int]:
        return _meta3(messages, encoded=True)

    @settings(examples(20), suppress_health_check=list(HealthCheck))
    @given(conversations(parallel=False))
    def check(messages: list[Message]) -> None:
        assume(all(call.arguments.isascii() for m in messages for call in m.calls))
        _assert_rendered(_llama3(family, encoded=True), reference, messages)

    check()


def _assert_rendered(chat: ChatFormat, reference: Reference, messages: list[Message]) -> None:
    """As :func:`_assert_parity`, for prompts alone: that template's calls cannot be read back in Llama's form."""
    while messages[-1].role == "assistant":
        messages = messages[:-1]
    assert list(chat.prompt(messages)) == reference(messages)


SEARCH = {
    "name": "brave_search",
    "description": "Search",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}


@pytest.mark.slow
def test_builtin_calls_match_metas_chat_format() -> None:
    chat = _llama3("llama3_1")

    def reference(messages: Sequence[Message]) -> list[int]:
        return _meta3(messages, builtin=frozenset(["brave_search"]))

    @settings(examples(20), suppress_health_check=list(HealthCheck))
    @given(conversations(parallel=False), texts)
    def check(messages: list[Message], query: str) -> None:
        functions = [{"type": "function", "function": SEARCH}, *json.loads(messages[0].content)]
        call = ToolCall("brave_search", canonical_json({"query": query}), call_id(0))
        asked = Message("assistant", "", calls=(call,))
        turns = [Message("tools", canonical_json(functions)), Message("user", "Gold?"), asked]
        result = Message("tool", query or "x", call_id=call.id)
        renumbered = [_renumbered(m) for m in messages[1:] if m.role != "system"]
        _assert_parity(chat, reference, [*turns, result, Message("assistant", "Fine."), *renumbered])

    check()


def _renumbered(message: Message) -> Message:
    """The message with ids one higher."""
    calls = tuple(ToolCall(call.name, call.arguments, call_id(int(call.id[4:]) + 1)) for call in message.calls)
    result = call_id(int(message.call_id[4:]) + 1) if message.call_id else None
    return Message(message.role, message.content, calls=calls, call_id=result)


def _meta4(messages: Sequence[Message]) -> list[int]:
    """Ids by Meta's tokenizer and headers of Llama 4, with the ends and marks of its published template.

    Meta's ChatFormat ends calls and results with <|eom|>, where the template writes <|eot|>, and writes no marks.
    """
    chat = makers.meta_chat_format(4)
    special = chat.tokenizer.special_tokens
    turns = [m for m in messages if m.role != "tools"]
    system = "Environment: ipython\n"
    if turns[0].role == "system":
        system += turns.pop(0).content.strip()
    introduction = "Given the following functions, please respond with a JSON for a function call.\n\n"
    first = Message("user", introduction + _function_texts(messages) + turns[0].content.strip())
    ids = [special["<|begin_of_text|>"]]
    spoken = [replace(m, content=m.content.strip()) if m.role != "tool" else m for m in turns[1:]]
    for turn in [Message("system", system), first, *spoken]:
        ids += chat._encode_header(turn.role)
        if turn.calls:
            calls = (f'{{"name": "{c.name}", "parameters": {_dumped(json.loads(c.arguments))}}}' for c in turn.calls)
            ids += [special["<|python_start|>"], special["<|python_end|>"]]
            text = "".join(calls)
        else:
            text = _dumped(turn.content) if turn.role == "tool" else turn.content
        ids += [*chat.tokenizer.encode(text, bos=False, eos=False), special["<|eot|>"]]
    return ids + (chat._encode_header("assistant") if turns[-1].role != "assistant" else [])


@pytest.mark.slow
def test_llama4_calls_match_metas_tokens() -> None:
    chat = format_of(makers.llama4_tokenizer())

    @settings(examples(20), suppress_health_check=list(HealthCheck))
    @given(conversations())
    def check(messages: list[Message]) -> None:
        _assert_parity(chat, _meta4, messages)

    check()


def test_difference_of_json_results_is_as_documented() -> None:
    """mistral-common's encoder of v2 and v3 reads a result that is JSON; the templates that it writes do not."""
    asked = [Message("tools", canonical_json([{"type": "function", "function": SEARCH}])), Message("user", "x")]
    call = ToolCall("brave_search", '{"query":"x"}', call_id(0))
    turns = [*asked, Message("assistant", "", calls=(call,)), Message("tool", '{"a": 1}', call_id=call.id)]
    tools: list[Mapping[str, Any]] = [{"type": "function", "function": SEARCH}]
    theirs = makers.mistral_reference("v3", _openai(turns), tools)
    chat = _mistral("v3")
    assert chat.tokenizer.decode(theirs).endswith('{"content": {"a": 1}, "call_id": "call00000"}[/TOOL_RESULTS]')
    assert chat.tokenizer.decode(chat.prompt(turns)).endswith(
        '{"content": "{\\"a\\": 1}", "call_id": "call00000"}[/TOOL_RESULTS]'
    )
