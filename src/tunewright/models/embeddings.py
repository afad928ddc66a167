"""Which tokens a base has never learnt, read from its embedding table."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tunewright.models.bases import Base, tensor_files
from tunewright.models.families import text_name

_INPUT = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"
_SAMPLE = 1000
_EMPTY = 1e-3
"""A row this small beside the median row has not been trained: Llama 3's base models hold such rows for ``<|eot_id|>``
and the header tokens; the smallest trained rows are some tenths of the median."""


def untrained_tokens(base: Base, ids: Collection[int]) -> list[int]:
    """Those of ``ids`` whose row of the input or output embedding is (as good as) empty, or isn't there; sorted."""
    tables = [_table(base.folder, name) for name in (_INPUT, _OUTPUT)]
    return sorted(set().union(*(_empty_rows(path, name, ids) for path, name in tables if path is not None)))


def _table(folder: Path, text: str) -> tuple[Path | None, str]:
    """The weights file that holds a tensor, and its name there; no file where it is not (an output tied to the input).

    Args:
        folder: the base's.
        text: what the tensor is called in a text model alone.
    """
    files = tensor_files(folder)
    found = next((name for name in files if text_name(name) == text), None)
    return (folder / files[found], found) if found else (None, text)


def _empty_rows(path: Path, name: str, ids: Collection[int]) -> set[int]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        table = weights.get_tensor(name)
    median = float(table[:: max(1, len(table) // _SAMPLE)].float().norm(dim=1).median())
    there = [token for token in ids if token < len(table)]
    norms = table[there].float().norm(dim=1).tolist()
    empty = {token for token, norm in zip(there, norms, strict=True) if norm <= _EMPTY * median}
    return empty | (set(ids) - set(there))
