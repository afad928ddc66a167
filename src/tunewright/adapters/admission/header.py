"""The header of a safetensors file, read by the letter of the format, before any library maps the file.

The format (github.com/huggingface/safetensors, README): 8 bytes with the header's length, little-endian; the header,
JSON of tensor names to dtype, shape and the beginning and end of their bytes; then these bytes, without a gap.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.strict_json import strict_object
from tunewright.core.errors import UserError

LARGEST_HEADER = 8 << 20
"""A LoRA of all linear layers of a 70B base has 1,120 tensors and a header of 180 kB."""

SIZES = {"F16": 2, "BF16": 2, "F32": 4}
"""Bytes of a number, by the dtypes that are let in."""

_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; ``begin`` and ``end`` count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, where: str) -> dict[str, Entry]:
    """Return the tensors of a safetensors file, by name.

    Args:
        path: the file.
        where: what errors call it.

    Raises:
        UserError: anything that is not as the format has it, or larger than an adapter needs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise UserError(f"{size} bytes: too short for safetensors", where=where)
        length = int.from_bytes(start, "little")
        if length > LARGEST_HEADER:
            raise UserError(f"its header claims {length:,} bytes, and {LARGEST_HEADER:,} are the most", where=where)
        if length > size - 8:
            raise UserError(f"its header claims {length:,} bytes, and the file has {size - 8:,} more", where=where)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise UserError("its header does not begin with {", where=where)
    return parse_header(text, size - 8 - length, where)


def parse_header(text: bytes, data: int, where: str) -> dict[str, Entry]:
    """Return the tensors that a header describes.

    Args:
        text: the header.
        data: how many bytes follow it.
        where: what errors call the file.

    Raises:
        UserError: as :func:`read_header`.
    """
    described = strict_object(text, f"{where}, header")
    _check_metadata(described.pop("__metadata__", {}), where)
    entries = {name: _entry(name, value, f"{where}, {name[:80]!a}") for name, value in described.items()}
    if not entries:
        raise UserError("it has no tensors", where=where)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            what = "overlaps the tensor before it" if entry.begin < end else "leaves a gap before it"
            raise UserError(f"it begins at byte {entry.begin:,} and {what}", where=f"{where}, {name}")
        end = entry.end
    if end != data:
        raise UserError(f"its tensors have {end:,} bytes, and {data:,} follow the header", where=where)
    return entries


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError("its __metadata__ is not a map of texts", where=where)


def _entry(name: str, value: Any, where: str) -> Entry:
    if not _NAME.fullmatch(name):
        raise UserError("no name of a weight: letters of ASCII, digits, _ and . alone", where=where)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError("it is not described by dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise UserError(f"dtype {str(dtype)[:20]!a}: let in are {', '.join(SIZES)}", where=where)
    if not _counts(shape) or not 1 <= len(shape) <= 2 or 0 in shape:
        raise UserError("its shape is not one or two sizes above 0", where=where)
    if not _counts(offsets) or len(offsets) != 2:
        raise UserError("its data_offsets are not a beginning and an end", where=where)
    begin, end = offsets
    needed = math.prod(shape) * SIZES[dtype]
    if end - begin != needed:
        raise UserError(f"its shape needs {needed:,} bytes, and its data_offsets give {end - begin:,}", where=where)
    return Entry(dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Return whether it is a list of whole numbers that are not negative; true and 1.0 are none."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
