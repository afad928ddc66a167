"""The plain path: padded rows through the model's own forward, for bases that packed rows cannot train.

A linear-attention or state-space layer carries a state from token to token, so in a packed row it would carry one
row's state into the next. Llama 4's chunked attention counts its chunks from the start of the row. Padded rows need
nothing but the model's own code, its own attention and its own head::

    row 0   S S S S S a a a A A    S  a prefix that the rows share: computed once for each row
    row 1   S S S S S b b B . .    .  padding

Padding is on the right: every layer is causal, so it changes nothing before it.

Shapes: R rows, T tokens of the longest row, L trained tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tunewright.training.packing.order import measured_batches
from tunewright.training.packing.pack import TensorBatch, computed_tokens, plan_groups
from tunewright.training.rows import IGNORED


@dataclass(frozen=True)
class PaddedBatch(TensorBatch):
    """A batch as the model takes it, one row for each row of the dataset."""

    input_ids: Tensor
    """Token ids [R, T]."""
    attention_mask: Tensor | None
    """0 for padding, else 1 [R, T]; None if no row is padded."""
    predicts: Tensor
    """True for the tokens whose state predicts a trained token [R, T]."""
    targets: Tensor
    """The trained tokens [L], row after row."""
    row_tokens: int
    """Tokens of the rows, without padding."""
    replayed: Tensor | None = None
    """Indices into L of the tokens of replayed rows, as in `PackedBatch`; or None."""
    learnt: Tensor | None = None
    """Indices into L of all other tokens; None where ``replayed`` is None."""


def pad(
    rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, replayed: Sequence[bool] | None = None
) -> PaddedBatch:
    """Pad rows on the right to the longest; ``labels`` and ``replayed`` are as in `pack`."""
    # The padding's id makes no difference: no token after it is real.
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    attended = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    # Labels are not shifted. A row's first token has no state that predicts it.
    wanted = pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORED)
    trained = wanted[:, 1:] != IGNORED  # [R, T - 1]
    owner = trained.nonzero()[:, 0]  # [L]
    held = torch.tensor(replayed or [False] * len(rows))[owner]  # [L]
    return PaddedBatch(
        input_ids=ids,
        attention_mask=None if attended.all() else attended,
        predicts=torch.cat([trained, trained.new_zeros(len(rows), 1)], dim=1),
        targets=wanted[:, 1:][trained],
        row_tokens=sum(map(len, rows)),
        replayed=held.nonzero()[:, 0] if held.any() else None,
        learnt=(~held).nonzero()[:, 0] if held.any() else None,
    )


def token_logits(model: Any, batch: PaddedBatch) -> Tensor:
    """Return the model's own logits for the trained tokens, in float32 [L, V]."""
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=batch.predicts,
    ).logits
    return logits.float()


@dataclass(frozen=True)
class Padding:
    """The cost of padded rows, measured on the first batches."""

    tokens: int
    """Tokens of the measured rows."""
    computed: int
    """Tokens computed for them, padding included."""
    shared: int
    """Tokens that packed rows with shared prefixes would compute."""

    def __str__(self) -> str:
        return (
            f"{1 - self.tokens / self.computed:.0%} of the computed tokens are padding, and prompts are not shared "
            f"(packed rows would compute {self.computed / self.shared:.1f} times fewer tokens)"
        )


def measure_padding(
    rows: Sequence[Sequence[int]],
    *,
    micro_batch: int,
    batch_size: int,
    seed: int,
    partners: Sequence[Sequence[int]] | None = None,
) -> Padding:
    """Measure rows of token ids, batched as the plain path trains them; ``partners`` as in `resolve_sharing`."""
    tokens = computed = shared = 0
    for batch in measured_batches(rows, partners, micro_batch, batch_size, seed, by_length=True):
        tokens += sum(map(len, batch))
        computed += len(batch) * max(map(len, batch))
        shared += computed_tokens(batch, plan_groups(batch))
    return Padding(tokens, computed, shared)
