"""What a dataset's held-out splits can show, and how many more rows they need, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.splits import Split
from tunewright.evidence.power import ASSUMED, FEWEST_CLUSTERS, POWER, minimum_detectable_effect

USUAL = ASSUMED[1]
TOO_BLUNT = 0.3
"""A test split that shows no difference below this gets a warning: fine-tuning seldom gains more over a good prompt."""
_SHOWN = 5
AIM = 0.2
"""The difference for which the warning says how many rows are needed."""


@dataclass(frozen=True)
class SplitPower:
    """What a test split can show.

    Attributes:
        clusters: independent clusters in each split.
        effect: smallest true difference that is found with 80% power, if 20% of the items change; 1.0: none is.
        significant: whether any difference can be significant.
        rows_to_significant: about how many more rows, unlike each other and all others, would make one significant.
        rows_to_aim: about how many more would show a difference of 20 points.
    """

    clusters: dict[Split, int]
    effect: float
    significant: bool
    rows_to_significant: int
    rows_to_aim: int


def foresee(rows: Mapping[Split, int], clusters: Mapping[Split, int], share: float) -> SplitPower:
    """Tell from the splits what a comparison on the test split can show.

    Args:
        rows: how many rows each split has, mix-in apart.
        clusters: in how many clusters.
        share: the share of rows that the test split is to have (``data.test``).
    """
    tests = clusters.get("test", 0)

    def more(needed: int) -> int:
        """Rows that are clusters of their own fill the test split up to its share of all rows."""
        missing = needed - tests
        if missing <= 0:
            return 0
        return max(missing, math.ceil((missing + rows.get("test", 0)) / share) - sum(rows.values()))

    return SplitPower(
        clusters={split: clusters.get(split, 0) for split in ("train", "dev", "test")},
        effect=minimum_detectable_effect(tests, USUAL) if tests else 1.0,
        significant=tests >= FEWEST_CLUSTERS,
        rows_to_significant=more(FEWEST_CLUSTERS),
        rows_to_aim=more(_clusters_for(AIM)),
    )


def _clusters_for(effect: float) -> int:
    """Return how many clusters show a difference with `POWER`, if `USUAL` of the items change."""
    few, enough = 1, 1
    while minimum_detectable_effect(enough, USUAL) > effect:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if minimum_detectable_effect(middle, USUAL) <= effect else (middle, enough)
    return enough


def foresight_text(told: SplitPower) -> str:
    """Return one line for a split that shows enough, and the warning for one that does not."""
    tests = _count(told.clusters["test"], "test cluster")
    aim = f"about {_count(told.rows_to_aim, 'more unlike row')} would show {100 * AIM:.0f} points."
    if not told.significant:
        return (
            f"{tests}: no difference can be significant, because that takes {FEWEST_CLUSTERS} or more. About "
            f"{_count(told.rows_to_significant, 'more unlike row')} are needed for any verdict, and {aim}"
        )
    shown = (
        f"{tests}: a comparison finds a true difference of {100 * told.effect:.0f} points or more ({POWER:.0%} power"
    )
    if told.effect > TOO_BLUNT:
        return f'{shown}). Smaller gains stay "can\'t tell"; {aim}'
    return f"{shown}, if {USUAL:.0%} of the items change)."


def tell_foresight(told: SplitPower, reporter: Reporter) -> None:
    """Say the clusters of each split and what they show; warn where that is little."""
    counts = ", ".join(f"{count:,} {split}" for split, count in told.clusters.items())
    reporter.say(f"Independent clusters: {counts}.")
    (reporter.warn if told.effect > TOO_BLUNT else reporter.say)(foresight_text(told))


def warn_of_few_dev_clusters(sizes: Sequence[int], reporter: Reporter) -> None:
    """Warn of a dev split that says no more than a handful of independent clusters.

    Clusters with shares p of the rows say as much as 1 / sum(p²) clusters of equal size: Kish's effective sample size.
    Below `FEWEST_CLUSTERS` not even a difference on which all clusters agree can be significant.

    Args:
        sizes: rows of each dev cluster, the largest first.
        reporter: hears the warning.
    """
    effective = sum(sizes) ** 2 / sum(size**2 for size in sizes) if sizes else 0.0
    if effective >= FEWEST_CLUSTERS:
        return
    held = f"{', '.join(f'{size:,}' for size in sizes[:_SHOWN])}{', …' if len(sizes) > _SHOWN else ''}"
    reporter.warn(
        f"{_count(len(sizes), 'dev cluster')} of {held} rows: dev says as much as "
        f"{_count(round(effective, 1), 'cluster')} of equal size, and {FEWEST_CLUSTERS} are the fewest that can show a "
        "difference. Dev chooses the prompt and the epoch, so both choices may suit these few clusters only. Add "
        "unlike rows, or start a new dataset with a larger data.dev or another seed."
    )


def require_significance(told: SplitPower, *, force: bool, reporter: Reporter) -> None:
    """Refuse a pipeline whose verdict is "can't tell" whatever is measured; with ``force``, warn instead.

    Raises:
        UserError: too few test clusters, and not forced.
    """
    if told.significant:
        return
    if force:
        reporter.warn(f'{foresight_text(told)} Continuing because of --force: the verdict will be "can\'t tell".')
        return
    raise UserError(
        foresight_text(told),
        where="test split",
        fix="Add unlike rows. With the rows that you have, `tunewright crossfit` measures on all of them, and "
        "`tunewright advise` compares prompts. --force runs the pipeline anyway.",
    )


def _count(number: float, thing: str) -> str:
    return f"{number:,g} {thing}{'' if number == 1 else 's'}"
