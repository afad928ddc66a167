"""The order of the training rows, a random function of seed and epoch, and the decision to share their prefixes.

The rows of an optimizer step are drawn at random without replacement, as in trl. Steps of rows of similar
length would be biased samples and cost quality (benchmarks/train_speed.py). The rows' gradients are added
up, so the order inside a step affects only speed, and rows with a common prefix share a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from torch.utils.data import DistributedSampler

from tunewright.training.packing.pack import computed_tokens, plan_groups

ORDER = "random"
"""Part of every adapter's identity, since the row order decides which adapter the same rows train."""


def random_order(rows: int, seed: int) -> DistributedSampler[int]:
    """Return the indices 0 to ``rows`` - 1 in an order that the seed and the epoch (`set_epoch`) decide.

    torch's RandomSampler draws from a generator with state. A run that resumes in a later epoch would see another
    order: some rows twice, others not at all.
    """
    return DistributedSampler(range(rows), num_replicas=1, rank=0, shuffle=True, seed=seed)  # type: ignore[arg-type]


class StepBatches:
    """The micro-batches of one process: each step's rows are split evenly, and every row is trained on once.

    accelerate's own batch dispatch repeats rows so that all processes have equally many. Here a
    process with fewer rows in an epoch's last step gets empty batches, since all processes must
    make equally many passes. ``step_rows`` are the rows of one optimizer step, all processes
    together; ``micro_batch`` the rows of one pass. Rows of one pass have a common prefix, or ``by_length`` a
    similar length.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        seed: int,
        *,
        step_rows: int,
        micro_batch: int,
        process: int = 0,
        processes: int = 1,
        by_length: bool = False,
    ) -> None:
        self.rows = rows
        self.sampler = random_order(len(rows), seed)
        self.step_rows = step_rows
        self.micro_batch = micro_batch
        self.process = process
        self.processes = processes
        self.by_length = by_length

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order; accelerate's data loader calls it before each one."""
        self.sampler.set_epoch(epoch)

    def _share(self, rows: int) -> int:
        return -(-rows // self.processes)

    def __len__(self) -> int:
        steps, rest = divmod(len(self.rows), self.step_rows)
        return sum(
            -(-self._share(rows) // self.micro_batch) * times for rows, times in ((self.step_rows, steps), (rest, 1))
        )

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(order), self.step_rows):
            step = order[start : start + self.step_rows]
            share = self._share(len(step))
            # Distributed by length, so that no process waits long for another. Then sorted by token
            # ids, which puts rows with a common prefix into one micro-batch.
            dealt = sorted(step, key=lambda place: -len(self.rows[place]))[self.process :: self.processes]
            mine = dealt if self.by_length else sorted(dealt, key=lambda place: list(self.rows[place]))
            for first in range(0, share, self.micro_batch):
                yield mine[first : first + self.micro_batch]


def longest_batch(
    rows: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], *, padded: bool = False
) -> Sequence[int]:
    """Return the micro-batch with the most tokens, including padding if its rows are ``padded``."""

    def tokens(batch: Sequence[int]) -> int:
        lengths = [len(rows[place]) for place in batch]
        return len(lengths) * max(lengths, default=0) if padded else sum(lengths)

    return max(batches, key=tokens)


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

    @property
    def ratio(self) -> float:
        """The factor by which sharing reduces the tokens."""
        return self.tokens / self.computed


def measured_batches(
    rows: Sequence[Sequence[int]],
    partners: Sequence[Sequence[int]] | None,
    micro_batch: int,
    batch_size: int,
    seed: int,
    *,
    by_length: bool = False,
) -> Iterator[list[Sequence[int]]]:
    """Yield the rows of the first batches, each with the row of the same index in ``partners``, if there are any."""
    batches = StepBatches(rows, seed, step_rows=batch_size, micro_batch=micro_batch, by_length=by_length)
    for places in islice(batches, _BATCHES):
        yield [each[place] for each in (rows, *([] if partners is None else [partners])) for place in places]


def resolve_sharing(
    rows: Sequence[Sequence[int]],
    *,
    setting: Literal["auto", "on", "off"],
    dropout: float,
    micro_batch: int,
    batch_size: int,
    seed: int,
    partners: Sequence[Sequence[int]] | None = None,
) -> Sharing:
    """Apply the config's ``setting`` to rows of token ids, batched as they are trained.

    ``partners`` are further rows, each of which goes through the model with the row of the same index.
    """
    tokens = computed = 0
    for batch in measured_batches(rows, partners, micro_batch, batch_size, seed):
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
