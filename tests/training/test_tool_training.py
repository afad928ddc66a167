"""Conversations with functions as training rows: what is trained and checked, and that a tiny base learns to call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from making.tool_families import family, format_of, tokenizer_of
from tunewright.chat import ChatFormat
from tunewright.core.io import canonical_json
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.versions import Member
from tunewright.training.rows import encode_members, expected_messages, row_faults

FUNCTION = {
    "name": "weather",
    "description": 'The "weather"',
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = Message("tools", canonical_json([{"type": "function", "function": FUNCTION}]))
CITIES = {"Oslo": "cold", "Rome": "warm", "Lima": "mild"}


def _member(city: str, weather: str, *, weight: Any = 1) -> Member:
    call = ToolCall("weather", canonical_json({"city": city}), call_id(0))
    example = Example(
        (
            TOOLS,
            Message("user", f"{city}?"),
            Message("assistant", "", calls=(call,), weight=weight),
            Message("tool", f'{{"sky": "{weather}"}}', call_id=call.id),
            Message("assistant", f"It is {weather}."),
        )
    )
    return Member(example, example.pair_key, "train", example.pair_key)


MEMBERS = [_member(city, weather) for city, weather in CITIES.items()]


def _trained(chat: ChatFormat, member: Member) -> str:
    (row,) = encode_members(chat, [member], 4000).rows
    return str(chat.tokenizer.decode([i for i, trained in zip(row.ids, row.loss_mask, strict=True) if trained]))


def test_calls_and_answers_are_trained_with_their_end_tokens() -> None:
    call = '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
    assert _trained(family("llama3_1"), MEMBERS[0]) == f"{call}It is cold.<|eot_id|>"
    assert _trained(family("llama3_1"), _member("Oslo", "cold", weight=0)) == "It is cold.<|eot_id|>"


@pytest.mark.parametrize("name", ["llama3_1", "mistral-v3", "mistral-v13", "hermes-chatml"])
def test_rows_with_functions_have_no_faults(name: str) -> None:
    encoded = encode_members(family(name), MEMBERS, 4000)
    assert encoded.faults == []
    assert len(encoded.rows) == len(MEMBERS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda m: replace(m, calls=(replace(m.calls[0], arguments='{"city":"Bonn"}'),)) if m.calls else m, "read"),
        (lambda m: replace(m, calls=(replace(m.calls[0], name="time"),)) if m.calls else m, "read"),
        (lambda m: replace(m, content="rain") if m.role == "tool" else m, "don't spell the tool turn 'rain'"),
        (
            lambda m: replace(m, content=m.content.replace("The ", "Some ")) if m.role == "tools" else m,
            "don't spell the tools turn 'Some \"weather\"'",
        ),
    ],
)
def test_row_faults_reports_functions_calls_and_results_that_differ(wrong: Any, words: str) -> None:
    chat = family("llama3_1")
    rows = chat.rows(MEMBERS[0].example.messages)
    (expected,) = expected_messages(MEMBERS[0], 1)
    assert row_faults(chat, rows, [expected]) == [None]
    (fault,) = row_faults(chat, rows, [[wrong(m) for m in expected]])
    assert words in str(fault)


def test_template_without_functions_is_a_fault_of_the_row() -> None:
    chat = format_of(tokenizer_of(family("hermes-chatml").tokenizer.chat_template))
    encoded = encode_members(chat, MEMBERS[:1], 4000)
    assert "drops the declarations of functions" in encoded.faults[0]
