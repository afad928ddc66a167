"""Similarity of held-out to training rows, the expected leakage of a random split, and scores by distance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import count_of, normalize
from tunewright.data.dedup import comparison_texts
from tunewright.data.dedup.output_leakage import OutputLeakage, measure_output_leakage, near_overlap
from tunewright.data.dedup.shingles import Indices, Sketches, shingle_matrix
from tunewright.data.dedup.similarity import in_blocks, near
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, Member
from tunewright.render.blocks import Block, Column, Notes, table

THRESHOLDS = (0.7, 0.8, 0.9)
BANDS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
MOST_HELD_OUT = 5_000
_MOST_COUNTED = 20_000  # rows whose near-equal rows are all counted; with more rows, a sample is used
_FIRST_OTHERS = 64  # rows compared first, which are enough if most rows are near-equal
_SURE = 1e-4  # a row counts as certainly leaked if a random split misses it less often
_ROUNDING = 1e-9


@dataclass(frozen=True)
class NearestTrainingRow:
    """A held-out row, its most similar training row (Jaccard of character 4-grams), and the similarity.

    ``of`` is None if no training row has a 4-gram in common.
    """

    key: str
    split: Split
    of: str | None
    similarity: float


@dataclass(frozen=True)
class LeakageRate:
    """Share of test rows with a training row at or above a similarity, in this split and in a random one."""

    threshold: float
    here: float
    random: float


@dataclass(frozen=True)
class LeakageReport:
    """Similarity of a version's held-out rows to its training rows."""

    version: str  # its digest
    held_out: int  # rows in dev and test
    nearest: tuple[NearestTrainingRow, ...]  # for all of them or a random sample; sorted by key
    leaks: tuple[LeakageRate, ...]  # rates at 0.7, 0.8, 0.9; ``random`` is the mean over all splits of the same sizes
    outputs: OutputLeakage
    authors_split: str | None = None  # the column or files that gave the split; None: it was drawn
    near_training: int = 0  # held-out rows that share a cluster with a training row: only data.on_overlap: keep has any

    def histogram(self, split: Split) -> list[int]:
        """Count a split's measured rows with nearest similarity in [0, 0.1), [0.1, 0.2) … [0.9, 1]."""
        counts = [0] * 10
        for row in self.nearest:
            if row.split == split:
                counts[min(int(row.similarity * 10 + _ROUNDING), 9)] += 1
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        histogram = {split: self.histogram(split) for split in ("dev", "test")}
        return {**asdict(self), "outputs": self.outputs.as_dict(), "histogram": histogram}


class EvaluatedItem(Protocol):
    """An evaluated test item, such as ``evidence.schema.Item``."""

    @property
    def key(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def answers(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, kw_only=True)
class _ExactMatch:
    """Exact match of an arm on some items; ``interval`` is Wilson's 95% interval, which assumes independent items."""

    arm: str
    items: int
    exact: int
    interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {**asdict(self), "exact_match": self.exact / self.items}


@dataclass(frozen=True, kw_only=True)
class BandScore(_ExactMatch):
    """Exact match of items whose nearest training row has a similarity in [low, high); the last band includes 1."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class TemplateScore(_ExactMatch):
    """Exact match of items whose output template training rows have (seen), or of the other items (new)."""

    template: Literal["seen", "new"]


def measure_leakage(version: DatasetVersion, seed: int, reporter: Reporter, most: int = MOST_HELD_OUT) -> LeakageReport:
    """Measure the similarity of each held-out row of a version to its training rows.

    Of more than ``most`` held-out rows a sample is measured, with a warning. The seed decides sample and splits.
    """
    members = version.members
    texts = comparison_texts([m.example for m in members])
    train, held_out = _places(members, {"train"}), _places(members, {"dev", "test"})
    measured = held_out
    if len(held_out) > most:
        measured = np.sort(np.random.default_rng(seed).choice(held_out, most, replace=False))
        reporter.warn(f"A sample of {most:,} of {len(held_out):,} held-out rows is compared with the training rows.")
    nearest = _nearest(members, texts, measured, train, reporter)
    of_test = [row.similarity for row in nearest if row.split == "test"]
    tests = sum(m.split == "test" for m in members)
    chances = _random_leaks(texts, tests, len(train), seed, reporter)
    leaks = tuple(
        LeakageRate(threshold, float(np.mean([s >= threshold for s in of_test])) if of_test else 0.0, chance)
        for threshold, chance in zip(THRESHOLDS, chances, strict=True)
    )
    outputs = measure_output_leakage(members)
    near = near_overlap(members, version.manifest.settings.dedup_threshold, seed, reporter)
    outputs = replace(outputs, overlaps=(*outputs.overlaps, near))
    given, trained = version.manifest.given_split, {members[i].cluster for i in train}
    return LeakageReport(
        version.digest,
        len(held_out),
        tuple(nearest),
        leaks,
        outputs,
        given.text if given else None,
        sum(members[i].cluster in trained for i in held_out),
    )


_OVERLAPS = {"identical": "an identical output", "template": "the same output template", "near": "a near-equal output"}


def leakage_sentences(report: LeakageReport) -> list[str]:
    """Return the shares of test rows with a similar training row, or a similar output, here and in a random split."""
    lines = [f"The split is its authors': {report.authors_split}"] if report.authors_split else []
    if report.near_training:
        rows = count_of(report.near_training, "held-out row")
        lines.append(f"{rows} in the cluster of a training row (data.on_overlap: keep)")
    lines += [
        f"Test rows with a training row at {each.threshold} or above: {each.here:.1%} here, "
        f"{each.random:.1%} in a random split"
        for each in report.leaks
    ]
    found = report.outputs
    about = f"{found.outputs:,} different outputs, {found.templates:,} different templates"
    if found.natural is not None:
        return [*lines, f"Outputs in training and test are alike by nature: {found.natural} ({about})"]
    lines += [
        f"Test rows with {_OVERLAPS[each.how]} in training: {each.here:.1%} here, {each.random:.1%} in a random split"
        for each in found.overlaps
    ]
    if found.ceiling is not None:
        about += f"; split by template, at most {found.ceiling:.0%} of the answers can be composed"
    return [*lines, f"  ({about})"]


def similarity_blocks(report: LeakageReport) -> tuple[Block, ...]:
    """Return the held-out rows by the similarity of their nearest training row, next to a random split."""
    head = ("Similarity", "Dev", "Test", Column("Both", words=True, of="bar"))
    counts = enumerate(zip(report.histogram("dev"), report.histogram("test"), strict=True))
    rows = (
        (f"{place / 10:.1f} to {(place + 1) / 10:.1f}", f"{dev:,}", f"{test:,}", f"{dev + test:,}")
        for place, (dev, test) in counts
    )
    return (table("Held-out rows by similarity", head, rows), Notes(tuple(leakage_sentences(report))))


def nearest_training(version: DatasetVersion, reporter: Reporter, split: Split = "test") -> dict[str, float]:
    """Return the Jaccard similarity (character 4-grams) of each test or dev row's nearest training input, by key."""
    members = version.members
    texts = comparison_texts([m.example for m in members])
    nearest = _nearest(members, texts, _places(members, {split}), _places(members, {"train"}), reporter)
    return {row.key: row.similarity for row in nearest}


def _places(members: Sequence[Member], splits: set[Split]) -> Indices:
    return np.array([i for i, m in enumerate(members) if m.split in splits], dtype=np.int64)


def _nearest(
    members: Sequence[Member], texts: Sequence[str], held_out: Indices, train: Indices, reporter: Reporter
) -> list[NearestTrainingRow]:
    found = []
    with reporter.task("comparing held-out rows", len(held_out), "examples") as task:
        for rows, similarity_of in in_blocks(shingle_matrix(texts), held_out, train, task):
            best, nearest = similarity_of.max(axis=0), similarity_of.argmax(axis=0)
            for row, similarity, place in zip(rows.tolist(), best.tolist(), nearest.tolist(), strict=True):
                of = members[int(train[place])].key if similarity else None
                found.append(NearestTrainingRow(members[row].key, members[row].split, of, similarity))
    return found


def _random_leaks(texts: Sequence[str], tests: int, training: int, seed: int, reporter: Reporter) -> list[float]:
    """Return the expected share of test rows with a near-equal training row in a random split, for each threshold.

    The mean over all random splits is computed without drawing any: for a row with k near-equal rows, the number of
    them in training is hypergeometric. So k is counted, up to the point where the probability of none is negligible.
    """
    from scipy.stats import hypergeom

    count = len(texts)
    if not tests or not training:
        return [0.0] * len(THRESHOLDS)
    rows, rng = shingle_matrix(texts), np.random.default_rng(seed)
    asked, others = np.arange(count), rng.permutation(count)
    if count > _MOST_COUNTED:
        asked = np.sort(rng.choice(count, MOST_HELD_OUT, replace=False))
        reporter.say(f"The leakage of a random split is estimated from {len(asked):,} of {count:,} rows.")
    missed = 1 - training / max(count - 1, 1)
    enough = max(math.ceil(math.log(_SURE) / math.log(missed)), 1) if missed > 0 else 1
    shares = []
    with reporter.task("estimating the leakage of a random split", len(THRESHOLDS) * count, "comparisons") as task:
        for threshold in THRESHOLDS:
            others_near = _near_counts(rows, asked, others, threshold, enough, task)[asked]
            shares.append(float(np.mean(hypergeom.sf(0, count - 1, others_near, training))))
    return shares


def _near_counts(rows: Any, asked: Indices, others: Indices, threshold: float, enough: int, task: Task) -> Indices:
    """Count the other rows near each of the ``asked`` ones, [rows]; counting stops at ``enough``."""
    sizes = np.diff(rows.indptr).astype(np.int64)
    sketches = Sketches(rows, sizes, threshold, int(np.quantile(sizes, 0.9)))
    counts: Indices = np.zeros(len(sizes), dtype=np.int64)
    at, step = 0, _FIRST_OTHERS
    while at < len(others):
        some = others[at : at + step]
        pairs = near(rows, sketches, threshold, asked[counts[asked] < enough], some)
        counts += np.bincount(pairs.first, minlength=len(counts))
        at, step = at + step, 2 * step
        task.advance(len(some))
    return counts


def score_by_distance(items: Iterable[EvaluatedItem], report: LeakageReport) -> list[BandScore]:
    """Return each arm's exact match (ignoring outer white space and Unicode form) by distance from the training rows.

    A score that falls with the distance comes from similarity to training rows. Bands without items are left out.
    """
    bands = {row.key: band_of(row.similarity) for row in report.nearest}
    return [
        BandScore(**score, low=BANDS[band][0], high=BANDS[band][1])
        for score, band in _exact(items, bands, report.version)
    ]


def score_by_template(items: Iterable[EvaluatedItem], new: Mapping[str, bool], version: str) -> list[TemplateScore]:
    """Return each arm's exact match on items with an output template of training rows, and on the other items.

    ``new`` says by pair key whether no training row has the template (``new_templates``); ``version`` is its digest.
    """
    return [TemplateScore(**score, template="new" if place else "seen") for score, place in _exact(items, new, version)]


def _exact(
    items: Iterable[EvaluatedItem], place: Mapping[str, int], version: str
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the fields of ``_ExactMatch`` and the place, sorted by arm and place."""
    from scipy.stats import binomtest

    counts: dict[tuple[str, int], list[int]] = {}
    for item in items:
        if item.key not in place:
            raise UserError(
                f"The evaluated item {item.key[:12]} is not among the measured rows of version {version[:12]}",
                fix="Measure the leakage of all held-out rows of the version that was evaluated.",
            )
        for arm, answer in item.answers.items():
            count = counts.setdefault((arm, place[item.key]), [0, 0])
            count[0] += 1
            count[1] += _spelling(answer) == _spelling(item.reference)
    for (arm, where), (total, exact) in sorted(counts.items()):
        interval = binomtest(exact, total).proportion_ci(0.95, method="wilson")
        bounds = float(interval.low), float(interval.high)
        yield {"arm": arm, "items": total, "exact": exact, "interval": bounds}, where


def band_of(similarity: float) -> int:
    """Return the index of a similarity's band."""
    return min(int(similarity * len(BANDS) + _ROUNDING), len(BANDS) - 1)


def _spelling(text: str) -> str:
    """Return the text that exact match compares, as in ``tunewright.metrics``."""
    return normalize(text).strip()
