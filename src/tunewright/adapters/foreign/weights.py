"""Checks of a foreign adapter's weights: the file's header, the tensors that the configuration requires, their numbers.

The format (github.com/huggingface/safetensors, README): 8 bytes with the header's length, little-endian; the header, a
JSON map of tensor names to dtype, shape, and the start and end of their bytes; then these bytes, without gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunewright.adapters.foreign.documents import ForeignConfig
from tunewright.adapters.lora_weights import tensor_name
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

LARGEST_HEADER = 8 << 20
"""A LoRA of all linear layers of a 70B base has 1,120 tensors and a header of 180 kB."""

DTYPES = ("F16", "BF16", "F32")


def read_header(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a safetensors file, by name.

    The library checks that shapes and offsets agree and that the tensors fill the file: bytes in a gap could hide a
    payload, an overlap could alias weights. Of the text it checks less: of two entries with one name it keeps the last,
    it ignores unknown keys, and it parses headers of up to 100 MB.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise UserError(f"The header claims {length:,} bytes (limit {LARGEST_HEADER:,})", where=where)
        text = file.read(length)
    try:
        with safe_open(path, framework="numpy") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"Not a safetensors file: {error}", where=where) from None
    for name, entry in strict_object(text, f"{where}, header").items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            what = "A tensor needs exactly dtype, shape and data_offsets"
            raise UserError(what, where=f"{where}, {name[:80]!a}")
        if entry["dtype"] not in DTYPES:
            what = f"The dtype must be one of {', '.join(DTYPES)} (got {entry['dtype']})"
            raise UserError(what, where=f"{where}, {name[:80]!a}")
    return shapes


def check_shapes(path: Path, config: ForeignConfig, where: str) -> None:
    """Check the tensors in ``path``, which no other process can change, against the configuration and the base."""
    shapes = read_header(path, where)
    wanted: dict[str, tuple[int, tuple[int, int]]] = {}
    for module, kind in config.modules.items():
        inputs, outputs = config.shape.linear(kind)
        rank, _ = config.rank_and_scale(module)
        wanted[tensor_name(module, "A")] = rank, (rank, inputs)
        wanted[tensor_name(module, "B")] = rank, (outputs, rank)
    for name in sorted(shapes.keys() - wanted.keys()):
        raise UserError("Not a LoRA weight of this configuration and base", where=f"{where}, {name[:120]!a}")
    for name, (rank, shape) in wanted.items():
        if name not in shapes:
            what = "The weight is missing, but the configuration requires it"
            raise UserError(what, where=f"{where}, {name}")
        if shapes[name] != shape:
            found, needed = (" x ".join(map(str, sizes)) for sizes in (shapes[name], shape))
            what = f"The shape is {found}; with this base and rank {rank} it must be {needed}"
            raise UserError(what, where=f"{where}, {name}")


def check_numbers(path: Path, config: ForeignConfig, norms: Mapping[str, float], where: str) -> None:
    """Check the weights of a file that passed :func:`check_shapes`; ``norms`` are those of the base, by module."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        for module in config.modules:
            pair = {}
            for half in "AB":
                name = tensor_name(module, half)
                pair[half] = weights.get_tensor(name)
                _check_finite(pair[half], f"{where}, {name}")
            _check_overflow(pair["A"], pair["B"], f"{where}, {module}")
            _, scale = config.rank_and_scale(module)
            _check_change(pair["A"], pair["B"], scale, norms[module], f"{where}, {module}")


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
            f"The adapter overflows float16: for inputs of normal size its products reach {reached:.3g} "
            f"(limit {LARGEST_WEIGHT:,.0f})",
            where=where,
        )


def base_norms(base: Path, modules: Iterable[str], task: Task) -> dict[str, float]:
    """Return the Frobenius norms of the weights of the base's modules, by their full names."""
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
