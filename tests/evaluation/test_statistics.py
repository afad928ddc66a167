"""Intervals, tests and power against scipy, sacrebleu, brute force, published numbers and simulation."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from scipy.stats import binomtest

from factories import fixed_and_broken, make_items
from tunewright.evaluation.statistics import (
    bootstrap_sums,
    cluster_sums,
    contrast,
    effective_items,
    exact_match_difference,
    exact_mcnemar,
    minimum_detectable_effect,
    score_arm,
    swapping_test,
    wilson,
)
from tunewright.metrics import bleu_statistics, corpus_bleu

CHANGES = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=60).map(np.array)


def _alone(count: int) -> list[str]:
    """A cluster name per item: none alike."""
    return [str(i) for i in range(count)]


# Intervals


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_is_scipys(items: int, share: float) -> None:
    successes = round(items * share)
    ours = wilson(successes / items, items)
    theirs = binomtest(successes, items).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_a_bootstrap_corpus_is_made_of_whole_clusters() -> None:
    sums = np.array([[1, 10], [2, 100], [4, 1000]])
    possible = {
        tuple(sums[list(drawn)].sum(axis=0).tolist()) for drawn in itertools.combinations_with_replacement(range(3), 3)
    }
    drawn = bootstrap_sums(sums, seed=0, resamples=2000)
    assert {tuple(row) for row in drawn.tolist()} == possible
    assert drawn.mean(axis=0) == pytest.approx(sums.sum(axis=0), rel=0.05)


def test_resamples_do_not_depend_on_how_memory_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.arange(40).reshape(20, 2)
    whole = bootstrap_sums(sums, seed=3, resamples=100)
    monkeypatch.setattr("tunewright.evaluation.statistics._CHUNK_CELLS", 140)
    np.testing.assert_array_equal(bootstrap_sums(sums, seed=3, resamples=100), whole)


def test_the_difference_interval_follows_a_plain_loop() -> None:
    """One fixed and one broken cluster of mean size join, then clusters are drawn: written out here item by item."""
    rng = np.random.default_rng(5)
    groups = [rng.choice([-1.0, 0.0, 1.0], size=size, p=[0.1, 0.5, 0.4]).tolist() for size in rng.integers(1, 5, 40)]
    items = [c for group in groups for c in group]
    names = [f"g{i}" for i, group in enumerate(groups) for _ in group]
    size = len(items) / len(groups)
    pool = [(sum(g), float(len(g))) for g in groups] + [(size, size), (-size, size)]
    means = []
    for _ in range(4000):
        drawn = [pool[i] for i in rng.integers(len(pool), size=len(pool))]
        means.append(sum(d[0] for d in drawn) / sum(d[1] for d in drawn))
    ours = exact_match_difference(np.array(items), names, seed=0)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)


@pytest.mark.parametrize(
    ("clusters", "size", "difference", "changed", "likeness"),
    [(200, 1, 0.0, 0.1, 0.0), (88, 2, 0.35, 0.45, 0.5), (20, 5, 0.2, 0.4, 0.6), (30, 1, 0.02, 0.02, 0.0)],
)
def test_the_difference_interval_covers_the_truth(
    clusters: int, size: int, difference: float, changed: float, likeness: float
) -> None:
    """A cluster's items share one outcome in ``likeness`` of the cases. 95% nominal; 300 runs scatter by 1.3 points."""
    rng = np.random.default_rng(1)
    covered = 0
    for run in range(300):
        changes, names = _simulated(rng, clusters, size, difference, changed, likeness)
        interval = exact_match_difference(changes, names, seed=run, resamples=500)
        covered += interval.low <= difference <= interval.high
    assert covered / 300 > 0.92


def _simulated(
    rng: np.random.Generator, clusters: int, size: int, difference: float, changed: float, likeness: float
) -> tuple[NDArray[np.float64], list[str]]:
    chances = [(changed - difference) / 2, 1 - changed, (changed + difference) / 2]
    codes = np.repeat(np.arange(clusters), size)
    shared = rng.choice([-1.0, 0.0, 1.0], size=clusters, p=chances)
    own = rng.choice([-1.0, 0.0, 1.0], size=len(codes), p=chances)
    return np.where(rng.random(len(codes)) < likeness, shared[codes], own), [str(c) for c in codes]


def test_the_bleu_interval_is_near_sacrebleus_bootstrap() -> None:
    items = make_items(120)
    references = [i.reference for i in items]
    answers = {name: [i.answers[name] for i in items] for name in ("retrieved-4", "tuned")}
    arm = score_arm(
        name="tuned",
        kind="tuned",
        shots=0,
        answers=answers["tuned"],
        references=references,
        clusters=_alone(120),
        truncated=0,
        prompt_tokens=1.0,
        seed=0,
    )
    theirs = _sacrebleu(answers, references, "bs", 2000)
    assert arm.bleu.value == pytest.approx(theirs.score / 100)
    half = (arm.bleu.interval.high - arm.bleu.interval.low) / 2
    assert half == pytest.approx(theirs.ci / 100, rel=0.1)


# Clusters


def test_cluster_sums_add_up_what_belongs_together() -> None:
    values = np.array([[1, 10], [2, 20], [3, 30]])
    assert cluster_sums(values, ["b", "a", "b"]).tolist() == [[2, 20], [4, 40]]


def test_copies_of_items_are_worth_nothing() -> None:
    values = np.random.default_rng(0).choice([0.0, 1.0], size=400)
    names = _alone(400)
    assert effective_items(values, names) == pytest.approx(400, rel=0.01)
    assert effective_items(np.repeat(values, 5), [n for n in names for _ in range(5)]) == pytest.approx(400, rel=0.01)


def test_clusters_of_unlike_items_cost_little() -> None:
    values = np.random.default_rng(0).choice([0.0, 1.0], size=1000)
    assert 800 < effective_items(values, [str(i // 2) for i in range(1000)]) <= 1000


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_nothing_varies_a_cluster_counts_as_one_item(value: float) -> None:
    assert effective_items(np.full(6, value), list("aabbcc")) == 3


# Tests


@given(CHANGES)
def test_with_items_apart_the_test_is_mcnemars(changes: NDArray[np.float64]) -> None:
    fixed, broken = int((changes > 0).sum()), int((changes < 0).sum())
    expected = binomtest(fixed, fixed + broken, 0.5).pvalue if fixed + broken else 1.0
    assert exact_mcnemar(changes, _alone(len(changes))) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(0, 7)), min_size=1, max_size=25))
def test_with_clusters_the_test_counts_every_pattern_of_signs(items: list[tuple[float, int]]) -> None:
    changes, names = np.array([c for c, _ in items]), [str(g) for _, g in items]
    nets = [sum(c for c, g in items if g == group) for group in {g for _, g in items}]
    totals = [abs(np.dot(signs, nets)) for signs in itertools.product([-1, 1], repeat=len(nets))]
    expected = np.mean([t >= abs(sum(nets)) for t in totals])
    assert exact_mcnemar(changes, names) == pytest.approx(expected, rel=1e-9)


def test_one_cluster_alone_proves_nothing() -> None:
    assert exact_mcnemar(np.ones(50), ["same"] * 50) == 1


def test_swapping_agrees_with_the_exact_test_where_both_apply() -> None:
    changes, names = _simulated(np.random.default_rng(2), 60, 2, 0.15, 0.4, 0.5)
    treatment = cluster_sums(np.clip(changes, 0, 1)[:, None], names)
    control = cluster_sums(np.clip(-changes, 0, 1)[:, None], names)
    p_value = swapping_test(treatment, control, lambda sums: float(sums[0]), seed=0)
    assert p_value == pytest.approx(exact_mcnemar(changes, names), abs=0.015)


def test_the_bleu_test_is_near_sacrebleus() -> None:
    items = make_items(60, tuned=0.6, retrieved=0.45)
    references = [i.reference for i in items]
    answers = {name: [i.answers[name] for i in items] for name in ("retrieved-4", "tuned")}
    ours, theirs = (bleu_statistics(a, references) for a in (answers["tuned"], answers["retrieved-4"]))
    expected = _sacrebleu(answers, references, "ar", 4000).p_value
    assert 0.02 < expected < 0.9, "the comparison would say nothing"
    assert swapping_test(ours, theirs, corpus_bleu, seed=0) == pytest.approx(expected, abs=0.03)


def _sacrebleu(answers: dict[str, list[str]], references: list[str], test: str, samples: int) -> Any:
    """Sacrebleu's own paired test of the second system against the first."""
    metrics = {"BLEU": BLEU(references=[references])}
    _, scores = PairedTest(list(answers.items()), metrics, None, test, samples)()
    return scores["BLEU"][1]


def test_equal_arms_give_p_one() -> None:
    table = np.ones((20, 1))
    assert swapping_test(table, table, lambda sums: float(sums[0]), seed=0, trials=100) == 1


# Power


@pytest.mark.parametrize(
    ("items", "changed", "effect"),
    [
        (1960, 0.1, 0.02),
        (3922, 0.2, 0.02),
        (870, 0.1, 0.03),
        (626, 0.2, 0.05),
        (940, 0.3, 0.05),
        (155, 0.2, 0.10),
        (233, 0.3, 0.10),
        (102, 0.3, 0.15),
    ],
)
def test_the_detectable_effect_matches_tables_of_paired_sample_sizes(items: int, changed: float, effect: float) -> None:
    assert minimum_detectable_effect(items, changed) == pytest.approx(effect, rel=0.005)


@given(st.floats(1, 1e5), st.floats(0, 1))
def test_more_items_never_hide_a_difference(items: float, changed: float) -> None:
    effect = minimum_detectable_effect(items, changed)
    assert 0 < minimum_detectable_effect(items * 2, changed) <= effect <= 1


def test_the_effect_is_found_in_four_of_five_experiments() -> None:
    effect = minimum_detectable_effect(200, 0.2)
    rng = np.random.default_rng(0)
    found = [exact_mcnemar(_simulated(rng, 200, 1, effect, 0.2, 0)[0], _alone(200)) < 0.05 for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)  # the exact test is a little shy


# Parts of the evidence


@pytest.mark.parametrize("metric", ["exact_match", "bleu"])
def test_a_contrast_counts_what_was_fixed_and_broken(metric: Any) -> None:
    items = make_items(50)
    measured = _contrast(items, metric)
    assert {"fixed": measured.fixed, "broken": measured.broken} == fixed_and_broken(items, "tuned", "retrieved-4")
    assert measured.interval.low <= measured.difference <= measured.interval.high
    assert measured == _contrast(items, metric), "the same seed gives the same numbers"


def _contrast(items: Any, metric: Any, seed: int = 0) -> Any:
    return contrast(
        treatment="tuned",
        control="retrieved-4",
        treatment_answers=[i.answers["tuned"] for i in items],
        control_answers=[i.answers["retrieved-4"] for i in items],
        references=[i.reference for i in items],
        clusters=[i.cluster for i in items],
        metric=metric,
        seed=seed,
        resamples=300,
    )


@pytest.mark.parametrize("metric", ["exact_match", "bleu"])
@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize(("tuned", "retrieved"), [(1, 1), (0, 0), (1, 0), (0, 1)])
def test_degenerate_samples_give_numbers_and_no_false_confidence(
    metric: Any, count: int, tuned: int, retrieved: int
) -> None:
    """One item, all ties, all fixed: the schema refuses NaN, and ten equal items are no proof of equality."""
    measured = _contrast(make_items(count, tuned=tuned, retrieved=retrieved), metric)
    if metric == "exact_match":
        assert measured.interval.high - measured.interval.low > 0.2
    if tuned == retrieved == 1:
        assert measured.difference == 0
        assert measured.p_value == 1
    assert measured.minimum_detectable_effect > 0.2 or metric == "bleu"
    assert (measured.p_value < 0.05) <= (count > 2)


def test_an_arm_of_like_items_gets_the_wider_interval() -> None:
    right = ["x"] * 30 + ["y"] * 30
    parts: dict[str, Any] = {
        "name": "tuned",
        "kind": "tuned",
        "shots": 0,
        "truncated": 2,
        "prompt_tokens": 9.0,
        "seed": 0,
    }
    apart = score_arm(answers=right, references=["x"] * 60, clusters=_alone(60), resamples=50, **parts)
    alike = score_arm(
        answers=right, references=["x"] * 60, clusters=[str(i // 6) for i in range(60)], resamples=50, **parts
    )
    assert (apart.exact, apart.items, apart.exact_match.value, apart.exact_match.method) == (30, 60, 0.5, "Wilson")
    assert alike.exact_match.method == "Wilson, 9 effective items"
    assert alike.exact_match.interval.low < apart.exact_match.interval.low
