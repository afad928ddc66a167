"""The matrices of several adapters beside each other, so that one operation multiplies with all of them.

A batched product needs its matrices in one tensor. So the adapters that answer the rows of a batch are copied to
*places* in it, where each stays while it is asked for. That takes a few milliseconds when an adapter's first row comes;
in each pass it saves two operations a layer for each of them, which take longer than what they compute
(benchmarks/adapter_passes.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BYTES = 2**30
"""What the copies may take, all layers together; of more adapters than fit each is multiplied with by itself."""
_GROWTH = 4


@dataclass(frozen=True)
class Lora:
    """One adapter's matrices of a layer, as they are multiplied with: [in, rank] and [rank, out]."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def bytes(self) -> int:
        """That its matrices take."""
        return sum(matrix.numel() * matrix.element_size() for matrix in (self.down, self.up))


class Places:
    """Which adapter lies where. One that is asked for again is where it was, as long as no other needed the place."""

    def __init__(self) -> None:
        self._names: list[str | None] = []
        self._asked: dict[str, None] = {}
        """By when they were asked for, the last ones last."""

    def take(self, names: Sequence[str], most: int) -> tuple[str | None, ...] | None:
        """Return what lies at each place once these have one; None where there are not so many (``most``)."""
        if len(names) > most:
            return None
        if len(self._names) > most:  # a larger adapter has come, of which fewer fit
            self._names, self._asked = [], {}
        for name in names:
            self._asked.pop(name, None)
            self._asked[name] = None
        wanted = set(names)
        for name in names:
            if name not in self._names:
                self._names[self._room(wanted, most)] = name
        return tuple(self._names)

    def _room(self, wanted: set[str], most: int) -> int:
        """Return a place that nobody needs now: an empty one, else the one whose adapter was not asked for longest."""
        if None not in self._names and len(self._names) < len(wanted):
            self._names += [None] * min(_GROWTH, most - len(self._names))
        if None in self._names:
            return self._names.index(None)
        idle = next(name for name in self._asked if name in self._names and name not in wanted)
        del self._asked[idle]
        return self._names.index(idle)


class BatchedLora:
    """One layer's matrices by place. What it holds is what it has copied, whatever :class:`Places` say later."""

    def __init__(self) -> None:
        self._held: list[str | None] = []
        self._down = self._up = torch.empty(0, 0, 0)

    def forget(self, name: str) -> None:
        """Copy this adapter anew before it is used again."""
        self._held = [None if held == name else held for held in self._held]

    def hold(self, names: Sequence[str | None], loras: Mapping[str | None, Lora]) -> None:
        """Have these adapters at their places; one that does not touch the layer changes nothing there."""
        if self._held == list(names):
            return
        own = {name: loras[name] for name in names if name is not None and name in loras}
        rank = max(lora.down.shape[1] for lora in own.values())
        if len(names) != len(self._held) or rank > self._down.shape[-1]:
            like = next(iter(own.values()))
            down = like.down.new_zeros(len(names), len(like.down), rank)
            up = like.up.new_zeros(len(names), rank, like.up.shape[1])
            self._held, self._down, self._up = [None] * len(names), down, up  # all of it or, out of memory, nothing
        for place, name in enumerate(names):
            if name is not None and name != self._held[place]:
                self._copy(place, own.get(name))
                self._held[place] = name

    def changes(self, x: Tensor) -> Tensor:
        """Return what the adapters make of their rows: [places, rows, in] to [places, rows, out]."""
        return x.bmm(self._down).bmm(self._up)

    def _copy(self, place: int, lora: Lora | None) -> None:
        rank = 0 if lora is None else lora.down.shape[1]
        self._down[place, :, rank:].zero_()
        self._up[place, rank:].zero_()
        if lora is not None:
            self._down[place, :, :rank] = lora.down
            self._up[place, :rank] = lora.up * lora.scale
