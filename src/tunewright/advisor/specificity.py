"""Signal (b): how far the domain's vocabulary and answers are from what the base writes by itself.

All of it is evidence for people, and none of it decides. Tokens per word tells of cost and length; that it foretells
what fine-tuning gains has been shown by nobody we know of, and such intuitive predictors can even point the wrong way
(Lin et al. 2024, "Selecting Large Language Model to Fine-tune via Rectified Scaling Law", arXiv 2402.02314).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunewright.advisor.signals import Fertility, Surprise
from tunewright.evidence.base import Interval
from tunewright.evidence.statistics import Floats, bootstrap_sums, cluster_sums, percentiles


def fertility(
    outputs: Sequence[tuple[str, int]], clusters: Sequence[str], generic: Sequence[tuple[str, int]], seed: int
) -> Fertility:
    """Tokens per word (of what white space parts) of the domain's outputs against generic text.

    Args:
        outputs: the domain's, each with its number of tokens.
        clusters: theirs.
        generic: texts that the base wrote by itself, with theirs; may be none.
        seed: decides the resamples.
    """
    ours = _resampled(outputs, clusters, seed)
    domain = _per_word(outputs)
    if not generic:
        return Fertility(domain=domain, generic=None, ratio=None, interval=None, samples=0)
    theirs = _resampled(generic, [str(n) for n in range(len(generic))], seed + 1)
    reference = _per_word(generic)
    return Fertility(
        domain=domain,
        generic=reference,
        ratio=domain / reference,
        interval=percentiles(ours / theirs),
        samples=len(generic),
    )


def _table(texts: Sequence[tuple[str, int]]) -> Floats:
    """Tokens and words of each text; a text of blanks is one word: its tokens are not to be lost."""
    return np.array([[tokens, max(len(text.split()), 1)] for text, tokens in texts], dtype=np.float64)


def _per_word(texts: Sequence[tuple[str, int]]) -> float:
    tokens, words = _table(texts).sum(axis=0)
    return float(tokens / words)


def _resampled(texts: Sequence[tuple[str, int]], clusters: Sequence[str], seed: int) -> Floats:
    drawn = bootstrap_sums(cluster_sums(_table(texts), clusters), seed)
    ratio: Floats = drawn[:, 0] / drawn[:, 1]
    return ratio


def surprise(
    arm: str, shots: int, nats: Sequence[float], references: Sequence[str], clusters: Sequence[str], seed: int
) -> Surprise:
    """Bits per byte of the gold answers: all their nats by all their bytes.

    Args:
        arm: the prompt's name.
        shots: its demonstrations.
        nats: of each whole answer, its end token included.
        references: the answers.
        clusters: the items'.
        seed: decides the resamples.
    """
    table = np.array([[n / math.log(2), len(text.encode())] for n, text in zip(nats, references, strict=True)])
    bits, count = table.sum(axis=0)
    drawn = bootstrap_sums(cluster_sums(table, clusters), seed)
    interval: Interval = percentiles(drawn[:, 0] / drawn[:, 1])
    return Surprise(arm=arm, shots=shots, items=len(references), bits_per_byte=float(bits / count), interval=interval)
