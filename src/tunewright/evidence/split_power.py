"""The differences that a dataset's held-out splits can show, before anything is trained."""

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
"""A test split that cannot show less than this gets a warning: few fine-tunes gain more over a good prompt."""
_SHOWN = 5
AIM = 0.2
"""The difference that the suggested number of rows would show."""


@dataclass(frozen=True)
class SplitPower:
    """Differences that a test split can show.

    Attributes:
        clusters: independent clusters in each split.
        effect: smallest true difference found with 80% power if 20% of the items change; 1.0: none.
        significant: True if any difference can be significant.
        rows_to_significant: additional distinct rows (estimate) to make any difference significant.
        rows_to_aim: additional distinct rows (estimate) to show a difference of 20 points.
    """

    clusters: dict[Split, int]
    effect: float
    significant: bool
    rows_to_significant: int
    rows_to_aim: int


def split_power(rows: Mapping[Split, int], clusters: Mapping[Split, int], share: float) -> SplitPower:
    """Return the power of the test split.

    Args:
        rows: rows of each split, without mix-in.
        clusters: clusters of each split.
        share: the test split's share of the rows (``data.test_size``).
    """
    tests = clusters.get("test", 0)

    def more(needed: int) -> int:
        """Return rows to add, each its own cluster, so that the test split's share has ``needed`` clusters."""
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
    """Return the number of clusters that show a difference with `POWER`, if `USUAL` of the items change."""
    few, enough = 1, 1
    while minimum_detectable_effect(enough, USUAL) > effect:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if minimum_detectable_effect(middle, USUAL) <= effect else (middle, enough)
    return enough


def split_power_text(power: SplitPower) -> str:
    """Return a line about the test split's power."""
    tests = _count(power.clusters["test"], "test cluster")
    aim = f"about {_count(power.rows_to_aim, 'more distinct row')} would show {100 * AIM:.0f} points."
    if not power.significant:
        return (
            f"{tests}: no difference can be significant with fewer than {FEWEST_CLUSTERS}. About "
            f"{_count(power.rows_to_significant, 'more distinct row')} are needed for any verdict, and {aim}"
        )
    shown = (
        f"{tests}: a comparison finds a true difference of {100 * power.effect:.0f} points or more ({POWER:.0%} power"
    )
    if power.effect > TOO_BLUNT:
        return f'{shown}). Smaller gains stay "can\'t tell"; {aim}'
    return f"{shown}, if {USUAL:.0%} of the items change)."


def report_split_power(power: SplitPower, reporter: Reporter) -> None:
    """Report the clusters of each split and their power, as a warning if that is low."""
    counts = ", ".join(f"{count:,} {split}" for split, count in power.clusters.items())
    reporter.say(f"Independent clusters: {counts}.")
    (reporter.warn if power.effect > TOO_BLUNT else reporter.say)(split_power_text(power))


def warn_of_few_dev_clusters(sizes: Sequence[int], reporter: Reporter) -> None:
    """Warn of a dev split with too few effective clusters.

    Clusters with shares p of the rows are worth 1 / sum(p²) clusters of equal size (Kish's effective sample size).
    Below `FEWEST_CLUSTERS` no difference can be significant, even if all clusters agree on it.

    Args:
        sizes: rows of each dev cluster, the largest first.
        reporter: receives the warning.
    """
    effective = sum(sizes) ** 2 / sum(size**2 for size in sizes) if sizes else 0.0
    if effective >= FEWEST_CLUSTERS:
        return
    held = f"{', '.join(f'{size:,}' for size in sizes[:_SHOWN])}{', …' if len(sizes) > _SHOWN else ''}"
    reporter.warn(
        f"{_count(len(sizes), 'dev cluster')} of {held} rows: dev is worth "
        f"{_count(round(effective, 1), 'cluster')} of equal size, and it takes at least {FEWEST_CLUSTERS} to show a "
        "difference. Dev chooses the prompt and the epoch, so both choices may only suit these few clusters. Add "
        "distinct rows, or start a new dataset with a larger data.val_size or another seed."
    )


def require_significance(power: SplitPower, *, force: bool, reporter: Reporter) -> None:
    """Refuse a pipeline whose verdict can only be "can't tell"; with ``force``, warn instead.

    Raises:
        UserError: too few test clusters, and not forced.
    """
    if power.significant:
        return
    if force:
        reporter.warn(f'{split_power_text(power)} Continuing because of --force: the verdict will be "can\'t tell".')
        return
    raise UserError(
        split_power_text(power),
        where="test split",
        fix="Add distinct rows. With the present rows, `tunewright crossval` measures on all of them, and "
        "`tunewright advise` compares prompts. --force runs the pipeline anyway.",
    )


def _count(number: float, thing: str) -> str:
    return f"{number:,g} {thing}{'' if number == 1 else 's'}"
