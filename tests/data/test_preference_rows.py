"""Preference rows: the preferred answer is the ideal output, and the rejected one is kept with the version."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import new_project, unlike_pairs, write_rows

import tunewright
from making.command_line import tunewright as command
from tunewright.api import Project
from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.options import AddOptions, RemoveOptions
from tunewright.data.readers import ReadResult, read_pairs
from tunewright.data.readers.validate import MOST_CHARACTERS

USER, GOOD, BAD = (
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "assistant", "content": "five"},
)
OPENAI = {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
SYSTEM = {"role": "system", "content": "Count."}
PAIR = [("user", "Two and two?"), ("assistant", "four")]


def _read(tmp_path: Path, *rows: dict[str, Any]) -> ReadResult:
    path = write_rows(tmp_path / "a.jsonl", rows)
    return read_pairs(path, DataConfig())


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (OPENAI, "preference pairs (OpenAI, Together)"),
        ({"prompt": "Two and two?", "chosen": "four", "rejected": "five"}, "preference pairs"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "preference pairs"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "preference pairs"),
        ({"prompt": "Two and two?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "preference pairs"),
        ({"prompt": "Two and two?", "chosen": [GOOD], "rejected": [BAD]}, "preference pairs"),
        ({"prompt": "Two and two?", "chosen": GOOD, "rejected": BAD, "score": None}, "preference pairs"),
        ({"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "preference pairs"),
    ],
)
def test_preference_row_is_its_preferred_answer_and_keeps_the_other(
    tmp_path: Path, row: dict[str, Any], kind: str
) -> None:
    reading = _read(tmp_path, row)
    assert not reading.faults
    [found] = reading.rows
    assert [(m.role, m.content) for m in found.example.messages] == PAIR
    assert found.metadata["rejected"] == "five"
    assert f"JSON Lines: {kind}, because rows have" in reading.notes[-1 if "messages" not in row else 0]
    plain = _read(tmp_path, {"messages": [USER, GOOD]}).rows[0]
    assert plain.example.pair_key == found.example.pair_key


def test_undesirable_completion_is_refused_as_an_ideal_output(tmp_path: Path) -> None:
    """trl's unpaired format, in which half of the rows are bad answers."""
    rows = [{"prompt": "Two and two?", "completion": text, "label": text == "four"} for text in ("four", "five")]
    reading = _read(tmp_path, *rows)
    assert [(f.line, f.code) for f in reading.faults] == [(2, "E209")]
    assert "label is false" in reading.faults[0].reason
    assert [row.example.output for row in reading.rows] == ["four"]
    path = tmp_path / "a.jsonl"
    assert not read_pairs(path, DataConfig(drop_columns=("label",))).faults


def test_system_turn_and_several_turns_are_kept(tmp_path: Path) -> None:
    more = [SYSTEM, USER, GOOD, {"role": "user", "content": "And two?"}]
    six, seven = ({"role": "assistant", "content": text} for text in ("six", "seven"))
    reading = _read(
        tmp_path,
        {"prompt": more, "chosen": [six], "rejected": [seven]},
        {"chosen": [*more, six], "rejected": [*more, seven]},
        {"system": "Count.", "prompt": "Two and two?", "chosen": "four", "rejected": "five"},
    )
    first, second, third = reading.rows
    assert first.example == second.example
    assert [m.role for m in first.example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert third.example.messages[0].content == "Count."
    assert [row.metadata["rejected"] for row in reading.rows] == ["seven", "seven", "five"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", [[USER], [SYSTEM, USER], [SYSTEM, USER, GOOD, {"role": "user", "content": "And two?"}]]
)
def test_shared_prompt_is_that_of_trl(tmp_path: Path, before: list[dict[str, str]]) -> None:
    from trl.data_utils import extract_prompt

    row: dict[str, Any] = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
    [found] = _read(tmp_path, row).rows
    theirs = extract_prompt(row)
    assert [turn.as_dict() for turn in found.example.prompt] == theirs["prompt"]
    assert [found.example.messages[-1].as_dict()] == theirs["chosen"]
    assert found.metadata["rejected"] == theirs["rejected"][0]["content"]


@pytest.mark.parametrize(
    ("row", "code", "path"),
    [
        ({"prompt": "a", "chosen": "b"}, "E209", "$"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "E209", "$.rejected"),
        ({"prompt": "a", "rejected": "b"}, "E209", "$"),
        ({"chosen": "a b", "rejected": "a c"}, "E209", "$"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "E209", "$.rejected"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "E209", "$.rejected"),
        ({"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "E209", "$.rejected"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "E209", "$.chosen[2]"),
        ({"preferred_output": [GOOD], "non_preferred_output": [BAD]}, "E209", "$"),
        ({**OPENAI, "input": {"messages": [USER], "n": 1}}, "E201", "$.input.n"),
        ({**OPENAI, "non_preferred_output": ["five"]}, "E301", "$.non_preferred_output[0]"),
        ({**OPENAI, "non_preferred_output": [{**BAD, "content": " "}]}, "E401", "$.non_preferred_output[0].content"),
        ({**OPENAI, "preferred_output": [{**GOOD, "content": 4}]}, "E305", "$.preferred_output[0].content"),
        ({"prompt": 4, "chosen": "b", "rejected": "c"}, "E305", "$.prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": 4}, "E301", "$.rejected"),
    ],
)
def test_malformed_preference_row_is_a_fault_at_its_place(
    tmp_path: Path, row: dict[str, Any], code: str, path: str
) -> None:
    reading = _read(tmp_path, row)
    assert [(f.code, f.path) for f in reading.faults] == [(code, path)]


def test_preferences_are_read_from_tables(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    pq.write_table(pa.table({"chosen": [[USER, GOOD]], "rejected": [[USER, BAD]], "id": [7]}), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected", "id"), ("Two and two?", "four", "five", "7")])
    for name, number in (("a.parquet", 7), ("a.csv", "7")):
        [row] = read_pairs(tmp_path / name, DataConfig()).rows
        assert [(m.role, m.content) for m in row.example.messages] == PAIR
        assert row.metadata == {"rejected": "five", "id": number}


def _project(root: Path, rejected: str = "wrong answer") -> Project:
    project = new_project(root)
    rows = [{"prompt": q, "chosen": a, "rejected": f"{rejected} {a}"} for q, a in unlike_pairs(24)]
    rows.append({**rows[0], "rejected": "another wrong answer"})
    write_rows(project.root / "a.jsonl", rows)
    opened = tunewright.open(project.root)
    opened.data.add([project.root / "a.jsonl"])
    return opened


def test_long_rejected_answers_are_kept_shown_and_exported(tmp_path: Path) -> None:
    long = "x " * MOST_CHARACTERS
    project = _project(tmp_path / "p", long)
    root = tmp_path / "p"
    shown = command("data", "show", "a.jsonl:1", "-p", root, "--json").document
    assert shown["metadata"]["rejected"].startswith(long)
    ran = command("data", "export", tmp_path / "out.jsonl", "--format", "preference", "-p", root)
    assert (ran.code, "Wrote 25 rows" in ran.stdout) == (0, True)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    question = next(iter(unlike_pairs(24)))[0]
    mine = [row for row in rows if row["prompt"][0]["content"] == question]
    assert all(row["chosen"] == [{"role": "assistant", "content": "answer 0"}] for row in mine)
    assert sorted(row["rejected"][0]["content"][:7] for row in mine) == ["another", "x x x x"]
    assert not project.data.add([tmp_path / "out.jsonl"]).created
    project.data.export(tmp_path / "chat.jsonl", metadata=True)
    again = read_pairs(tmp_path / "chat.jsonl", DataConfig()).rows
    assert all(len(row.metadata["rejected"]) > MOST_CHARACTERS for row in again[1:])


def test_export_names_rows_without_a_rejected_answer(tmp_path: Path) -> None:
    project = _project(tmp_path / "p")
    more = tmp_path / "p" / "more.jsonl"
    more.write_text(json.dumps({"prompt": "something else entirely", "completion": "yes"}))
    project.data.add([more])
    ran = command("data", "export", tmp_path / "out.jsonl", "--format", "preference", "-p", tmp_path / "p")
    assert "1 row without a rejected answer left out" in " ".join(ran.stderr.split())
    plain = new_project(tmp_path / "q")
    (plain.root / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in unlike_pairs(24))
    )
    data = tunewright.open(plain.root).data
    data.add([plain.root / "a.jsonl"])
    with pytest.raises(UserError, match="No row has a rejected answer"):
        data.export(tmp_path / "none.jsonl", "preference")
    assert not (tmp_path / "none.jsonl").exists()


def test_secret_in_a_rejected_answer_is_refused_or_redacted(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    file = project.root / "a.jsonl"
    rows = [{"prompt": f"{q} of ann@acme-mail.com", "chosen": a, "rejected": f"bad {a}"} for q, a in unlike_pairs(24)]
    rows[3]["rejected"] = "the password: hunter2-Xy9! of ann@acme-mail.com and bob@acme-mail.com"
    write_rows(file, rows)
    data = tunewright.open(project.root).data
    with pytest.raises(UserError, match="secrets in groups or metadata") as caught:
        data.add([file])
    assert "a.jsonl:4: password in the key rejected" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    data.add([file], AddOptions(redact=True))
    data.export(tmp_path / "out.jsonl", "preference")
    [row] = [line for line in (tmp_path / "out.jsonl").read_text().splitlines() if "<PASSWORD_1>" in line]
    assert "<EMAIL_1> and <EMAIL_2>" in json.loads(row)["rejected"][0]["content"]
    assert "<EMAIL_1>" in json.loads(row)["prompt"][0]["content"]


def test_purge_erases_the_rejected_answers(tmp_path: Path) -> None:
    project = _project(tmp_path / "p")
    key = project.data.show("a.jsonl:1").key
    (tmp_path / "keys").write_text(key)
    (tmp_path / "p" / "a.jsonl").unlink()
    texts = ("wrong answer answer 0", "another wrong answer")
    dataset = tmp_path / "p" / "dataset"
    there = [text for file in dataset.rglob("*") if file.is_file() for text in texts if text in file.read_text()]
    assert set(there) == set(texts)
    project.data.remove(RemoveOptions(keys=tmp_path / "keys", because="asked for", purge=True))
    left = [file for file in dataset.rglob("*") if file.is_file() for text in texts if text in file.read_text()]
    assert not left
