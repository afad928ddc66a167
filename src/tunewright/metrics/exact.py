"""Exact match: the answer equals the reference after a declared normalisation."""

from __future__ import annotations

import unicodedata

from tunewright.config import MetricName
from tunewright.config.metrics import Normalisation
from tunewright.metrics.scorer import ItemScore, Pair, Scorer, mean_score

_WORDS = {
    "ignore_case": "case folded",
    "collapse_whitespace": "runs of white space collapsed",
    "ignore_punctuation": "punctuation taken out",
}


def normalised(text: str, settings: Normalisation | None = None) -> str:
    """Return the compared spelling: outer white space stripped, Unicode NFC, and the optional normalisations."""
    settings = settings or Normalisation()
    text = unicodedata.normalize("NFC", text)
    if settings.ignore_case:
        # Casefolding can leave a letter decomposed.
        text = unicodedata.normalize("NFC", text.casefold())
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
