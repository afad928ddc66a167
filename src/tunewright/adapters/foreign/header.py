"""The header of a safetensors file, parsed strictly before any library maps the file.

The format (github.com/huggingface/safetensors, README): 8 bytes with the header's length, little-endian; the header, a
JSON map of tensor names to dtype, shape, and the start and end of their bytes; then these bytes, without gaps.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.strict_json import strict_object

LARGEST_HEADER = 8 << 20
"""A LoRA of all linear layers of a 70B base has 1,120 tensors and a header of 180 kB."""

SIZES = {"F16": 2, "BF16": 2, "F32": 4}
"""Bytes of a number, by allowed dtype."""

_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")


@dataclass(frozen=True)
class Entry:
    """One tensor in the header; ``begin`` and ``end`` count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, where: str) -> dict[str, Entry]:
    """Return the tensors of a safetensors file, by name.

    Args:
        path: the file.
        where: the file's name in errors.

    Raises:
        UserError: a violation of the format, or a size that no adapter needs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise UserError(f"Too short for a safetensors file ({size} bytes)", where=where)
        length = int.from_bytes(start, "little")
        if length > LARGEST_HEADER:
            raise UserError(f"The header claims {length:,} bytes (limit {LARGEST_HEADER:,})", where=where)
        if length > size - 8:
            raise UserError(f"The header claims {length:,} bytes, but only {size - 8:,} follow", where=where)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise UserError("The header does not start with {", where=where)
    return parse_header(text, size - 8 - length, where)


def parse_header(text: bytes, data: int, where: str) -> dict[str, Entry]:
    """Return the tensors that a header describes.

    Args:
        text: the header.
        data: the number of bytes that follow it.
        where: the file's name in errors.

    Raises:
        UserError: as for :func:`read_header`.
    """
    described = strict_object(text, f"{where}, header")
    _check_metadata(described.pop("__metadata__", {}), where)
    entries = {name: _entry(name, value, f"{where}, {name[:80]!a}") for name, value in described.items()}
    if not entries:
        raise UserError("The file has no tensors", where=where)
    # Offsets must tile the data exactly: bytes in a gap could hide a payload, an overlap could alias weights.
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            what = "overlaps the tensor before it" if entry.begin < end else "leaves a gap before it"
            raise UserError(f"The tensor starts at byte {entry.begin:,} and {what}", where=f"{where}, {name}")
        end = entry.end
    if end != data:
        raise UserError(f"The tensors have {end:,} bytes, but {data:,} follow the header", where=where)
    return entries


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError("__metadata__ must map texts to texts", where=where)


def _entry(name: str, value: Any, where: str) -> Entry:
    if not _NAME.fullmatch(name):
        raise UserError("A tensor's name may have only ASCII letters, digits, underscores and dots", where=where)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError("A tensor needs exactly dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise UserError(f"The dtype must be one of {', '.join(SIZES)} (got {str(dtype)[:20]!a})", where=where)
    if not _counts(shape) or not 1 <= len(shape) <= 2 or 0 in shape:
        raise UserError("The shape must be one or two sizes above 0", where=where)
    if not _counts(offsets) or len(offsets) != 2:
        raise UserError("data_offsets must be a start and an end", where=where)
    begin, end = offsets
    needed = math.prod(shape) * SIZES[dtype]
    if end - begin != needed:
        raise UserError(f"The shape needs {needed:,} bytes, but data_offsets span {end - begin:,}", where=where)
    return Entry(dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Return whether this is a list of non-negative integers; true and 1.0 are not integers."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
