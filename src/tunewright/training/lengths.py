"""Token lengths of a dataset version as training sees it: row lengths, trained tokens and faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright.chat import ChatFormat, Tokens
from tunewright.core.progress import Reporter
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import DatasetVersion
from tunewright.training.rows import EncodedRows, encode_members, name_of

PERCENTILES = (0, 25, 50, 75, 90, 99, 100)
_BINS = 12
_WIDTHS = [step * 10**power for power in range(8) for step in (1, 2, 5)]


@dataclass(frozen=True)
class Lengths:
    """The row lengths of one split in tokens."""

    split: Split
    rows: int
    percentiles: dict[int, int]
    """Length at each of PERCENTILES: 0 is the shortest row, 100 the longest."""
    tokens: int
    trained: int


@dataclass(frozen=True)
class HistogramBar:
    """One histogram bar: rows of ``first`` to ``last`` tokens."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class LengthReport:
    """All splits of a version, rendered with the config's base and chat template."""

    version: str
    base: str
    template_digest: str
    max_length: int
    splits: tuple[Lengths, ...]
    histogram: tuple[HistogramBar, ...]
    too_long: tuple[dict[str, Any], ...]
    """Rows over max_length: key, name, split, tokens."""
    faults: tuple[str, ...]
    look_alikes: int
    """Rows whose text looks like a control token of this base; it stays text."""

    def refused(self, *, dropping: bool) -> bool:
        """Return whether training, or the evaluation after it, would refuse this version."""
        left = {s.split: s.rows - sum(row["split"] == s.split for row in self.too_long) for s in self.splits}
        too_long = any(row["split"] != "test" for row in self.too_long)
        return bool(self.faults) or (too_long and not dropping) or not all(left.get(s) for s in ("train", "dev"))


def measure_lengths(
    chat: ChatFormat, base: str, version: DatasetVersion, max_length: int, reporter: Reporter
) -> LengthReport:
    """Encode every row of every split as training would."""
    encoded: dict[Split, EncodedRows] = {}
    with reporter.task("encoding", len(version.members), "examples") as task:
        for split in SPLITS:
            members = version.examples(split)
            encoded[split] = encode_members(chat, members, max_length)
            task.advance(len(members))
    rows = {split: [*each.rows, *(long.row for long in each.too_long)] for split, each in encoded.items()}
    return LengthReport(
        version=version.digest,
        base=base,
        template_digest=chat.digest,
        max_length=max_length,
        splits=tuple(_summary(split, rows[split]) for split in SPLITS if rows[split]),
        histogram=_histogram([len(row.ids) for each in rows.values() for row in each]),
        too_long=tuple(
            {"key": row.member.key, "name": name_of(row.member), "split": split, "tokens": len(row.row.ids)}
            for split in SPLITS
            for row in encoded[split].too_long
        ),
        faults=tuple(fault for split in SPLITS for fault in encoded[split].faults),
        look_alikes=sum(bool(chat.encoder.hide(m.example.messages)[1]) for m in version.members),
    )


def _summary(split: Split, rows: Sequence[Tokens]) -> Lengths:
    lengths = [len(row.ids) for row in rows]
    values = np.percentile(lengths, PERCENTILES, method="nearest")
    return Lengths(
        split=split,
        rows=len(lengths),
        percentiles={p: int(value) for p, value in zip(PERCENTILES, values, strict=True)},
        tokens=sum(lengths),
        trained=sum(sum(row.loss_mask) for row in rows),
    )


def _histogram(lengths: Sequence[int]) -> tuple[HistogramBar, ...]:
    if not lengths:
        return ()
    width = next(w for w in _WIDTHS if w * _BINS >= max(lengths))
    counts = np.bincount((np.asarray(lengths) - 1) // width)
    bins = [HistogramBar(place * width + 1, (place + 1) * width, int(count)) for place, count in enumerate(counts)]
    first = next(place for place, one in enumerate(bins) if one.rows)
    return tuple(bins[first:])
