"""Checks of a foreign adapter's weights: the tensors that the configuration and the base require, of a sane size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunewright.adapters.foreign.config import ForeignConfig
from tunewright.adapters.foreign.header import Entry, read_header
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
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
