"""A version as a file for other tools: round trips, and rows that a format cannot represent."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from data_helpers import Listener, example, new_project, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.browse import Format, write_version
from tunewright.data.examples import Example, Message, ToolCall
from tunewright.data.readers import read_pairs
from tunewright.data.versions import DatasetVersion, Member, load_version

few_examples = examples(60)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> DatasetVersion:
    """A version of 60 one-turn rows."""
    project = new_project(tmp_path_factory.mktemp("export") / "p")
    add(project, [write_jsonl(project.root / "first.jsonl", unlike_pairs(60))], Listener())
    return load_version(project.dataset)


def _with(version: DatasetVersion, examples: Sequence[Example]) -> DatasetVersion:
    """The version with these rows in place of its own; `export` looks at nothing else."""
    keyed = {e.pair_key: e for e in examples}
    return replace(version, members=tuple(Member(keyed[k], k, "train", k) for k in sorted(keyed)))


def _keys_read(path: Path, config: DataConfig | None = None) -> list[str]:
    reading = read_pairs(path, config or DataConfig())
    assert reading.faults == []
    return sorted(row.example.pair_key for row in reading.rows)


# Import composes text (NFC) and refuses blank turns, so no version has others.
_TEXT = (
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
    .map(lambda text: unicodedata.normalize("NFC", text))
    .filter(str.strip)
)
_WEIGHT: st.SearchStrategy[Literal[0, 1]] = st.sampled_from([0, 1])


@st.composite
def _conversations(draw: st.DrawFn) -> Example:
    turns = [Message("system", draw(_TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(_TEXT)), Message("assistant", draw(_TEXT), draw(_WEIGHT))]
    reasoning = draw(st.just("") | _TEXT.map(str.strip))
    return Example((*turns, Message("user", draw(_TEXT)), Message("assistant", draw(_TEXT), reasoning=reasoning)))


@few_examples
@given(examples=st.lists(_conversations(), min_size=1, max_size=5))
@pytest.mark.parametrize("form", ["chat", "parquet"])
def test_export_to_chat_and_parquet_round_trips(
    version: DatasetVersion, tmp_path_factory: pytest.TempPathFactory, form: Format, examples: list[Example]
) -> None:
    path = tmp_path_factory.mktemp("out") / ("rows.jsonl" if form == "chat" else "rows.parquet")
    changed = _with(version, examples)
    write_version(changed, path, form, Listener())
    assert _keys_read(path) == [m.key for m in changed.members]


@few_examples
@given(
    pairs=st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=5),
    system=st.none() | _TEXT,
    form=st.sampled_from(["csv", "alpaca"]),
)
def test_export_to_csv_and_alpaca_round_trips_for_one_turn_rows(
    version: DatasetVersion,
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, str]],
    system: str | None,
    form: Format,
) -> None:
    path = tmp_path_factory.mktemp("out") / ("rows.csv" if form == "csv" else "rows.json")
    changed = _with(version, [example(p, c, system) for p, c in pairs])
    listener = Listener()
    result = write_version(changed, path, form, listener)
    config = (
        DataConfig(input="prompt", output="completion", system_prompt=result.system) if form == "csv" else DataConfig()
    )
    assert _keys_read(path, config) == [m.key for m in changed.members]
    assert len([w for w in listener.warned if "formula" not in w]) == (form == "csv" and system is not None)
    assert result.system == (system if form == "csv" else None)


def test_export_writes_only_the_given_split(version: DatasetVersion, tmp_path: Path) -> None:
    for split in (None, "train", "dev", "test"):
        path = tmp_path / f"{split}.jsonl"
        result = write_version(version, path, "chat", Listener(), split=split)
        expected = [m.key for m in version.members if split in (None, m.split)]
        assert _keys_read(path) == expected
        assert result.rows == len(expected)


def test_export_writes_the_usual_layout_of_each_format(version: DatasetVersion, tmp_path: Path) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    changed = _with(version, [example('say "hi",\nplease', "hi", "Be brief.")])
    write_version(changed, tmp_path / "a.jsonl", "chat", Listener())
    write_version(changed, tmp_path / "a.json", "alpaca", Listener())
    write_version(changed, tmp_path / "a.csv", "csv", Listener())
    write_version(changed, tmp_path / "a.parquet", "parquet", Listener())
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'say "hi",\nplease'},
        {"role": "assistant", "content": "hi"},
    ]
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"messages": turns}
    row = {"instruction": 'say "hi",\nplease', "input": "", "output": "hi", "system": "Be brief."}
    assert json.loads((tmp_path / "a.json").read_text()) == [row]
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"prompt": 'say "hi",\nplease', "completion": "hi"}]
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.to_pylist() == [{"messages": turns}]
    assert table.schema.metadata[b"tunewright.version"].decode() == version.digest


_WEIGHTED = Example(
    (Message("user", "a"), Message("assistant", "b", 0), Message("user", "c"), Message("assistant", "d"))
)
_CALLED = Example(
    (Message("tools", "[]"), Message("user", "a"), Message("assistant", "", calls=(ToolCall("f", "{}", "c"),)))
)
_THOUGHT = Example((Message("user", "a"), Message("assistant", "b", reasoning="c")))
_TWO_TURNS = Example((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")))


@pytest.mark.parametrize(
    ("form", "rows", "words"),
    [
        ("csv", [_CALLED], "functions and calls"),
        ("alpaca", [_CALLED], "functions and calls"),
        ("csv", [_TWO_TURNS], "conversations of several turns"),
        ("alpaca", [_TWO_TURNS], "conversations of several turns"),
        ("csv", [_THOUGHT], "thinking"),
        ("csv", [_WEIGHTED], "weights"),
        ("alpaca", [_WEIGHTED], "weights"),
        ("csv", [example("a", "b", "one"), example("c", "d", "two"), example("e", "f", "one")], "system turns"),
        ("csv", [example("a", "b"), example("c", "d", "two"), example("e", "f")], "system turns"),
    ],
)
def test_export_refuses_rows_that_a_format_cannot_represent(
    version: DatasetVersion, tmp_path: Path, form: Format, rows: list[Example], words: str
) -> None:
    changed = _with(version, rows if words == "system turns" else [*rows, example("fine", "fine")])
    odd = rows[1] if words == "system turns" else rows[0]
    with pytest.raises(UserError, match=f"{form} cannot represent {words}.* 1 of .* rows .*{odd.pair_key[:12]}"):
        write_version(changed, tmp_path / "out.file", form, Listener())
    assert list(tmp_path.iterdir()) == []


def test_export_does_not_overwrite_a_file(version: DatasetVersion, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_version(version, path, "chat", Listener())
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("form", "split"), [("xml", None), ("chat", "exam")])
def test_export_refuses_unknown_formats_and_splits(
    version: DatasetVersion, tmp_path: Path, form: str, split: str
) -> None:
    with pytest.raises(UserError, match="Unknown"):
        write_version(version, tmp_path / "x", form, Listener(), split=split)  # type: ignore[arg-type]


def test_export_refuses_an_empty_split(version: DatasetVersion, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dev rows"):
        write_version(_with(version, [example("a", "b")]), tmp_path / "x", "chat", Listener(), split="dev")


def test_csv_export_keeps_formulas_and_reports_them(version: DatasetVersion, tmp_path: Path) -> None:
    rows = [example("=cmd|' /C calc'!A0", "a"), example("b", "@SUM(A1)"), example("c", "1-1")]
    changed, listener = _with(version, rows), Listener()
    write_version(changed, tmp_path / "a.csv", "csv", listener)
    assert [warning for warning in listener.warned if "2 rows of " in warning and "formula" in warning]
    read = read_pairs(tmp_path / "a.csv", DataConfig())
    assert {row.example.output for row in read.rows} == {"a", "@SUM(A1)", "1-1"}
    silent = Listener()
    write_version(changed, tmp_path / "a.jsonl", "chat", silent)
    assert not silent.warned


@pytest.mark.parametrize("form", ["chat", "alpaca", "csv", "parquet"])
def test_export_leaves_nothing_when_interrupted(
    version: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_version(version, tmp_path / "out", form, Listener())
    assert list(tmp_path.iterdir()) == []
