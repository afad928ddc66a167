"""The answer of ``fit``: whether training fits, with which micro-batch, and what would fit instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunewright.config import TrainConfig
from tunewright.models.memory.estimate import Way
from tunewright.models.memory.plan import Plan
from tunewright.models.memory.sizes import gigabytes


@dataclass(frozen=True)
class Answer:
    """Whether the config's training fits into the memory."""

    fits: bool
    text: str
    """The answer and its reason, in one sentence or two."""
    micro_batch: int
    """Rows that go through at once; 0 if not even one row fits."""
    length: int
    """Tokens of each of these rows."""
    longest_row: int | None
    """Tokens of the dataset's longest row that is trained or chosen by; None if it is not known."""

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as ``--json`` prints it."""
        return {
            "fits": self.fits,
            "text": self.text,
            "micro_batch_size": self.micro_batch,
            "length": self.length,
            "longest_row": self.longest_row,
        }


def answer(plan: Plan, settings: TrainConfig, longest_row: int | None, *, rows: bool, length: bool) -> Answer:
    """Say whether training fits, as `tunewright train` does it in this memory.

    Without ``rows`` the micro-batch may be halved until it fits, as training halves it. Without ``length`` rows of
    ``train.max_length`` tokens have to fit, or at least the dataset's longest row.

    Args:
        plan: the memory, and the micro-batch that was asked about.
        settings: the config's.
        longest_row: tokens of the dataset's longest row, if known.
        rows, length: the user named them.
    """
    # On a card training recomputes activations; on the processor it does not.
    ways = {each.way.nf4: each.way for each in plan.ways if each.way.checkpointing == plan.memory.card}
    way = ways[settings.quantization == "nf4"]
    asked = plan.asked.rows
    yours = "" if longest_row is None else f"; your longest row has {longest_row:,} tokens"
    many = _most(plan, way, plan.length, asked, halving=not rows)
    if many:
        return Answer(True, f"{_fits(plan, way, many, plan.length)}{yours}.", many, plan.length, longest_row)
    least = plan.length
    if not length and longest_row is not None and longest_row < plan.length:
        least = longest_row
        some = _most(plan, way, least, asked, halving=not rows)
        if some:
            text = f"{_fits(plan, way, some, least)}{yours}. train.max_length ({plan.length:,}) does not fit."
            return Answer(True, text, some, least, longest_row)
    fewest = asked if rows else 1
    needed = gigabytes(plan.need(way, fewest, least).total)
    text = (
        f"Does not fit: micro-batch {fewest} × {least:,} ({way.name}) needs {needed}, and there are "
        f"{gigabytes(plan.memory.bytes)}{yours}."
    )
    return Answer(False, " ".join([text, *_instead(plan, ways, way, fewest, least)]), 0, least, longest_row)


def _most(plan: Plan, way: Way, length: int, asked: int, *, halving: bool) -> int:
    """Return the rows that go through at once: those asked for, or with ``halving`` the first half that fits."""
    while asked and plan.need(way, asked, length).total > plan.memory.bytes:
        asked = asked // 2 if halving else 0
    return asked


def _fits(plan: Plan, way: Way, rows: int, length: int) -> str:
    needed = gigabytes(plan.need(way, rows, length).total)
    return f"Fits: micro-batch {rows} × {length:,} ({way.name}, {needed} of {gigabytes(plan.memory.bytes)})"


def _instead(plan: Plan, ways: dict[bool, Way], way: Way, rows: int, length: int) -> list[str]:
    """Say what does fit, the change that costs least first."""
    instead = []
    fewer = _most(plan, way, length, rows, halving=True)
    if fewer:
        instead.append(f"Micro-batch {fewer} × {length:,} does.")
    longest = next(each.longest for each in plan.ways if each.way == way)
    if 0 < longest < length:
        instead.append(f"The longest single row that fits has {longest:,} tokens.")
    nf4 = ways.get(True)
    if nf4 is not None and nf4 != way and plan.need(nf4, rows, length).total <= plan.memory.bytes:
        instead.append("With train.quantization: nf4 it fits.")
    return instead
