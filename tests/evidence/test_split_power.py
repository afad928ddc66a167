"""Power of a test split: fewest clusters against the exact test, needed rows against the split itself."""

from __future__ import annotations

import numpy as np
import pytest

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.splits import Split, assign_splits
from tunewright.evidence.power import (
    AIM,
    USUAL,
    SplitPower,
    power,
    require_significance,
    split_power,
    split_power_text,
    warn_of_few_dev_clusters,
)
from tunewright.evidence.statistics import exact_mcnemar


class _Warned(LogReporter):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def _foresee(tests: int, rows_each: int = 1, others: int = 50) -> SplitPower:
    rows: dict[Split, int] = {"train": others * rows_each, "dev": tests * rows_each, "test": tests * rows_each}
    return split_power(rows, {"train": others, "dev": tests, "test": tests}, 0.1)


@pytest.mark.parametrize("clusters", range(1, 12))
def test_split_power_is_significant_exactly_where_unanimous_clusters_are(clusters: int) -> None:
    best = exact_mcnemar(np.ones(clusters), [str(i) for i in range(clusters)])
    assert _foresee(clusters).significant == (best < 0.05)


def _clusters_in_test(large: int, single: int) -> tuple[dict[Split, int], dict[Split, int]]:
    """Rows and clusters by split, of clusters of 12 rows that were there before and single rows that are new."""
    old = {f"large {i}": [f"{i}-{k}" for k in range(12)] for i in range(large)}
    data = DataConfig()
    former = {key: split for name, split in assign_splits(old, {}, data, 0).items() for key in old[name]}
    clusters = {**old, **{f"single {i}": [f"single {i}"] for i in range(single)}}
    splits = assign_splits(clusters, former, data, 0)
    names: tuple[Split, ...] = ("train", "dev", "test")
    rows = {split: sum(len(clusters[n]) for n, s in splits.items() if s == split) for split in names}
    return rows, {split: sum(s == split for s in splits.values()) for split in names}


@pytest.mark.parametrize("large", [15, 30, 50])
def test_suggested_rows_make_the_test_split_large_enough(large: int) -> None:
    rows, clusters = _clusters_in_test(large, 0)
    reported = split_power(rows, clusters, DataConfig().test_size)
    assert not reported.significant
    for needed, goal in ((reported.rows_to_significant, 6), (reported.rows_to_aim, 37)):
        assert _clusters_in_test(large, needed)[1]["test"] == pytest.approx(goal, abs=1)
        assert split_power(*_clusters_in_test(large, needed + 20), DataConfig().test_size).clusters["test"] >= goal
        assert _clusters_in_test(large, needed - 20)[1]["test"] < goal


def test_split_power_aim_has_80_percent_power() -> None:
    rows = _foresee(6).rows_to_aim
    assert rows == 10 * 37 - 62
    assert power(36, USUAL, AIM) < 0.8 <= power(37, USUAL, AIM)


def test_large_test_split_needs_no_rows() -> None:
    reported = _foresee(100)
    assert (reported.rows_to_significant, reported.rows_to_aim) == (0, 0)
    assert split_power_text(reported) == (
        "100 test clusters: a comparison finds a true difference of 12 points or more (80% power, if 20% of the items "
        "change)."
    )


def test_run_without_a_possible_verdict_is_refused_unless_forced() -> None:
    reporter = _Warned()
    with pytest.raises(UserError, match="5 test clusters: no difference can be significant") as refused:
        require_significance(_foresee(5), force=False, reporter=reporter)
    assert "--force" in str(refused.value.fix)
    require_significance(_foresee(5), force=True, reporter=reporter)
    (warning,) = reporter.warned
    assert 'the verdict will be "can\'t tell"' in warning
    require_significance(_foresee(6), force=False, reporter=reporter)
    assert len(reporter.warned) == 1


@pytest.mark.parametrize(
    ("sizes", "reported"),
    [
        ([43, 30, 7, 2, 1, 1], "6 dev clusters of 43, 30, 7, 2, 1, … rows: dev is worth 2.5 clusters of equal"),
        ([5], "1 dev cluster of 5 rows: dev is worth 1 cluster of equal size"),
        ([4, 4, 4, 4, 4], "5 dev clusters of 4, 4, 4, 4, 4 rows: dev is worth 5 clusters of equal size"),
    ],
)
def test_few_or_dominating_dev_clusters_are_a_warning(sizes: list[int], reported: str) -> None:
    reporter = _Warned()
    warn_of_few_dev_clusters(sizes, reporter)
    (warning,) = reporter.warned
    assert reported in warning
    assert "larger data.val_size or another seed" in warning


def test_dev_clusters_of_equal_size_are_no_warning_when_there_are_enough() -> None:
    reporter = _Warned()
    warn_of_few_dev_clusters([3] * 6, reporter)
    assert reporter.warned == []
