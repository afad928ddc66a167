"""Shared parts of the suites: drawn items, controls, and a suite's numbers."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tunewright.adapters.registry import Adapter
from tunewright.config.evaluate import FileSuite
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, write_json
from tunewright.core.progress import Reporter
from tunewright.data.dedup import distinctive
from tunewright.data.dedup.similarity import link
from tunewright.data.splits import join_groups
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.generations import Generator
from tunewright.evidence.benchmarks import Control, Suite, SuiteKind
from tunewright.evidence.non_inferiority import items_needed, paired_drop, smallest_margin
from tunewright.evidence.statistics import effective_items, wilson

CONTROL_ITEMS = 200
"""Item limit of a control that needs its own forward passes."""

Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """A project's base with the adapter off and on."""

    project: ProjectFolder
    version: DatasetVersion
    generator: Generator
    adapter: Adapter
    reporter: Reporter

    @property
    def seed(self) -> int:
        """The seed of drawn items, controls and resamples."""
        return self.project.config.seed

    def clusters(self, suite: str, texts: Sequence[str], groups: Sequence[str | None]) -> list[str]:
        """Return the cluster of each item, joined by the file's groups and by similarity.

        Items of a cluster (questions on one passage, a question asked twice) are not independent. Treating them as
        independent would make limits too narrow.
        """
        with self.reporter.task("clustering", len(texts), "questions") as task:
            alike = link(distinctive(texts), self.project.config.data.dedup_threshold, task).tolist()
        names = _joined(alike, groups)
        count = len(set(names))
        if count < len(names):
            self.reporter.say(f"{suite}: {len(names):,} items in {count:,} clusters of similar or grouped items.")
        return names

    def kept(self, what: str, adapter: Adapter | None, **decides: Any) -> MeasurementCache:
        """Return the known results of items measured with an adapter, or with only the base."""
        identity = {
            "what": what,
            "base": self.generator.base.digest,
            "weights": self.generator.weights,
            "adapter": adapter.digest if adapter else None,
            **decides,
        }
        return MeasurementCache(self.project.work / "regressions" / "items" / f"{digest(identity)[:16]}.json")


class MeasurementCache:
    """Measured items by name, kept in a file that is always written atomically."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def add(self, measured: dict[str, Any]) -> None:
        """Add measured items."""
        self.known |= measured
        write_json(self.file, self.known)


class OpenSuite(Protocol):
    """A suite whose items have been read but not measured."""

    name: str
    identity: dict[str, Any]
    """Everything that decides its measurement, apart from base and adapter."""

    @property
    def margin(self) -> float | None:
        """The largest drop that still counts as no loss; None if the suite decides nothing."""

    def expected(self) -> str:
        """Return a message on the result to expect from the suite."""

    def measure(self, bench: Bench) -> Suite:
        """Return the suite, measured with the adapter off and on."""


def item_lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a suite's file that are not blank, each with its place."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"Cannot read the file: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8: {error.reason}", where=str(path)) from None
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def draw(items: Sequence[T], wanted: int | None, seed: int) -> list[T]:
    """Draw this number of items, in their own order, or return all if there are no more."""
    if wanted is None or wanted >= len(items):
        return list(items)
    return [items[place] for place in sorted(np.random.default_rng(seed).permutation(len(items))[:wanted].tolist())]


def _joined(alike: Sequence[int], groups: Sequence[str | None]) -> list[str]:
    """Return cluster names, [items]: groups of similar items, joined where two share a group."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for place, label in enumerate(alike):
        members[f"{label:09}"].append(f"{place}")
    named = {f"{place}": (group,) for place, group in enumerate(groups) if group is not None}
    cluster_of = {place: name for name, places in join_groups(members, named).items() for place in places}
    return [cluster_of[f"{place}"] for place in range(len(alike))]


def file_identity(engine: str, path: Path, settings: FileSuite, margin: float) -> dict[str, Any]:
    """Return everything that decides the measurement of a file's suite, apart from base and adapter."""
    return {
        "engine": engine,
        "file": file_digest(path),
        "settings": settings.model_dump(mode="json"),
        "margin": margin,
    }


def items_that_fit(
    suite: str, items: Sequence[T], fits: Callable[[T], bool], long: str, bench: Bench
) -> tuple[list[T], list[str]]:
    """Return the items that fit the base's context, and a note on the other items."""
    kept = [item for item in items if fits(item)]
    if len(kept) == len(items):
        return kept, []
    summary = f"{len(items) - len(kept)} {long}"
    bench.reporter.warn(f"{suite}: {summary}, and are left out.")
    return kept, [summary]


def derangement(count: int, seed: int) -> list[int]:
    """Return another index for each of at least two indices: one cycle through all, so none maps to itself."""
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return [int(place) for place in other]


def expected_text(name: str, items: int, margin: float) -> str:
    """Return a message on the number of items that the margin requires, before any measurement."""
    needed = items_needed(margin)
    said = (
        f"{name}: {items:,} items. To show a drop of less than {100 * margin:g} points takes about {needed:,} "
        "(80% power, if a tenth of the items change)"
    )
    if items >= needed:
        return f"{said}."
    return f"{said}: too few. They show a drop of less than {100 * smallest_margin(items):.1f} points at best."


# Controls


def above_chance(base: Floats, clusters: Sequence[str], chance: float, margin: float) -> Control:
    """Return the control that the base is above guessing by at least the margin."""
    return Control(
        name=f"the base, where guessing gives {chance:.1%}",
        score=float(base.mean()),
        items=len(base),
        wanted=f"more than {100 * margin:g} points above guessing, with 95% certainty",
        passed=lower_limit(base, clusters) - chance > margin,
    )


def above_floor(name: str, base: Floats, floor: Floats, clusters: Sequence[str], margin: float, seed: int) -> Control:
    """Return the control that a model without the ability falls below the base by more than the margin."""
    return Control(
        name=name,
        score=float(floor.mean()),
        items=len(floor),
        wanted=f"more than {100 * margin:g} points below the base ({base.mean():.1%}), with 95% certainty",
        passed=paired_drop(base, floor, clusters, seed).lower > margin,
    )


def lower_limit(scores: Floats, clusters: Sequence[str]) -> float:
    """Return the one-sided 95% lower limit of a mean of scores: Wilson's, on the effective number of items.

    It also covers graded scores from 0 to 1: for a given mean, binary scores have the largest variance.
    """
    items = len(scores) if len(set(clusters)) == len(scores) else effective_items(scores, clusters)
    return wilson(float(scores.mean()), items, level=0.9).low


# A suite's numbers


def suite_of(
    *,
    name: str,
    kind: SuiteKind,
    metric: str,
    base: Floats,
    tuned: Floats,
    clusters: Sequence[str],
    margin: float,
    controls: Sequence[Control],
    seed: int,
    left_out: Sequence[str] = (),
    truncated: tuple[int, int] | None = None,
) -> Suite:
    """Return a suite of items that score from 0 to 1; ``base``, ``tuned`` and ``clusters`` are per item, [items]."""
    drop = paired_drop(base, tuned, clusters, seed)
    binary = bool(np.isin([base, tuned], (0.0, 1.0)).all())
    # For graded scores, the mean squared change replaces the share of changed items.
    changed = float(np.square(base - tuned).mean())
    # No change among n items still leaves about 1 in n + 2 (Laplace): zero items never show a margin.
    needed = items_needed(margin, max(changed, 1 / (len(base) + 2)))
    if len(set(clusters)) < len(base):  # needed counts independent items; clustered items are worth less
        needed = math.ceil(needed * len(base) / effective_items(base - tuned, clusters))
    return Suite(
        name=name,
        kind=kind,
        unit="share",
        metric=metric,
        items=len(base),
        clusters=len(set(clusters)),
        left_out=tuple(left_out),
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        drop=drop.value,
        interval=drop.interval,
        limit=drop.limit,
        method=drop.method,
        margin=margin,
        changed=changed if binary else None,
        items_needed=needed,
        expected_items=items_needed(margin),
        truncated=truncated,
        controls=tuple(controls),
        result=drop.against(margin),
    )
