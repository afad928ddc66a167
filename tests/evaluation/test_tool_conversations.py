"""Conversations with functions in arms and in the judge's prompts."""

from __future__ import annotations

from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.versions import Member
from tunewright.evaluation.arms import Instruction
from tunewright.evaluation.demonstrations import with_demonstrations
from tunewright.evaluation.judge.runner import task_text
from tunewright.evaluation.losses import _without_input

TOOLS = Message(
    "tools", '[{"function":{"name":"now","parameters":{"properties":{},"type":"object"}},"type":"function"}]'
)


def _member(question: str, answer: str) -> Member:
    call = Message("assistant", "", calls=(ToolCall("now", "{}", call_id(0)),))
    turns = (TOOLS, Message("system", "Be brief."), Message("user", question), call)
    example = Example((*turns, Message("tool", "12:00", call_id=call_id(0)), Message("assistant", answer)))
    return Member(example, example.pair_key, "train", example.pair_key)


def test_with_demonstrations_declares_functions_once_and_numbers_calls() -> None:
    prompt = with_demonstrations(_member("c", "d"), [_member("a", "b"), _member("e", "f")])
    assert [turn.role for turn in prompt].count("tools") == 1
    assert [turn.role for turn in prompt[:3]] == ["tools", "system", "user"]
    assert [call.id for turn in prompt for call in turn.calls] == [call_id(0), call_id(1), call_id(2)]
    assert [turn.call_id for turn in prompt if turn.role == "tool"] == [call_id(0), call_id(1), call_id(2)]


def test_instruction_without_a_place_follows_the_declarations() -> None:
    messages = [TOOLS, Message("user", "a")]
    assert Instruction("none", "").replaced(messages, "Be kind.") == (TOOLS, Message("system", "Be kind."), messages[1])
    assert [m.role for m in Instruction("none", "").replaced(messages[1:], "Be kind.")] == ["system", "user"]


def test_task_text_shows_functions_calls_and_results() -> None:
    text = task_text(_member("Time?", "Noon.").example.prompt)
    assert text.startswith('Tools: [{"function":{"name":"now"')
    assert 'Assistant: {"name": "now", "arguments": {}}' in text
    assert "Tool: 12:00" in text


def test_answer_without_input_keeps_its_declarations() -> None:
    member = _member("Time?", "Noon.")
    last = Message("assistant", "", calls=(ToolCall("now", "{}", call_id(4)),))
    cut = _without_input(Member(Example((*member.example.prompt, last)), "k", "train", "k"))
    assert [turn.role for turn in cut.example.messages] == ["tools", "system", "user", "assistant"]
    assert cut.example.messages[-1].calls[0].id == call_id(0)
