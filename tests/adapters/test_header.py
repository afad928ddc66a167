"""The reader of foreign safetensors headers: any bytes are read or refused, and accepted tensors fill the file."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.adapters.foreign.importer import read_header
from tunewright.core.errors import UserError

NAMES = st.text("abz_.019", min_size=1, max_size=12)


def _read(data: bytes) -> dict[str, tuple[int, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(data)
        return read_header(path, "weights")


def _file(header: bytes, data: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(data)


@given(st.binary(max_size=400))
def test_parse_header_refuses_or_reads_any_bytes(data: bytes) -> None:
    try:
        _read(data)
    except UserError as error:
        assert error.what


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-4, 40), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(NAMES | st.just("__metadata__"), ENTRIES | JSON, max_size=4), st.integers(0, 64))
def test_accepted_tensors_fill_the_file(described: Any, data: int) -> None:
    whole = _file(json.dumps(described).encode(), data)
    try:
        found = _read(whole)
    except UserError as error:
        assert error.what
        return
    ends = sorted(described[name]["data_offsets"] for name in found)
    assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])][: len(ends)]
    assert data == (ends[-1][1] if ends else 0)
    assert found == {name: tuple(described[name]["shape"]) for name in found}


@pytest.mark.parametrize(
    ("dtype", "size"), [("F64", 8), ("I64", 8), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("f32", 4), ("", 4)]
)
def test_header_refuses_other_dtypes_by_name(dtype: str, size: int) -> None:
    text = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
    with pytest.raises(UserError, match=f"must be one of F16, BF16, F32 .got {dtype}|unknown variant `{dtype}`"):
        _read(_file(text, size))
