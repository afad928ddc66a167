"""BFCL's files as rows: the ideal output, the acceptable values, families, and items that cannot be rows."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from bfcl_rows import FOLDER, items, needs_bfcl
from command_line import tunewright
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


def test_function_may_lack_a_description_and_parameters(tmp_path: Path) -> None:
    bare = {key: value for key, value in PLAY.items() if key != "description"}
    (row,) = _converted(tmp_path, [{"spotify.play": {"artist": ["Björk"]}}], functions=[bare]).rows
    assert row["tools"][0]["function"].keys() == {"name", "parameters"}
    (row,) = _converted(tmp_path, [{"stop": {}}], functions=[{"name": "stop", "description": "Stop."}]).rows
    assert row["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}}


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


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        (
            [{**PLAY, "name": "play music"}],
            "the function name 'play music' has other characters than letters, digits, _, - and dots",
        ),
        ([PLAY, {**PLAY, "name": "spotify_play"}], "two functions have the same name"),
        ([{**PLAY, "parameters": {"type": "HashMap"}}], "the type 'HashMap' is unknown"),
        ([{"description": "Play music."}], "a function has no name"),
    ],
)
def test_functions_that_no_api_takes_are_named(tmp_path: Path, functions: Any, reason: str) -> None:
    (line,) = _converted(tmp_path, [{"spotify.play": {"artist": ["a"]}}], functions=functions).left_out
    assert reason in line


def test_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "BFCL_v4_multi_turn_base.json").write_text('{"id": "m_0"}\n', encoding="utf-8")
    converted = _converted(tmp_path, [{"spotify.play": {"artist": ["a"]}}])
    assert len(converted.rows) == 1
    (line,) = converted.left_out
    assert line == "BFCL_v4_multi_turn_base.json: its answers are not one assistant turn with JSON arguments"


def test_irrelevant_item_has_text_for_its_ideal_output(tmp_path: Path) -> None:
    (row,) = _converted(tmp_path, [], category="irrelevance").rows
    assert row["messages"][-1] == {"role": "assistant", "content": NO_FUNCTION_FITS}


@pytest.mark.parametrize("line", ["{", "[]", "{}", "3"])
def test_damaged_file_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "BFCL_v4_irrelevance.json").write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"BFCL_v4_irrelevance.json:2: Expected a JSON object with an id"):
        convert(tmp_path)


def test_folder_without_usable_files_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 JSON files"):
        convert(tmp_path / "missing")
    for name in ("BFCL_v4_simple_javascript.json", "bfcl_live_parallel.json"):
        (tmp_path / name).write_text('{"id": "s_0"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="2 JSON files") as refusal:
        convert(tmp_path)
    assert [line.strip() for line in refusal.value.what.splitlines()[1:]] == [
        "BFCL_v4_simple_javascript.json: its answers are not one assistant turn with JSON arguments",
        "bfcl_live_parallel.json: its name does not begin with BFCL_v4_",
    ]
    assert "live_parallel_multiple" in str(refusal.value.fix)


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


def test_init_is_refused_when_no_item_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "BFCL_v4_irrelevance.json").write_text('{"id": "i_0", "question": []}\n', encoding="utf-8")
    ran = tunewright("init", tmp_path / "project", "--example", "bfcl", "--data", tmp_path)
    assert ran.code == 2
    assert "i_0: " in ran.stderr
    assert not (tmp_path / "project").exists()


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


@needs_bfcl
def test_function_is_in_one_family_only() -> None:
    families = defaultdict(set)
    for item in items():
        for tool in item.row["tools"]:
            families[tool["function"]["name"]].add(item.row["family"])
    assert {len(names) for names in families.values()} == {1}
    assert len({item.row["family"] for item in items()}) > 500


@needs_bfcl
@pytest.mark.slow  # 10 s
def test_project_takes_all_of_its_rows(tmp_path: Path) -> None:
    project = tmp_path / "bfcl"
    assert tunewright("init", project, "--example", "bfcl", "--data", FOLDER).code == 0
    added = tunewright("data", "add", project / "bfcl.jsonl", "--project", project, "--json")
    assert added.code == 0, added.stderr
    assert added.document["added"] == len(items())
