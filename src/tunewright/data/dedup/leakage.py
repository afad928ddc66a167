"""How near the held-out rows are to the training rows, what a random split would have leaked, scores by distance."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, Task
from tunewright.data.dedup import comparison_texts
from tunewright.data.dedup.output_leakage import OutputLeak, near_overlap, output_leak
from tunewright.data.dedup.similarity import shingle_matrix, verified
from tunewright.data.dedup.sketches import Indices, Sketches
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, Member

THRESHOLDS = (0.7, 0.8, 0.9)
BANDS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
MOST_HELD_OUT = 5_000
_MOST_COUNTED = 20_000  # rows whose near-equal ones are all counted; of more, a sample's
_FIRST_OTHERS = 64  # rows compared first: where most are near-equal, they are enough
_SURE = 1e-4  # a row is counted as leaked for sure where a random split misses it less often
_BLOCK = 128  # held-out rows compared at once with all training rows, at most
_CELLS = 16_000_000  # similarities held at once: bounds the memory, not the result
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Nearest:
    """A held-out row, its most similar training row (Jaccard of character 4-grams), and that similarity.

    ``of`` is None where no training row has a 4-gram in common.
    """

    key: str
    split: Split
    of: str | None
    similarity: float


@dataclass(frozen=True)
class Leak:
    """The share of test rows with a training row at or above a similarity: in this split, and in a random one."""

    threshold: float
    here: float
    random: float


@dataclass(frozen=True)
class LeakReport:
    """How near a version's held-out rows are to its training rows.

    Attributes:
        version: the version's digest.
        held_out: how many rows dev and test have; ``nearest`` has as many, or a random sample of them.
        nearest: the measured rows, sorted by key.
        leaks: at 0.7, 0.8 and 0.9; the random splits have the sizes of this one, and their shares are the mean of all.
        outputs: how many test rows have an output, or its template, that training rows have too.
    """

    version: str
    held_out: int
    nearest: tuple[Nearest, ...]
    leaks: tuple[Leak, ...]
    outputs: OutputLeak

    def histogram(self, split: Split) -> list[int]:
        """Counts of a split's measured rows with nearest similarity in [0, 0.1), [0.1, 0.2) … [0.9, 1]."""
        counts = [0] * 10
        for row in self.nearest:
            if row.split == split:
                counts[min(int(row.similarity * 10 + _ROUNDING), 9)] += 1
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Return the report as ``--json`` prints it."""
        histogram = {split: self.histogram(split) for split in ("dev", "test")}
        return {**asdict(self), "outputs": self.outputs.as_dict(), "histogram": histogram}


class Answered(Protocol):
    """An evaluated test item: ``evaluation.evidence.Item`` is one."""

    @property
    def key(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def answers(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class BandScore:
    """An arm's exact match on the items whose nearest training row has a similarity in [low, high).

    The last band has 1 in it. ``interval`` is Wilson's, at 95%, and takes items for independent.
    """

    arm: str
    low: float
    high: float
    items: int
    exact: int
    interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the score as ``--json`` prints it."""
        return {**asdict(self), "exact_match": self.exact / self.items}


@dataclass(frozen=True)
class TemplateScore:
    """An arm's exact match on the items whose output template training rows have (seen), or on the others (new).

    ``interval`` is Wilson's, at 95%, and takes items for independent.
    """

    arm: str
    template: Literal["seen", "new"]
    items: int
    exact: int
    interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the score as ``--json`` prints it."""
        return {**asdict(self), "exact_match": self.exact / self.items}


def leak(version: DatasetVersion, seed: int, reporter: Reporter, most: int = MOST_HELD_OUT) -> LeakReport:
    """Measure every held-out row of a version against its training rows.

    Args:
        version: with rows in train and test.
        seed: decides the random splits, and the sample where there is one.
        reporter: is warned if only a sample is measured.
        most: held-out rows measured at most: each is compared with all training rows.
    """
    members = version.members
    texts = comparison_texts([m.example for m in members])
    train = np.array([i for i, m in enumerate(members) if m.split == "train"], dtype=np.int64)
    held_out = np.array([i for i, m in enumerate(members) if m.split != "train"], dtype=np.int64)
    measured = held_out
    if len(held_out) > most:
        measured = np.sort(np.random.default_rng(seed).choice(held_out, most, replace=False))
        reporter.warn(f"{most:,} of {len(held_out):,} held-out rows are compared with the training rows: a sample.")
    nearest = _nearest(members, texts, measured, train, reporter)
    of_test = [row.similarity for row in nearest if row.split == "test"]
    tests = sum(m.split == "test" for m in members)
    chances = _random_leaks(texts, tests, len(train), seed, reporter)
    leaks = tuple(
        Leak(threshold, float(np.mean([s >= threshold for s in of_test])) if of_test else 0.0, chance)
        for threshold, chance in zip(THRESHOLDS, chances, strict=True)
    )
    outputs = output_leak(members)
    near = near_overlap(members, version.manifest.settings.dedup_threshold, seed, reporter)
    outputs = replace(outputs, overlaps=(*outputs.overlaps, near))
    return LeakReport(version.digest, len(held_out), tuple(nearest), leaks, outputs)


def nearest_training(version: DatasetVersion, reporter: Reporter, split: Split = "test") -> dict[str, float]:
    """Return the Jaccard similarity (character 4-grams) of each test or dev row's nearest training input, by key."""
    members = version.members
    texts = comparison_texts([m.example for m in members])
    train = np.array([i for i, m in enumerate(members) if m.split == "train"], dtype=np.int64)
    held_out = np.array([i for i, m in enumerate(members) if m.split == split], dtype=np.int64)
    return {row.key: row.similarity for row in _nearest(members, texts, held_out, train, reporter)}


def _nearest(
    members: Sequence[Member], texts: Sequence[str], held_out: Indices, train: Indices, reporter: Reporter
) -> list[Nearest]:
    matrix = shingle_matrix(texts).astype(np.float32)
    sizes = np.diff(matrix.indptr)
    training = matrix[train]
    step = min(_BLOCK, max(1, _CELLS // max(len(train), matrix.shape[1])))
    found = []
    with reporter.task("comparing held-out rows", len(held_out), "examples") as task:
        for start in range(0, len(held_out), step):
            rows = held_out[start : start + step]
            block = matrix[rows]
            # Dense on one side: where inputs are made from templates, nearly every two rows share a shingle. The
            # others' shingles that no row of the block has are left out first.
            columns = np.unique(block.indices)
            shared = training[:, columns] @ block[:, columns].toarray().T  # [train, rows]
            similarity_of = shared / (sizes[train, None] + sizes[rows] - shared.astype(np.float64))
            best, nearest = similarity_of.max(axis=0), similarity_of.argmax(axis=0)
            for row, similarity, place in zip(rows.tolist(), best.tolist(), nearest.tolist(), strict=True):
                of = members[int(train[place])].key if similarity else None
                found.append(Nearest(members[row].key, members[row].split, of, similarity))
            task.advance(len(rows))
    return found


def _random_leaks(texts: Sequence[str], tests: int, training: int, seed: int, reporter: Reporter) -> list[float]:
    """For each threshold the mean share of a random test that has a near-equal input in the random training rows.

    The mean over all random splits is known without drawing any: a row with k near-equal ones has none of them among
    the training rows with a hypergeometric chance. So k is counted, and only as far as it matters.
    """
    from scipy.stats import hypergeom

    count = len(texts)
    if not tests or not training:
        return [0.0] * len(THRESHOLDS)
    rows, rng = shingle_matrix(texts), np.random.default_rng(seed)
    asked, others = np.arange(count), rng.permutation(count)
    if count > _MOST_COUNTED:
        asked = np.sort(rng.choice(count, MOST_HELD_OUT, replace=False))
        reporter.say(f"What a random split leaks is estimated from {len(asked):,} of {count:,} rows.")
    missed = 1 - training / max(count - 1, 1)
    enough = max(math.ceil(math.log(_SURE) / math.log(missed)), 1) if missed > 0 else 1
    shares = []
    with reporter.task("looking for what a random split leaks", len(THRESHOLDS) * count, "comparisons") as task:
        for threshold in THRESHOLDS:
            near = _near_counts(rows, asked, others, threshold, enough, task)
            shares.append(float(np.mean(hypergeom.sf(0, count - 1, near[asked], training))))
    return shares


def _near_counts(rows: Any, asked: Indices, others: Indices, threshold: float, enough: int, task: Task) -> Indices:
    """How many of the other rows are near each of the asked ones, [rows]; no longer counted from ``enough`` on."""
    sizes = np.diff(rows.indptr).astype(np.int64)
    sketches = Sketches(rows, sizes, threshold, int(np.quantile(sizes, 0.9)))
    near: Indices = np.zeros(len(sizes), dtype=np.int64)
    at, step = 0, _FIRST_OTHERS
    while at < len(others):
        some = others[at : at + step]
        met = [(first, second) for first, second, _ in sketches.meetings(asked[near[asked] < enough], some)]
        if met:
            first, second = (np.concatenate(parts) for parts in zip(*met, strict=True))
            near += np.bincount(verified(rows, sizes, first, second, threshold)[0], minlength=len(near))
        at, step = at + step, 2 * step
        task.advance(len(some))
    return near


def score_by_distance(items: Iterable[Answered], report: LeakReport) -> list[BandScore]:
    """Each arm's exact match (outer white space and Unicode form apart) by how near the items are to the training rows.

    A score that falls with the distance was earned by likeness; the bands without items are left out.

    Raises:
        UserError: an item is not among the report's rows.
    """
    bands = {row.key: band_of(row.similarity) for row in report.nearest}
    return [
        BandScore(arm, *BANDS[band], items=total, exact=exact, interval=_wilson(exact, total))
        for arm, band, total, exact in _exact(items, bands, report.version)
    ]


def score_by_template(items: Iterable[Answered], new: Mapping[str, bool], version: str) -> list[TemplateScore]:
    """Return each arm's exact match on the items whose output template training rows have, and on the others.

    Args:
        items: the items of an evaluation.
        new: whether no training row has the template, by pair key (``new_templates``).
        version: the digest of the version that ``new`` is of.

    Raises:
        UserError: an item is not among the rows of ``new``.
    """
    return [
        TemplateScore(arm, "new" if place else "seen", items=total, exact=exact, interval=_wilson(exact, total))
        for arm, place, total, exact in _exact(items, new, version)
    ]


def _exact(items: Iterable[Answered], place: Mapping[str, int], version: str) -> list[tuple[str, int, int, int]]:
    """For each arm and place, in their order: how many items there are, and how many have an exact answer."""
    counts: dict[tuple[str, int], list[int]] = {}
    for item in items:
        if item.key not in place:
            raise UserError(
                f"the evaluated item {item.key[:12]} is not among the measured rows of version {version[:12]}",
                fix="Measure the leak of the version that was evaluated, all of its held-out rows.",
            )
        for arm, answer in item.answers.items():
            count = counts.setdefault((arm, place[item.key]), [0, 0])
            count[0] += 1
            count[1] += _spelling(answer) == _spelling(item.reference)
    return [(arm, where, total, exact) for (arm, where), (total, exact) in sorted(counts.items())]


def band_of(similarity: float) -> int:
    """Return the number of the band, from 0, that a similarity lies in."""
    return min(int(similarity * len(BANDS) + _ROUNDING), len(BANDS) - 1)


def _spelling(text: str) -> str:
    """Return what exact match compares, as in ``tunewright.metrics``."""
    return unicodedata.normalize("NFC", text).strip()


def _wilson(exact: int, items: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(exact, items).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
