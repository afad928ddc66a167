"""Rows laid out as one packed row: ids, positions, what is predicted from where, and the layout for attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tunewright.training.packing.layout import Layout, lay_out
from tunewright.training.packing.plan import Group, plan_groups
from tunewright.training.rows import IGNORED


@dataclass(frozen=True)
class PackedBatch:
    """A batch as the model gets it."""

    input_ids: Tensor
    """Token ids [1, T]."""
    position_ids: Tensor
    """Each token's position in its own row [1, T]."""
    predict_from: Tensor
    """Where in T the trained tokens are predicted from [L]; two rows may be predicted from one place of a prefix."""
    targets: Tensor
    """The trained tokens [L]."""
    layout: Layout
    row_tokens: int
    """Tokens of the rows, shared ones counted once for each row."""
    replayed: Tensor | None = None
    """Which of the trained tokens are of rows that the adapter is held to the base on: places in L; None: none is."""
    learnt: Tensor | None = None
    """Which of them are not; None where ``replayed`` is."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the same batch, all of its tensors on ``device``."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, layout=self.layout.to(device, non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the same batch in pinned memory, from which copies to a card do not block; torch's loader asks."""
        return replace(self._each(Tensor.pin_memory), layout=self.layout.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def model_inputs(self) -> dict[str, Any]:
        """Return what the model's forward takes, the targets apart."""
        # transformers takes positions that begin again for rows packed without a layout, and makes a mask [1, 1, T, T]
        # of them; a mask that has four dimensions already is passed on, and attention by a layout does not look at it.
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
    """Lay rows out as one packed row.

    Args:
        rows: token ids.
        labels: of the same lengths: the id of a trained token, else -100 (as transformers has them, not shifted).
        share: compute shared prefixes once; else every row stands whole.
        groups: the grouping (None: the best one, see `plan_groups`).
        replayed: which rows the adapter is held to the base on (None: no row).
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
            if label != IGNORED and place:
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
