"""Token F1: the words that answer and reference share, counted as in SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter

from tunewright.config import MetricName
from tunewright.metrics.scorer import ItemScore, Pair, Scorer, mean_score

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """Return lower-case words without ASCII punctuation and English articles.

    The rules are those of Rajpurkar et al. (2016), evaluate-v1.1.py.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(name: MetricName) -> Scorer:
    """Return a scorer of the harmonic mean of precision and recall over words, with multiplicity.

    If answer or reference has no words, the score is 1 if both have none, else 0 (evaluate-v2.0.py).
    """

    def item(pair: Pair) -> ItemScore:
        answer, reference = squad_words(pair.answer), squad_words(pair.reference)
        if not answer or not reference:
            return mean_score(float(answer == reference))
        shared = (Counter(answer) & Counter(reference)).total()
        return mean_score(2 * shared / (len(answer) + len(reference)))

    definition = "the mean F1 of words, SQuAD's: lower case, without ASCII punctuation and English articles"
    return Scorer(name, "mean", definition, 2, item)
