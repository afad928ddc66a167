"""Byte strings and texts in temporary files, compared with lists."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.spill import RecordFile, TextFile, numbered, repeated

texts = st.lists(st.text(st.characters(exclude_categories=()), max_size=9), max_size=12)


@given(st.lists(st.binary(max_size=9), max_size=12), st.integers(1, 20))
def test_record_file_returns_what_was_appended_at_any_time(records: list[bytes], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunewright.core.spill._BLOCK", block)
        file = RecordFile()
        for count, record in enumerate(records):
            assert file.append(record) == count
            assert [file[i] for i in range(len(file))] == list(file) == records[: count + 1]
    for first in range(len(records) + 1):
        for last in range(first, len(records) + 1):
            assert file.between(first, last) == records[first:last]


@given(texts, st.integers(1, 20), st.slices(12))
def test_text_file_reads_as_the_list_of_its_texts(some: list[str], block: int, part: slice) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunewright.core.spill._BLOCK", block)
        file = TextFile(some)
        assert list(file) == some
    assert [file[i] for i in range(len(file))] == some
    assert file[part.start : part.stop] == some[part.start : part.stop]
    with pytest.raises(IndexError):
        file[len(some)]


@given(texts)
def test_numbers_follow_the_first_place_of_each_value(some: list[str]) -> None:
    known: dict[str, int] = {}
    assert numbered(iter(some)).tolist() == [known.setdefault(text, len(known)) for text in some]


@given(st.lists(st.sampled_from([b"a", b"b", b"", b"a\0"]), max_size=9))
def test_repeated_values_are_found_with_all_their_places(some: list[bytes]) -> None:
    places = {value: [i for i, other in enumerate(some) if other == value] for value in some}
    assert repeated(some) == [found for found in places.values() if len(found) > 1]


def test_texts_are_not_held() -> None:
    tracemalloc.start()
    file = TextFile(f"{i} " + "x" * 10_000 for i in range(1_000))
    assert len(numbered(file)) == len(file) == 1_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_full_disk_is_one_error(tmp_path: Path) -> None:
    code = (
        # Python would keep compiled modules that the limit cut short.
        "import resource, sys; sys.dont_write_bytecode = True\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from tunewright.core.spill import TextFile\n"
        "TextFile(['abc' * 500_000])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True)
    assert f"UserError: {tmp_path}: the file exceeds the size limit of this system" in ran.stderr.decode()
