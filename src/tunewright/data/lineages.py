"""Adapters' lineages as plain data: the chain of trainings that one stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def ancestors(lineage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield an adapter's lineage, then that of the adapter that its training started from, and so on."""
    at: Mapping[str, Any] | None = lineage
    while at is not None:
        yield at
        at = at.get("parent")
