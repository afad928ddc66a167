"""Encodings: one per file, detected from its bytes, or the file is refused with the line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import ReadResult, read_pairs
from tunewright.data.readers.encodings import find_encoding

DATA = DataConfig(input="q", output="a")


def _read(tmp_path: Path, content: bytes, name: str = "pairs.jsonl") -> ReadResult:
    path = tmp_path / name
    path.write_bytes(content)
    return read_pairs(path, DATA)


def _line(prompt: str) -> str:
    return json.dumps({"prompt": prompt, "completion": "x"}, ensure_ascii=False) + "\r\n"


@pytest.mark.parametrize(
    ("codec", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
        ("cp1252", b""),
        ("latin-1", b""),
    ],
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_open_text_decodes_each_encoding(tmp_path: Path, codec: str, mark: bytes, name: str) -> None:
    texts = ["plain", "café", "naïve façade", "déjà vu"]
    text = "".join(map(_line, texts)) if name.endswith("jsonl") else "q,a\r\n" + "".join(f"{t},x\r\n" for t in texts)
    reading = _read(tmp_path, mark + text.encode(codec), name)
    assert [row.example.input_text for row in reading.rows] == texts
    assert not reading.faults


def test_note_on_cp1252_quotes_the_first_line(tmp_path: Path) -> None:
    reading = _read(tmp_path, (_line("plain") + _line("a “café” at 5 €")).encode("cp1252"))
    assert reading.rows[1].example.input_text == "a “café” at 5 €"
    assert "read as cp1252" in reading.notes[0]
    assert "line 2 is not UTF-8" in reading.notes[0]
    assert "a “café” at 5 €" in reading.notes[0]


def test_find_encoding_is_utf8_when_few_bytes_are_invalid(tmp_path: Path) -> None:
    reading = _read(tmp_path, (_line("café") * 3).encode() + _line("naïve").encode("latin-1"))
    assert [row.example.input_text for row in reading.rows] == ["café"] * 3
    [fault] = reading.faults
    assert (fault.line, fault.code) == (4, "E101")


def test_json_array_reports_the_line_of_an_invalid_byte(tmp_path: Path) -> None:
    content = '[\n{"prompt": "é",\n"completion": "a"},\n{"prompt": "b",\n"completion": "'.encode() + b'\xe9"}]'
    reading = _read(tmp_path, content, "pairs.json")
    assert len(reading.rows) == 1
    [fault] = reading.faults
    assert (fault.line, fault.reason) == (4, "not UTF-8: invalid byte in line 5")


def test_find_encoding_refuses_bytes_outside_cp1252_with_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Neither UTF-8 nor cp1252") as caught:
        _read(tmp_path, (_line("plain") + _line("ソース")).encode("cp932"))
    assert caught.value.where == f"{tmp_path / 'pairs.jsonl'}:2"


def test_find_encoding_refuses_truncated_utf16_with_line(tmp_path: Path) -> None:
    content = codecs.BOM_UTF16_LE + _line("a").encode("utf-16-le") + b"\x00\xd8\x41\x00"
    with pytest.raises(UserError, match="Invalid UTF-16") as caught:
        _read(tmp_path, content)
    assert caught.value.where == f"{tmp_path / 'pairs.jsonl'}:2"


@given(st.text(min_size=1, max_size=50).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)))
def test_find_encoding_is_utf8_for_any_utf8_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("utf8") / "a.txt"
    path.write_bytes(text.encode())
    try:
        encoding = find_encoding(path)
    except UserError as error:
        assert "\0" in text
        assert "UTF-16" in error.what
    else:
        assert encoding.codec in ("utf-8", "utf-8-sig")


def test_find_encoding_refuses_a_real_set_with_mixed_encodings(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "snips_slots" / "train_PlayMusic_full.json"
    if not path.exists():
        pytest.skip("the SNIPS set is no part of the project and is not here")
    [fault] = read_pairs(path, DataConfig()).faults
    line = int(fault.reason.rsplit(" ", 1)[1])
    with pytest.raises(UnicodeDecodeError):
        path.read_bytes().split(b"\n")[line - 1].decode()
    assert all(each.decode() is not None for each in path.read_bytes().split(b"\n")[: line - 1])
