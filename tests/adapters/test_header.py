"""The reader of foreign safetensors headers: the library reads accepted headers alike, and all others are refused."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from tunewright.adapters.foreign.weights import read_header
from tunewright.core.errors import UserError

NAMES = st.text("abz_.019", min_size=1, max_size=12)
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16}


def _read(data: bytes) -> dict[str, tuple[int, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(data)
        return read_header(path, "weights")


def _file(header: bytes, data: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(data)


def _as_the_library_reads(data: bytes) -> dict[str, tuple[int, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(data)
        with safe_open(path, framework="numpy") as weights:
            return {name: weights.get_tensor(name).shape for name in weights.keys()}  # noqa: SIM118


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file as the library writes it."""
    shapes = st.lists(st.integers(1, 5), min_size=1, max_size=2)
    tensors = draw(st.dictionaries(NAMES, st.tuples(shapes, st.sampled_from([*DTYPES])), min_size=1, max_size=5))
    arrays = {name: np.ones(shape, DTYPES[dtype]) for name, (shape, dtype) in tensors.items()}
    return save(arrays, draw(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)))


@given(files())
def test_read_header_equals_the_library_for_its_own_files(data: bytes) -> None:
    assert _read(data) == _as_the_library_reads(data)


@given(st.binary(max_size=400))
def test_parse_header_refuses_or_reads_any_bytes(data: bytes) -> None:
    try:
        _read(data)
    except UserError as error:
        assert error.what


@given(files(), st.data())
def test_accepted_mutated_header_is_read_equally_by_safetensors(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        changed[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        found = _read(bytes(changed))
    except UserError:
        return
    assert found == _as_the_library_reads(bytes(changed))


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
