"""Rows inside one JSON document: found by a JMESPath expression, with their lines and the keys above them."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import ReadResult, read_pairs

A, B, C = ({"prompt": text, "completion": "x"} for text in "abc")


def _read(folder: Path, document: Any, rows: str | None, name: str = "rows.json", **config: Any) -> ReadResult:
    path = folder / name
    text = document if isinstance(document, str) else json.dumps(document, indent=1)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return read_pairs(path, DataConfig(rows=rows, **config))


def _places(reading: ReadResult) -> list[tuple[int, str]]:
    return [(row.line, row.example.input_text) for row in reading.rows]


@pytest.mark.parametrize(
    ("document", "rows", "places"),
    [
        ({"1": A, "2": B}, "values(@)", [(2, "a"), (6, "b")]),
        ({"1": A, "2": B}, "*", [(2, "a"), (6, "b")]),
        ({"X": [A, B], "Y": [C]}, "*[]", [(3, "a"), (7, "b"), (13, "c")]),
        ({"version": 1, "data": [A, B]}, "data", [(4, "a"), (8, "b")]),
        ([{"rows": [A]}, {"rows": [B]}], "[].rows[]", [(4, "a"), (12, "b")]),
        ({"1": A, "2": B}, "reverse(values(@))", [(6, "b"), (2, "a")]),
        ({"data": [A, B]}, "data[?prompt == 'b']", [(7, "b")]),
    ],
)
def test_document_rows_have_their_lines(
    tmp_path: Path, document: Any, rows: str, places: list[tuple[int, str]]
) -> None:
    reading = _read(tmp_path, document, rows)
    assert (_places(reading), reading.faults) == (places, [])
    assert reading.notes == [
        f"{tmp_path / 'rows.json'}: rows at {rows} of a JSON document: prompt/completion pairs, because rows have "
        "prompt and completion"
    ]


_texts = st.text(alphabet='ab{}[]"\\\n:,é ', max_size=6)


@given(
    st.dictionaries(
        _texts,
        st.lists(
            st.fixed_dictionaries(
                {"p": _texts, "deep": st.lists(st.dictionaries(_texts, _texts, max_size=2), max_size=2)}
            ),
            max_size=3,
        ),
        max_size=3,
    ),
    st.sampled_from([None, 0, 2]),
)
def test_document_rows_have_the_lines_of_a_plain_search(
    tmp_path_factory: pytest.TempPathFactory, groups: dict[str, list[dict[str, Any]]], indent: int | None
) -> None:
    """Each row has its number in it, by which the text can be searched: an independent way to its line.

    Where the document is one line, the number is the place.
    """
    number, marked = 0, {}
    for key, rows in groups.items():
        marked[key] = [{"n": f"#{(number := number + 1)}#", **row} for row in rows]
    if not number:
        return
    text = json.dumps(marked, indent=indent, ensure_ascii=False)
    reading = _read(
        tmp_path_factory.mktemp("lines"), text, "*[]", input="{{ n }}", output="{{ above[0] }}={{ above[1] }}"
    )
    at = {
        m.group(1): int(m.group(1).strip("#")) if indent is None else text.count("\n", 0, m.start())
        for m in re.finditer(r'"(#\d+#)"', text)
    }
    assert [row.line for row in reading.rows] == [at[row.example.input_text] for row in reading.rows]
    outputs = {
        f"#{n}#": (key, i) for key, rows in marked.items() for i, row in enumerate(rows) for n in [row["n"].strip("#")]
    }
    for row in reading.rows:
        key, i = outputs[row.example.input_text]
        assert row.example.output == unicodedata.normalize("NFC", f"{key}={i}")
    assert len(reading.rows) == number


def test_template_gets_the_keys_above_a_row(tmp_path: Path) -> None:
    document = {"Get": {"train": [{"t": "a"}, {"t": "b"}]}, "Set": {"test": [{"t": "c"}]}}
    reading = _read(tmp_path, document, "*.*[][]", input="{{ t }}", output="{{ above | join('/') }}")
    assert [row.example.output for row in reading.rows] == ["Get/train/0", "Get/train/1", "Set/test/0"]


def test_document_rows_are_numbered_when_the_expression_creates_them(tmp_path: Path) -> None:
    document = {"1": {"ask": "a", "say": "x"}, "2": {"ask": "b", "say": None}}
    reading = _read(tmp_path, document, "values(@)[].{prompt: ask, completion: say}")
    assert _places(reading) == [(1, "a")]
    assert [(fault.line, fault.code) for fault in reading.faults] == [(2, "E305")]
    assert "places are row numbers in the result of data.rows" in reading.notes[0]


def test_document_rows_that_are_not_objects_are_faults(tmp_path: Path) -> None:
    reading = _read(tmp_path, {"data": [A, 7, "x", None, [B], B]}, "data[*]")
    assert _places(reading) == [(1, "a"), (5, "b")]
    assert [(fault.line, fault.code) for fault in reading.faults] == [(2, "E103"), (3, "E103"), (4, "E103")]


@pytest.mark.parametrize(
    ("document", "rows", "words", "where"),
    [
        ({"data": [A]}, "data[", "Invalid JMESPath expression", "data.rows (--rows)"),
        ({"data": [A]}, "rows", "'rows' selects nothing in ", "data.rows (--rows)"),
        ([{"sentences": [A], "sql": "b"}], "[].sentence[]", "selects nothing", "data.rows (--rows)"),
        ({"data": A}, "data", "'data' selects one object instead of a list of rows", "data.rows (--rows)"),
        ({"data": [A]}, "length(data)", "selects a number instead of a list", "data.rows (--rows)"),
        ({"data": [A]}, "nothing(@)", "Unknown function", "data.rows (--rows)"),
        ({"data": [A]}, "values(data)", "fails on", "data.rows (--rows)"),
        (json.dumps(A) + "\n" + json.dumps(B), "data", "text after the end of the document", "rows.json:2"),
        ('{"data": [{"prompt": "a",\n}]}', "data", "Not one JSON document", "rows.json:2"),
        ('{"data": [{}],\n "data": [{}]}', "data", 'duplicate key "data"', "rows.json:1"),
        ('{"data": [{}],\n\n "x": NaN}', "data", "NaN is not JSON", "rows.json:3"),
        ('{"data": [{}],\n "\udce9": "é"}', "data", "not UTF-8: invalid byte in line 2", "rows.json:2"),
        ("[" * 100_000, "data", "nested too deep", "rows.json"),
        ("", "data", "The file has no rows", "rows.json"),
        ("q,a\nx,y\n", "data", "is a table", "data.rows (--rows)"),
    ],
)
def test_document_without_rows_is_refused_once(
    tmp_path: Path, document: Any, rows: str, words: str, where: str
) -> None:
    name = "rows.csv" if words == "is a table" else "rows.json"
    with pytest.raises(UserError) as caught:
        _read(tmp_path, document, rows, name)
    assert words in caught.value.what
    assert (caught.value.where or "").endswith(where)


def test_document_fault_affects_its_row_only(tmp_path: Path) -> None:
    rows = ['{"prompt": "a", "completion": "x"}', '{"prompt": "b", "prompt": "c", "completion": "x"}']
    rows += [
        '{"prompt": NaN, "completion": "x"}',
        '{"prompt": "d", "completion":\n"caf\udce9"}',
        '{"prompt": "é", "completion": "x"}',
    ]
    text = '{"data": [\n' + ",\n".join(rows) + "\n]}"
    reading = _read(tmp_path, text, "data")
    assert _places(reading) == [(2, "a"), (7, "é")]
    reported = [(fault.line, fault.code, fault.reason) for fault in reading.faults]
    assert reported == [
        (3, "E104", 'duplicate key "prompt"'),
        (4, "E105", "NaN is not JSON"),
        (5, "E101", "not UTF-8: invalid byte in line 6"),
    ]


@pytest.mark.parametrize(
    ("document", "hint"),
    [
        ({"1": {"q": "a"}, "2": {"q": "b"}}, "'values(@)'"),
        ({"X": [{"q": "a"}], "Y": [{"q": "b"}]}, "'*[]'"),
        ({"version": "1.1", "data": [{"q": "a"}]}, "data"),
        ({"my rows": [{"q": "a"}]}, "'\"my rows\"'"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("config", [{}, {"input": "q", "output": "a"}, {"input": "{{ q }}", "output": "{{ a }}"}])
def test_document_of_rows_is_refused_with_the_option_for_it(
    tmp_path: Path, document: Any, hint: str, indent: int | None, config: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        _read(tmp_path, json.dumps(document, indent=indent), None, **config)
    assert f"--rows {hint}, or set data.rows" in (caught.value.fix or "")
    assert caught.value.where == f"{tmp_path / 'rows.json'}:1"


def test_single_known_row_is_a_row_when_it_contains_objects(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert len(_read(tmp_path, {"messages": turns}, None).rows) == 1
    assert [fault.code for fault in _read(tmp_path, {"messages": turns, "sytem": "x"}, None).faults] == ["E201"]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_data_rows_is_refused_for_tables(tmp_path: Path, kind: str) -> None:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list([A])
    table.to_parquet(str(tmp_path / "rows")) if kind == "parquet" else table.save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(UserError, match=r"data\.rows requires a JSON document"):
        read_pairs(tmp_path / "rows", DataConfig(rows="data"))


QUERIES = [
    {"sql": ["select 1"], "id": 7, "sentences": [{"text": "a"}, {"text": "b"}]},
    {"sql": ["select 2"], "id": 8, "sentences": [{"text": "c"}]},
]
FROM_PARENT = {"input": "{{ text }}", "output": "{{ parent.sql[0] }}"}


def test_parent_is_available_to_templates_and_groups(tmp_path: Path) -> None:
    groups = ("parent.sql[0]", "parent.id", "parent.parent.name")
    document = {"name": "geo", "queries": QUERIES}
    reading = _read(tmp_path, document, "queries[].sentences[]", group_by=groups, **FROM_PARENT)
    assert [(row.example.input_text, row.example.output) for row in reading.rows] == [
        ("a", "select 1"),
        ("b", "select 1"),
        ("c", "select 2"),
    ]
    assert [tuple(row.groups.values()) for row in reading.rows] == [
        ("select 1", "7", "geo"),
        ("select 1", "7", "geo"),
        ("select 2", "8", "geo"),
    ]


def test_array_of_objects_with_rows_is_refused_with_the_expression(tmp_path: Path) -> None:
    path = tmp_path / "queries.json"
    path.write_text(json.dumps(QUERIES))
    with pytest.raises(UserError, match="seem to contain the rows") as refusal:
        read_pairs(path, DataConfig())
    assert "--rows '[].sentences[]'" in (refusal.value.fix or "")
    assert "sql, id, sentences" in (refusal.value.fix or "")
    # An object that a mapping makes a row of is one, whatever else it holds.
    assert len(read_pairs(path, DataConfig(input="{{ id }}", output="{{ sql[0] }}")).rows) == 2


def test_group_above_the_rows_is_refused_when_no_row_has_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'parent.sqls\[0\]' selects nothing above any row") as refusal:
        _read(tmp_path, QUERIES, "[].sentences[]", group_by=("parent.sqls[0]",), **FROM_PARENT)
    assert (refusal.value.where, refusal.value.fix) == (
        "data.group_by",
        "Keys of the object above a row: sql, id, sentences.",
    )
    with pytest.raises(UserError, match="selects nothing above any row") as refusal:
        _read(tmp_path, [{"prompt": "a", "completion": "b"}], "[]", group_by=("parent.id",))
    assert refusal.value.fix == "There are no objects above the rows."
    with pytest.raises(UserError, match="selects nothing above any row"):  # rows that the expression makes
        _read(tmp_path, QUERIES, "[].{prompt: sql[0], completion: 'x'}", group_by=("parent.id",))


def test_group_above_the_rows_is_a_fault_of_rows_without_it(tmp_path: Path) -> None:
    document = [QUERIES[0], {**QUERIES[1], "id": None}, {**QUERIES[1], "id": ["x"]}]
    reading = _read(tmp_path, document, "[].sentences[]", group_by=("parent.id",), **FROM_PARENT)
    assert len(reading.rows) == 2
    assert [(fault.code, fault.reason) for fault in reading.faults] == [
        ("E205", "data.group_by: 'parent.id' selects nothing above the row"),
        ("E205", "parent.id is list, not text or a number"),
    ]
    provided = _read(tmp_path, document[:2], "[].sentences[]", group_by=("parent.id || ''",), **FROM_PARENT)
    assert [row.groups for row in provided.rows] == [{"parent.id || ''": "7"}, {"parent.id || ''": "7"}, {}]


def test_group_above_the_rows_is_refused_when_the_expression_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Invalid JMESPath expression") as refusal:
        _read(tmp_path, QUERIES, "[].sentences[]", group_by=("parent.sql[0",), **FROM_PARENT)
    assert refusal.value.where == "data.group_by"


def test_parent_is_a_plain_key_without_a_document(tmp_path: Path) -> None:
    rows = '{"t": "a", "parent": {"n": "x"}, "parent.id": "1"}\n{"t": "b", "parent": {"n": "y"}, "parent.id": "2"}\n'
    config = {"input": "{{ t }}", "output": "{{ parent.n }}", "group_by": ("parent.id",)}
    reading = _read(tmp_path, rows, None, "rows.jsonl", **config)
    assert [(row.example.output, row.groups) for row in reading.rows] == [
        ("x", {"parent.id": "1"}),
        ("y", {"parent.id": "2"}),
    ]


def test_template_with_parent_is_a_fault_without_an_object_above(tmp_path: Path) -> None:
    reading = _read(tmp_path, [{"text": "a"}], "[]", **FROM_PARENT)
    reason = "data.output uses parent, but there is no object above the row"
    assert [fault.reason for fault in reading.faults] == [reason]
