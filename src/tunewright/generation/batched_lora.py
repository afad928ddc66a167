"""LoRA weights of several adapters stacked in one tensor, so that one batched product serves all of them.

``torch.bmm`` needs its matrices in one tensor. The adapters that answer the rows of a batch are
copied to *slots* of that tensor and stay there while requests ask for them. The copy takes a few
milliseconds when an adapter's first row arrives. In each pass it saves two operations a layer for
each adapter, which take longer than their arithmetic (benchmarks/adapter_passes.py).

Shapes: S slots, N rows of a slot, R the largest rank of the stacked adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BYTES = 2**30
"""Memory budget of the copies, all layers together. When more adapters are active, each is multiplied separately."""
_GROWTH = 4


@dataclass(frozen=True)
class Lora:
    """One adapter's weights for one layer, transposed for ``x @ down @ up``."""

    down: Tensor
    """A transposed [in, rank]."""
    up: Tensor
    """B transposed [rank, out]."""
    scale: float

    @property
    def nbytes(self) -> int:
        """The bytes of both matrices."""
        return sum(matrix.numel() * matrix.element_size() for matrix in (self.down, self.up))


class AdapterSlots:
    """Assignment of adapters to slots; the least recently requested adapter is evicted first."""

    def __init__(self) -> None:
        self._names: list[str | None] = []
        self._recency: dict[str, None] = {}
        """Adapters by their last request, the most recent one last."""

    def assign(self, names: Sequence[str], capacity: int) -> tuple[str | None, ...] | None:
        """Return each slot's adapter once all ``names`` have a slot; None if they are more than ``capacity``."""
        if len(names) > capacity:
            return None
        if len(self._names) > capacity:  # a larger adapter has arrived, and fewer adapters of that size fit
            self._names, self._recency = [], {}
        for name in names:
            self._recency.pop(name, None)
            self._recency[name] = None
        wanted = set(names)
        for name in names:
            if name not in self._names:
                self._names[self._free_slot(wanted, capacity)] = name
        return tuple(self._names)

    def _free_slot(self, wanted: set[str], capacity: int) -> int:
        """Return an empty slot, or else the slot of the least recently requested adapter outside ``wanted``."""
        if None not in self._names and len(self._names) < len(wanted):
            self._names += [None] * min(_GROWTH, capacity - len(self._names))
        if None in self._names:
            return self._names.index(None)
        idle = next(name for name in self._recency if name in self._names and name not in wanted)
        del self._recency[idle]
        return self._names.index(idle)


class BatchedLora:
    """One layer's stacked weights. It tracks the copies that it has made, independently of :class:`AdapterSlots`."""

    def __init__(self) -> None:
        self._loaded: list[str | None] = []
        # A as stored, untransposed: with one token a row, each of its products then reads consecutive numbers.
        self._down = self._up = torch.empty(0, 0, 0)  # [S, R, in] and [S, R, out]

    def invalidate(self, name: str) -> None:
        """Copy this adapter again before its next use."""
        self._loaded = [None if loaded == name else loaded for loaded in self._loaded]

    def load(self, names: Sequence[str | None], loras: Mapping[str | None, Lora]) -> None:
        """Copy each slot's adapter into place; an adapter without weights for this layer gets zeros."""
        if self._loaded == list(names):
            return
        own = {name: loras[name] for name in names if name is not None and name in loras}
        rank = max(lora.down.shape[1] for lora in own.values())
        if len(names) != len(self._loaded) or rank > self._down.shape[1]:
            like = next(iter(own.values()))
            down = like.down.new_zeros(len(names), rank, len(like.down))  # [S, R, in]
            up = like.up.new_zeros(len(names), rank, like.up.shape[1])  # [S, R, out]
            # Assigned together, after both allocations: out of memory leaves the old state.
            self._loaded, self._down, self._up = [None] * len(names), down, up
        for slot, name in enumerate(names):
            if name is not None and name != self._loaded[slot]:
                self._copy(slot, own.get(name))
                self._loaded[slot] = name

    def delta(self, x: Tensor) -> Tensor:
        """Return the adapters' deltas for their rows: [S, N, in] to [S, N, out]."""
        return x.bmm(self._down.transpose(1, 2)).bmm(self._up)

    def _copy(self, slot: int, lora: Lora | None) -> None:
        # A rank below R leaves rows of the adapter that was here before: zero them.
        rank = 0 if lora is None else lora.down.shape[1]
        self._down[slot, rank:].zero_()
        self._up[slot, rank:].zero_()
        if lora is not None:
            self._down[slot, :rank] = lora.down.t()
            torch.mul(lora.up, lora.scale, out=self._up[slot, :rank])
