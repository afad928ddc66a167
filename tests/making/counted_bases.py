"""Counting the bases in memory whenever another one is loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import PreTrainedModel


@contextmanager
def counted_bases(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that gets, at each load of a base, how many other bases are alive.

    Automatic collection is off: a base that only the garbage collector would find stays alive, as it may on a card,
    whose memory the collector knows nothing of.
    """
    known = set(map(id, _bases()))
    counts: list[int] = []
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(sum(id(base) not in known for base in _bases()))
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    gc.collect()
    gc.disable()
    try:
        yield counts
    finally:
        gc.enable()


def _bases() -> list[PreTrainedModel]:
    found = [each for each in gc.get_objects() if issubclass(type(each), PreTrainedModel)]
    return [each for each in found if each.get_output_embeddings() is not None]
