"""Token lengths of a dataset version as training sees it: row lengths, trained tokens and faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright.chat import ChatFormat
from tunewright.core.progress import Reporter, Task
from tunewright.core.workers import THIS_PROCESS, Workers, slices
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import DatasetVersion, Member
from tunewright.training.rows import encode_members, name_of

PERCENTILES = (0, 25, 50, 75, 90, 99, 100)
_BINS = 12
_ROWS = 1000  # rows encoded at once
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
    chat: ChatFormat,
    base: str,
    version: DatasetVersion,
    max_length: int,
    reporter: Reporter,
    workers: Workers = THIS_PROCESS,
) -> LengthReport:
    """Encode every row of every split as training would."""
    measured: dict[Split, list[_Measured]] = {}
    with reporter.task("encoding", len(version.members), "examples") as task:
        for split in SPLITS:
            parts = slices(version.examples(split), _ROWS)
            measured[split] = list(workers.map(_measured, _Encoding(chat, max_length), parts, task, batch=2))
    lengths = {split: [n for part in parts for n in part.lengths] for split, parts in measured.items()}
    return LengthReport(
        version=version.digest,
        base=base,
        template_digest=chat.digest,
        max_length=max_length,
        splits=tuple(
            _summary(split, lengths[split], sum(part.trained for part in measured[split]))
            for split in SPLITS
            if lengths[split]
        ),
        histogram=_histogram([length for each in lengths.values() for length in each]),
        too_long=tuple(
            {"key": key, "name": name, "split": split, "tokens": tokens}
            for split in SPLITS
            for part in measured[split]
            for key, name, tokens in part.too_long
        ),
        faults=tuple(fault for split in SPLITS for part in measured[split] for fault in part.faults),
        look_alikes=sum(part.look_alikes for parts in measured.values() for part in parts),
    )


@dataclass(frozen=True)
class _Encoding:
    """The format of rows, and the most tokens of one."""

    chat: ChatFormat
    max_length: int


@dataclass(frozen=True)
class _Measured:
    """Token lengths of some rows, their trained tokens, those too long (key, name, tokens), and faults."""

    lengths: list[int]
    trained: int
    too_long: list[tuple[str, str, int]]
    faults: list[str]
    look_alikes: int


def _measured(encoding: _Encoding, members: Sequence[Member], task: Task) -> _Measured:
    """Encode some rows."""
    chat = encoding.chat
    encoded = encode_members(chat, members, encoding.max_length)
    rows = [*encoded.rows, *(long.row for long in encoded.too_long)]
    task.advance(len(members))
    return _Measured(
        [len(row.ids) for row in rows],
        sum(sum(row.loss_mask) for row in rows),
        [(long.member.key, name_of(long.member), len(long.row.ids)) for long in encoded.too_long],
        encoded.faults,
        sum(bool(chat.encoder.hide(m.example.messages)[1]) for m in members),
    )


def _summary(split: Split, lengths: Sequence[int], trained: int) -> Lengths:
    values = np.percentile(lengths, PERCENTILES, method="nearest")
    return Lengths(
        split=split,
        rows=len(lengths),
        percentiles={p: int(value) for p, value in zip(PERCENTILES, values, strict=True)},
        tokens=sum(lengths),
        trained=trained,
    )


def _histogram(lengths: Sequence[int]) -> tuple[HistogramBar, ...]:
    if not lengths:
        return ()
    width = next(w for w in _WIDTHS if w * _BINS >= max(lengths))
    counts = np.bincount((np.asarray(lengths) - 1) // width)
    bins = [HistogramBar(place * width + 1, (place + 1) * width, int(count)) for place, count in enumerate(counts)]
    first = next(place for place, one in enumerate(bins) if one.rows)
    return tuple(bins[first:])
