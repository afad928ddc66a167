"""The decision to share prefixes: measured on the training rows, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from tunewright.training.packing.order import StepBatches
from tunewright.training.packing.plan import computed_tokens, plan_groups

WORTH = 1.05
"""Saving factor below which rows are packed without looking for prefixes."""

_BATCHES = 200
"""Batches of the first epoch that are measured; the rest save about as much."""


@dataclass(frozen=True)
class Sharing:
    """The decision, and the tokens that sharing saves."""

    share: bool
    """True if prefixes are shared."""
    tokens: int
    """Tokens of the measured rows."""
    computed: int
    """Tokens computed for them with shared prefixes."""
    reason: str
    """The decision and its reason, as shown to the user."""

    def as_dict(self) -> dict[str, Any]:
        """Return the decision for the lineage."""
        return asdict(self)

    @property
    def ratio(self) -> float:
        """The factor by which sharing reduces the tokens."""
        return self.tokens / self.computed


def measure_sharing(
    rows: Sequence[Sequence[int]],
    *,
    setting: Literal["auto", "on", "off"],
    dropout: float,
    micro_batch: int,
    batch_size: int,
    seed: int,
) -> Sharing:
    """Apply the config's ``setting`` to rows of token ids, batched as they are trained."""
    tokens = computed = 0
    for places in islice(StepBatches(rows, seed, step_rows=batch_size, micro_batch=micro_batch), _BATCHES):
        batch = [rows[place] for place in places]
        tokens += sum(map(len, batch))
        computed += computed_tokens(batch, plan_groups(batch))
    saves = f"{tokens / computed:.1f} times fewer tokens to compute"
    if setting == "off":
        reason = f"Prompts are not shared (train.prefix_sharing: off). Sharing would give {saves}"
        return Sharing(False, tokens, computed, reason)
    if setting == "auto" and dropout:
        # One dropout mask for all rows of a batch would be coarser than the config asks for.
        return Sharing(False, tokens, computed, "Prompts are not shared: dropout needs a separate mask for each row")
    if setting == "auto" and tokens < WORTH * computed:
        return Sharing(False, tokens, computed, "Prompts are not shared: rows of a batch have too little in common")
    return Sharing(True, tokens, computed, f"Rows of a batch share prompts: {saves}")
