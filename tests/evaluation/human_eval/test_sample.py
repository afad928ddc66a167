"""The sample: random within strata, of known chances, and silent about sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from making.evidence import make_evidence, make_items, with_scores
from making.human_evaluations import begin, evaluation, save, side_of_treatment
from tunewright.core.errors import UserError
from tunewright.evaluation.human_eval.results import Design, estimate
from tunewright.evaluation.human_eval.sample import (
    STRATA,
    StratumName,
    allocate,
    comparison,
    draw,
    draw_sample,
    stratify,
    treatment_is_a,
)
from tunewright.metrics import normalised

ITEMS = make_items(120, tuned=0.7, retrieved=0.3)


def test_strata_follow_exact_match_and_exclude_equal_answers() -> None:
    found = stratify(ITEMS, "tuned", "retrieved-4", "exact_match")
    for item in ITEMS:
        ours, theirs = item.answers["tuned"], item.answers["retrieved-4"]
        right = normalised(ours) == normalised(item.reference), normalised(theirs) == normalised(item.reference)
        kinds = {(True, False): "fixed", (False, True): "broken", (False, False): "both wrong"}
        assert found.get(item.key) == (None if normalised(ours) == normalised(theirs) else kinds[right])


def test_stratum_by_bleu_is_the_higher_scoring_answer() -> None:
    items = [
        ITEMS[0].model_copy(update={"key": str(n), "reference": "a b c d e f", "answers": {"new": new, "old": old}})
        for n, (new, old) in enumerate(
            [("a b c d e x", "a b x x x x"), ("x", "a b c d e f"), ("p q", "r s"), (" a b c d e f", "a b c d e f\n")]
        )
    ]
    assert stratify(with_scores(items), "new", "old", "bleu") == {"0": "fixed", "1": "broken", "2": "both wrong"}


@given(
    st.dictionaries(st.sampled_from(STRATA), st.integers(1, 300), min_size=1),
    st.integers(8, 400),
)
def test_allocation_has_the_requested_size_and_two_items_per_stratum(sizes: dict[StratumName, int], count: int) -> None:
    asked = allocate(sizes, count)
    assert sum(asked.values()) == min(count, sum(sizes.values()))
    for name, size in sizes.items():
        assert min(2, size) <= asked[name] <= size


def test_allocation_is_proportional_for_large_strata() -> None:
    assert allocate({"fixed": 500, "broken": 200, "both wrong": 300}, 50) == {
        "fixed": 25,
        "broken": 10,
        "both wrong": 15,
    }


def test_allocation_refuses_too_few_items_and_states_the_minimum() -> None:
    with pytest.raises(UserError, match="too few") as caught:
        allocate({"fixed": 50, "broken": 50, "both wrong": 50}, 5)
    assert caught.value.fix == "Use --items 6 or more."


def test_weighted_sample_is_unbiased() -> None:
    strata = stratify(ITEMS, "tuned", "retrieved-4", "exact_match")
    keys = [item.key for item in ITEMS]
    certain = np.array([key not in strata for key in keys])
    rng = np.random.default_rng(0)
    lean = {"fixed": 0.9, "broken": 0.1, "both wrong": 0.4}
    truth = np.array([0.0 if c else float(rng.random() < lean[strata[k]]) for k, c in zip(keys, certain, strict=True)])
    judged = np.array([0.0 if c else float(rng.integers(-1, 2)) for c in certain])  # a judge that is biased and wrong
    times = dict.fromkeys(strata, 0)
    plain, helped, unweighted = [], [], []
    rounds = 600
    for seed in range(rounds):
        chosen = set(draw(strata, 24, seed))
        for key in chosen:
            times[key] += 1
        reviewed = np.array([key in chosen for key in keys])
        design = Design([strata.get(k, "same") for k in keys], reviewed | certain, certain, keys)
        plain.append(estimate(design, truth).value)
        helped.append(estimate(design, truth, judged, tuning=0.8).value)
        unweighted.append(truth[reviewed].mean())
    asked = allocate({n: list(strata.values()).count(n) for n in STRATA if n in strata.values()}, 24)
    for name, size in asked.items():
        members = [key for key in strata if strata[key] == name]
        assert min(binomtest(times[k], rounds, size / len(members)).pvalue for k in members) > 1e-5
    for values in (plain, helped):
        assert abs(np.mean(values) - truth.mean()) < 4 * np.std(values) / np.sqrt(rounds)
    assert abs(np.mean(unweighted) - truth.mean()) > 4 * np.std(unweighted) / np.sqrt(rounds)


def test_review_order_mixes_the_strata(tmp_path: Path) -> None:
    evidence = make_evidence(ITEMS)
    compared = comparison(tmp_path, evidence)
    sample = draw_sample(compared, evidence, ITEMS, 40)
    strata = stratify(ITEMS, "tuned", "retrieved-4", "exact_match")
    firsts, seconds = ([strata[k] for k in half] for half in (sample.order[:20], sample.order[20:]))
    assert len(set(firsts)) == len(set(seconds)) == 3
    assert sample.order == draw_sample(compared, evidence, ITEMS, 40).order


def test_sides_are_random_and_independent_of_the_stratum() -> None:
    many = make_items(1500, tuned=0.7, retrieved=0.3)
    strata = stratify(many, "tuned", "retrieved-4", "exact_match")
    for name in set(strata.values()):
        sides = [treatment_is_a(11, key) for key in strata if strata[key] == name]
        assert binomtest(sum(sides), len(sides)).pvalue > 1e-3
    assert len({treatment_is_a(seed, many[0].key) for seed in range(20)}) == 2


def test_sample_is_stored_with_the_first_verdict_and_never_changes(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    assert begin(folder, items=30).progress.asked == 30
    assert not (folder / "human-eval").exists()
    review = begin(folder, items=20)
    pair = review.next()
    assert pair is not None
    review.answer(pair, "both")
    assert begin(folder).sample == begin(folder, "ben").sample == review.sample
    with pytest.raises(UserError, match="has 20 items and cannot be changed"):
        begin(folder, items=30)


def test_sample_is_refused_when_all_answers_are_equal(tmp_path: Path) -> None:
    same = [item.model_copy(update={"answers": dict.fromkeys(item.answers, "x")}) for item in ITEMS]
    with pytest.raises(UserError, match="alike"):
        begin(save(tmp_path / "evaluation", same, make_evidence(ITEMS)))


def test_stored_sample_does_not_reveal_the_sides(tmp_path: Path) -> None:
    """The files of two evaluations whose arms changed names, judged alike, are the same byte for byte."""
    kept = []
    for name, swap in (("one", False), ("two", True)):
        evidence = make_evidence(ITEMS)
        items = ITEMS
        if swap:
            items = [
                i.model_copy(update={"answers": {"tuned": i.answers["retrieved-4"], "retrieved-4": i.answers["tuned"]}})
                for i in ITEMS
            ]
        review = begin(save(tmp_path / name, items, evidence), items=60)
        keys = review.open_keys()
        kept.append({key: {review.item(key).a, review.item(key).b} for key in keys})
        first = [side_of_treatment(review, review.item(key)) for key in keys]
        assert {"A", "B"} == set(first)
        dumped = review.sample.model_dump_json()
        assert not any(word in dumped for word in ('"A"', '"B"', "side"))
    shared = kept[0].keys() & kept[1].keys()
    assert shared
    assert all(kept[0][key] == kept[1][key] for key in shared)


def test_sample_includes_items_not_scored_in_both_arms() -> None:
    item = ITEMS[0].model_copy(update={"answers": {"new": "a", "old": "b"}, "scores": {"m": {"new": 1.0}}})
    assert stratify([item], "new", "old", "m") == {item.key: "both wrong"}
