"""Signal (b): distance of the domain's vocabulary and answers from the base's own text.

It is shown as evidence and decides nothing. Tokens per word indicate cost and length. We know of no study in which they
predict the gain of fine-tuning. Such intuitive predictors can even be wrong in sign (Lin et al. 2024, "Selecting Large
Language Model to Fine-tune via Rectified Scaling Law", arXiv 2402.02314).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunewright.advisor.signals import BitsPerByte, Fertility, Format
from tunewright.config import Metric
from tunewright.config.metrics import Choices, Json, Regex
from tunewright.data.examples import Example
from tunewright.evidence.common import Interval
from tunewright.evidence.statistics import Floats, bootstrap_sums, cluster_sums, percentiles
from tunewright.metrics import Scorer, score_all
from tunewright.metrics.fields import json_valid
from tunewright.metrics.string_match import accuracy, matches


def form(metrics: Sequence[Metric], texts: Sequence[str], examples: Sequence[Example]) -> Format | None:
    """Return the number of answers that are a declared choice, JSON, or match a pattern; None without such a metric.

    Args:
        metrics: the config's metrics; the first one that requires a format is used.
        texts: the answers.
        examples: the examples that were answered.
    """
    for metric in metrics:
        match metric:
            case Choices(choices=choices):
                outside = score_all(accuracy("choices", choices), texts, examples).outside
                return _told(f"one of {len(choices)} declared choices", texts, len(texts) - outside)
            case Json() | "json" | "json_valid":
                return _told("valid JSON", texts, _right(json_valid("json_valid"), texts, examples))
            case Regex(regex=pattern):
                return _told(f"matches {pattern}", texts, _right(matches("regex", pattern), texts, examples))
            case _:
                continue
    return None


def _right(scorer: Scorer, texts: Sequence[str], examples: Sequence[Example]) -> int:
    return int(score_all(scorer, texts, examples).values.sum())


def _told(what: str, texts: Sequence[str], valid: int) -> Format:
    return Format(what=what, items=len(texts), valid=valid)


def fertility(
    outputs: Sequence[tuple[str, int]], clusters: Sequence[str], generic: Sequence[tuple[str, int]], seed: int
) -> Fertility:
    """Return tokens per word (split at white space) of the domain's outputs, compared with generic text.

    Args:
        outputs: the domain's outputs, each with its number of tokens.
        clusters: the outputs' clusters.
        generic: texts that the base wrote unprompted, with their numbers of tokens; may be empty.
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
    """Return tokens and words of each text; blank text counts as one word, so that its tokens are included."""
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
) -> BitsPerByte:
    """Return bits per byte of the reference answers: total nats by total bytes.

    Args:
        arm: the prompting arm's name.
        shots: its number of demonstrations.
        nats: loss of each whole answer, including its end token.
        references: the answers.
        clusters: the items' clusters.
        seed: decides the resamples.
    """
    table = np.array([[n / math.log(2), len(text.encode())] for n, text in zip(nats, references, strict=True)])
    bits, count = table.sum(axis=0)
    drawn = bootstrap_sums(cluster_sums(table, clusters), seed)
    interval: Interval = percentiles(drawn[:, 0] / drawn[:, 1])
    return BitsPerByte(
        arm=arm, shots=shots, items=len(references), bits_per_byte=float(bits / count), interval=interval
    )
