"""BFCL's files as rows: the ideal output, the acceptable values, families, and items that cannot be rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from making.bfcl_examples import FOLDER, items, needs_bfcl
from making.command_line import tunewright
from prepare_bfcl import CATEGORIES, NO_FUNCTION_FITS, Converted, convert
from tunewright.core.errors import UserError

PLAY = {
    "name": "spotify.play",
    "description": "Play music.",
    "parameters": {
        "type": "dict",
        "properties": {
            "artist": {"type": "string", "description": "The artist."},
            "volume": {"type": "float", "default": 0.5},
            "tags": {"type": "tuple", "items": {"type": "string"}},
            "extra": {"type": "any", "optional": True},
            "device": {"type": "dict", "properties": {"id": {"type": "integer"}, "room": {"type": "string"}}},
        },
        "required": ["artist"],
    },
}


def _converted(folder: Path, truth: Any, *, category: str = "simple_python", functions: Any = None) -> Converted:
    item = {"id": "a_0", "question": [[{"role": "user", "content": "Play."}]], "function": functions or [PLAY]}
    (folder / "possible_answer").mkdir(exist_ok=True)
    (folder / f"BFCL_v4_{category}.json").write_text(json.dumps(item) + "\n", encoding="utf-8")
    answer = json.dumps({"id": "a_0", "ground_truth": truth}) + "\n"
    (folder / "possible_answer" / f"BFCL_v4_{category}.json").write_text(answer, encoding="utf-8")
    return convert(folder)


def _arguments(row: dict[str, Any]) -> list[Any]:
    return [json.loads(call["function"]["arguments"]) for call in row["messages"][-1]["tool_calls"]]


def test_types_become_json_schema(tmp_path: Path) -> None:
    (row,) = _converted(tmp_path, [{"spotify.play": {"artist": ["Björk"]}}]).rows
    function = row["tools"][0]["function"]
    assert function["name"] == row["family"] == "spotify_play"
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "artist": {"type": "string", "description": "The artist."},
            "volume": {"type": "number", "default": 0.5},
            "tags": {"type": "array", "items": {"type": "string"}},
            "extra": {},
            "device": {"type": "object", "properties": {"id": {"type": "integer"}, "room": {"type": "string"}}},
        },
        "required": ["artist"],
    }


@pytest.mark.parametrize(
    ("truth", "arguments", "acceptable"),
    [
        ({"artist": ["Björk"]}, {"artist": "Björk"}, {}),
        ({"artist": ["Björk", "Bjork"]}, {"artist": "Björk"}, {"artist": ["Björk", "Bjork"]}),
        (
            {"artist": ["Björk"], "volume": [0.8, ""]},
            {"artist": "Björk", "volume": 0.8},
            {"volume": [0.8, ""]},
        ),
        ({"artist": ["Björk"], "volume": ["", 0.8]}, {"artist": "Björk"}, {"volume": ["", 0.8]}),
        ({"artist": ["", "Björk"]}, {"artist": "Björk"}, {"artist": ["", "Björk"]}),
        ({"artist": ["Björk"], "extra": [7]}, {"artist": "Björk", "extra": 7}, {}),
        ({"artist": ["Björk"], "undeclared": ["", 1]}, {"artist": "Björk"}, {}),
        (
            {"artist": ["Björk"], "volume": ["loud", 0.8]},
            {"artist": "Björk", "volume": 0.8},
            {"volume": ["loud", 0.8]},
        ),
        ({"artist": ["Björk"], "device": [{"id": [1]}]}, {"artist": "Björk", "device": {"id": 1}}, {}),
        (
            {"artist": ["Björk"], "device": [{"id": [1, 2], "room": ["", "bath"]}]},
            {"artist": "Björk", "device": {"id": 1}},
            {"device": [{"id": [1, 2], "room": ["", "bath"]}]},
        ),
    ],
)
def test_first_acceptable_value_of_the_schema_is_the_ideal_output(
    tmp_path: Path, truth: Any, arguments: Any, acceptable: Any
) -> None:
    (row,) = _converted(tmp_path, [{"spotify.play": truth}]).rows
    assert _arguments(row) == [arguments]
    assert row.get("acceptable", [{}]) == [acceptable]


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        ([{"spotify.stop": {}}], "the acceptable call is of spotify.stop, which is not declared"),
        ([{"spotify.play": {"artist": [1]}}], "no acceptable value of artist satisfies its schema: [1]"),
        ([{"spotify.play": {"artist": ["a"], "x": [1]}}], "the acceptable calls have x, which is not declared"),
        ([{"spotify.play": {"volume": [1]}}], "does not satisfy its schema: 'artist' is a required property"),
        ([], "it has no acceptable calls"),
        ([{"spotify.play": {"artist": [f"name {n}" for n in range(200)]}}], "more than 1,000 characters"),
    ],
)
def test_item_that_cannot_be_a_row_is_named_with_its_reason(tmp_path: Path, truth: Any, reason: str) -> None:
    converted = _converted(tmp_path, truth)
    assert converted.rows == ()
    (line,) = converted.left_out
    assert line.startswith("a_0: ")
    assert line.endswith(reason)


def test_irrelevant_item_has_text_for_its_ideal_output(tmp_path: Path) -> None:
    (row,) = _converted(tmp_path, [], category="irrelevance").rows
    assert row["messages"][-1] == {"role": "assistant", "content": NO_FUNCTION_FITS}


@pytest.mark.parametrize("line", ["{", "[]", "{}", "3"])
def test_damaged_file_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "BFCL_v4_irrelevance.json").write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"BFCL_v4_irrelevance.json:2: Expected a JSON object with an id"):
        convert(tmp_path)


def test_items_that_data_add_would_refuse_are_left_out_with_the_reason(tmp_path: Path) -> None:
    """Two user turns in a row, a name on a turn, and an empty question, and one good item."""
    user = {"role": "user", "content": "Play."}
    turns = [[user], [user, user], [{**user, "name": "ann"}], [{**user, "content": " "}]]
    lines = [{"id": f"i_{n}", "question": [turn], "function": [PLAY]} for n, turn in enumerate(turns)]
    (tmp_path / "BFCL_v4_live_irrelevance.json").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    project = tmp_path / "project"
    assert tunewright("init", project, "--example", "bfcl", "--data", tmp_path).code == 0
    (row,) = map(json.loads, (project / "bfcl.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["id"] == "i_0"
    left_out = (project / "left-out.txt").read_text(encoding="utf-8").splitlines()
    assert [(line.partition(":")[0], line[-6:]) for line in left_out] == [
        ("i_1", "[E406]"),
        ("i_2", "[E309]"),
        ("i_3", "[E401]"),
    ]


def test_files_are_found_by_content_whatever_their_names(tmp_path: Path) -> None:
    """Java's types, two turns, acceptable calls next to the items, and files that are neither."""
    java = {**PLAY, "parameters": {"type": "dict", "properties": {"artist": {"type": "String"}}, "required": []}}
    user = {"role": "user", "content": "Play."}
    lines = [
        {"id": "simple_java_0", "question": [[user]], "function": [java]},
        {"id": "java_1", "question": [[user], [user]], "function": [java]},
        {"id": "live_relevance_2-0", "question": [[{**user, "content": "Stop."}]], "function": [java]},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    answer = {"id": "simple_java_0", "ground_truth": [{"spotify.play": {"artist": ["Björk"]}}]}
    (tmp_path / "calls.json").write_text(json.dumps(answer), encoding="utf-8")
    (tmp_path / "turns.json").write_text(json.dumps({"id": "a", "question": [[user]], "path": []}), encoding="utf-8")
    (tmp_path / "BFCL_v4_notes.json").write_text("{}", encoding="utf-8")
    converted = convert(tmp_path)
    (row,) = converted.rows
    assert (row["id"], row["category"], _arguments(row)) == ("simple_java_0", "simple_java", [{"artist": "Björk"}])
    assert [line.partition(":")[0] for line in converted.left_out] == [
        "java_1",
        "live_relevance_2-0",
        "BFCL_v4_notes.json",
        "turns.json",
    ]


def test_question_with_another_answer_for_the_same_functions_is_left_out(tmp_path: Path) -> None:
    _converted(tmp_path, [{"spotify.play": {"artist": ["Björk"]}}])
    item = {"id": "b_0", "question": [[{"role": "user", "content": "Play."}]], "function": [PLAY]}
    (tmp_path / "BFCL_v4_irrelevance.json").write_text(json.dumps(item), encoding="utf-8")
    converted = convert(tmp_path)
    assert [row["id"] for row in converted.rows] == ["a_0"]
    assert converted.left_out == ("b_0: its question and functions have another answer in a_0",)


@pytest.mark.slow
@needs_bfcl
def test_every_item_of_the_data_set_is_a_row_or_named() -> None:
    converted = convert(FOLDER)
    named = [line.partition(":")[0] for line in converted.left_out]
    there = {
        json.loads(line)["id"]
        for path in FOLDER.glob("BFCL_v4_*.json")
        if path.stem.removeprefix("BFCL_v4_") in CATEGORIES
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    assert {row["id"] for row in converted.rows} | {name for name in named if ".json" not in name} == there
    assert [name for name in named if ".json" in name] == ["BFCL_v4_multi_turn_base.json"]
    assert len(converted.rows) > 0.99 * len(there)
    assert len(items()) == len(converted.rows)  # the reader of rows takes them all, and checks calls against schemas
