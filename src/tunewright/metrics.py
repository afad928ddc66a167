"""What an answer is worth: exact match, and corpus BLEU through sacrebleu with its signature."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from tunewright.recipe import Metric

BLEU_COLUMNS = 10
"""Hypothesis length, reference length, matched n-grams of order 1 to 4, all n-grams of order 1 to 4."""

_SMOOTHING = "exp"


def normalised(text: str) -> str:
    """The spelling that exact match compares: outer white space stripped, Unicode NFC. Nothing else is forgiven."""
    return unicodedata.normalize("NFC", text).strip()


def exact_matches(answers: Sequence[str], references: Sequence[str]) -> NDArray[np.bool_]:
    """Which answers equal their reference after `normalised`; shape [items]."""
    return np.array(
        [normalised(a) == normalised(r) for a, r in zip(answers, references, strict=True)],
        dtype=np.bool_,
    )


def bleu_statistics(answers: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """The counts that BLEU is made of, one row per item; shape [items, BLEU_COLUMNS].

    A corpus BLEU is `corpus_bleu` of the column sums, so a resampled corpus costs one matrix product and no tokenising.
    """
    # Effective order changes a sentence's score, which is not used here, never its counts; without it sacrebleu warns.
    bleu = BLEU(smooth_method=_SMOOTHING, effective_order=True)
    rows = np.zeros((len(answers), BLEU_COLUMNS), dtype=np.int64)
    for row, answer, reference in zip(rows, answers, references, strict=True):
        score = bleu.sentence_score(answer, [reference])
        row[:] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return rows


def corpus_bleu(sums: NDArray[np.int64]) -> float:
    """Corpus BLEU as a share from 0 to 1 of summed `bleu_statistics`; shape [BLEU_COLUMNS]."""
    hypothesis_length, reference_length, *counts = sums.tolist()
    score = BLEU.compute_bleu(counts[:4], counts[4:], hypothesis_length, reference_length, smooth_method=_SMOOTHING)
    # A perfect corpus comes out of sacrebleu's logarithms as 100.00000000000004.
    return min(float(score.score) / 100, 1.0)


def corpus_score(metric: Metric, answers: Sequence[str], references: Sequence[str]) -> float:
    """The score of at least one answer by ``metric``, as a share from 0 to 1."""
    if metric == "exact_match":
        return float(exact_matches(answers, references).mean())
    return corpus_bleu(bleu_statistics(answers, references).sum(axis=0))


def bleu_signature() -> str:
    """Sacrebleu's own description of this BLEU (tokenizer, smoothing, version), without which a score means little."""
    bleu = BLEU(smooth_method=_SMOOTHING)
    bleu.corpus_score(["a"], [["a"]])  # the signature names the number of references, known only after scoring
    return str(bleu.get_signature())


def score_text(metric: Metric, share: float) -> str:
    """A score as people say it: ``86.0%`` or ``BLEU 43.2``."""
    return f"{100 * share:.1f}%" if metric == "exact_match" else f"BLEU {100 * share:.1f}"


def points_text(difference: float) -> str:
    """A difference of shares in points, with its sign: ``+35.0``."""
    # The sum with zero turns a rounded -0.0 into +0.0.
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def p_text(p_value: float) -> str:
    """A p-value as people can read it: ``p = 0.031``, ``p = 2e-05``, ``p < 1e-15``."""
    if p_value < 1e-15:
        return "p < 1e-15"
    return f"p = {p_value:.0e}" if p_value < 0.001 else f"p = {p_value:.3f}"
