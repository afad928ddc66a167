"""Text of files: one encoding each, or a refusal with the line; gzip and Zstandard are read within limits."""

from __future__ import annotations

import codecs
import gzip
import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from data_helpers import Listener, new_project, unlike_pairs
from hypothesis import given
from hypothesis import strategies as st

import tunewright
from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import Fault, ReadResult, read_pairs, scan_pairs
from tunewright.data.readers.encodings import find_encoding
from tunewright.data.readers.json_rows import LONGEST_ROW
from tunewright.data.readers.source_files import source_files

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


def test_find_encoding_refuses_truncated_utf16(tmp_path: Path) -> None:
    content = codecs.BOM_UTF16_LE + _line("a").encode("utf-16-le") + b"\x00\xd8\x41\x00"
    with pytest.raises(UserError, match="Invalid UTF-16") as caught:
        _read(tmp_path, content)
    assert caught.value.where == str(tmp_path / "pairs.jsonl")


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


PAIRS = [{"prompt": f"question {i}, é", "completion": f"answer {i}"} for i in range(300)]
LINES = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS).encode()


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content)


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


Compress = Callable[[bytes], bytes]
both = pytest.mark.parametrize(("compress", "suffix"), [(_gzip, ".gz"), (_zstd, ".zst")])


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@both
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", json.dumps(PAIRS, indent=1).encode()),
        ("a.csv", b"prompt;completion\n" + b'"one\ntwo";x\n' * 3),
        ("a.tsv", "prompt\tcompletion\nhi, é\tho\n".encode("utf-16")),
        ("a.csv", "prompt,completion\né,ho\n".encode("cp1252")),
        ("a.jsonl", LINES + b'{"prompt": "\xff", "completion": "x"}\n{"prompt": 1}\n'),
    ],
    ids=["lines", "array", "csv", "utf16", "cp1252", "faults"],
)
def test_compressed_file_has_the_rows_and_places_of_its_content(
    tmp_path: Path, compress: Compress, suffix: str, name: str, content: bytes
) -> None:
    plain = read_pairs(_write(tmp_path / name, content), DataConfig())
    packed = read_pairs(_write(tmp_path / (name + suffix), compress(content)), DataConfig())
    assert [(r.line, r.example) for r in packed.rows] == [(r.line, r.example) for r in plain.rows]
    assert [str(f) for f in packed.faults] == [str(f).replace(name, name + suffix) for f in plain.faults]
    assert (" in gzip" if suffix == ".gz" else " in Zstandard") in packed.notes[-1]


@both
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_one_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, compress: Compress, suffix: str, cut: float
) -> None:
    whole = compress(LINES)
    path = tmp_path_factory.getbasetemp() / f"cut.jsonl{suffix}"
    path.write_bytes(whole[: 4 + int(cut * (len(whole) - 4))])
    with pytest.raises(UserError, match="Truncated or damaged") as caught:
        read_pairs(path, DataConfig())
    assert caught.value.where == str(path)


@both
def test_damaged_file_is_one_error_that_names_it(tmp_path: Path, compress: Compress, suffix: str) -> None:
    whole = compress(LINES)
    damaged = whole[:40] + bytes(byte ^ 0xFF for byte in whole[40:80]) + whole[80:]
    for content in (damaged, whole + b"garbage after the end"):
        path = _write(tmp_path / f"a.jsonl{suffix}", content)
        with pytest.raises(UserError, match="Truncated or damaged") as caught:
            read_pairs(path, DataConfig())
        assert caught.value.where == str(path)


@both
def test_concatenated_files_are_read_to_the_end(tmp_path: Path, compress: Compress, suffix: str) -> None:
    half = len(LINES) // 2
    path = _write(tmp_path / f"a{suffix}", compress(LINES[:half]) + compress(LINES[half:]))
    assert len(read_pairs(path, DataConfig()).rows) == len(PAIRS)


@pytest.mark.parametrize("program", ["gzip", "zstd"])
def test_file_of_the_programs_is_read(tmp_path: Path, program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    packed = subprocess.run([program, "-c"], input=LINES, stdout=subprocess.PIPE, check=True).stdout
    assert len(read_pairs(_write(tmp_path / "a.jsonl", packed), DataConfig()).rows) == len(PAIRS)


@both
def test_bomb_is_refused_with_little_memory(tmp_path: Path, compress: Compress, suffix: str) -> None:
    path = _write(tmp_path / f"a.jsonl{suffix}", compress(b'{"prompt": "' + b"x" * (100 << 20) + b'"}\n'))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(UserError, match="over 67,108,864 bytes, the limit for") as caught:
        read_pairs(path, DataConfig())
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert caught.value.where == str(path)
    assert "decompress it first" in str(caught.value.fix)


@pytest.mark.slow
def test_row_is_refused_when_it_is_too_long_and_the_next_one_is_read(tmp_path: Path) -> None:
    long = b'{"prompt": "' + b"x" * LONGEST_ROW + b'", "completion": "y"}\n'
    path = _write(tmp_path / "a.jsonl", long + LINES[: LINES.index(b"\n") + 1] + long[:-1])
    first, second, third = scan_pairs(path, DataConfig(), [])
    assert isinstance(first, Fault)
    assert not isinstance(second, Fault)
    assert isinstance(third, Fault)
    assert [(f.line, f.code) for f in (first, third)] == [(1, "E108"), (3, "E108")]
    assert second.line == 2


@pytest.mark.slow
@pytest.mark.parametrize("row", [b'"x', b'x,"y"\n"'])
def test_csv_is_refused_where_a_quote_is_not_closed_for_too_long(tmp_path: Path, row: bytes) -> None:
    path = _write(tmp_path / "a.csv", b"prompt,completion\nhi,ho\n" + row + b"line\n" * (LONGEST_ROW // 5 + 1))
    rows = scan_pairs(path, DataConfig(), [])
    assert not isinstance(next(rows), Fault)
    with pytest.raises(UserError, match="a row of over 67,108,863 characters") as caught:
        list(rows)
    assert str(caught.value.where).startswith(f"{path}:")


@both
@pytest.mark.parametrize("inner", [b"PAR1", b"PK\x03\x04", b"\x1f\x8b\x08", b"(\xb5/\xfd"])
def test_binary_file_in_a_compressed_one_is_refused(
    tmp_path: Path, compress: Compress, suffix: str, inner: bytes
) -> None:
    with pytest.raises(UserError, match=r"inside .*: decompress the file first"):
        read_pairs(_write(tmp_path / f"a.jsonl{suffix}", compress(inner + bytes(100))), DataConfig())


def test_folder_of_compressed_files_is_added(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    rows = "".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in unlike_pairs(24)).encode()
    half = rows.index(b"\n", len(rows) // 2) + 1
    (project.root / "data").mkdir()
    files = [
        _write(project.root / "data" / "a.jsonl.gz", _gzip(rows[:half])),
        _write(project.root / "data" / "b.json.zst", _zstd(rows[half:])),
    ]
    _write(project.root / "data" / "c.tar.gz", _gzip(b"x"))
    listener = Listener()
    assert source_files([project.root / "data"], listener) == files
    assert listener.warned == [f"{project.root / 'data'}: 1 file ignored because of the suffix: c.tar.gz"]
    data = tunewright.open(project.root).data
    assert data.check_files([project.root / "data"]).effect.added == 24  # type: ignore[union-attr]
    added = data.add([project.root / "data"])
    assert [source.name for source in added.version.sources] == ["data/a.jsonl.gz", "data/b.json.zst"]
    assert data.show("data/a.jsonl.gz:1").example.input_text
    data.fix_file(files[0], project.root / "fixed.jsonl")
    assert len(read_pairs(project.root / "fixed.jsonl", DataConfig()).rows) == rows[:half].count(b"\n")
