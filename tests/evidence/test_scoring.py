"""Arms and contrasts by every kind of metric, against sacrebleu, statsmodels, plain loops and degenerate samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from making.evidence import fixed_and_broken, make_items, pair, scored_items, scorers
from tunewright.config import Metric
from tunewright.config.metrics import Json, JsonFields
from tunewright.core.errors import UserError
from tunewright.evidence.power import detectable
from tunewright.evidence.schema import Contrast, Item
from tunewright.evidence.scoring import declared_contrasts, score_arm, score_arms, score_of
from tunewright.evidence.statistics import holm
from tunewright.metrics import score_all

KINDS: list[Metric] = ["exact_match", "token_f1", "bleu", "chrf"]


def _alone(count: int) -> list[str]:
    """A cluster name per item: none alike."""
    return [str(i) for i in range(count)]


def _contrast(items: list[Item], metric: Metric, resamples: int = 300) -> Contrast:
    scored = scored_items(items, [metric])
    return declared_contrasts(scored, [("tuned", "retrieved-4")], 0, resamples)[0]


# Against sacrebleu


@pytest.mark.parametrize(("metric", "theirs"), [("bleu", BLEU), ("chrf", CHRF)])
def test_corpus_interval_is_near_sacrebleus_bootstrap(metric: Metric, theirs: Any) -> None:
    items = [i.model_copy(update={"cluster": i.key}) for i in make_items(120)]
    measured = score_of(scored_items(items, [metric]).of_arm("tuned")[0], [i.cluster for i in items], 0)
    expected = _sacrebleu(items, theirs, "bs", 2000)
    assert measured.value == pytest.approx(expected.score / 100)
    half = (measured.interval.high - measured.interval.low) / 2
    assert half == pytest.approx(expected.ci / 100, rel=0.1)


@pytest.mark.parametrize(("metric", "theirs"), [("bleu", BLEU), ("chrf", CHRF)])
def test_corpus_test_is_near_sacrebleus(metric: Metric, theirs: Any) -> None:
    items = [i.model_copy(update={"cluster": i.key}) for i in make_items(60, tuned=0.6, retrieved=0.45)]
    expected = _sacrebleu(items, theirs, "ar", 4000).p_value
    assert 0.001 < expected < 0.9, "the comparison would say nothing"
    assert _contrast(items, metric, 4000).p_value == pytest.approx(expected, abs=0.03)


def _sacrebleu(items: Sequence[Item], metric: Any, test: str, samples: int) -> Any:
    """Sacrebleu's own paired test of the second system against the first."""
    references = [[i.reference for i in items]]
    systems: list[Any] = [(name, [i.answers[name] for i in items]) for name in ("retrieved-4", "tuned")]
    _, scores = PairedTest(systems, {"theirs": metric(references=references)}, None, test, samples)()
    return list(scores.values())[-1][1]


# A mean of graded scores


def test_graded_contrast_uses_mean_difference_bootstrap_and_permutation_test() -> None:
    items = [i.model_copy(update={"cluster": i.key}) for i in make_items(150, tuned=0.6, retrieved=0.45)]
    scored = scored_items(items, ["token_f1"]).by_metric["token_f1"]
    changes = scored["tuned"].values - scored["retrieved-4"].values
    measured = _contrast(items, "token_f1", 4000)
    assert measured.difference == pytest.approx(changes.mean())
    error = changes.std(ddof=1) / len(changes) ** 0.5
    assert measured.interval.high - measured.interval.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert measured.p_value == pytest.approx(_sign_flips(changes), abs=0.03)
    assert measured.minimum_detectable_effect == pytest.approx(detectable(error), rel=0.02)
    assert (measured.fixed, measured.broken) == (int((changes > 0).sum()), int((changes < 0).sum()))


def _sign_flips(changes: NDArray[np.float64], trials: int = 4000) -> float:
    rng = np.random.default_rng(9)
    flipped = [abs((rng.choice([-1, 1], len(changes)) * changes).sum()) for _ in range(trials)]
    return float(np.mean(np.array(flipped) >= abs(changes.sum()) - 1e-9))


# What is counted


@pytest.mark.parametrize("metric", KINDS)
def test_contrast_is_reproducible_and_its_interval_contains_the_difference(metric: Metric) -> None:
    items = make_items(50)
    measured = _contrast(items, metric)
    assert measured.interval.low <= measured.difference <= measured.interval.high
    assert measured == _contrast(items, metric)
    if metric == "exact_match":
        counted = {"fixed": measured.fixed, "broken": measured.broken}
        assert counted == fixed_and_broken(items, "tuned", "retrieved-4")


@pytest.mark.parametrize("metric", KINDS)
@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize(("tuned", "retrieved"), [(1, 1), (0, 0), (1, 0), (0, 1)])
def test_degenerate_samples_give_numbers_and_no_false_confidence(
    metric: Metric, count: int, tuned: int, retrieved: int
) -> None:
    """One item, all ties, all fixed: the schema refuses NaN, and ten equal items are no proof of equality."""
    measured = _contrast(make_items(count, tuned=tuned, retrieved=retrieved), metric)
    if metric == "exact_match" or (metric == "token_f1" and tuned == retrieved == 1):
        assert measured.interval.high - measured.interval.low > 0.2
    if tuned == retrieved == 1:
        assert measured.difference == 0
        assert measured.p_value == 1
    if metric == "exact_match":
        assert measured.minimum_detectable_effect > 0.2
    assert measured.p_value >= 0.05 or count > 2


def test_arm_of_similar_items_gets_a_wider_interval() -> None:
    (exact,) = scorers(["exact_match"])
    scores = score_all(exact, ["x"] * 30 + ["y"] * 30, [pair("?", "x")] * 60)
    apart, alike = score_of(scores, _alone(60), 0), score_of(scores, [str(i // 6) for i in range(60)], 0)
    assert (apart.value, apart.scored, apart.method) == (0.5, 60, "Wilson")
    assert alike.method == "Wilson, 9 effective items"
    assert alike.interval.low < apart.interval.low


# Several contrasts and metrics


def test_only_contrasts_by_the_deciding_metric_are_adjusted() -> None:
    scored = scored_items(make_items(40), ["token_f1", "bleu"])
    found = declared_contrasts(scored, [("tuned", "retrieved-4"), ("tuned", "zero-shot")], 0, 300)
    assert [(c.metric, c.control) for c in found] == [
        ("token_f1", "retrieved-4"),
        ("token_f1", "zero-shot"),
        ("bleu", "retrieved-4"),
        ("bleu", "zero-shot"),
    ]
    assert [c.p_adjusted for c in found[:2]] == holm([c.p_value for c in found[:2]])
    assert [c.p_adjusted for c in found[2:]] == [None, None]


# Unscored items


FIELDS: Metric = Json.model_validate({"json": JsonFields(fields=("court",))})


def test_unscored_items_are_left_out_of_arm_and_contrast_and_counted_with_their_reason() -> None:
    references = ['{"court": "a"}', "not json", '{"court": "b"}', '{"other": 1}', '{"court": "c"}']
    right = ['{"court": "a"}', '{"court": "z"}', '{"court": "b"}', '{"court": "z"}', '{"court": "c"}']
    scored = score_arms(
        scorers([FIELDS]),
        [pair(f"question {n}", r) for n, r in enumerate(references)],
        _alone(5),
        {"tuned": right, "zero-shot": ["{}"] * 5},
    )
    arm = score_arm(
        name="tuned",
        kind="tuned",
        shots=0,
        scores=scored.of_arm("tuned"),
        clusters=scored.clusters,
        truncated=0,
        prompt_tokens=1.0,
        seed=0,
        resamples=50,
    )
    score = arm.score("json court")
    assert (score.value, score.scored, arm.items) == (1.0, 3, 5)
    assert score.unscored == {"the reference is not JSON": 1, "the reference has no field": 1}
    (measured,) = declared_contrasts(scored, [("tuned", "zero-shot")], 0, 50)
    assert (measured.scored, measured.clusters, measured.difference) == (3, 3, 1.0)
    assert measured.left_out == score.unscored
    assert scored.of_item(1) == {"json court": {}}
    assert scored.why_not(1) == {"json court": dict.fromkeys(["tuned", "zero-shot"], "the reference is not JSON")}
    assert scored.why_not(0) is None


def test_contrast_covers_items_scored_in_both_arms() -> None:
    """An item is taken out of both arms, though only one of them cannot be scored on it."""

    def halves(answer: str) -> Any:
        return None if answer == "?" else float(answer)

    scored = _own(halves, {"tuned": ["1", "?", "0.5", "0"], "zero-shot": ["0", "1", "?", "0"]})
    (measured,) = declared_contrasts(scored, [("tuned", "zero-shot")], 0, 50)
    assert (measured.scored, measured.difference) == (2, 0.5)
    assert sum(measured.left_out.values()) == 2


def test_contrast_refuses_arms_without_a_shared_scored_item() -> None:
    scored = _own(lambda answer: None if answer == "?" else 1.0, {"tuned": ["1", "?"], "zero-shot": ["?", "1"]})
    with pytest.raises(UserError, match="No item is scored by python m:f in both tuned and zero-shot"):
        declared_contrasts(scored, [("tuned", "zero-shot")], 0, 50)


def test_score_arms_refuses_an_arm_without_scores() -> None:
    (fields,) = scorers([FIELDS])
    scores = score_all(fields, ["{}"] * 3, [pair("?", "no")] * 3)
    with pytest.raises(UserError, match=r"No item can be scored by json court: the reference is not JSON \(3\)"):
        score_of(scores, _alone(3), 0)


def _own(value: Any, answers: dict[str, list[str]]) -> Any:
    from tunewright.metrics.scorer import Scorer, Unscored, mean_score

    def item(asked: Any) -> Any:
        found = value(asked.answer)
        return Unscored("none") if found is None else mean_score(found)

    count = len(next(iter(answers.values())))
    scorer = Scorer("python m:f", "mean", "", 2, item)
    return score_arms([scorer], [pair("?", "x")] * count, _alone(count), answers)
