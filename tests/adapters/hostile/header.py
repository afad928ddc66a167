"""The header of the weights."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

from adapter_helpers import write_adapter
from hostile.corpus import Q0, Payload, hostile
from tunewright.adapters.registry import WEIGHTS


def _header(at: Path, header: bytes, data: int, length: int | None = None) -> Path:
    """Return an adapter whose weights have this header, followed by ``data`` bytes."""
    folder = write_adapter(at / "evil")
    claimed = len(header) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + header + bytes(data))
    return folder


def _described(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]} | changes
    return json.dumps({f"{Q0}.lora_A.weight": entry}).encode()


@hostile("The header claims 18,446,744,073,709,551,615 bytes")
def a_header_of_all_memory(at: Path) -> Path:
    return _header(at, b"{}", 0, length=2**64 - 1)


@hostile(r"The header claims 9,000,000 bytes \(limit 8,388,608\)")
def a_header_of_nine_megabytes(at: Path) -> Path:
    return _header(at, b"{" + b" " * 8_999_998 + b"}", 0)


@hostile("invalid header length")
def a_header_longer_than_the_file(at: Path) -> Path:
    return _header(at, b"{}", 100, length=5000)


@hostile("header too small")
def weights_of_three_bytes(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes(b"abc")
    return folder


@hostile("file not fully covered")
def weights_that_are_cut_off(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    return folder


@hostile("file not fully covered")
def weights_with_something_after_them(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + pickle.dumps(Payload()))
    return folder


@hostile("invalid offset for tensor")
def tensors_that_overlap(at: Path) -> Path:
    entry = {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]}
    other = {"dtype": "F32", "shape": [4, 64], "data_offsets": [512, 1536]}
    return _header(at, json.dumps({f"{Q0}.lora_A.weight": entry, f"{Q0}.lora_B.weight": other}).encode(), 1536)


@hostile("invalid offset for tensor")
def a_gap_to_hide_something_in(at: Path) -> Path:
    return _header(at, _described(data_offsets=[512, 1536]), 1536)


@hostile("invalid value: integer `-1024`")
def offsets_below_zero(at: Path) -> Path:
    return _header(at, _described(data_offsets=[-1024, 0]), 1024)


@hostile("invalid offset for tensor")
def offsets_that_run_backwards(at: Path) -> Path:
    return _header(at, _described(data_offsets=[1024, 0]), 1024)


@hostile("overflow computing buffer size")
def a_shape_that_overflows(at: Path) -> Path:
    return _header(at, _described(shape=[2**32, 2**32]), 1024)


@hostile("got I64")
def weights_that_are_whole_numbers(at: Path) -> Path:
    return _header(at, _described(dtype="I64", shape=[2, 64]), 1024)


@hostile("duplicate key")
def one_tensor_described_twice(at: Path) -> Path:
    entry = _described()[1:-1]
    return _header(at, b"{" + entry + b"," + entry + b"}", 1024)


@hostile("recursion limit exceeded")
def a_header_nested_a_million_deep(at: Path) -> Path:
    return _header(at, b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", 0)


@hostile("invalid UTF-8 in header")
def a_header_that_is_no_text(at: Path) -> Path:
    return _header(at, b'{"\xff\xfe": 1}', 0)


@hostile(r"q_pr\\u03bfj.*Not a LoRA weight")
def a_tensor_with_a_name_of_unicode(at: Path) -> Path:
    return _header(at, _described().replace(b"q_proj", "q_prοj".encode()), 1024)


@hostile("invalid type: map, expected a string")
def metadata_that_is_no_text(at: Path) -> Path:
    return _header(at, b'{"__metadata__": {"format": {"torch": 1}}, ' + _described()[1:], 1024)


@hostile("A tensor needs exactly dtype, shape and data_offsets")
def a_tensor_with_another_key(at: Path) -> Path:
    return _header(at, _described(strides=[1, 4]), 1024)


@hostile("A tensor needs exactly dtype, shape and data_offsets")
def a_tensor_described_by_a_list(at: Path) -> Path:
    return _header(at, json.dumps({f"{Q0}.lora_A.weight": ["F32", [4, 64], [0, 1024]]}).encode(), 1024)
