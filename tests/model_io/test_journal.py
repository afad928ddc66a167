"""The journal of answers: whole rows only, whatever a crash left, and each answer is asked for once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.model_io.replies import Journal

ANSWERS = st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=4)


def journal_of(path: Path) -> Journal[str]:
    return Journal(path, lambda row: (row["key"], row["text"]), lambda key, text: {"key": key, "text": text})


@given(answers=ANSWERS, cut=st.integers(min_value=0), last=st.text(max_size=5))
def test_journal_cut_at_any_byte_yields_its_whole_rows_and_later_ones(
    tmp_path_factory: pytest.TempPathFactory, answers: dict[str, str], cut: int, last: str
) -> None:
    path = tmp_path_factory.mktemp("log") / "folder" / "journal.jsonl"
    first = journal_of(path)
    with first.keeping() as keep:
        for key, text in answers.items():
            keep(key, text)
    assert first.answers == answers
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])
    there = journal_of(path)
    assert there.answers == dict(list(answers.items())[: len(there.answers)])
    assert there.missing({**answers, "last": "?"}).keys() == answers.keys() - there.answers.keys() | {"last"}
    with there.keeping() as keep:
        keep("last", last)
    assert journal_of(path).answers == {**there.answers, "last": last}


def test_journal_skips_rows_of_another_form_and_a_line_cut_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes('[1]\n1\n{"key": "a"}\n{"key": "b", "text": "ü"}\n{"key": "c", "text": "ü'.encode()[:-1])
    assert journal_of(path).answers == {"b": "ü"}


def test_answer_without_a_row_is_kept_in_memory_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal: Journal[str] = Journal(path, lambda row: (row["key"], ""), lambda _key, _text: None)
    with journal.keeping() as keep:
        keep("a", "refused")
    assert journal.missing({"a": 1, "b": 2}) == {"b": 2}
    assert path.read_text().strip() == ""
