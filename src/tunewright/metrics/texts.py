"""Metrics on strings: exact match, accuracy over declared choices, a pattern, token F1, ROUGE-L, BLEU and chrF.

BLEU and chrF are sacrebleu's: corpus scores from counts that add up over items.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from tunewright.config import MetricName
from tunewright.config.metrics import Normalisation
from tunewright.core.errors import UserError
from tunewright.core.strict_json import standard_json
from tunewright.core.text import normalize
from tunewright.data.examples import MOST_CLASSES
from tunewright.metrics.scorer import AnsweredItem, Floats, ItemScore, Scorer, Unscored, mean_score

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUGE_WORD = re.compile("[a-z0-9]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SMOOTHING = "exp"
BLEU_COLUMNS = 10
"""Hypothesis length, reference length, matched n-grams of order 1 to 4, all n-grams of order 1 to 4."""
CHRF_COLUMNS = 3 * CHRF.CHAR_ORDER
"""For each order of character n-grams: counts of the hypothesis, of the reference, and of matches."""


def squad_words(text: str) -> list[str]:
    """Return lower-case words without ASCII punctuation and English articles.

    The rules are from Rajpurkar et al. (2016), evaluate-v1.1.py.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(name: MetricName) -> Scorer:
    """Return a scorer of the harmonic mean of precision and recall over words, with multiplicity.

    If answer or reference has no words, the score is 1 if both have none, else 0 (evaluate-v2.0.py).
    """

    def item(pair: AnsweredItem) -> ItemScore:
        answer, reference = squad_words(pair.answer), squad_words(pair.reference)
        if not answer or not reference:
            return mean_score(float(answer == reference))
        shared = (Counter(answer) & Counter(reference)).total()
        return mean_score(2 * shared / (len(answer) + len(reference)))

    definition = "the mean F1 of words, SQuAD's: lower case, without ASCII punctuation and English articles"
    return Scorer(name, "mean", definition, 2, item)


def rouge_l(name: MetricName) -> Scorer:
    """Return a scorer of ROUGE-L (Lin 2004): F1 over the longest common subsequence of words.

    Words are the default ones of the package rouge-score, without stemming: runs of a-z and 0-9 in lower case. A
    reference without any, as in Greek, is unscored.
    """

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
        answer, reference = (_ROUGE_WORD.findall(text.lower()) for text in (pair.answer, pair.reference))
        if not reference:
            return Unscored("the reference has no word of a-z or 0-9")
        return mean_score(2 * _common_subsequence(answer, reference) / (len(answer) + len(reference)))

    definition = "the mean ROUGE-L F1 of words, rouge-score's: runs of a-z and 0-9, lower case, without stemming"
    return Scorer(name, "mean", definition, 2, item)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): one integer is a row of the table, and
    its zeros mark where the length grows. Two texts of 1,000 words take 1 ms; the table in Python takes 350.
    """
    places: Counter[str] = Counter()
    for place, word in enumerate(one):
        places[word] |= 1 << place
    full = row = (1 << len(one)) - 1
    for word in other:
        matched = row & places[word]
        row = (row + matched | row - matched) & full
    return len(one) - row.bit_count()


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

    def item(pair: AnsweredItem) -> ItemScore:
        return mean_score(float(normalised(pair.answer, settings) == normalised(pair.reference, settings)))

    forgiven = "".join(f", {_WORDS[option]}" for option, on in settings if on)
    definition = f"the share of answers equal to the reference (Unicode NFC, outer white space stripped{forgiven})"
    return Scorer(name, "right or wrong", definition, 2, item)


def accuracy(name: MetricName, choices: Sequence[str]) -> Scorer:
    """Return a scorer of accuracy over the choices; an answer outside them is wrong and counted.

    A reference outside the choices is a mistake in data or config: its item is unscored.
    """
    known = {normalised(choice) for choice in choices}

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
        answer, reference = normalised(pair.answer), normalised(pair.reference)
        if reference not in known:
            return Unscored("the reference is none of the choices")
        return mean_score(float(answer == reference), outside=answer not in known)

    definition = f"the share of right answers among {', '.join(map(repr, choices))} (spelling as for exact_match)"
    return Scorer(name, "right or wrong", definition, 2, item)


def macro_f1(name: MetricName, classes: Collection[str]) -> Scorer:
    """Return a scorer of the mean F1 over the classes that occur among the references, as in scikit-learn.

    An answer that is no class counts against the recall of its reference's class only. More than 200 answers are
    refused: they are no classes.
    """
    if len(classes) > MOST_CLASSES:
        what = f"macro_f1 needs classes: the dataset has {len(classes):,} different answers (limit {MOST_CLASSES})"
        raise UserError(what, where="evaluate.metric", fix="Use exact_match, or a metric of texts such as chrf.")
    places = {label: place for place, label in enumerate(sorted(classes))}

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
        answer, reference = normalised(pair.answer), normalised(pair.reference)
        if reference not in places:
            return Unscored("the dataset has no such answer")
        counts = np.zeros((3, len(places)))  # right answers, references and answers of each class
        counts[:2, places[reference]] = answer == reference, 1
        if answer in places:
            counts[2, places[answer]] = 1
        return ItemScore(float(answer == reference), tuple(counts.ravel().tolist()))

    def corpus(sums: Floats) -> Floats:
        right, references, answers = np.split(sums, 3, axis=-1)
        here = references > 0
        f1 = np.where(here, 2 * right / np.maximum(references + answers, 1), 0)
        return np.asarray(f1.sum(axis=-1) / np.maximum(here.sum(axis=-1), 1), dtype=np.float64)

    definition = "the mean over the references' classes of a class's F1 (spelling as for exact_match)"
    return Scorer(name, "corpus", definition, 3 * len(places), item, corpus)


def matches(name: MetricName, pattern: str) -> Scorer:
    """Return a scorer: 1 if the pattern matches the whole answer (stripped), else 0; the reference is ignored."""
    compiled = re.compile(pattern)

    def item(pair: AnsweredItem) -> ItemScore:
        return mean_score(float(compiled.fullmatch(normalised(pair.answer)) is not None))

    definition = f"the share of answers that {pattern!r} matches whole (Python's re; outer white space stripped)"
    return Scorer(name, "right or wrong", definition, 2, item)


def bleu(name: MetricName) -> Scorer:
    """Return a scorer of corpus BLEU (Papineni et al. 2002) with sacrebleu's defaults; items score sentence BLEU."""
    # Effective order changes only a sentence's score (short ones are not zero for lack of 4-grams), never its counts.
    metric = BLEU(smooth_method=_SMOOTHING, effective_order=True)

    def item(pair: AnsweredItem) -> ItemScore:
        score = metric.sentence_score(pair.answer, list(pair.references))
        return ItemScore(_share(score.score), (score.sys_len, score.ref_len, *score.counts, *score.totals))

    def corpus(sums: Floats) -> float:
        hypothesis_length, reference_length, *counts = (round(value) for value in sums.tolist())
        score = BLEU.compute_bleu(counts[:4], counts[4:], hypothesis_length, reference_length, smooth_method=_SMOOTHING)
        return _share(score.score)

    definition, of_several = (
        f"corpus BLEU, sacrebleu's ({_signature(BLEU(smooth_method=_SMOOTHING), several)}); an item's own score is its "
        "sentence BLEU"
        for several in (False, True)
    )
    return Scorer(name, "corpus", definition, BLEU_COLUMNS, item, _by_row(corpus), of_several)


def chrf(name: MetricName) -> Scorer:
    """Return a scorer of corpus chrF (Popović 2015) with sacrebleu's defaults; items score sentence chrF."""
    metric = CHRF()

    def item(pair: AnsweredItem) -> ItemScore:
        # The counts that sacrebleu's own resampling adds up; they have no public name.
        (counts,) = metric._extract_corpus_statistics([pair.answer], [[reference] for reference in pair.references])
        return ItemScore(_share(metric._compute_f_score(counts)), tuple(counts))

    def corpus(sums: Floats) -> float:
        return _share(metric._compute_f_score(sums.tolist()))

    definition, of_several = (
        f"corpus chrF, sacrebleu's ({_signature(CHRF(), several)}); an item's own score is its sentence chrF"
        for several in (False, True)
    )
    return Scorer(name, "corpus", definition, CHRF_COLUMNS, item, _by_row(corpus), of_several)


def _share(score: float) -> float:
    # sacrebleu's logarithms give a perfect corpus 100.00000000000004.
    return min(float(score) / 100, 1.0)


def _by_row(score: Callable[[Floats], float]) -> Callable[[Floats], Floats]:
    """Return the score of each row of summed statistics: [..., columns] to [...]."""

    def scores(sums: Floats) -> Floats:
        rows = sums.reshape(-1, sums.shape[-1])
        return np.array([score(row) for row in rows]).reshape(sums.shape[:-1])

    return scores


def _signature(metric: BLEU | CHRF, several: bool) -> str:
    """Return a metric's signature, which names the number of references (items may have different numbers)."""
    # It is known only after scoring.
    metric.corpus_score(*((["a", "b"], [["a", "b"], ["c", None]]) if several else (["a"], [["a"]])))
    return str(metric.get_signature())


# JSON


def json_valid(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer parses as JSON, else 0, regardless of its content."""

    def item(pair: AnsweredItem) -> ItemScore:
        try:
            standard_json(pair.answer)
        except ValueError:
            return mean_score(0.0)
        return mean_score(1.0)

    return Scorer(name, "right or wrong", "the share of answers that parse as JSON (RFC 8259)", 2, item)


def json_fields(name: MetricName, fields: Sequence[str] | None) -> Scorer:
    """Return a scorer of micro F1 over top-level fields: a field is right if both have it with the same value.

    Values are compared as JSON values: 1 equals 1.0, but not "1" or true. An answer that is not an object has no
    fields, so it misses them all. An item is unscored if the reference is not an object or has none of the fields.
    """

    def counted(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict):
            return None
        return value if fields is None else {key: value[key] for key in fields if key in value}

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
        try:
            reference = counted(standard_json(pair.reference))
        except ValueError:
            return Unscored("the reference is not JSON")
        if not reference:
            return Unscored("the reference is not a JSON object" if reference is None else "the reference has no field")
        try:
            answer = counted(standard_json(pair.answer)) or {}
        except ValueError:
            answer = {}
        right = sum(key in answer and same(answer[key], value) for key, value in reference.items())
        return ItemScore(2 * right / (len(answer) + len(reference)), (right, len(answer), len(reference)))

    which = "top-level fields" if fields is None else f"the fields {', '.join(fields)}"
    return Scorer(name, "corpus", f"micro F1 over {which} of a JSON object, all items' together", 3, item, micro_f1)


def same(one: Any, other: Any) -> bool:
    """Return whether two parsed JSON values are equal: Python takes true for 1, JSON does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def micro_f1(sums: Floats) -> Floats:
    """Map [..., right, answered, wanted] to F1; every scored item wants at least one field."""
    f1: Floats = 2 * sums[..., 0] / np.asarray(sums[..., 1] + sums[..., 2])
    return f1
