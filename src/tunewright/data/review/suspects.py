"""Rows whose answer is likely wrong, the most suspicious first, each with its reason.

Where answers are classes, a row is suspicious when a model of *other* rows gives it another class (Northcutt et al.
2021, "Confident Learning", arXiv 1911.00068; by cleanlab's normalised margin). Where answers repeat, but are too many
for such a model or it is often wrong, each is compared with the centroid of its answer's other rows. Free text has
nothing to compare: there a trained adapter's loss ranks the rows, if the caller has it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.dedup import comparison_texts, find_clusters
from tunewright.data.dedup.similarity import near_pairs
from tunewright.data.dedup.sketches import Mask
from tunewright.data.examples import in_conflict
from tunewright.data.splits import join_groups
from tunewright.data.versions import DatasetVersion, Member, short

Reason = Literal["conflict", "near-duplicate", "label", "loss"]

SHARE = 0.1
"""Of the rows, the share worth looking at: benchmarks/label_errors.py says what is in it."""

METHOD = 3
"""Goes up with each change of what ``suspects`` finds in the same rows: lists that are kept are then found again."""

REPEATED = 0.5
"""Share of the rows that have to share their answer with another, for answers to be judged by their other rows."""

MOST_CLASSES = 200
ROWS_PER_CLASS = 5
FOLDS = 5
ACCURATE = 0.65
"""Share of rows whose answer the model of other rows has to give for its doubts to rank them: docs/labels.md has the
measurements. Below it the model mostly doubts right answers, and the centroids of the answers rank better."""
_BLOCK = 1024  # rows whose similarity to all answers is held at once
_NOTHING = 1e-4  # what is left of a sum of unit rows when all of them are taken away

# Of 1e-4 to 1e-5, the weakest regularisation ranks best: with 77 classes the stronger ones leave all margins alike.
_REGULARISATION = 1e-5


@dataclass(frozen=True)
class AnswerLoss:
    """Mean negative log-likelihood per token of an answer, in nats: ``given`` its conversation, and ``alone``."""

    given: float
    alone: float

    @property
    def unexplained(self) -> float:
        """How little the input explains of the answer: the negative of their mutual information per token.

        The loss itself says as much of how rare an answer's words are as of how well it fits its input.
        """
        return self.given - self.alone


@dataclass(frozen=True)
class Suspect:
    """A doubtful row; of higher scores the worse.

    ``score`` is from 0 to 1 within its reason, and for a loss its ``unexplained`` part.
    """

    key: str
    score: float
    reason: Reason
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """Return the suspect as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """The suspects of a version, the worst first, and how far the model that judged classes can be trusted."""

    suspects: list[Suspect]
    accuracy: float | None = None
    """Share of rows whose answer the model of other rows gives; None where no such model judged."""


def class_like(outputs: Sequence[str]) -> bool:
    """Return whether answers are classes: at most 200 different ones, and on average at least 5 rows for each."""
    different = len(set(outputs))
    return 1 < different <= MOST_CLASSES and len(outputs) >= ROWS_PER_CLASS * different


def answers_repeat(outputs: Sequence[str]) -> bool:
    """Return whether at least half of the rows share their answer with another row, as with a thousand labels."""
    counts = Counter(outputs)
    return len(counts) > 1 and sum(n for n in counts.values() if n > 1) >= REPEATED * len(outputs)


def conflicts_accepted(version: DatasetVersion) -> bool:
    """Return whether several outputs of one input are meant.

    Versions of earlier releases do not say. They too have only conflicts that were accepted, but in classes these stay
    suspects.
    """
    recorded = version.manifest.settings.conflicts
    if recorded is None:
        return not class_like([_answer(m) for m in version.domain])
    return recorded == "accept"


def suspects(
    version: DatasetVersion,
    reporter: Reporter,
    *,
    losses: Mapping[str, AnswerLoss] | None = None,
    share: float = SHARE,
    seed: int = 0,
) -> list[Suspect]:
    """Return :func:`find_suspects`' rows, without the accuracy."""
    return find_suspects(version, reporter, losses=losses, share=share, seed=seed).suspects


def find_suspects(
    version: DatasetVersion,
    reporter: Reporter,
    *,
    losses: Mapping[str, AnswerLoss] | None = None,
    share: float = SHARE,
    seed: int = 0,
) -> Found:
    """Return the most suspicious rows of a version, each once, the worst first.

    Conflicts come first (the same input, another answer) unless the version accepts them, then near-duplicates of
    another class, then classes that a model of other rows doubts. Answers that repeat without being classes, and
    classes that this model gives too rarely (``ACCURATE``), are ranked by their answer's other rows, free text by loss;
    of rows of both kinds, the first of each come first.

    Args:
        version: the rows.
        reporter: shows progress, and is told what could not be looked at.
        losses: for free text, by pair key.
        share: how many to return, as a share of all rows; conflicts are never cut off.
        seed: decides folds and training order.

    Raises:
        UserError: a loss that is no finite number, or a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"the share of rows to list is {share}", fix="Give a number above 0 and at most 1.")
    if version.manifest.settings.split_by == "output_template":
        version = _clustered_by_input(version, reporter)
    members = version.domain
    accepted = conflicts_accepted(version)
    found = [] if accepted else conflicts(members)
    most = max(round(share * len(members)), len(found))
    answers = [_answer(m) for m in members]
    accuracy = None
    if class_like(answers):
        if losses is not None:
            reporter.warn("Losses are not used: the answers are classes, and a model of other rows judges them better.")
        margins, doubts, accuracy = _doubts(members, answers, seed, reporter)
        if accuracy is not None and accuracy < ACCURATE:
            reporter.warn(
                f"A model of other rows gives {accuracy:.0%} of the rows their answer, too few for its doubts to rank "
                f"them (below {ACCURATE:.0%}): rows are ranked by how unlike they are to their answer's other rows. "
                "Careless errors are found so; many plausible ones are not."
            )
            doubts = _by_centroids(members, answers, reporter)
            margins = {suspect.key: 1 - suspect.score for suspect in doubts}
        elif accuracy is not None:
            reporter.say(f"A model of other rows gives {accuracy:.0%} of the rows their answer.")
        found += _near_duplicates(version, margins, reporter, accepted=accepted) + doubts
    else:
        found += _of_many_answers(members, answers, losses, reporter)
    first: dict[str, Suspect] = {}
    for suspect in found:
        first.setdefault(suspect.key, suspect)
    return Found(list(first.values())[:most], accuracy)


def _clustered_by_input(version: DatasetVersion, reporter: Reporter) -> DatasetVersion:
    """Return the version with clusters by inputs and groups alone.

    Its own put all rows of one answer together, so that no row of another cluster could be compared with it.
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
    """Rows whose answer repeats by their answer's other rows, the others by their loss, if there is one."""
    repeating = _by_centroids(members, answers, reporter) if answers_repeat(answers) else []
    judged = {suspect.key for suspect in repeating}
    rest = [m for m in members if m.key not in judged]
    if losses is None:
        if rest:
            reporter.say(
                f"{len(rest):,} of {len(members):,} rows are not judged: {_why_not_judged(rest, members)}. The loss of "
                "a trained adapter would rank them. --adapter base ranks by the base's own loss."
            )
        return repeating
    by_loss = _by_loss(rest, losses, reporter)
    ranked = [(rank / len(group), suspect) for group in (repeating, by_loss) for rank, suspect in enumerate(group)]
    return [suspect for _, suspect in sorted(ranked, key=lambda each: each[0])]


def _why_not_judged(rest: Sequence[Member], members: Sequence[Member]) -> str:
    """Say how many of the ``rest`` have no other row to compare their answer with, by reason."""
    counts = Counter(_answer(m) for m in members)
    clusters: dict[str, set[str]] = defaultdict(set)
    for member in members:
        clusters[_answer(member)].add(member.cluster)
    repeat = answers_repeat([_answer(m) for m in members])

    def reason(member: Member) -> str:
        answer = _answer(member)
        if counts[answer] == 1:
            return "with an answer that no other row has"
        if not repeat:
            return "with an answer that other rows have, in a dataset where too few rows share theirs"
        if len(clusters[answer]) == 1:
            return "with an answer that only rows of their own cluster have"
        return "with no words in common with other rows"

    return ", ".join(f"{count:,} {why}" for why, count in Counter(map(reason, rest)).most_common())


def _by_centroids(members: Sequence[Member], answers: Sequence[str], reporter: Reporter) -> list[Suspect]:
    """Rows whose answer another cluster has too, the worst first: how much nearer another answer's rows are.

    The score is s' / (s + s'): the cosine similarity s to the centroid of the other clusters' rows with the same
    answer, s' to the nearest centroid of another answer.
    """
    from scipy.sparse import csr_matrix, diags

    names, labels = np.unique(answers, return_inverse=True)
    clusters = np.unique([m.cluster for m in members], return_inverse=True)[1]
    own_part = np.unique(np.stack([labels, clusters], axis=1), axis=0, return_inverse=True)[1].ravel()
    features = text_features(_texts(members))  # [rows, pieces]

    def sums(groups: NDArray[np.int64]) -> Any:
        ones = np.ones(len(groups), dtype=np.float32)
        return csr_matrix((ones, (groups, np.arange(len(groups))))) @ features  # [groups, pieces]

    by_label, by_part = sums(labels), sums(own_part)
    norms = np.sqrt(np.asarray(by_label.multiply(by_label).sum(axis=1)).ravel())
    centroids = (diags(1 / norms) @ by_label).T.tocsr()  # [pieces, labels]
    scores = np.full(len(members), -1.0)
    likes = np.zeros((len(members), 2))
    nearest = np.zeros(len(members), dtype=np.int64)
    with reporter.task("judging answers by other rows", len(members), "rows") as task:
        for start in range(0, len(members), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(members)))
            others = by_label[labels[rows]] - by_part[own_part[rows]]  # without the row's own cluster
            size = np.sqrt(np.asarray(others.multiply(others).sum(axis=1)).ravel())
            own = np.asarray(others.multiply(features[rows]).sum(axis=1)).ravel() / np.maximum(size, 1e-9)
            to_all = (features[rows] @ centroids).toarray()  # [rows, labels]
            to_all[np.arange(len(rows)), labels[rows]] = -1
            nearest[rows] = to_all.argmax(axis=1)
            other = to_all.max(axis=1)
            judged = (size > _NOTHING) & (own + other > 0)
            scores[rows] = np.where(judged, other / np.maximum(own + other, 1e-9), -1)
            likes[rows] = np.stack([own, other], axis=1)
            task.advance(len(rows))
    found = []
    # A row that is unlike all others with its answer has score 1 however little it is like another's: the likeness to
    # the other answer ranks these.
    for row in np.lexsort((np.arange(len(members)), -likes[:, 1], -scores, _echoes(members))).tolist():
        if scores[row] < 0:
            continue
        detail = (
            f"rows with {excerpt(str(names[nearest[row]]))} are more like it ({likes[row, 1]:.2f}) than the others "
            f"with its answer ({likes[row, 0]:.2f})"
            if likes[row, 1] > likes[row, 0]
            else f"the others with its answer are not much like it ({likes[row, 0]:.2f})"
        )
        found.append(Suspect(members[row].key, float(scores[row]), "label", detail))
    return found


def _answer(member: Member) -> str:
    return member.example.output.strip()


def _echoes(members: Sequence[Member]) -> NDArray[np.bool_]:
    """Which inputs are their own answer ("Mendoza", of the province Mendoza): hardly ever wrong, so ranked last."""
    return np.array([m.example.input_text.strip() == _answer(m) for m in members], dtype=bool)


def excerpt(text: str, most: int = 60) -> str:
    """Return a text in quotes, on one line, cut to so many characters with a mark where it is cut."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= most else line[: most - 1] + "…"}"'


def conflicts(members: Sequence[Member]) -> list[Suspect]:
    """Rows with the same input as another; among them, the rarer an answer the worse."""
    by_input: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_input[member.example.asked].append(member)
    found = []
    for rows in by_input.values():
        if not in_conflict([row.example for row in rows]):
            continue
        counts = Counter(map(_answer, rows))
        for row in rows:
            others = [r for r in rows if _answer(r) != _answer(row)]
            if others:
                detail = (
                    f"the same input has the answer {excerpt(others[0].example.output)} in row {short(others[0].key)}"
                )
                found.append(Suspect(row.key, 1 - counts[_answer(row)] / len(rows), "conflict", detail))
    return sorted(found, key=lambda s: (-s.score, s.key))


def _near_duplicates(
    version: DatasetVersion, margins: Mapping[str, float], reporter: Reporter, *, accepted: bool
) -> list[Suspect]:
    """Rows that have, of the rows nearly equal to them, more with another class than with their own (or as many).

    With ``accepted`` conflicts, rows of the same input do not contradict each other.
    """
    answers: dict[str, set[str]] = defaultdict(set)
    for member in version.domain:
        answers[member.cluster].add(_answer(member))
    rows = [i for i, m in enumerate(version.domain) if len(answers[m.cluster]) > 1]
    members = [version.domain[i] for i in rows]
    # Of all rows: what all inputs share is set aside, and a few rows may share more.
    texts = comparison_texts([m.example for m in version.domain])
    clusters = np.unique([m.cluster for m in members], return_inverse=True)[1]

    def wanted(first: NDArray[np.int64], second: NDArray[np.int64]) -> Mask:
        mask: Mask = clusters[first] == clusters[second]
        return mask

    same: Counter[int] = Counter(range(len(members)))  # each row is on its own side
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
            if _answer(members[a]) == _answer(members[b]):
                same.update((a, b))
            elif not (accepted and members[a].example.asked == members[b].example.asked):
                other[a].append((j, b))
                other[b].append((j, a))
    found = []
    for row, against in other.items():
        if len(against) >= same[row]:
            j, nearest = max(against)
            text = f"{excerpt(members[nearest].example.output)} in row {short(members[nearest].key)}"
            score = len(against) / (len(against) + same[row])
            found.append(
                Suspect(members[row].key, score, "near-duplicate", f"a nearly equal input ({j:.2f}) has {text}")
            )
    # Of two that contradict each other, the one that other rows doubt comes first.
    return sorted(found, key=lambda s: (margins.get(s.key, 1.0), s.key))


def _doubts(
    members: Sequence[Member], answers: Sequence[str], seed: int, reporter: Reporter
) -> tuple[dict[str, float], list[Suspect], float | None]:
    """Return cleanlab's normalised margin (0 to 1, low is bad) of each row that can be judged, and these as suspects.

    The third is the accuracy of the model of other rows on these rows; None where there is none.
    """
    from cleanlab.rank import get_label_quality_scores

    names, labels = np.unique(answers, return_inverse=True)
    clusters = np.unique([m.cluster for m in members], return_inverse=True)[1]
    spread = np.array([len(np.unique(clusters[labels == label])) for label in range(len(names))])
    lone = spread[labels] < 2
    if lone.any():
        reporter.warn(
            f"{int(lone.sum()):,} rows are not judged by their answer, because no independent row has the same: "
            + ", ".join(excerpt(str(names[label])) for label in np.flatnonzero(spread < 2)[:5])
            + (", …" if int((spread < 2).sum()) > 5 else "")
        )
    if len(np.unique(clusters)) < FOLDS:
        reporter.warn(f"The answers are not judged by a model of other rows: fewer than {FOLDS} independent clusters.")
        return {}, [], None
    probabilities = _out_of_fold(_texts(members), labels, clusters, seed, reporter)
    scores = get_label_quality_scores(labels, probabilities, method="normalized_margin")
    margins: dict[str, float] = {}
    found = []
    for row in np.lexsort((np.arange(len(members)), scores, _echoes(members))).tolist():
        if lone[row]:
            continue
        margins[members[row].key] = float(scores[row])
        guess = int(np.argmax(probabilities[row]))
        own = float(probabilities[row, labels[row]])
        detail = (
            f"other rows suggest {excerpt(str(names[guess]))} ({probabilities[row, guess]:.0%}) "
            f"rather than {excerpt(str(names[labels[row]]))} ({own:.0%})"
            if guess != labels[row]
            else f"other rows suggest {excerpt(str(names[guess]))} with {own:.0%} only"
        )
        found.append(Suspect(members[row].key, 1 - float(scores[row]), "label", detail))
    right = probabilities.argmax(axis=1) == labels
    return margins, found, float(right[~lone].mean()) if not lone.all() else None


def _texts(members: Sequence[Member]) -> list[str]:
    """Return what the answer depends on: the input, and the system turn where there are several."""
    systems = {tuple(m.content for m in one.example.prompt if m.role == "system") for one in members}
    if len(systems) < 2:
        return [one.example.input_text for one in members]
    return ["\n".join(m.content for m in one.example.prompt) for one in members]


def _out_of_fold(
    texts: Sequence[str], labels: NDArray[Any], clusters: NDArray[Any], seed: int, reporter: Reporter
) -> NDArray[np.float64]:
    """Return each row's class probabilities [rows, classes] by a model that saw no row of its cluster."""
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import GroupKFold

    features = text_features(texts)
    probabilities = np.zeros((len(texts), int(labels.max()) + 1))
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    with reporter.task("judging answers by other rows", FOLDS, "folds") as task:
        for seen, unseen in folds.split(texts, labels, clusters):
            model = SGDClassifier(loss="log_loss", alpha=_REGULARISATION, random_state=seed)
            if len(np.unique(labels[seen])) == 1:
                probabilities[unseen, labels[seen][0]] = 1
            else:
                model.fit(features[seen], labels[seen])
                # A class that no other cluster has is not among the model's: its probability stays 0.
                probabilities[np.ix_(unseen, model.classes_)] = model.predict_proba(features[unseen])
            task.advance()
    return probabilities


def text_features(texts: Sequence[str]) -> Any:
    """TF-IDF of the characters of words (pieces of 3 to 5), as a sparse matrix [texts, pieces] of unit rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    few = 2 if len(texts) > 1000 else 1
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=few, dtype=np.float32)
    return pieces.fit_transform([text or " " for text in texts])


def _by_loss(members: Sequence[Member], losses: Mapping[str, AnswerLoss], reporter: Reporter) -> list[Suspect]:
    known = [m for m in members if m.key in losses]
    bad = [m.key for m in known if not np.isfinite(losses[m.key].unexplained)]
    if bad:
        raise UserError(f"the loss of row {short(bad[0])} is {losses[bad[0]]}", fix="Losses are finite numbers.")
    if len(known) < len(members):
        reporter.warn(f"{len(members) - len(known):,} rows of {len(members):,} have no loss, so they are not ranked.")
    if not known:
        return []
    median = float(np.median([losses[m.key].unexplained for m in known]))
    found = []
    for member in sorted(known, key=lambda m: (-losses[m.key].unexplained, m.key)):
        loss = losses[member.key]
        detail = (
            f"loss {loss.given:.2f} per token of the answer, {loss.alone:.2f} without its input: difference "
            f"{loss.unexplained:+.2f}, median {median:+.2f}"
        )
        found.append(Suspect(member.key, loss.unexplained, "loss", detail))
    return found


class Nearest:
    """The rows of a version most like a given one, with their answers: what a reviewer holds it against."""

    def __init__(self, version: DatasetVersion) -> None:
        self.members = version.domain
        self._places = {m.key: i for i, m in enumerate(version.domain)}
        self._features = text_features(_texts(version.domain))

    def of(self, key: str, count: int = 4) -> list[tuple[float, Member]]:
        """Up to so many other rows with anything in common, the nearest first, with their cosine similarity."""
        row = self._places[key]
        similarity = (self._features @ self._features[[row]].T).toarray()[:, 0]
        similarity[row] = -1
        best = np.argsort(-similarity, kind="stable")[:count]
        return [(float(similarity[i]), self.members[i]) for i in best.tolist() if similarity[i] > 0]
