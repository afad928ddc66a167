"""Rows with functions: each format is read as the same conversation, and each fault has its code and place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_rows import (
    FORMATS,
    FUNCTIONS,
    OSLO,
    TOOLS,
    WEATHER,
    Row,
    as_openai,
    as_openai_functions,
    conversation,
    weather,
)

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.progress import LogReporter
from tunewright.data import tools
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.readers import read_pairs
from tunewright.data.readers.file_check import check_files, fix_file
from tunewright.data.readers.row_errors import CODES, RowError
from tunewright.data.readers.validate import example_from_object

ONE = conversation(
    Message("user", "Time?"),
    Message("assistant", "", calls=(ToolCall("clock.now", "{}", call_id(0)),)),
    Message("tool", "12:00", call_id=call_id(0)),
    Message("assistant", "Noon.", 0),
    Message("user", "Weather?"),
    Message("assistant", "", calls=(weather(1, city="Zürich", units="metric"),)),
)


def _write(tmp_path: Path, rows: list[Row]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("written", [*FORMATS, as_openai_functions])
def test_formats_with_functions_give_the_same_example(written: Callable[[Example], Row]) -> None:
    for example in (ONE,) if written is as_openai_functions else (ONE, OSLO):
        read = example_from_object(written(example), DataConfig())
        assert read == example
        assert read.pair_key == example.pair_key


_texts = st.text(alphabet="ab é\"'{}\\\n", min_size=1).map(str.strip).filter(bool)
_calls: st.SearchStrategy[tuple[str, Row]] = st.one_of(
    st.just(("clock.now", {})),
    st.tuples(
        st.just("get_weather"),
        st.fixed_dictionaries({"city": _texts}, optional={"days": st.integers(1, 9), "units": st.just("metric")}),
    ),
)


@st.composite
def _conversations(draw: st.DrawFn) -> Example:
    turns = [Message("system", draw(_texts))] if draw(st.booleans()) else []
    count = 0
    rounds = draw(st.integers(1, 3))
    for number in range(rounds):
        turns.append(Message("user", draw(_texts)))
        for step in range(draw(st.integers(0, 2))):
            calls = draw(st.lists(_calls, min_size=1, max_size=3))
            made = [ToolCall(n, canonical_json(a), call_id(count + i)) for i, (n, a) in enumerate(calls)]
            count += len(made)
            turns.append(Message("assistant", "", calls=tuple(made)))
            if number == rounds - 1 and step == 1 and draw(st.booleans()):
                return conversation(*turns)
            turns += [Message("tool", draw(_texts), call_id=call.id) for call in made]
        last = number == rounds - 1
        turns.append(Message("assistant", draw(_texts), 1 if last else draw(st.sampled_from([0, 1]))))
    return conversation(*turns)


@given(_conversations())
def test_any_conversation_is_the_same_in_each_format_and_in_a_version_file(example: Example) -> None:
    for written in FORMATS:
        assert example_from_object(written(example), DataConfig()) == example, written.__name__
    assert Example.from_dicts([message.as_dict() for message in example.messages]) == example


def test_text_like_tags_stays_text_without_declarations() -> None:
    row: Row = {"prompt": "What is <tools>[x]</tools>?", "completion": '<tool_call>{"name": "f"}</tool_call> is a tag'}
    example = example_from_object(row, DataConfig())
    assert (len(example.messages), example.output) == (2, row["completion"])
    row = as_openai(OSLO)
    row["messages"][-1]["content"] = "<tool_call>no call</tool_call>"
    assert example_from_object(row, DataConfig()).output == "<tool_call>no call</tool_call>"


def test_parallel_tool_calls_is_metadata_and_groups_and_weights_are_kept(tmp_path: Path) -> None:
    row = {**as_openai(ONE), "parallel_tool_calls": False, "customer": "Acme"}
    [read] = read_pairs(_write(tmp_path, [row]), DataConfig(group_by=("customer",))).rows
    assert (read.metadata, read.groups) == ({"parallel_tool_calls": False}, {"customer": "Acme"})
    assert [m.weight for m in read.example.messages if m.role == "assistant"] == [1, 0, 1]


def test_config_system_prompt_follows_the_declarations() -> None:
    example = example_from_object(as_openai(ONE), DataConfig(system_prompt="Be kind."))
    assert [m.role for m in example.messages[:3]] == ["tools", "system", "user"]


def _changed(change: Callable[[Row], None], example: Example = OSLO) -> Row:
    row: Row = json.loads(json.dumps(as_openai(example)))
    change(row)
    return row


def _call(row: Row, number: int = 0) -> Row:
    turn = next(turn for turn in row["messages"] if "tool_calls" in turn)
    found: Row = turn["tool_calls"][number]
    return found


def _arguments(text: Any) -> Callable[[Row], None]:
    return lambda row: _call(row)["function"].update(arguments=text)


def _parameters(schema: Any) -> Callable[[Row], None]:
    return lambda row: row.update(tools=[{"type": "function", "function": {**WEATHER, "parameters": schema}}])


def _deep(levels: int) -> Row:
    schema: Row = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


_DOUBLING = {"x0": {"type": "string"}} | {f"x{i}": {"allOf": [{"$ref": f"#/$defs/x{i - 1}"}] * 2} for i in range(1, 25)}
_AT = "$.messages[2].tool_calls[0]"

FAULTS: list[tuple[str, Callable[[Row], None], str, str, str]] = [
    ("no list", lambda r: r.update(tools={"name": "f"}), "E501", "$.tools", "not a list of functions"),
    ("no JSON", lambda r: r.update(tools="[{"), "E501", "$.tools", "not JSON"),
    ("no name", lambda r: r.update(tools=[{"description": "x"}]), "E501", "$.tools[0].name", "name must have"),
    ("two", lambda r: r.update(tools=[WEATHER, WEATHER]), "E501", "$.tools[1]", "declared twice"),
    ("kind", lambda r: r.update(tools=[{"type": "web_search"}]), "E501", "$.tools[0]", "type function"),
    ("both", lambda r: r.update(functions=FUNCTIONS), "E501", "$.functions", '"tools", "functions"'),
    ("dict", _parameters({"type": "dict"}), "E501", "$.tools[0].function.parameters", "type object"),
    ("schema", _parameters({"type": "object", "properties": {"a": {"type": "dict"}}}), "E501", "$.tools[0]", "a.type"),
    ("regex", _parameters({"type": "object", "properties": {"a": {"pattern": "("}}}), "E501", "$.tools[0]", "pattern"),
    ("ref", _parameters({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}), "E501", "$.tools[0]", "no sc"),
    ("loop", _parameters({"type": "object", "properties": {"a": {"$ref": "#"}}}), "E502", "$.tools[0]", "recursive"),
    (
        "url",
        _parameters({"type": "object", "properties": {"a": {"$ref": "https://a.b/c"}}}),
        "E502",
        "$.tools[0]",
        "local",
    ),
    ("deep", _parameters(_deep(40)), "E502", "$.tools[0]", "32 schemas deep"),
    ("huge", _parameters({"type": "object", "$defs": _DOUBLING}), "E502", "$.tools[0]", "more than 10,000 values"),
    ("long", _parameters({"type": "object", "description": "x" * 300_000}), "E502", "$.tools", "limit 262,144"),
    ("keyword", _parameters({"type": "object", "unevaluatedProperties": False}), "E502", "$.tools[0]", "unevaluated"),
    ("name", lambda r: _call(r)["function"].update(name="get_wether"), "E503", _AT, 'declared: "get_weather"'),
    ("cut", _arguments('{"city": "Os'), "E504", f"{_AT}.function.arguments", "not JSON"),
    ("list", _arguments("[1]"), "E504", f"{_AT}.function.arguments", "list, not a JSON object"),
    ("nan", _arguments('{"days": NaN}'), "E504", f"{_AT}.function.arguments", "NaN"),
    ("lack", _arguments("{}"), "E505", f"{_AT}.function.arguments", "'city' is a required property"),
    ("type", _arguments({"city": 7}), "E505", f"{_AT}.function.arguments", 'arguments.city: not valid under "type"'),
    ("more", _arguments({"city": "a", "x": 1}), "E505", f"{_AT}.function.arguments", 'unexpected key "x"'),
    ("enum", _arguments({"city": "a", "units": "k"}), "E505", f"{_AT}.function.arguments", '"enum": ["metric"'),
    ("unknown", lambda r: r["messages"][3].update(tool_call_id="x"), "E506", "$.messages[3]", "answers no call"),
    ("again", lambda r: r["messages"][4].update(tool_call_id=_call(r)["id"]), "E506", "$.messages[4]", "has a result"),
    ("named", lambda r: r["messages"][3].update(name="clock.now"), "E506", "$.messages[3]", 'is of "get_weather"'),
    ("no call", lambda r: r["messages"].pop(2), "E506", "$.messages[2]", "answers no call"),
    ("twice", lambda r: _call(r, 1).update(id=_call(r)["id"]), "E507", "$.messages[2].tool_calls[1]", "repeats the id"),
    ("open", lambda r: r["messages"].pop(4), "E508", "$.messages[4]", "calls without a result"),
    ("nothing", lambda r: r.pop("tools"), "E509", _AT, "declares no functions"),
    ("serial", lambda r: r.update(parallel_tool_calls=False), "E510", "$.messages[2]", "has 2 calls"),
    ("shape", lambda r: r["messages"][2].update(tool_calls=[{"id": "x"}]), "E511", _AT, '"type": "function"'),
    ("no id", lambda r: _call(r).pop("id"), "E512", _AT, "has no id"),
    ("no answer id", lambda r: r["messages"][3].pop("tool_call_id"), "E512", "$.messages[3]", "no tool_call_id"),
    ("user", lambda r: r["messages"].insert(5, {"role": "user", "content": "?"}), "E513", "$.messages[5]", "right af"),
    ("end", lambda r: r["messages"].pop(5), "E407", "$.messages[4]", "the last turn"),
    ("marks", _arguments({"city": "a" + "\u0300" * 40}), "E408", "$.messages[2].content", "combining marks"),
    ("half", _arguments({"city": "\ud800"}), "E402", "$.messages[2].content", "surrogate"),
    ("image", lambda r: r["messages"][1].update(content=[{"type": "image"}]), "E208", "$.messages[1].content", "im"),
    ("audio", lambda r: r["messages"][1].update(content=[{"type": "audio"}]), "E306", "$.messages[1].content", "parts"),
]


@pytest.mark.parametrize(("change", "code", "path", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_fault_of_functions_has_code_place_and_fix(
    tmp_path: Path, change: Callable[[Row], Any], code: str, path: str, words: str
) -> None:
    file = _write(tmp_path, [as_openai(OSLO), _changed(change)])
    [fault] = read_pairs(file, DataConfig(max_characters=10**6)).faults
    assert (fault.line, fault.code, fault.fix) == (2, code, CODES[code][1])
    assert fault.path.startswith(path)
    assert words in fault.reason


def test_all_codes_of_functions_are_tested() -> None:
    assert {code for code in CODES if code.startswith("E5")} <= {code for _, _, code, _, _ in FAULTS}


def test_hostile_pattern_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_SECONDS", 0.1)
    hostile = {"type": "object", "properties": {"city": {"pattern": "^(a|aa)+$"}}}
    row = _changed(_parameters(hostile))
    _call(row)["function"]["arguments"] = {"city": "a" * 200 + "!"}
    started = time.process_time()
    with pytest.raises(RowError) as caught:
        example_from_object(row, DataConfig())
    assert (caught.value.code, "takes too long" in str(caught.value)) == ("E502", True)
    assert time.process_time() - started < 60  # far above the limit, and far below the time without one


def test_large_arguments_of_a_large_schema_are_refused() -> None:
    listed = {"type": "object", "properties": {"a": {"items": {"enum": list(range(5_000))}}}}
    row = _changed(_parameters(listed))
    _call(row)["function"]["arguments"] = {"a": [-1] * 20_000}
    with pytest.raises(RowError, match="too large to be checked"):
        example_from_object(row, DataConfig())


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({"properties": {"a": {"type": "integer"}}}, {"a": 1}),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 1.5}),
        ({"patternProperties": {"^x": {"type": "string"}}, "additionalProperties": False}, {"xa": "b"}),
        ({"patternProperties": {"^x": {"type": "string"}}, "additionalProperties": False}, {"a": "b"}),
        ({"patternProperties": {"^x": {"type": "string"}}, "additionalProperties": {"type": "null"}}, {"xa": 1}),
        ({"additionalProperties": {"type": "null"}}, {"a": 1}),
        ({"properties": {"a": {"pattern": "^b+$"}}}, {"a": "bb"}),
        ({"properties": {"a": {"pattern": "^b+$"}}}, {"a": "cb"}),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, "1", True]}),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [{"b": 1}, {"b": 1.0}]}),
        ({"properties": {"a": {"$ref": "#/$defs/b~1c"}}, "$defs": {"b/c": {"const": 1}}}, {"a": 2}),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"a": 1, "b": 2}),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "required": ["a"]}, {}),
    ],
)
def test_arguments_are_judged_as_by_jsonschema(schema: Row, arguments: Row) -> None:
    from jsonschema import Draft202012Validator

    schema = {"type": "object", **schema}
    row = _changed(_parameters(schema))
    row["messages"][2]["tool_calls"].pop()
    row["messages"].pop(4)
    _call(row)["function"]["arguments"] = arguments
    reference = Draft202012Validator({key: value for key, value in schema.items() if key != "$schema"})
    try:
        example_from_object(row, DataConfig())
    except RowError as error:
        assert (error.code, reference.is_valid(arguments)) == ("E505", False)
    else:
        assert reference.is_valid(arguments)


REPAIRS: list[tuple[str, Callable[[Row], Any], list[str]]] = [
    ("no arguments", lambda r: r["messages"][1]["tool_calls"][0]["function"].pop("arguments"), ["E504"]),
    ("empty arguments", lambda r: _call(r)["function"].update(arguments=" "), ["E504"]),
    ("no ids", lambda r: [_call(r).pop("id"), r["messages"][2].pop("tool_call_id")], ["E512"]),
    ("no result id", lambda r: r["messages"][2].pop("tool_call_id"), ["E512"]),
    ("result", lambda r: r["messages"][2].update(content={"time": 12}), ["E305"]),
    ("results", lambda r: r["messages"][2].update(content=[12]), ["E306"]),
    ("role", lambda r: r["messages"][2].update(role="Tool"), ["E304"]),
    ("same id", lambda r: r["messages"][5]["tool_calls"][0].update(id=_call(r)["id"]), ["E507"]),
]


@pytest.mark.parametrize(("change", "codes"), [r[1:] for r in REPAIRS], ids=[r[0] for r in REPAIRS])
def test_fix_file_repairs_faults_of_functions(tmp_path: Path, change: Callable[[Row], Any], codes: list[str]) -> None:
    path = _write(tmp_path, [_changed(change, ONE)])
    changes = fix_file(path, tmp_path / "out.jsonl", DataConfig())
    assert [(c.code, c.left_out) for c in changes if c.code] == [(code, False) for code in codes]
    [read] = read_pairs(tmp_path / "out.jsonl", DataConfig()).rows
    assert [m.call_id for m in read.example.messages] == [m.call_id for m in ONE.messages]
    assert read.example.messages[-1] == ONE.messages[-1]


def test_fix_file_reads_a_python_literal(tmp_path: Path) -> None:
    path = _write(tmp_path, [_changed(_arguments("{'city': 'Oslo', 'days': 2}"))])
    fix_file(path, tmp_path / "out.jsonl", DataConfig())
    [read] = read_pairs(tmp_path / "out.jsonl", DataConfig()).rows
    assert read.example == OSLO


def test_fix_file_does_not_guess(tmp_path: Path) -> None:
    def ids(row: Row) -> None:
        _call(row).pop("id")  # one of two

    rows = [as_openai(OSLO), _changed(ids), _changed(_arguments(None)), _changed(_arguments("{city: Oslo}"))]
    changes = fix_file(_write(tmp_path, rows), tmp_path / "out.jsonl", DataConfig())
    assert [(c.line, c.code, c.left_out) for c in changes] == [(2, "E512", True), (3, "E505", True), (4, "E504", True)]


@pytest.mark.parametrize("written", FORMATS)
def test_fix_file_writes_any_format_as_chat_rows(tmp_path: Path, written: Callable[[Example], Row]) -> None:
    fix_file(_write(tmp_path, [written(OSLO)]), tmp_path / "out.jsonl", DataConfig())
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["tools"], {"messages", "tools"} <= row.keys()) == (json.loads(canonical_json(TOOLS)), True)
    assert example_from_object(row, DataConfig()) == OSLO
    assert check_files([tmp_path / "out.jsonl"], DataConfig(), LogReporter()).ok


def test_fix_file_writes_a_table_from_a_table_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Only the copy of a CSV file"):
        fix_file(_write(tmp_path, [as_openai(OSLO)]), tmp_path / "out.csv", DataConfig())
    assert not (tmp_path / "out.csv").exists()
    (tmp_path / "in.csv").write_text('id,output,system,instruction\n1,yes," ",a\n2,,be kind,b\n3,"no, no",be kind,c\n')
    changes = fix_file(tmp_path / "in.csv", tmp_path / "out.csv", DataConfig())
    assert [(change.line, change.code, change.left_out) for change in changes] == [
        (2, "E401", False),
        (3, "E401", True),
    ]
    copy = (tmp_path / "out.csv").read_text(encoding="utf-8-sig")
    assert copy == 'id,output,system,instruction\n1,yes,,a\n3,"no, no",be kind,c\n'
    assert check_files([tmp_path / "out.csv"], DataConfig(), LogReporter()).ok
