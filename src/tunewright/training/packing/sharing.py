"""Whether computing shared prompts once is worth it: looked up in the rows, in the order of their training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from tunewright.training.packing.order import StepBatches
from tunewright.training.packing.plan import computed_tokens, plan_groups

WORTH = 1.05
"""Below this many times fewer tokens, rows are packed without looking for prefixes."""

_BATCHES = 200
"""So many batches of the first epoch are looked at; the saving of the rest is much the same."""


@dataclass(frozen=True)
class Sharing:
    """What sharing prompts saves."""

    share: bool
    """Whether prompts are shared."""
    tokens: int
    """Tokens of the rows looked at."""
    computed: int
    """Tokens that are computed for them where prompts are shared."""
    reason: str
    """What was decided and why, for people."""

    def as_dict(self) -> dict[str, Any]:
        """For the lineage."""
        return asdict(self)

    @property
    def ratio(self) -> float:
        """How many times fewer tokens go through the model."""
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
    """Decide by the config's ``setting``, for rows of token ids and batches as they will be trained."""
    tokens = computed = 0
    for places in islice(StepBatches(rows, seed, step_rows=batch_size, micro_batch=micro_batch), _BATCHES):
        batch = [rows[place] for place in places]
        tokens += sum(map(len, batch))
        computed += computed_tokens(batch, plan_groups(batch))
    saves = f"rows of a batch share prompts: {tokens / computed:.1f} times fewer tokens to compute"
    if setting == "off":
        return Sharing(False, tokens, computed, f"Prompts are not shared (train.prefix_sharing: off); {saves} with it")
    if setting == "auto" and dropout:
        # One mask for all rows of a batch would be a coarser dropout than the config asks for.
        return Sharing(False, tokens, computed, "Prompts are not shared: each row has a dropout of its own")
    if setting == "auto" and tokens < WORTH * computed:
        return Sharing(False, tokens, computed, "Prompts are not shared: rows of a batch have next to none in common")
    return Sharing(True, tokens, computed, saves[0].upper() + saves[1:])
