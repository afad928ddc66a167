"""Examples whose turns are in a file are the examples that were stored."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

from tunewright.config import DataConfig
from tunewright.data.examples import Example, Message, RowFile, ToolCall
from tunewright.data.readers import read_pairs

EXAMPLES = (
    Example((Message("user", "question é"), Message("assistant", "answer"))),
    Example(
        (
            Message("tools", '[{"name":"weather"}]'),
            Message("system", "Be brief."),
            Message("user", "Oslo?"),
            Message("assistant", "", 0, (ToolCall("weather", '{"city":"Oslo"}', "call00000"),)),
            Message("tool", "rain", call_id="call00000"),
            Message("assistant", "It rains.", reasoning="Rain."),
        )
    ),
)


def test_stored_example_is_the_example() -> None:
    file = RowFile()
    for example, stored in [(each, file.stored(each)) for each in EXAMPLES]:
        for name in ("messages", "output", "input_text", "pair_key", "prompt_key", "input_key", "question_key"):
            assert getattr(stored, name) == getattr(example, name), name
        assert stored.content_key == example.content_key
        assert stored == example == stored
        assert hash(stored) == hash(example)
        assert stored.as_row() == example.as_row()
    assert file.stored(EXAMPLES[0]) != EXAMPLES[1] != file.stored(EXAMPLES[0])


def test_stored_example_reaches_another_process_with_its_turns() -> None:
    for example in EXAMPLES:
        copy = pickle.loads(pickle.dumps(RowFile().stored(example)))
        assert type(copy) is Example
        assert (copy, copy.pair_key, copy.prompt_digest) == (example, example.pair_key, example.prompt_digest)


def test_rows_that_were_read_hold_no_text(tmp_path: Path) -> None:
    count, length = 500, 5_000
    rows = [{"prompt": f"{i} " + "question " * (length // 9), "completion": "a"} for i in range(count)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    read = read_pairs(tmp_path / "pairs.jsonl", DataConfig()).rows
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < count * length / 2
    assert [row.example.input_text for row in read] == [row["prompt"] for row in rows]
