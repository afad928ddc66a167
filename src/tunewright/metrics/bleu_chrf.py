"""BLEU and chrF, by sacrebleu: corpus scores from counts that add up over items."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from tunewright.config import MetricName
from tunewright.metrics.scorer import Floats, ItemScore, Pair, Scorer

_SMOOTHING = "exp"
BLEU_COLUMNS = 10
"""Hypothesis length, reference length, matched n-grams of order 1 to 4, all n-grams of order 1 to 4."""
CHRF_COLUMNS = 3 * CHRF.CHAR_ORDER
"""For each order of character n-grams: counts of the hypothesis, of the reference, and of matches."""


def bleu(name: MetricName) -> Scorer:
    """Return a scorer of corpus BLEU (Papineni et al. 2002) with sacrebleu's defaults; items score sentence BLEU."""
    # Effective order changes only a sentence's score (short ones are not zero for lack of 4-grams), never its counts.
    metric = BLEU(smooth_method=_SMOOTHING, effective_order=True)

    def item(pair: Pair) -> ItemScore:
        score = metric.sentence_score(pair.answer, list(pair.references))
        return ItemScore(_share(score.score), (score.sys_len, score.ref_len, *score.counts, *score.totals))

    definition, of_several = (
        f"corpus BLEU, sacrebleu's ({_bleu_signature(several)}); an item's own score is its sentence BLEU"
        for several in (False, True)
    )
    return Scorer(name, "corpus", definition, BLEU_COLUMNS, item, _by_row(_corpus_bleu), of_several)


def chrf(name: MetricName) -> Scorer:
    """Return a scorer of corpus chrF (Popović 2015) with sacrebleu's defaults; items score sentence chrF."""
    metric = CHRF()

    def item(pair: Pair) -> ItemScore:
        # The counts that sacrebleu's own resampling adds up; they have no public name.
        (counts,) = metric._extract_corpus_statistics([pair.answer], [[reference] for reference in pair.references])
        return ItemScore(_share(metric._compute_f_score(counts)), tuple(counts))

    def corpus(sums: Floats) -> float:
        return _share(metric._compute_f_score(sums.tolist()))

    definition, of_several = (
        f"corpus chrF, sacrebleu's ({_chrf_signature(several)}); an item's own score is its sentence chrF"
        for several in (False, True)
    )
    return Scorer(name, "corpus", definition, CHRF_COLUMNS, item, _by_row(corpus), of_several)


def _corpus_bleu(sums: Floats) -> float:
    hypothesis_length, reference_length, *counts = (round(value) for value in sums.tolist())
    score = BLEU.compute_bleu(counts[:4], counts[4:], hypothesis_length, reference_length, smooth_method=_SMOOTHING)
    return _share(score.score)


def _share(score: float) -> float:
    # sacrebleu's logarithms give a perfect corpus 100.00000000000004.
    return min(float(score) / 100, 1.0)


def _by_row(score: Callable[[Floats], float]) -> Callable[[Floats], Floats]:
    """Return the score of each row of summed statistics: [..., columns] to [...]."""

    def scores(sums: Floats) -> Floats:
        rows = sums.reshape(-1, sums.shape[-1])
        return np.array([score(row) for row in rows]).reshape(sums.shape[:-1])

    return scores


# A signature names the number of references, known only after scoring; items may have different numbers of them.


def _example(several: bool) -> tuple[list[str], Any]:
    return (["a", "b"], [["a", "b"], ["c", None]]) if several else (["a"], [["a"]])


@cache
def _bleu_signature(several: bool) -> str:
    metric = BLEU(smooth_method=_SMOOTHING)
    metric.corpus_score(*_example(several))
    return str(metric.get_signature())


@cache
def _chrf_signature(several: bool) -> str:
    metric = CHRF()
    metric.corpus_score(*_example(several))
    return str(metric.get_signature())
