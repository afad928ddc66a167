"""A version's training rows against all that it is measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.core.progress import Reporter
from tunewright.data.dedup.decontaminate import TEST, Hit, How, item_names, read_items, training_hits
from tunewright.data.versions import DatasetVersion


@dataclass(frozen=True)
class HeldItem:
    """A training row that holds an item: the row's key, the item as people name it, how, and whether it is mix-in."""

    row: str
    item: str
    source: str
    how: How
    score: float
    mixed: bool


@dataclass(frozen=True)
class Contamination:
    """What was looked for, by source with the number of its items, and what was found, the surest first."""

    looked_for: dict[str, int]
    found: tuple[HeldItem, ...]

    def rows(self, source: str) -> Counter[How]:
        """Return how many training rows hold an item of a source, each row by the surest of its hits."""
        best: dict[str, How] = {}
        for held in self.found:
            if held.source == source:
                best.setdefault(held.row, held.how)
        return Counter(best.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as ``--json`` prints it."""
        return asdict(self)


_SUREST: tuple[How, ...] = ("equal", "contained", "overlap")


def contamination(
    project: ProjectFolder, version: DatasetVersion, files: Sequence[Path], reporter: Reporter
) -> Contamination:
    """Look in all training rows, mix-in included, for the test inputs and for the items of benchmarks.

    Args:
        project: its config names benchmarks, relative to its folder.
        files: more files of items, as ``read_items`` reads them.

    Raises:
        UserError: a file cannot be read.
    """
    benchmarks = {name: read_items(project.root / name) for name in project.config.data.benchmarks}
    benchmarks |= {str(path): read_items(path) for path in files}
    mixed = {m.key for m in version.members if m.mixed}
    hits = sorted(training_hits(version.members, benchmarks, reporter), key=_rank)
    found = tuple(
        HeldItem(hit.row, item, hit.source, hit.how, round(hit.score, 4), hit.row in mixed)
        for hit, item in zip(hits, item_names(hits, version.members), strict=True)
    )
    return Contamination({TEST: len(version.examples("test")), **{n: len(i) for n, i in benchmarks.items()}}, found)


def _rank(hit: Hit) -> tuple[int, float, str]:
    return _SUREST.index(hit.how), -hit.score, hit.row
