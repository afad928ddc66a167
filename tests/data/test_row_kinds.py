"""Row formats: each is recognised by its keys and read as the same conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.config import DataConfig
from tunewright.data.readers import Fault, ReadResult, read_pairs
from tunewright.data.readers.row_errors import CODES
from tunewright.data.readers.validate import example_from_object

ASKED, ANSWERED = "Which court?", "D. Mass."
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
MARKS = "\u0300\u0316" * 16
SHARED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]


def _read(tmp_path: Path, rows: list[Any], data: DataConfig | None = None) -> ReadResult:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_pairs(path, data or DataConfig())


def _fault(tmp_path: Path, row: Any, data: DataConfig | None = None) -> Fault:
    [fault] = _read(tmp_path, [row], data).faults
    return fault


def _turns(row: Any, data: DataConfig | None = None) -> list[tuple[str, str, int]]:
    return [(m.role, m.content, m.weight) for m in example_from_object(row, data or DataConfig()).messages]


def test_group_with_too_many_combining_marks_is_refused(tmp_path: Path) -> None:
    data = DataConfig(group_by=("customer",))
    fault = _fault(tmp_path, {"prompt": ASKED, "completion": ANSWERED, "customer": MARKS}, data)
    assert (fault.code, fault.path) == ("E408", "$.customer")
    assert "more than 30 combining marks in a row, from character 1 of customer" in fault.reason


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": CHAT}, "OpenAI chats, because rows have messages[].role/content"),
        ({"messages": CHAT, "tools": []}, "OpenAI chats"),
        ({"prompt": ASKED, "completion": ANSWERED}, "prompt/completion pairs, because rows have prompt and completion"),
        ({"instruction": ASKED, "output": ANSWERED}, "Alpaca instructions, because rows have instruction and output"),
        ({"instruction": ASKED, "input": "", "output": ANSWERED, "history": [], "system": ""}, "Alpaca"),
        ({"conversations": SHARED}, "ShareGPT conversations, because rows have conversations[].from/value"),
        ({"conversations": CHAT}, "ShareGPT conversations, because rows have conversations[].role/content"),
        ({"interactions": CHAT}, "Mistral conversations, because rows have interactions[].role/content"),
        ({"messages": [{"role": m["role"], "text": m["content"]} for m in CHAT]}, "messages[].role/text"),
        ({"messages": CHAT, "system_prompt": None}, "Mistral conversations"),
        ({"conversation": CHAT}, "Together conversations, because rows have conversation[].role/content"),
    ],
)
def test_formats_give_the_same_example_and_a_note(tmp_path: Path, row: Any, words: str) -> None:
    reading = _read(tmp_path, [row])
    assert [r.example for r in reading.rows] == [example_from_object({"messages": CHAT}, DataConfig())]
    [note] = reading.notes
    assert note.startswith(f"{tmp_path / 'rows.jsonl'}: JSON Lines: ")
    assert words in note


def test_mixed_formats_are_reported_with_counts(tmp_path: Path) -> None:
    notes = _read(tmp_path, [{"messages": CHAT}, {"conversations": SHARED}, {"messages": CHAT}]).notes
    assert ["2 rows of OpenAI chats" in notes[0], "1 row of ShareGPT" in notes[1]] == [True, True]


def test_alpaca_input_follows_the_instruction_and_history_precedes_it(tmp_path: Path) -> None:
    row = {
        "instruction": "Translate.",
        "input": "chat",
        "output": "cat",
        "system": "From French.",
        "history": [["Hello?", "Yes."]],
    }
    assert _turns(row) == [
        ("system", "From French.", 1),
        ("user", "Hello?", 1),
        ("assistant", "Yes.", 1),
        ("user", "Translate.\nchat", 1),
        ("assistant", "cat", 1),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHARED, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHARED]},
        {"messages": CHAT, "system_prompt": "Be brief."},
        {"interactions": CHAT, "system": "Be brief."},
    ],
)
def test_system_key_becomes_the_first_turn(row: Any) -> None:
    assert _turns(row)[0] == ("system", "Be brief.", 1)
    assert len(_turns(row)) == 3


def test_mistral_only_last_trains_the_last_answer_only() -> None:
    assert [weight for *_, weight in _turns({"messages": CHAT * 2, "only_last": True})] == [1, 0, 1, 1]
    assert [weight for *_, weight in _turns({"messages": CHAT * 2, "only_last": False})] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("row", "code", "path"),
    [
        ({"text": "a whole document"}, "E203", "$.text"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "E209", "$.preferred_output"),
        ({"input_ids": [1], "attention_mask": [1], "labels": [1]}, "E203", "$.input_ids"),
        ({"prompt": ASKED, "completion": ANSWERED, "tools": [{}]}, "E204", "$.tools"),
        ({"instruction": ASKED, "output": ANSWERED, "tools": [{}]}, "E204", "$.tools"),
        ({"messages": CHAT, "sytem": "x"}, "E201", "$.sytem"),
        ({"mesages": CHAT}, "E201", "$.mesages"),
        ({"promt": "a", "completion": "b"}, "E201", "$.promt"),
        ({"prompt": "a", "completion": "b", "Completions": "c"}, "E201", "$.Completions"),
        ({"messages": CHAT, "images": ["a.png"]}, "E208", "$.images"),
        ({"instruction": "a"}, "E202", "$"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "E206", "$.history[0]"),
        ({"instruction": "a", "output": "b", "input": 4}, "E305", "$.input"),
        ({"conversations": []}, "E206", "$.conversations"),
        ({"conversations": [{"from": "human"}]}, "E302", "$.conversations[0]"),
        ({"messages": [{"role": "user", "content": "a", "text": "b"}]}, "E303", "$.messages[0]"),
        ({"messages": [*CHAT, {**CHAT[0], "name": "Ann"}, CHAT[1]]}, "E309", "$.messages[2].name"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "E305", "$.messages[1].content"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "E401", "$.messages[1].content"),
        ({"messages": [*CHAT, CHAT[1]]}, "E406", "$.messages[2]"),
        ({"messages": [*CHAT, CHAT[0]]}, "E407", "$.messages[2]"),
        ({"prompt": "a" + MARKS, "completion": ANSWERED}, "E408", "$.prompt"),
        ({"messages": [CHAT[0], {**CHAT[1], "content": MARKS}]}, "E408", "$.messages[1].content"),
        ({"messages": CHAT, "system_prompt": "a", "system": "b"}, "E404", "$.system_prompt"),
        ({"messages": CHAT, "only_last": "yes"}, "E305", "$.only_last"),
    ],
)
def test_fault_has_code_place_and_fix(tmp_path: Path, row: Any, code: str, path: str) -> None:
    fault = _fault(tmp_path, row)
    assert (fault.code, fault.path, fault.fix) == (code, path, CODES[code][1])
    assert str(fault) == f"{tmp_path / 'rows.jsonl'}:1: {fault.reason}"


def test_fault_names_at_most_eight_keys(tmp_path: Path) -> None:
    fault = _fault(tmp_path, {f"key{i}": "x" for i in range(1000)})
    assert "and 992 more" in fault.reason
    assert len(fault.reason) < 300


def test_configured_keys_are_input_and_output(tmp_path: Path) -> None:
    data = DataConfig(input="question", output="answer")
    reading = _read(tmp_path, [{"question": ASKED, "answer": ANSWERED}], data)
    assert reading.rows[0].example.output == ANSWERED
    assert "the config names question as input" in reading.notes[0]
    assert _read(tmp_path, [{"question": ASKED, "answer": ANSWERED, "topic": "law"}], data).rows[0].metadata == {
        "topic": "law"
    }
    assert _fault(tmp_path, {"question": ASKED, "answer": ANSWERED, "answers": "law"}, data).code == "E201"


def test_groups_are_read_and_null_is_no_group(tmp_path: Path) -> None:
    data = DataConfig(group_by=("customer", "document"))
    pair = {"prompt": ASKED, "completion": ANSWERED}
    rows = [{**pair, "customer": "Acme", "document": 12}, {**pair, "customer": None, "document": 12.0}]
    reading = _read(tmp_path, rows, data)
    assert [row.groups for row in reading.rows] == [{"customer": "Acme", "document": "12"}, {"document": "12"}]
    assert _fault(tmp_path, {**pair, "customer": "Acme"}, data).code == "E205"
    assert _fault(tmp_path, {**pair, "customer": ["Acme"], "document": 1}, data).path == "$.customer"
    assert _read(tmp_path, [pair]).rows[0].groups == {}


def test_ignored_keys_are_dropped_and_reported_once(tmp_path: Path) -> None:
    row = {"prompt": ASKED, "completion": ANSWERED, "id": 4, "source": {"url": "x"}}
    reading = _read(tmp_path, [row, row], DataConfig(drop_columns=("id", "source", "date")))
    assert len(reading.rows) == 2
    assert [note for note in reading.notes if "data.drop_columns" in note] == [
        f"{tmp_path / 'rows.jsonl'}: dropped by data.drop_columns: id, source"
    ]


@pytest.mark.parametrize(
    "answer",
    [
        {"content": ANSWERED, "reasoning_content": "Boston."},
        {"content": ANSWERED, "reasoning": "Boston.", "thinking": None},
        {"content": ANSWERED, "thinking": "Boston."},
        {"content": f"<think>\nBoston.\n</think>\n\n{ANSWERED}"},
        {"content": f"[THINK]Boston.[/THINK]{ANSWERED}", "reasoning_content": ""},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Boston."}]},
                {"type": "text", "text": ANSWERED},
            ]
        },
    ],
)
def test_thinking_is_read_apart_from_the_answer(answer: dict[str, Any]) -> None:
    asked = {"role": "user", "content": ASKED, "reasoning_content": None}
    example = example_from_object({"messages": [asked, {"role": "assistant", **answer}]}, DataConfig())
    assert (example.messages[-1].reasoning, example.output) == ("Boston.", ANSWERED)
    assert example.as_row()["messages"][-1]["reasoning_content"] == "Boston."
    assert example.from_dicts(example.as_row()["messages"]) == example
    plain = example_from_object({"messages": CHAT}, DataConfig())
    assert example.pair_key != plain.pair_key and example.content_key == plain.content_key


def test_thinking_of_a_pair_is_read_from_its_completion() -> None:
    row = {"prompt": ASKED, "completion": f"<think>Boston.</think>\n{ANSWERED}"}
    assert example_from_object(row, DataConfig()).messages[-1].reasoning == "Boston."


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        ({"content": "<think>Boston. D. Mass."}, "E310"),
        ({"content": "<think>Boston.</think>"}, "E401"),
        ({"content": f"<think>Boston.</think>{ANSWERED}", "reasoning_content": "Boston."}, "E310"),
        ({"content": ANSWERED, "reasoning": "Boston.", "thinking": "Boston."}, "E310"),
        ({"content": ANSWERED, "reasoning_content": ["Boston."]}, "E305"),
        ({"content": ANSWERED, "reasoning_content": f"a{MARKS}"}, "E408"),
    ],
)
def test_unclear_thinking_is_a_fault(tmp_path: Path, turn: dict[str, Any], code: str) -> None:
    assert _fault(tmp_path, {"messages": [CHAT[0], {"role": "assistant", **turn}]}).code == code


def test_thinking_of_a_user_turn_is_a_fault(tmp_path: Path) -> None:
    row = {"messages": [{**CHAT[0], "reasoning_content": "Boston."}, CHAT[1]]}
    assert _fault(tmp_path, row).code == "E303"
