"""Scores by distance: compared with a plain count over the items, and to similarities counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from making.evidence import make_evidence, make_items, scored_items
from tunewright.evidence.scoring import contrast, scores_by_distance, scores_by_template

ITEMS = make_items(60)
EVIDENCE = make_evidence(ITEMS)
NEAREST = [(7 * n % 60) / 60 for n in range(60)]


def test_band_score_equals_the_score_of_its_items() -> None:
    scored = scored_items(ITEMS)
    found = scores_by_distance(scored, NEAREST, EVIDENCE.contrasts[0], seed=0, resamples=500)
    assert [(b.low, b.high) for b in found.bands] == [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)]
    assert sum(band.items for band in found.bands) == 60
    for band in found.bands:
        inside = [n for n, near in enumerate(NEAREST) if band.low <= near < band.high]
        items = [ITEMS[n] for n in inside]
        assert (band.items, band.clusters) == (len(items), len({item.cluster for item in items}))
        right = {name: sum(i.scores["exact_match"][name] for i in items) for name in ("zero-shot", "tuned")}
        for name, count in right.items():
            assert band.scores[name].value == pytest.approx(count / len(items))
        alone = scored_items(items).by_metric["exact_match"]
        same = contrast(
            treatment="tuned", control="retrieved-4", ours=alone["tuned"], theirs=alone["retrieved-4"],
            clusters=[i.cluster for i in items], seed=0, resamples=500,
        )  # fmt: skip
        assert (band.difference, band.interval) == (same.difference, same.interval)


def test_farther_half_reaches_up_to_the_median() -> None:
    near = [0.3] * 20 + [0.9] * 20 + [0.5] * 20
    found = scores_by_distance(scored_items(ITEMS), near, EVIDENCE.contrasts[0], seed=0, resamples=500).farther
    far = [item for item, similarity in zip(ITEMS, near, strict=True) if similarity <= 0.5]
    assert (found.high, found.items) == (0.5, 40)
    changes = [i.scores["exact_match"]["tuned"] - i.scores["exact_match"]["retrieved-4"] for i in far]
    assert found.difference == pytest.approx(sum(changes) / 40)


def test_intervals_of_unclustered_items_are_wilsons() -> None:
    items = [item.model_copy(update={"cluster": item.key}) for item in ITEMS]
    found = scores_by_distance(scored_items(items), NEAREST, EVIDENCE.contrasts[0], seed=0, resamples=500)
    for band in found.bands:
        own = band.scores["tuned"]
        message = binomtest(round(own.value * own.scored), own.scored).proportion_ci(0.95, method="wilson")
        assert (own.interval.low, own.interval.high) == pytest.approx((message.low, message.high))


def test_empty_band_is_omitted_and_unscorable_band_has_no_score() -> None:
    scored = scored_items(ITEMS)
    scores = scored.by_metric["exact_match"]["tuned"]
    for place in range(30):
        scores.values[place] = np.nan
        scores.unscored[place] = "no reference"
    near = [0.1] * 30 + [1.0] * 30
    far, same = scores_by_distance(scored, near, EVIDENCE.contrasts[0], seed=0, resamples=500).bands
    assert (far.low, same.high) == (0.0, 1.0)
    assert "tuned" not in far.scores
    assert far.difference is None
    assert same.scores["tuned"].scored == 30


def test_items_with_a_new_template_are_scored_apart() -> None:
    new = [n % 5 == 0 for n in range(60)]
    found = scores_by_template(scored_items(ITEMS), new, EVIDENCE.contrasts[0], seed=0, resamples=500)
    assert (found.treatment, found.control) == ("tuned", "retrieved-4")
    assert found.new is not None
    assert found.seen is not None
    for part, wanted in ((found.new, True), (found.seen, False)):
        items = [item for item, is_new in zip(ITEMS, new, strict=True) if is_new == wanted]
        assert (part.items, part.clusters) == (len(items), len({item.cluster for item in items}))
        for name, score in part.scores.items():
            assert score.value == pytest.approx(sum(i.scores["exact_match"][name] for i in items) / len(items))
    known = scores_by_template(scored_items(ITEMS), [False] * 60, EVIDENCE.contrasts[0], seed=0, resamples=500)
    assert known.new is None
    assert known.seen is not None
    assert known.seen.items == 60
