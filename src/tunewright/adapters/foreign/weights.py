"""Checks of a foreign adapter's weights: the file's header, the tensors that the configuration requires, their numbers.

The format (github.com/huggingface/safetensors, README): 8 bytes with the header's length, little-endian; the header, a
JSON map of tensor names to dtype, shape, and the start and end of their bytes; then these bytes, without gaps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.foreign.config import ForeignConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.core.strict_json import strict_object
from tunewright.models.bases import tensor_files
from tunewright.models.families import text_name

LARGEST_WEIGHT = 65504.0
"""The largest number of float16, which engines may use."""

LARGEST_CHANGE = 2.0
"""Limit of a layer's |scale·BA| / |W| (Frobenius norms). Trained adapters measured 0.03 on SmolLM2-135M (all linear
layers, 1e-3, two epochs) and 0.6 on a tiny base of random weights. A change of twice the base is not a fine-tune,
and its numbers can overflow in a batch that others share.
"""

_PREFIX = "base_model.model."

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

    The library's own reader does not check as much: of two entries with one name it keeps the last, it ignores unknown
    keys, takes any name, and parses headers of up to 100 MB. So it maps a file only after this check.

    Raises:
        UserError: a violation of the format, or a size that no adapter needs; ``where`` names the file.
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
    """Return the tensors that a header describes, which ``data`` bytes follow."""
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


def check_shapes(path: Path, config: ForeignConfig, where: str) -> None:
    """Check the tensors in ``path``, and their shapes, against the configuration and the base.

    Args:
        path: a safetensors file that no other process can change.
        config: the adapter's, already checked.
        where: the file's name in errors.

    Raises:
        UserError: naming the tensor and the problem.
    """
    entries = read_header(path, where)
    _check_names(entries, config, where)
    for module, kind in config.modules.items():
        inputs, outputs = config.shape.linear(kind)
        rank = config.rank(module)
        for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            name = f"{_PREFIX}{module}.lora_{half}.weight"
            if entries[name].shape != shape:
                raise UserError(
                    f"The shape is {_by(entries[name].shape)}; with this base and rank {rank} it must be {_by(shape)}",
                    where=f"{where}, {name}",
                )


def check_numbers(path: Path, config: ForeignConfig, norms: Mapping[str, float], where: str) -> None:
    """Check the weights of a file that passed :func:`check_shapes`.

    Args:
        path, config, where: as there.
        norms: Frobenius norms of the base's weights by module.

    Raises:
        UserError: naming the tensor and the problem.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        for module in config.modules:
            pair = {}
            for half in "AB":
                name = f"{_PREFIX}{module}.lora_{half}.weight"
                pair[half] = weights.get_tensor(name)
                _check_finite(pair[half], f"{where}, {name}")
            _check_overflow(pair["A"], pair["B"], f"{where}, {module}")
            _check_change(pair["A"], pair["B"], config.scale(module), norms[module], f"{where}, {module}")


def _check_names(entries: Mapping[str, Entry], config: ForeignConfig, where: str) -> None:
    wanted = {f"{_PREFIX}{module}.lora_{half}.weight" for module in config.modules for half in "AB"}
    for name in sorted(entries.keys() - wanted):
        raise UserError("Not a LoRA weight of this configuration and base", where=f"{where}, {name}")
    for name in sorted(wanted - entries.keys()):
        raise UserError("The weight is missing, but the configuration requires it", where=f"{where}, {name}")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_finite(tensor: Any, where: str) -> None:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise UserError(f"{bad:,} of {tensor.numel():,} weights are not finite", where=where)
    largest = float(tensor.abs().max())
    # Engines may hold the weights in float16, where a larger one becomes infinite.
    if largest > LARGEST_WEIGHT:
        raise UserError(f"The largest weight is {largest:.3g}, above float16's {LARGEST_WEIGHT:,.0f}", where=where)


def _check_change(a: Any, b: Any, scale: float, norm: float, where: str) -> None:
    """Compare |scale·BA| with the base's |W|, using |BA|² = trace((BᵀB)(AAᵀ)) to avoid a product of BA's size."""
    a, b = a.double(), b.double()
    squared = float(((b.T @ b) * (a @ a.T)).sum())  # both factors are [rank, rank] and symmetric
    change = scale * max(squared, 0.0) ** 0.5
    if change > LARGEST_CHANGE * norm:
        raise UserError(
            f"The change of the base's weights is {change / norm:,.1f} times their norm (limit {LARGEST_CHANGE:g})",
            where=where,
        )


def _check_overflow(a: Any, b: Any, where: str) -> None:
    """Check that A·x and B·A·x stay within float16 for inputs x of norm √inputs, which layers' norms give them.

    |a·x| is at most |a||x|, for a row of A or of BA. The scale does not matter: engines multiply by it at the end.
    """
    a, b = a.double(), b.double()
    gram = a @ a.T
    squared = max(float(gram.diagonal().max()), float(((b @ gram) * b).sum(1).max()))
    reached = max(squared, 0.0) ** 0.5 * a.shape[1] ** 0.5
    if reached > LARGEST_WEIGHT:
        raise UserError(
            f"On inputs of ordinary size the products of its weights reach {reached:.3g}, above float16's "
            f"{LARGEST_WEIGHT:,.0f}",
            where=where,
        )


def base_norms(base: Path, modules: Iterable[str], task: Task) -> dict[str, float]:
    """Return the Frobenius norms of the weights of the base's modules.

    Args:
        base: the base's folder.
        modules: their full names.
        task: advances by one for each.
    """
    from safetensors import safe_open

    wanted = {text_name(module): module for module in modules}
    found: dict[str, list[tuple[str, str]]] = {}
    for name, file in tensor_files(base).items():
        module = wanted.get(text_name(name.removesuffix(".weight")))
        if module is not None and name.endswith(".weight"):
            found.setdefault(file, []).append((name, module))
    norms = {}
    for file, tensors in sorted(found.items()):
        with safe_open(base / file, framework="pt") as weights:
            for name, module in tensors:
                norms[module] = float(weights.get_tensor(name).float().norm())
                task.advance()
    assert norms.keys() == set(wanted.values())
    return norms
