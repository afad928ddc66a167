"""The evidence's section on incumbents: models in use today, compared with the adapter by non-inferiority.

The rule is stricter than the one for forgetting: the whole two-sided 95% interval of the drop has to lie below the
margin, which is a one-sided test at 2.5% (ICH E9, section 3.5). With clusters and losses on one side only, limits at a
nominal 5% accept up to 10% (docs/decisions/0005).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from scipy.stats import t

from tunewright.evidence.common import ArmScore, Interval, Part
from tunewright.evidence.non_inferiority import paired_drop
from tunewright.evidence.statistics import RESAMPLES, Floats, bootstrap_sums, cluster_sums, percentiles
from tunewright.metrics import Scores

Outcome = Literal["replace", "keep", "can't tell"]

HOURS_PER_MONTH = 730


class Drop(Part):
    """The incumbent's score minus the tuned arm's on the same items, as a share; negative if tuned is better.

    For a free arm: another arm's score minus the free arm's.
    """

    value: float
    interval: Annotated[Interval, Field(description="Two-sided 95% interval, which decides.")]
    method: str
    items: Annotated[int, Field(description="Items scored in both arms.")]
    clusters: int
    left_out: Annotated[dict[str, int], Field(description="Reason to number of items that are not compared.")]
    margin: Annotated[float, Field(description="Largest loss that counts as not worse.")]

    @property
    def outcome(self) -> Outcome:
        """Replace if the interval lies below the margin, keep if it lies above, else can't tell."""
        if self.interval.high < self.margin:
            return "replace"
        return "keep" if self.interval.low > self.margin else "can't tell"


class Latency(Part):
    """Seconds from a request to its whole answer."""

    p50: float
    p95: float
    answers: int
    how: Annotated[str, Field(description="Where the answers were timed, and how many were in flight at once.")]


class Serving(Part):
    """Cost and latency of one side's calls; an unavailable figure is null, and ``missing`` names the reason."""

    latency: Latency | None
    cost_per_1000: Annotated[float | None, Field(description="Cost of 1,000 calls like these.")]
    basis: Annotated[str, Field(description="Source of the cost: prices and tokens, or machine time.")]
    missing: Annotated[dict[str, str], Field(description="Figure to the reason why it is missing.")]


class TunedServing(Serving):
    """The tuned arm's side."""

    seconds_per_call: Annotated[float, Field(description="Machine seconds of a call in a full batch.")]
    rows: Annotated[int, Field(description="Answers in that batch.")]
    training: Annotated[float | None, Field(description="One-off costs: training, labelling, hosting.")]
    hour: Annotated[float | None, Field(description="Price of an hour of the machine, from advise.prices.hour.")]


class Incumbent(Part):
    """An incumbent's frozen answers to the items, and the tuned arm against it."""

    name: Annotated[str, Field(description="Its name in evaluate.incumbents.")]
    arm: Annotated[str, Field(description="Its arm's name: incumbent-NAME.")]
    model: str
    url: str
    file: Annotated[str, Field(description="Frozen answers, relative to the folder of evaluations.")]
    file_digest: Annotated[str, Field(description="SHA-256 of that file.")]
    versions: Annotated[dict[str, int], Field(description="Model version that the endpoint stated, to answers.")]
    first: Annotated[str, Field(description="Time of the first answer (UTC, ISO 8601).")]
    last: Annotated[str, Field(description="Time of the last answer.")]
    gaps: Annotated[dict[str, int], Field(description="Reason to number of items without an answer.")]
    truncated: Annotated[int, Field(description="Answers cut at the token limit.")]
    prompt_tokens: int
    completion_tokens: int
    estimated: Annotated[int, Field(description="Answers whose tokens the endpoint did not count: guessed.")]
    cost: Annotated[float | None, Field(description="Cost of these answers; null without prices.")]
    serving: Serving
    dev: Annotated[ArmScore | None, Field(description="Its score on dev by the deciding metric; null: not asked.")]
    drop: Drop
    seen: Annotated[int, Field(description="Items from files that the incumbent was trained on (trained_on).")] = 0
    unseen: Annotated[
        Drop | None, Field(description="The drop on the other items; null: all are others, or none is.")
    ] = None

    @property
    def answered(self) -> int:
        """The number of answers."""
        return sum(self.versions.values())


class Incumbents(Part):
    """All incumbents, and the tuned arm's side of cost and latency."""

    tuned: TunedServing
    compared: Annotated[tuple[Incumbent, ...], Field(min_length=1)]


# Statistics


def measured_drop(ours: Scores, theirs: Scores, clusters: Sequence[str], margin: float, seed: int) -> Drop:
    """Return the drop from an incumbent to the tuned arm, on the items scored in both.

    For right and wrong the interval is the wider of two: Tango's score limits with the effective number of
    items, and a clustered t-interval with two artificial clusters of mean size, one lost and one won (Bonett
    and Price 2012), as for all differences (docs/decisions/0005). Graded scores have only the second interval.
    A corpus metric has the wider of percentiles and a t-interval from the same resamples of clusters, and at least the
    second interval's width for equal answers.
    """
    both = ours.scored & theirs.scored
    names = [name for name, here in zip(clusters, both, strict=True) if here]
    count = len(set(names))
    if not count:
        value, interval, method = 0.0, Interval(low=-1, high=1), "none: no item is scored in both"
    elif ours.scorer.kind == "corpus":
        value, interval, method = _corpus_drop(ours, theirs, both, names, seed)
    else:
        before, after = theirs.values[both], ours.values[both]
        value = float((before - after).mean())
        interval = clustered_interval(before - after, names)
        method = "t-interval over clusters, Bonett-Price adjusted"
        if ours.scorer.kind == "right or wrong":
            score = paired_drop(before, after, names, seed)
            interval, method = _wider(interval, score.interval), f"{method}, or {score.method} if wider"
    return Drop(
        value=value,
        interval=interval,
        method=method,
        items=len(names),
        clusters=count,
        left_out=dict(Counter((ours.unscored | theirs.unscored).values())),
        margin=margin,
    )


def clustered_interval(changes: Floats, clusters: Sequence[str]) -> Interval:
    """Return a 95% interval of a mean change, with two artificial clusters in which every item changes by 1 and by -1.

    The variance is computed for a ratio of cluster sums, and t has the clusters' degrees of freedom.
    """
    sums = cluster_sums(np.column_stack([changes, np.ones_like(changes)]), clusters)
    count, size = len(sums), len(changes) / len(sums)
    if count == 1:
        return Interval(low=-1, high=1)
    sums = np.vstack([sums, [[size, size], [-size, size]]])
    total, items = sums.sum(axis=0)
    mean = float(total / items)
    spread = sums[:, 0] - mean * sums[:, 1]
    error = float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(spread).sum()) / items)
    half = float(t.ppf(0.975, count - 1)) * error
    return Interval(low=max(mean - half, -1.0), high=min(mean + half, 1.0))


def _corpus_drop(
    ours: Scores, theirs: Scores, both: Any, names: Sequence[str], seed: int
) -> tuple[float, Interval, str]:
    score = ours.scorer.corpus
    sums = [cluster_sums(each.statistics[both], names) for each in (theirs, ours)]
    value = float(score(sums[0].sum(axis=0)) - score(sums[1].sum(axis=0)))
    if len(sums[0]) == 1:
        return value, Interval(low=-1, high=1), "none: a single cluster"
    drawn = bootstrap_sums(np.hstack(sums), seed)
    columns = ours.scorer.columns
    drops = score(drawn[:, :columns]) - score(drawn[:, columns:])
    # Resampling (almost) equal clusters gives (almost) no width, however few they are.
    least = clustered_interval(np.zeros(len(names)), names).high
    half = max(float(t.ppf(0.975, len(sums[0]) - 1) * drops.std()), least)
    interval = _wider(percentiles(drops), Interval(low=value - half, high=value + half))
    return value, interval, f"percentile bootstrap over clusters, {RESAMPLES:,} resamples, or its t-interval if wider"


def _wider(first: Interval, second: Interval) -> Interval:
    return Interval(low=min(first.low, second.low), high=max(first.high, second.high))
