"""Files compressed by gzip and Zstandard are read like the files that they contain, within limits."""

from __future__ import annotations

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
from tunewright.data.readers import Fault, read_pairs, scan_pairs, source_size
from tunewright.data.readers import compression as module
from tunewright.data.readers.json_rows import LONGEST_ROW
from tunewright.data.readers.sources import source_files

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


def test_limit_grows_with_the_file() -> None:
    assert module.expansion_limit(1) == 64 << 20
    assert module.expansion_limit(1 << 30) == 100 << 30


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


@both
def test_progress_counts_the_bytes_of_the_compressed_file(tmp_path: Path, compress: Compress, suffix: str) -> None:
    path = _write(tmp_path / f"a.jsonl{suffix}", compress(LINES * 50))
    listener = Listener()
    with listener.task("reading", source_size(path), "bytes") as task:
        read_pairs(path, DataConfig(), task)
    assert listener.steps["reading"] == (source_size(path), source_size(path))


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
