"""Trainings on parts of a version's rows: folds in which every row is a test row once, and nested training parts.

The parts are versions in memory. Each trains an adapter of the same config, which is then measured.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.chat import ChatFormat
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import DatasetVersion, Member, keys_digest, members_digest, short
from tunewright.data.versions.version import count_families
from tunewright.evaluation.generations import Generator
from tunewright.models.bases import Base
from tunewright.training.rows import require_min_examples
from tunewright.training.train import TrainResult, find_trained, train, training_inputs
from tunewright.training.trainings import Training, Trainings


@dataclass(eq=False)
class SubsetTrainings:
    """Adapters of one config, each trained on a part of a version's rows and measured before the next one is trained.

    They are kept in the project's working folder, apart from its own adapters. ``force`` also trains on too few rows.
    """

    project: ProjectFolder
    version: DatasetVersion
    base: Base
    chat: ChatFormat
    reporter: Reporter
    trainings: Trainings
    force: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.config = self.project.config
        # The adapters are all trained by this config, so its quantization applies to all of them.
        self.quantization = self.config.evaluate.quantization or self.config.train.quantization
        self.forced: str | None = None

    def require_enough(self, parts: Iterable[DatasetVersion], place: str) -> None:
        """Refuse parts with too few training pairs; with ``force``, the lineage records them."""
        fewest = min(len(part.domain_of("train")) for part in parts)
        self.forced = require_min_examples(fewest, force=self.force, reporter=self.reporter, place=place)

    def generator(self) -> Generator:
        """Return a fresh generator: each adapter has one, since the next training loads its own base."""
        return Generator.of(self.project, self.base, self.chat, self.quantization, self.reporter)

    def own(self, training: Training) -> Adapter | None:
        """Return the project's own adapter of the same inputs, if there is one."""
        inputs = digest(training_inputs(training.project, training.version, self.base, self.chat))
        return find_trained(self.project.adapters, self.config.name, inputs)

    def trained(
        self,
        planned: Sequence[tuple[Training, float, str]],
        left_text: Callable[[float, float, int], str],
        *,
        own: bool = False,
    ) -> Iterator[TrainResult]:
        """Yield the adapter of each training, and train the next adapter on demand.

        Args:
            planned: trainings with their sizes relative to each other, and a message before each.
            left_text: returns a message after the first adapter that is actually trained and measured, from its
                seconds, the expected seconds of the rest, and their number.
            own: use the project's own adapter where it has the same inputs.
        """
        known = [self.own(training) if own else None for training, _, _ in planned]
        missing = [training for (training, _, _), there in zip(planned, known, strict=True) if there is None]
        self.trainings.train_missing([replace(each, facts=self._facts(each)) for each in missing], self.chat)
        timed = False
        for number, ((training, size, message), there) in enumerate(zip(planned, known, strict=True), start=1):
            began = time.monotonic()
            self.reporter.say(message)
            if there is not None:
                yield TrainResult(there, trained=False)
                continue
            result = train(
                training.project,
                training.version,
                self.base,
                self.chat,
                self.reporter,
                adapters=training.adapters,
                facts=self._facts(training),
            )
            yield result
            left = [size for _, size, _ in planned[number:]]
            if result.trained and left and not timed:
                timed = True
                seconds = time.monotonic() - began
                self.reporter.say(left_text(seconds, seconds / size * sum(left), len(left)))

    def _facts(self, training: Training) -> dict[str, Any]:
        return {**training.facts, **({"forced": self.forced} if self.forced else {})}


def fold_versions(version: DatasetVersion, folds: int, seed: int) -> list[DatasetVersion]:
    """Return one version per fold: its test rows are the fold, its dev and train rows the rest.

    The generic mix-in, which resembles no row of the domain, is in every fold's training part. So are generated rows,
    accepted or not, except in folds that hold out a row of their cluster: there they are left out.

    Clusters stay whole, so no row has a near-duplicate on another side. Folds are as equal in size as whole clusters
    allow (the largest first, each into the smallest fold). Dev gets the version's own share of all rows. These versions
    exist in memory only, with their own digests.
    """
    assert folds >= 2
    clusters: dict[str, list[Member]] = defaultdict(list)
    people = [member for member in version.domain if not member.generated]
    for member in people:
        clusters[member.cluster].append(member)
    dealt = _assign_folds({name: len(rows) for name, rows in clusters.items()}, folds, seed)
    share = version.manifest.settings.val_size
    made = []
    for number, held_out in enumerate(dealt, start=1):
        rest = {name: len(rows) for name, rows in clusters.items() if name not in held_out}
        if not held_out or len(rest) < 2:
            raise UserError(
                f"{len(clusters)} independent clusters are too few for {folds} folds: in fold {number} they do not "
                "make a train, a dev and a test part",
                where="--folds",
                fix="Add pairs with other inputs, or choose another number of folds.",
            )
        dev = _choose(_shuffled(rest, f"{seed}:{number}"), rest, round(share * len(people)))
        members = tuple(m for m in _placed(version, held_out, dev) if not m.generated or m.split == "train")
        counts = Counter(member.split for member in members)
        message = f"fold {number} of {folds} of {short(version.digest)}"
        made.append(_in_memory(version, members, message, {name: counts[name] for name in SPLITS}))
    return made


def _shuffled(names: Iterable[str], salt: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{name}".encode()).digest())


def _assign_folds(sizes: Mapping[str, int], folds: int, seed: int) -> list[set[str]]:
    """Assign clusters to folds, the largest first, each into the smallest; the seed orders equal clusters."""
    dealt: list[set[str]] = [set() for _ in range(folds)]
    smallest = [(0, fold) for fold in range(folds)]
    for name in sorted(_shuffled(sizes, str(seed)), key=lambda name: -sizes[name]):
        rows, fold = heapq.heappop(smallest)
        dealt[fold].add(name)
        heapq.heappush(smallest, (rows + sizes[name], fold))
    return dealt


def _placed(version: DatasetVersion, test: set[str], dev: set[str]) -> Iterator[Member]:
    """Yield all members, in the fold's splits."""
    for member in version.members:
        split: Split = "test" if member.cluster in test else "dev" if member.cluster in dev else "train"
        yield replace(member, split="train" if member.mixed else split)


def _choose(order: Sequence[str], sizes: Mapping[str, int], room: int) -> set[str]:
    """Choose clusters for dev: in order, each that fits; at least one and never all."""
    taken: set[str] = set()
    for name in order:
        if sizes[name] <= room and len(taken) < len(order) - 1:
            taken.add(name)
            room -= sizes[name]
    return taken or {min(order, key=lambda name: sizes[name])}


def _in_memory(
    version: DatasetVersion, members: tuple[Member, ...], message: str, counts: Mapping[str, int]
) -> DatasetVersion:
    """Return a version of these members; it is never saved, so it seals nothing on disk."""
    manifest = version.manifest.model_copy(
        update={
            "digest": members_digest(members),
            "parent": version.digest,
            "message": message,
            "counts": version.manifest.counts.model_copy(update=dict(counts)),
            "splits": {name: keys_digest(m.key for m in members if m.split == name) for name in SPLITS},
            "imports": None,
            "seal": None,
        }
    )
    return DatasetVersion(manifest, members)


def subset_versions(version: DatasetVersion, shares: Sequence[float], seed: int) -> list[DatasetVersion]:
    """Return the version once per share, with that share of its training rows; dev and test are unchanged.

    The seed draws an order of whole clusters. Each part is the prefix of that order that comes nearest to its share of
    the rows, so larger parts include smaller ones. The generic mix-in is cut to the same share separately, so that its
    proportion of the training rows stays the same. These versions exist in memory only, with their own digests; the
    whole (share 1) is the version itself.
    """
    assert shares[-1] == 1
    assert all(a < b for a, b in pairwise([0, *shares]))
    generic = [member for member in version.examples("train") if member.mixed]
    domain, mixed = _prefixes(version.domain_of("train"), shares, seed), _prefixes(generic, shares, seed)
    rows = [len(keys) for keys in domain]
    if any(a == b for a, b in pairwise([0, *rows])):
        sizes = ", ".join(f"{share:.0%}: {count}" for share, count in zip(shares, rows, strict=True))
        raise UserError(
            f"The training rows form too few independent clusters to divide: whole clusters would give {sizes}",
            fix="Add pairs with other inputs.",
        )
    made = []
    for share, keys, more in zip(shares, domain, mixed, strict=True):
        members = tuple(m for m in version.members if m.split != "train" or m.key in keys | more)
        counts = {
            "rows": len(members),
            "train": sum(m.split == "train" for m in members),
            "mixed": sum(m.mixed for m in members if m.split == "train"),
            "clusters": len({m.cluster for m in members}),
            "families": count_families(members),
        }
        message = f"{share:.0%} of the training rows of {short(version.digest)}, seed {seed}"
        made.append(version if share == 1 else _in_memory(version, members, message, counts))
    return made


def _prefixes(members: Iterable[Member], shares: Sequence[float], seed: int) -> list[set[str]]:
    """Return the keys of each share's members."""
    clusters: dict[str, list[str]] = defaultdict(list)
    for member in members:
        clusters[member.cluster].append(member.key)
    order = _shuffled(clusters, str(seed))
    rows = list(accumulate((len(clusters[name]) for name in order), initial=0))
    # Ties go to the first, so that a larger share never gets fewer.
    nearest = [min(range(len(rows)), key=lambda n: abs(rows[n] - share * rows[-1])) for share in shares]
    return [{key for name in order[:count] for key in clusters[name]} for count in nearest]


def out_of_fold(
    project: ProjectFolder, version: DatasetVersion, base: Base, chat: ChatFormat
) -> list[tuple[Adapter, list[Member]]]:
    """Return each fold's adapter with its held-out rows, from the version's newest complete cross-fit.

    Empty if no cross-fit has this base and chat format.
    """
    runs: dict[str, dict[int, Adapter]] = defaultdict(dict)
    for adapter in list_adapters(project.fold_adapters):
        lineage = adapter.lineage
        fits = (lineage["base"]["digest"], lineage["template_digest"]) == (base.digest, chat.digest)
        if fits and lineage["fold"]["of"] == version.digest:
            runs[lineage["fold"]["crossval"]][lineage["fold"]["number"]] = adapter
    complete = [run for run in runs.values() if len(run) == run[min(run)].lineage["fold"]["folds"]]
    if not complete:
        return []
    newest = max(complete, key=lambda run: max(str(a.lineage["created"]) for a in run.values()))
    lineage = newest[1].lineage
    versions = fold_versions(version, lineage["fold"]["folds"], lineage["seed"])
    pairs = [(newest[number], fold) for number, fold in enumerate(versions, start=1)]
    # An earlier release may have split the rows differently: then each adapter's held-out rows are unknown here.
    if any(adapter.lineage["dataset"]["digest"] != fold.digest for adapter, fold in pairs):
        return []
    for adapter, _ in pairs:
        adapter.verify()
    return [(adapter, fold.examples("test")) for adapter, fold in pairs]
