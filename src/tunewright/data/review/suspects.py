"""Rows whose answer is likely wrong, most suspicious first, each with a reason.

If answers are classes, a row is suspicious when a model trained on *other* rows predicts another class (Northcutt et
al. 2021, "Confident Learning", arXiv 1911.00068; by cleanlab's normalised margin). If repeated answers are too many for
such a model, or it is often wrong, each row is compared with the centroid of its answer's other rows. Free text is
ranked by a trained adapter's loss, if the caller has it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunewright.core.errors import UserError
from tunewright.core.io import write_json, writing
from tunewright.core.progress import Reporter
from tunewright.data.dedup import comparison_texts, find_clusters
from tunewright.data.dedup.shingles import Mask
from tunewright.data.dedup.similarity import near_pairs
from tunewright.data.examples import answers_repeat, class_like, in_conflict
from tunewright.data.review.label_models import (
    Suspect,
    answer_of,
    excerpt,
    rank_by_centroids,
    rank_by_classifier,
)
from tunewright.data.splits import join_groups
from tunewright.data.versions import DatasetVersion, Member, short

SHARE = 0.1
"""Share of the rows worth reviewing: benchmarks/label_errors.py measures its yield."""

METHOD = 3
"""Version of the method: increase it with each change of the results, so that cached lists are recomputed."""


ACCURATE = 0.65
"""Minimum accuracy of the model for its margins to rank rows (measured in docs/benchmarks/data.md). Below it, the model
mostly doubts right answers, and the centroids of the answers rank better."""


@dataclass(frozen=True)
class AnswerLoss:
    """Mean negative log-likelihood per token of an answer, in nats: ``given`` its prompt, and ``alone``."""

    given: float
    alone: float

    @property
    def negative_pmi(self) -> float:
        """Loss given the prompt minus loss without it: the negative pointwise mutual information per token.

        The loss given the prompt alone would rank answers with rare words first, however well they fit.
        """
        return self.given - self.alone


@dataclass(frozen=True)
class SuspectList:
    """Suspects of a version, worst first, and the accuracy of the model that judged classes."""

    suspects: list[Suspect]
    accuracy: float | None = None
    """Share of rows whose answer the out-of-fold model predicts; None if no such model was used."""


def conflicts_accepted(version: DatasetVersion) -> bool:
    """Return whether several outputs of one input are intended.

    Versions of earlier releases do not record it. Their conflicts were also accepted, but stay
    suspects if answers are classes.
    """
    recorded = version.manifest.settings.conflicts
    if recorded is None:
        return not class_like([answer_of(m) for m in version.domain])
    return recorded == "accept"


def find_suspects(
    version: DatasetVersion,
    reporter: Reporter,
    *,
    losses: Mapping[str, AnswerLoss] | None = None,
    share: float = SHARE,
    seed: int = 0,
) -> SuspectList:
    """Return the most suspicious rows of a version, each once, worst first.

    Conflicts (same input, another answer) come first unless the version accepts them, then near-duplicates with
    another class, then classes that the out-of-fold model doubts. Repeated answers that are not classes, and classes
    that the model predicts too rarely (``ACCURATE``), are ranked by the other rows with their answer. Free text is
    ranked by loss; if both apply, the two rankings are interleaved.
    """
    if not 0 < share <= 1:
        raise UserError(f"The share of rows to list must be above 0 and at most 1 (got {share})")
    if version.manifest.settings.split_by == "output_template":
        version = _clustered_by_input(version, reporter)
    members = version.domain
    accepted = conflicts_accepted(version)
    found = [] if accepted else conflicts(members)
    most = max(round(share * len(members)), len(found))
    answers = [answer_of(m) for m in members]
    accuracy = None
    if class_like(answers):
        if losses is not None:
            reporter.warn("Losses are ignored: the answers are classes, which an out-of-fold model judges better.")
        margins, doubts, accuracy = rank_by_classifier(members, answers, seed, reporter)
        if accuracy is not None and accuracy < ACCURATE:
            reporter.warn(
                f"An out-of-fold model predicts the answers of {accuracy:.0%} of the rows, too few to rank by it "
                f"(minimum {ACCURATE:.0%}). Rows are ranked by their distance from other rows with their answer, which "
                "finds careless errors, but few plausible ones."
            )
            doubts = rank_by_centroids(members, answers, reporter)
            margins = {suspect.key: 1 - suspect.score for suspect in doubts}
        elif accuracy is not None:
            reporter.say(f"An out-of-fold model predicts the answers of {accuracy:.0%} of the rows.")
        found += _near_duplicates(version, margins, reporter, accepted=accepted) + doubts
    else:
        found += _of_many_answers(members, answers, losses, reporter)
    first: dict[str, Suspect] = {}
    for suspect in found:
        first.setdefault(suspect.key, suspect)
    return SuspectList(list(first.values())[:most], accuracy)


def _clustered_by_input(version: DatasetVersion, reporter: Reporter) -> DatasetVersion:
    """Return the version with clusters by inputs and groups only.

    Clusters by output template contain all rows of an answer, so no other cluster could be compared with them.
    """
    domain = version.domain
    names = find_clusters([m.example for m in domain], version.manifest.settings.dedup_threshold, reporter)
    clusters: dict[str, list[str]] = defaultdict(list)
    for member, name in zip(domain, names, strict=True):
        clusters[name].append(member.key)
    joined = join_groups(clusters, {m.key: m.groups for m in domain})
    cluster_of = {key: name for name, keys in joined.items() for key in keys}
    members = tuple(replace(m, cluster=cluster_of.get(m.key, m.cluster)) for m in version.members)
    return replace(version, members=members)


def _of_many_answers(
    members: Sequence[Member], answers: Sequence[str], losses: Mapping[str, AnswerLoss] | None, reporter: Reporter
) -> list[Suspect]:
    """Rank rows with repeated answers by the other rows with their answer, and the rest by loss, if given."""
    repeating = rank_by_centroids(members, answers, reporter) if answers_repeat(answers) else []
    judged = {suspect.key for suspect in repeating}
    rest = [m for m in members if m.key not in judged]
    if losses is None:
        if rest:
            reporter.say(
                f"{len(rest):,} of {len(members):,} rows cannot be judged: no comparable row has their answer. Use "
                "--adapter NAME to rank them by an adapter's loss, or --adapter base to use the base's loss."
            )
        return repeating
    by_loss = _by_loss(rest, losses, reporter)
    ranked = [(rank / len(group), suspect) for group in (repeating, by_loss) for rank, suspect in enumerate(group)]
    return [suspect for _, suspect in sorted(ranked, key=lambda each: each[0])]


def conflicts(members: Sequence[Member]) -> list[Suspect]:
    """Return rows with the same input as another row, the rarest answers first."""
    by_input: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_input[member.example.prompt_key].append(member)
    found = []
    for rows in by_input.values():
        if not in_conflict([row.example for row in rows]):
            continue
        counts = Counter(map(answer_of, rows))
        for row in rows:
            others = [r for r in rows if answer_of(r) != answer_of(row)]
            if others:
                detail = (
                    f"the same input has the answer {excerpt(others[0].example.output)} in row {short(others[0].key)}"
                )
                score = 1 - counts[answer_of(row)] / len(rows)
                found.append(Suspect(row.key, score, "conflict", detail, others[0].example.output))
    return sorted(found, key=lambda s: (-s.score, s.key))


def _near_duplicates(
    version: DatasetVersion, margins: Mapping[str, float], reporter: Reporter, *, accepted: bool
) -> list[Suspect]:
    """Return rows for which at least half of the nearly equal rows (themselves included) have another class.

    With ``accepted`` conflicts, rows of the same input do not contradict each other.
    """
    answers: dict[str, set[str]] = defaultdict(set)
    for member in version.domain:
        answers[member.cluster].add(answer_of(member))
    rows = [i for i, m in enumerate(version.domain) if len(answers[m.cluster]) > 1]
    members = [version.domain[i] for i in rows]
    # Computed over all rows: a subset may share more text, which would also be stripped.
    texts = comparison_texts([m.example for m in version.domain])
    clusters = np.unique([m.cluster for m in members], return_inverse=True)[1]

    def wanted(first: NDArray[np.int64], second: NDArray[np.int64]) -> Mask:
        mask: Mask = clusters[first] == clusters[second]
        return mask

    same: Counter[int] = Counter(range(len(members)))  # each row counts for its own class
    other: dict[int, list[tuple[float, int]]] = defaultdict(list)
    near = near_pairs(
        [texts[i] for i in rows],
        version.manifest.settings.dedup_threshold,
        wanted,
        reporter,
        "comparing near-duplicates",
    )
    for block in near:
        for a, b, j in zip(block.first.tolist(), block.second.tolist(), block.similarity.tolist(), strict=True):
            if answer_of(members[a]) == answer_of(members[b]):
                same.update((a, b))
            elif not (accepted and members[a].example.prompt_key == members[b].example.prompt_key):
                other[a].append((j, b))
                other[b].append((j, a))
    found = []
    for row, against in other.items():
        if len(against) >= same[row]:
            j, nearest = max(against)
            suggested = members[nearest].example.output
            detail = f"a nearly equal input ({j:.2f}) has {excerpt(suggested)} in row {short(members[nearest].key)}"
            score = len(against) / (len(against) + same[row])
            found.append(Suspect(members[row].key, score, "near-duplicate", detail, suggested))
    # Of two contradicting rows, the row that the out-of-fold model doubts comes first.
    return sorted(found, key=lambda s: (margins.get(s.key, 1.0), s.key))


def _by_loss(members: Sequence[Member], losses: Mapping[str, AnswerLoss], reporter: Reporter) -> list[Suspect]:
    known = [m for m in members if m.key in losses]
    bad = [m.key for m in known if not np.isfinite(losses[m.key].negative_pmi)]
    if bad:
        raise UserError(f"The loss of row {short(bad[0])} is not finite (got {losses[bad[0]]})")
    if len(known) < len(members):
        reporter.warn(f"{len(members) - len(known):,} of {len(members):,} rows are not ranked: they have no loss.")
    if not known:
        return []
    median = float(np.median([losses[m.key].negative_pmi for m in known]))
    found = []
    for member in sorted(known, key=lambda m: (-losses[m.key].negative_pmi, m.key)):
        loss = losses[member.key]
        detail = (
            f"loss {loss.given:.2f} per token of the answer, {loss.alone:.2f} without its input: difference "
            f"{loss.negative_pmi:+.2f}, median {median:+.2f}"
        )
        found.append(Suspect(member.key, loss.negative_pmi, "loss", detail))
    return found


FOLDER = "suspects"
"""Folder of cached lists, below the project's working folder."""


def remove_cached_suspects(root: Path) -> int:
    """Delete the cached lists of a project, and return their number.

    They quote answers, also of rows that are not suspects, so a purge cannot know which lists quote its rows.
    """
    folder = root / ".tunewright" / FOLDER
    if not folder.is_dir():
        return 0
    count = len(list(folder.glob("[!.]*.json")))
    with writing(folder):
        shutil.rmtree(folder)
    return count


class _Recorder:
    """Reporter that forwards to another one, and records messages and warnings."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.task = reporter.task
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)
        self._reporter.say(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)
        self._reporter.warn(message)


def stored_suspects(file: Path) -> SuspectList:
    """Return the suspects cached in a file, which exists."""
    kept = _stored(file)
    return SuspectList([Suspect(**suspect) for suspect in kept["suspects"]], kept["accuracy"])


def _stored(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


def cached_suspects(file: Path, find: Callable[[Reporter], SuspectList], reporter: Reporter) -> SuspectList:
    """Return the suspects cached in a file, repeating the messages; else find and cache them.

    ``file`` is named by the digest of all inputs of the search.
    """
    if file.exists():
        kept = _stored(file)
        reporter.say(f"Using cached suspects for the same rows and settings: {file}")
        for message in kept["said"]:
            reporter.say(message)
        for message in kept["warned"]:
            reporter.warn(message)
        return stored_suspects(file)
    recorder = _Recorder(reporter)
    found = find(recorder)
    listed = [asdict(each) for each in found.suspects]
    document = {"said": recorder.said, "warned": recorder.warned, "suspects": listed, "accuracy": found.accuracy}
    write_json(file, document)
    return found
