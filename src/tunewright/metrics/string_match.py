"""Metrics on strings: exact match, accuracy over declared choices, a pattern, and token F1."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from tunewright.config import MetricName
from tunewright.config.metrics import Normalisation
from tunewright.core.unicode import normalize
from tunewright.metrics.scorer import ItemScore, Pair, Scorer, Unscored, mean_score

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


_WORDS = {
    "ignore_case": "case folded",
    "collapse_whitespace": "runs of white space collapsed",
    "ignore_punctuation": "punctuation taken out",
}


def normalised(text: str, settings: Normalisation | None = None) -> str:
    """Return the compared spelling: outer white space stripped, Unicode NFC, and the optional normalisations."""
    settings = settings or Normalisation()
    text = normalize(text)
    if settings.ignore_case:
        # Casefolding can leave a letter decomposed.
        text = normalize(text.casefold())
    if settings.ignore_punctuation:
        text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))
    return " ".join(text.split()) if settings.collapse_whitespace else text.strip()


def exact_match(name: MetricName, settings: Normalisation) -> Scorer:
    """Return a scorer: 1 if the normalised answer equals the normalised reference, else 0."""

    def item(pair: Pair) -> ItemScore:
        return mean_score(float(normalised(pair.answer, settings) == normalised(pair.reference, settings)))

    forgiven = "".join(f", {_WORDS[option]}" for option, on in settings if on)
    definition = f"the share of answers equal to the reference (Unicode NFC, outer white space stripped{forgiven})"
    return Scorer(name, "right or wrong", definition, 2, item)


def accuracy(name: MetricName, choices: Sequence[str]) -> Scorer:
    """Return a scorer of accuracy over the choices; an answer outside them is wrong and counted.

    A reference outside the choices is a mistake in data or config: its item is unscored.
    """
    known = {normalised(choice) for choice in choices}

    def item(pair: Pair) -> ItemScore | Unscored:
        answer, reference = normalised(pair.answer), normalised(pair.reference)
        if reference not in known:
            return Unscored("the reference is none of the choices")
        return mean_score(float(answer == reference), outside=answer not in known)

    definition = f"the share of right answers among {', '.join(map(repr, choices))} (spelling as for exact_match)"
    return Scorer(name, "right or wrong", definition, 2, item)


def matches(name: MetricName, pattern: str) -> Scorer:
    """Return a scorer: 1 if the pattern matches the whole answer (stripped), else 0; the reference is ignored."""
    compiled = re.compile(pattern)

    def item(pair: Pair) -> ItemScore:
        return mean_score(float(compiled.fullmatch(normalised(pair.answer)) is not None))

    definition = f"the share of answers that {pattern!r} matches whole (Python's re; outer white space stripped)"
    return Scorer(name, "right or wrong", definition, 2, item)
