"""Rankings of rows by the answers of other rows: an out-of-fold classifier, answer centroids, nearest rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunewright.core.progress import Reporter
from tunewright.data.examples import INSTRUCTIONS
from tunewright.data.versions import DatasetVersion, Member

Reason = Literal["conflict", "near-duplicate", "label", "loss"]


FOLDS = 5


_BLOCK = 1024  # rows per block of similarities to all answers


_NOTHING = 1e-4  # rounding error of a sum of unit rows minus all of them


# The weakest of 1e-4 to 1e-5 ranks best: with 77 classes, stronger regularisation makes all margins alike.
_REGULARISATION = 1e-5


@dataclass(frozen=True)
class Suspect:
    """A suspicious row.

    ``score`` ranks rows of one reason, higher is worse: from 0 to 1, or for losses ``AnswerLoss.negative_pmi``.
    """

    key: str
    score: float
    reason: Reason
    detail: str
    suggested: str = ""
    """The answer that other rows suggest instead; empty if they suggest none, and in lists of earlier versions."""


def rank_by_centroids(members: Sequence[Member], answers: Sequence[str], reporter: Reporter) -> list[Suspect]:
    """Rank rows whose answer also occurs in another cluster, by how much nearer the rows of another answer are.

    The score is s' / (s + s'). Here s is the cosine similarity to the centroid of the other clusters'
    rows with the same answer. s' is the similarity to the nearest centroid of another answer.
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
    # A row unlike all other rows with its answer (s = 0) has score 1 for any s' > 0, so ties are ranked by s'.
    for row in np.lexsort((np.arange(len(members)), -likes[:, 1], -scores, _echoes(members))).tolist():
        if scores[row] < 0:
            continue
        suggested = str(names[nearest[row]]) if likes[row, 1] > likes[row, 0] else ""
        detail = (
            f"rows with {excerpt(suggested)} are more like it ({likes[row, 1]:.2f}) than the others "
            f"with its answer ({likes[row, 0]:.2f})"
            if suggested
            else f"the others with its answer are not much like it ({likes[row, 0]:.2f})"
        )
        found.append(Suspect(members[row].key, float(scores[row]), "label", detail, suggested))
    return found


def answer_of(member: Member) -> str:
    return member.example.output.strip()


def _echoes(members: Sequence[Member]) -> NDArray[np.bool_]:
    """Return whether each input equals its answer ("Mendoza", in Mendoza): rarely wrong, so ranked last; [rows]."""
    return np.array([m.example.input_text.strip() == answer_of(m) for m in members], dtype=bool)


def excerpt(text: str, most: int = 60) -> str:
    """Return a text in quotes, on one line, cut to ``most`` characters."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= most else line[: most - 1] + "…"}"'


def rank_by_classifier(
    members: Sequence[Member], answers: Sequence[str], seed: int, reporter: Reporter
) -> tuple[dict[str, float], list[Suspect], float | None]:
    """Return cleanlab's normalised margin (0 to 1, low is bad) by row, the ranked rows, and the model's accuracy.

    Rows that cannot be judged are left out; the accuracy is None if no row is left.
    """
    from cleanlab.rank import get_label_quality_scores

    names, labels = np.unique(answers, return_inverse=True)
    clusters = np.unique([m.cluster for m in members], return_inverse=True)[1]
    spread = np.array([len(np.unique(clusters[labels == label])) for label in range(len(names))])
    lone = spread[labels] < 2
    if lone.any():
        reporter.warn(
            f"{int(lone.sum()):,} rows cannot be judged, because no independent row has the same answer: "
            + ", ".join(excerpt(str(names[label])) for label in np.flatnonzero(spread < 2)[:5])
            + (", …" if int((spread < 2).sum()) > 5 else "")
        )
    if len(np.unique(clusters)) < FOLDS:
        reporter.warn(f"Answers cannot be judged by an out-of-fold model: fewer than {FOLDS} independent clusters.")
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
        likely = str(names[guess])
        own = float(probabilities[row, labels[row]])
        detail = (
            f"other rows suggest {excerpt(likely)} ({probabilities[row, guess]:.0%}) "
            f"rather than {excerpt(str(names[labels[row]]))} ({own:.0%})"
            if guess != labels[row]
            else f"other rows suggest {excerpt(likely)} with {own:.0%} only"
        )
        suggested = likely if guess != labels[row] else ""
        found.append(Suspect(members[row].key, 1 - float(scores[row]), "label", detail, suggested))
    right = probabilities.argmax(axis=1) == labels
    return margins, found, float(right[~lone].mean()) if not lone.all() else None


def _texts(members: Sequence[Member]) -> list[str]:
    """Return the text that decides each answer: the input, with the instructions if there are several."""
    instructions = {tuple(m.content for m in one.example.prompt if m.role in INSTRUCTIONS) for one in members}
    if len(instructions) < 2:
        return [one.example.input_text for one in members]
    return ["\n".join(m.text for m in one.example.prompt) for one in members]


def _out_of_fold(
    texts: Sequence[str], labels: NDArray[Any], clusters: NDArray[Any], seed: int, reporter: Reporter
) -> NDArray[np.float64]:
    """Return class probabilities [rows, classes] from models that saw no row of the same cluster."""
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
                # The model lacks classes that no other cluster has: their probability stays 0.
                probabilities[np.ix_(unseen, model.classes_)] = model.predict_proba(features[unseen])
            task.advance()
    return probabilities


def text_features(texts: Sequence[str]) -> Any:
    """Return TF-IDF of character 3- to 5-grams within words: a sparse matrix [texts, n-grams] of unit rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    few = 2 if len(texts) > 1000 else 1
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=few, dtype=np.float32)
    return pieces.fit_transform([text or " " for text in texts])


class NeighborIndex:
    """Index of a version's rows, to show a reviewer the rows most similar to a given one."""

    def __init__(self, version: DatasetVersion) -> None:
        self.members = version.domain
        self._places = {m.key: i for i, m in enumerate(version.domain)}
        self._features = text_features(_texts(version.domain))

    def of(self, key: str, count: int = 4) -> list[tuple[float, Member]]:
        """Return at most ``count`` other rows with nonzero cosine similarity, nearest first."""
        row = self._places[key]
        similarity = (self._features @ self._features[[row]].T).toarray()[:, 0]
        similarity[row] = -1
        best = np.argsort(-similarity, kind="stable")[:count]
        return [(float(similarity[i]), self.members[i]) for i in best.tolist() if similarity[i] > 0]
