"""Arms: the ways of answering that are measured against each other, and the prompts they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunewright.data.examples import Message
from tunewright.data.versions import Member


@dataclass(frozen=True)
class ArmPlan:
    """One way of answering."""

    kind: Literal["zero-shot", "retrieved", "tuned"]
    shots: int = 0

    @property
    def name(self) -> str:
        """zero-shot, retrieved-K or tuned."""
        return f"retrieved-{self.shots}" if self.kind == "retrieved" else self.kind


ZERO_SHOT = ArmPlan("zero-shot")
TUNED = ArmPlan("tuned")


def prompting_arms(shots: Sequence[int]) -> list[ArmPlan]:
    """Every arm that needs no training, the cheapest first."""
    return [ZERO_SHOT, *(ArmPlan("retrieved", k) for k in sorted(set(shots)))]


class Retriever:
    """BM25 over the training split's inputs (Robertson & Zaragoza 2009; Lucene's variant, by bm25s)."""

    def __init__(self, train: Sequence[Member]) -> None:
        import bm25s

        self._members = train
        self._clusters = np.array([m.cluster for m in train])
        self._index = bm25s.BM25()
        self._index.index(self._words([m.example.input_text for m in train]), show_progress=False)

    def nearest(self, query: Member, k: int) -> list[Member]:
        """The ``k`` most similar training examples, the most similar first, none of the query's own cluster."""
        (words,) = self._words([query.example.input_text])
        known = [w for w in words if w in self._index.vocab_dict]
        scores = self._index.get_scores(known) if known else np.zeros(len(self._members))
        scores = np.where(self._clusters == query.cluster, -np.inf, scores)
        # Stable, so that equal scores keep the members' own order, by key.
        order = np.argsort(-scores, kind="stable")[:k]
        return [self._members[i] for i in order if scores[i] > -np.inf]

    @staticmethod
    def _words(texts: list[str]) -> list[list[str]]:
        import bm25s

        # Single letters count (the default pattern drops them): "N.D." and "S.D." are different districts.
        words: list[list[str]] = bm25s.tokenize(
            texts, token_pattern=r"(?u)\b\w+\b", stopwords=None, return_ids=False, show_progress=False
        )
        return words


def with_demonstrations(query: Member, demonstrations: Sequence[Member]) -> tuple[Message, ...]:
    """The query's prompt with worked examples before it, the most similar one nearest to the question."""
    prompt = query.example.prompt
    system = tuple(m for m in prompt if m.role == "system")
    asked = tuple(m for m in prompt if m.role != "system")
    shown = tuple(m for d in reversed(demonstrations) for m in d.example.messages if m.role != "system")
    return system + shown + asked
