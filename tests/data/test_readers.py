"""Files of pairs: supported and refused content, and faults with their lines."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import ReadResult, read_pairs

CONFIG = DataConfig(input="q", output="a")
PAIR = b'{"prompt": "two and two?", "completion": "four"}\n'


def _read(tmp_path: Path, content: bytes, name: str = "pairs.jsonl", config: DataConfig = CONFIG) -> ReadResult:
    path = tmp_path / name
    path.write_bytes(content)
    return read_pairs(path, config)


def _faults(reading: ReadResult) -> list[tuple[int, str]]:
    return [(fault.line, fault.reason) for fault in reading.faults]


def _turns(*turns: tuple[str, Any]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


def _weighted(weight: Any) -> bytes:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": weight}]
    return json.dumps({"messages": turns}).encode()


def test_chat_row_keeps_every_turn(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", " ciao ")]
    reading = _read(tmp_path, _turns(*turns))
    assert [(m.role, m.content) for m in reading.rows[0].example.messages] == turns
    assert not reading.faults


def test_weight_0_is_kept_and_weight_1_changes_nothing(tmp_path: Path) -> None:
    def turns(**first: int) -> bytes:
        rows: list[dict[str, Any]] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", **first},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
        return json.dumps({"messages": rows}).encode() + b"\n"

    none, one, zero = (row.example for row in _read(tmp_path, turns() + turns(weight=1) + turns(weight=0)).rows)
    assert [m.weight for m in zero.messages] == [1, 0, 1, 1]
    assert none.pair_key == one.pair_key != zero.pair_key
    assert type(zero).from_dicts([m.as_dict() for m in zero.messages]) == zero


def test_system_turn_of_the_config_is_added_when_missing(tmp_path: Path) -> None:
    own = _turns(("system", "mine"), ("user", "a"), ("assistant", "b"))
    reading = _read(tmp_path, PAIR + own, config=DataConfig(system_prompt="the config's"))
    assert [row.example.messages[0].content for row in reading.rows] == ["the config's", "mine"]


FAULTY = [
    (b"not json", "E102"),
    (b'{"prompt": "a"', "E102"),
    (b'["a", "b"]', "E103"),
    (b"{}", "E202"),
    (b'{"question": "a", "answer": "b"}', "E201"),
    (b'{"prompt": "a", "completion": "b", "completion": "c"}', "E104"),
    (b'{"prompt": "a", "completion": ""}', "E401"),
    (b'{"prompt": "a", "completion": " \\n"}', "E401"),
    (b'{"prompt": "", "completion": "b"}', "E401"),
    (b'{"prompt": "a", "completion": null}', "E305"),
    (b'{"prompt": "a", "completion": NaN}', "E105"),
    (b'{"prompt": [{"role": "user"}], "completion": "b"}', "E306"),
    (b'{"prompt": "a\xff\xc3\xa9", "completion": "b"}', "E101"),
    (b'{"prompt": "a", "completion": "\\ud800"}', "E402"),
    (b'{"messages": []}', "E206"),
    (b'{"messages": ["hi"]}', "E301"),
    (b'{"messages": [{"role": "user"}]}', "E302"),
    (b'{"messages": [{"role": "user", "content": "a", "weight": 0}]}', "E307"),
    (_weighted(2), "E307"),
    (_weighted(True), "E307"),
    (_weighted(0), "E308"),
    (b'{"messages": [{"role": "tools", "content": "a"}]}', "E304"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', "E304"),
    (_turns(("user", "a")), "E407"),
    (_turns(("system", "a")), "E407"),
    (_turns(("assistant", "a")), "E405"),
    (_turns(("user", "a"), ("user", "b"), ("assistant", "c")), "E406"),
    (_turns(("user", "a"), ("system", "b"), ("assistant", "c")), "E404"),
    (b"[" * 100_000, "E106"),
    (b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}', "E102"),
    (b'{"prompt": "' + b"x" * 100_000 + b'", "completion": "b"}', "E403"),
]


def test_faulty_rows_are_reported_by_line_and_code_and_the_others_are_read(tmp_path: Path) -> None:
    reading = _read(tmp_path, b"".join(PAIR + row + b"\r\n\n" for row, _ in FAULTY))
    assert [fault.line for fault in reading.faults] == [3 * n + 2 for n in range(len(FAULTY))]
    assert [fault.code for fault in reading.faults] == [code for _, code in FAULTY]
    assert [row.line for row in reading.rows] == [3 * n + 1 for n in range(len(FAULTY))]


def test_line_separators_inside_text_do_not_break_rows(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a\u2028b\x85c", "completion": "d"}, ensure_ascii=False).encode()
    reading = _read(tmp_path, row)
    assert reading.rows[0].example.input_text == "a\u2028b\x85c"


def test_text_is_normalised_to_nfc(tmp_path: Path) -> None:
    one, other = (
        _read(tmp_path, json.dumps({"prompt": "caf\u00e9", "completion": "b"}).encode()),
        _read(tmp_path, json.dumps({"prompt": "cafe\u0301", "completion": "b"}).encode()),
    )
    assert one.rows[0].example == other.rows[0].example


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pairs.jsonl", b"", "The file has no rows"),
        ("pairs.jsonl", b"\xef\xbb\xbf", "The file has no rows"),
        ("pairs.jsonl", b"\n \n", "The file has no rows"),
        ("pairs.csv", b"", "The file has no rows"),
        ("pairs.csv", b"q,a\n", "The file has no rows"),
        ("pairs.xlsx", b"PK", "Unsupported file format"),
        *(("pairs.jsonl", magic + bytes(range(256)), "format") for magic in (b"\xd0\xcf\x11\xe0", b"BZh9", b"\xfd7zX")),
        ("pairs.jsonl", '{"prompt": "a"}'.encode("utf-16") + b"x", "Invalid UTF-16"),
        ("pairs.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        ("pairs.json", b'[\n  {"prompt": "a", "completion": "b"}\n', "the array does not end"),
        ("pairs.csv", b'q,a\n"hi,ho\n', "Unreadable CSV"),
        ("pairs.csv", b'q,a\n"hi"x,ho\n', "Unreadable CSV"),
        ("pairs.csv", b"x,y\nhi,ho\n", 'No column named "q"'),
        ("pairs.csv", b"q,q,a\nhi,ho,he\n", 'More than one column named "q"'),
        ("pairs.csv", b"q,\xff\xc3\xa9\nhi,ho\n", "Not UTF-8"),
        ("pairs.csv", b"q,a\nhi,h\x81\n", "Neither UTF-8 nor cp1252"),
    ],
)
def test_unreadable_file_gets_one_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(UserError) as caught:
        _read(tmp_path, content, name)
    assert words in caught.value.what
    assert caught.value.where is not None
    assert str(tmp_path / name) in caught.value.where


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_pairs(tmp_path / "none.jsonl", CONFIG)
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(UserError, match="Expected a file, got a folder"):
        read_pairs(folder, CONFIG)


def test_csv_handles_quotes_and_line_breaks_with_correct_lines(tmp_path: Path) -> None:
    content = b'q,a\r\n"one, ""two""\nthree",x\r\n\r\nfour,y\r\nfive\r\nsix,\r\nsev\xffen\xc3\xa9,z\r\n"a\nb\nc",w\r\n'
    reading = _read(tmp_path, content, "pairs.csv")
    rows = [(r.line, r.example.input_text, r.example.output) for r in reading.rows]
    assert rows == [(2, 'one, "two"\nthree', "x"), (5, "four", "y"), (9, "a\nb\nc", "w")]
    assert _faults(reading) == [(6, "1 fields (the header has 2)"), (7, "an empty answer"), (8, "not UTF-8")]


def test_csv_reports_unnamed_columns(tmp_path: Path) -> None:
    reading = _read(tmp_path, b"id,q,a,when,when,\n1,hi,ho,now,then,x\n", "pairs.csv")
    assert f"{tmp_path / 'pairs.csv'}: unused columns: when, (without a name)" in reading.notes
    assert reading.rows[0].metadata == {"id": "1"}


def test_csv_field_beyond_pythons_limit_is_one_fault(tmp_path: Path) -> None:
    reading = _read(tmp_path, b"q,a\n" + b"x" * 200_000 + b",b\nhi,ho\n", "pairs.csv")
    assert len(reading.rows) == 1
    assert _faults(reading) == [(2, "200,001 characters (limit 32,000, data.max_characters)")]


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20)).filter(
            lambda pair: all(t.strip() and not any("\ud800" <= c <= "\udfff" for c in t) for t in pair)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_csv_and_jsonl_of_the_same_pairs_give_the_same_examples(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("same")
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("q", "a"), *pairs])
    lines = "".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs)
    from_csv = _read(folder, text.getvalue().encode(), "pairs.csv")
    from_json = _read(folder, lines.encode())
    assert [r.example for r in from_csv.rows] == [r.example for r in from_json.rows]
    assert len(from_json.rows) == len(pairs)


def test_read_pairs_suggests_the_column_for_a_misspelt_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("promt,completion,id\na,b,1\n", encoding="utf-8")
    with pytest.raises(UserError, match='Unknown column "promt", did you mean "prompt"\\?') as caught:
        read_pairs(path, DataConfig())
    assert caught.value.where == f"{path}:1"
    assert str(caught.value.fix).startswith("Correct the header, or use --input COLUMN")
    path.write_text("question,answer\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="Unknown columns for the input and the ideal output"):
        read_pairs(path, DataConfig())
