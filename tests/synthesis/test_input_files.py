"""Files of inputs: any format of pairs, with or without ideal outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.config import DataConfig
from tunewright.core.progress import LogReporter
from tunewright.synthesis.input_files import read_inputs

TURN = {"role": "user", "content": "hello you"}


@pytest.mark.parametrize(
    ("row", "config", "answered"),
    [
        ({"prompt": "hello you"}, {}, False),
        ({"prompt": "hello you", "completion": ""}, {}, False),
        ({"prompt": "hello you", "completion": "hi"}, {}, True),
        ({"instruction": "hello", "input": "you"}, {}, False),
        ({"messages": [TURN]}, {}, False),
        ({"messages": [TURN, {"role": "assistant", "content": "hi"}]}, {}, True),
        ({"conversations": [{"from": "human", "value": "hello you"}]}, {}, False),
        ({"q": "hello you"}, {"input": "q", "output": "a"}, False),
        ({"q": "hello you", "a": "hi"}, {"input": "q", "output": "a"}, True),
        ({"x": "hello", "y": "you"}, {"input": "{{ x }} {{ y }}", "output": "{{ answer }}"}, False),
    ],
)
def test_read_inputs_takes_rows_of_any_format(
    tmp_path: Path, row: dict[str, Any], config: dict[str, Any], answered: bool
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({**row, "team": "a"}) + "\n", encoding="utf-8")
    (found,) = read_inputs([path], DataConfig(system_prompt="Be brief.", group_by=("team",), **config), LogReporter())
    assert [m.content.split() for m in found.example.prompt] == [["Be", "brief."], ["hello", "you"]]
    assert (found.answered, found.row.groups, found.place) == (answered, {"team": "a"}, f"{path}:1")


def test_read_inputs_takes_tables_with_an_empty_output_column(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("question,answer,note\nhello you,,1\nand you,,2\n", encoding="utf-8")
    found = read_inputs([path], DataConfig(input="question", output="answer"), LogReporter())
    assert [each.example.input_text for each in found] == ["hello you", "and you"]
    assert (found[0].answered, found[0].row.metadata) == (False, {"note": "1"})
