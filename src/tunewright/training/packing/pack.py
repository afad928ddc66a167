"""Packing rows into one row: groups of shared prefixes, then ids, positions, prediction indices and targets.

Shapes: T tokens of the packed row, L trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from tunewright.core.text import common_prefix
from tunewright.training.packing.layout import Layout, lay_out
from tunewright.training.rows import IGNORED

GROUP_COST = 8
"""Fixed cost of one more group, in tokens: its attention is a separate computation."""


@dataclass(frozen=True)
class Group:
    """Rows that start with the same ``prefix`` tokens; rows that share nothing form a group with a prefix of 0."""

    prefix: int
    rows: tuple[int, ...]
    """Indices in the batch."""


def plan_groups(rows: Sequence[Sequence[int]]) -> list[Group]:
    """Group rows by shared prefixes, so that prefixes and suffixes together have the fewest tokens.

    In lexicographic order rows with a common prefix are neighbours, so groups are runs of that order. Dynamic
    programming over the runs' ends finds the best groups. At least one token of each row stays in its suffix.
    """
    order = sorted(range(len(rows)), key=lambda place: list(rows[place]))
    common = [common_prefix(rows[a], rows[b]) for a, b in pairwise(order)]
    # best[end] = (cost, start, prefix): the lowest cost of the first `end` rows in order, and their last group.
    # cost(start, end) = best[start] + tokens of the rows - (rows - 1) * prefix + GROUP_COST.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        alone = len(rows[order[end - 1]])
        choice = (best[end - 1][0] + alone, end - 1, 0)
        prefix, total = alone - 1, alone
        for start in range(end - 2, -1, -1):
            length = len(rows[order[start]])
            prefix = min(prefix, common[start], length - 1)
            if prefix <= 0:
                break
            total += length
            cost = best[start][0] + total - (end - start - 1) * prefix + GROUP_COST
            choice = min(choice, (cost, start, prefix))
        best.append(choice)
    groups: list[Group] = []
    alone_rows: list[int] = []
    end = len(order)
    while end:
        _, start, prefix = best[end]
        members = order[start:end]
        if prefix:
            groups.append(Group(prefix, tuple(members)))
        else:
            alone_rows += members
        end = start
    groups.reverse()
    return groups + [Group(0, tuple(sorted(alone_rows)))] * bool(alone_rows)


def computed_tokens(rows: Sequence[Sequence[int]], groups: Sequence[Group]) -> int:
    """Return the tokens that go through the model: each group's prefix once, and all suffixes."""
    return sum(map(len, rows)) - sum((len(group.rows) - 1) * group.prefix for group in groups)


class TensorBatch:
    """A batch whose tensors move together; its subclasses are dataclasses."""

    input_ids: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the same batch with all tensors on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the same batch in pinned memory, from which copies to a GPU do not block; for torch's data loader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        own: Any = self
        values = {each.name: getattr(own, each.name) for each in fields(own)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        moved: Self = replace(own, **changed)
        return moved


@dataclass(frozen=True)
class PackedBatch(TensorBatch):
    """A batch as the model takes it."""

    input_ids: Tensor
    """Token ids [1, T]."""
    position_ids: Tensor
    """Each token's position in its own row [1, T]."""
    predict_from: Tensor
    """Indices into T of the states that predict the trained tokens [L]; rows with a common prefix may share one."""
    targets: Tensor
    """The trained tokens [L]."""
    layout: Layout
    row_tokens: int
    """Tokens of the rows, counting shared ones once for each row."""
    replayed: Tensor | None = None
    """Indices into L of the tokens of replayed rows, whose loss is the divergence from the base; or None."""
    learnt: Tensor | None = None
    """Indices into L of all other tokens; None where ``replayed`` is None."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the same batch with all tensors on ``device``."""
        return replace(super().to(device, non_blocking), layout=self.layout.to(device, non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the same batch in pinned memory."""
        return replace(super().pin_memory(), layout=self.layout.pin_memory())

    def model_inputs(self) -> dict[str, Any]:
        """Return the arguments of the model's forward, without the targets."""
        # transformers takes restarting positions for packed rows and makes a mask [1, 1, T, T] of
        # them. It forwards a mask with four dimensions, and attention by a layout ignores it.
        no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device)
        return {
            "input_ids": self.input_ids,
            "attention_mask": no_mask,
            "position_ids": self.position_ids,
            "layout": self.layout,
        }


def pack(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    share: bool,
    groups: Sequence[Group] | None = None,
    replayed: Sequence[bool] | None = None,
) -> PackedBatch:
    """Pack rows into one row.

    ``labels`` have the id of a trained token, else -100 (as in transformers, not shifted). Without
    ``share`` every row is laid out in full; ``groups`` None: the best ones (`plan_groups`).
    """
    if groups is None:
        groups = plan_groups(rows) if share else [Group(0, tuple(range(len(rows))))]
    layout = lay_out([(group.prefix, [(row, len(rows[row]) - group.prefix) for row in group.rows]) for group in groups])
    ids: list[int] = []
    positions: list[int] = []
    for piece in layout.pieces:
        row = rows[piece.row]
        ids += row[piece.first : piece.first + piece.length]
        positions += range(piece.first, piece.first + piece.length)
    predict_from: list[int] = []
    targets: list[int] = []
    held: list[int] = []
    learnt: list[int] = []
    for place_in_batch, wanted in enumerate(labels):
        place_of = layout.places(place_in_batch)
        for place, label in enumerate(wanted):
            if label != IGNORED and place:  # a row's first token has no state that predicts it
                predict_from.append(place_of(place - 1))
                (held if replayed and replayed[place_in_batch] else learnt).append(len(targets))
                targets.append(label)
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        predict_from=torch.tensor(predict_from, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        layout=layout,
        row_tokens=sum(map(len, rows)),
        replayed=torch.tensor(held) if held else None,
        learnt=torch.tensor(learnt, dtype=torch.long) if held else None,
    )
