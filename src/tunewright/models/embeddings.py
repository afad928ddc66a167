"""Which tokens a base has never learnt, read from its embedding table."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from tunewright.models.bases import Base

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


def _table(folder: Path, name: str) -> tuple[Path | None, str]:
    """The weights file that holds a tensor; None where no file has it (an output tied to the input)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
        return (folder / file if file else None), name
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as weights:
        return (path if name in weights.keys() else None), name  # noqa: SIM118 (no mapping)


def _empty_rows(path: Path, name: str, ids: Collection[int]) -> set[int]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        table = weights.get_tensor(name)
    median = float(table[:: max(1, len(table) // _SAMPLE)].float().norm(dim=1).median())
    there = [token for token in ids if token < len(table)]
    norms = table[there].float().norm(dim=1).tolist()
    empty = {token for token, norm in zip(there, norms, strict=True) if norm <= _EMPTY * median}
    return empty | (set(ids) - set(there))
