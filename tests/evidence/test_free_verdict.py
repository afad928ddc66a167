"""The verdict where an arm needs no model: it is never said too early, and changes no other number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from making.evidence import make_evidence, make_items, scored_items, scorers, with_contrast
from tunewright.cli.evaluate import verdict_text
from tunewright.evidence.blocks import arms_section
from tunewright.evidence.causes import decided
from tunewright.evidence.incumbents import Drop, measured_drop
from tunewright.evidence.schema import Evidence, FreeArms, Item
from tunewright.evidence.scoring import score_arm
from tunewright.evidence.verdict import verdict
from tunewright.metrics import Scores
from tunewright.metrics.texts import macro_f1

FREE = "free-tfidf"
CONTROLS = {"tuned": "tuned", "prompting": "retrieved-4"}


def _with_free(items: list[Item], right: float) -> Evidence:
    """Evidence with a free arm that is right on this share of the items, spread evenly."""
    answered = [
        item.model_copy(
            update={
                "answers": {**item.answers, FREE: item.reference if int((n + 1) * right) > int(n * right) else "no"}
            }
        )
        for n, item in enumerate(items)
    ]
    evidence, scored = make_evidence(items), scored_items(answered, ["exact_match"])
    arms = scored.by_metric["exact_match"]
    drops: dict[str, Any] = {
        field: measured_drop(arms[FREE], arms[name], scored.clusters, 0.02, 0) for field, name in CONTROLS.items()
    }
    arm = score_arm(
        name=FREE,
        kind="free",
        shots=0,
        scores=scored.of_arm(FREE),
        clusters=scored.clusters,
        truncated=0,
        prompt_tokens=0,
        seed=0,
        resamples=200,
    )
    free = FreeArms(why="the training rows have 5 different answers", dev=[arm], best=FREE, left_out=(), **drops)
    return evidence.model_copy(update={"arms": [*evidence.arms, arm], "free": free})


def test_free_arm_as_good_as_the_adapter_is_said_first_with_exit_code_3() -> None:
    items = make_items(600, tuned=0.9, retrieved=0.3)
    assert verdict(make_evidence(items)).decision == "ship"
    found = verdict(_with_free(items, 1.0))
    assert (found.decision, found.exit_code) == ("don't ship", 3)
    scores = [f"{FREE} 100.0%", "tuned 9", "95% interval", "600 test items"]
    assert found.reasons[0].startswith("No model is needed: ")
    assert all(text in found.reasons[0] for text in scores)
    assert found.summary.startswith("No model is needed: ")


def test_free_arm_is_called_better_where_its_interval_lies_above_zero() -> None:
    worse = decided(_with_free(make_items(600, tuned=0.3, retrieved=0.6), 1.0))
    assert f"No model is needed: {FREE} 100.0% is better than tuned" in worse.reasons[0]
    assert "margin" not in worse.reasons[0]
    assert worse.causes and worse.causes_title == "If you still want an adapter:"
    assert "If you still want an adapter:" in verdict_text(worse).plain
    assert worse.next_step.startswith("No model is needed. If you still want an adapter: ")
    as_good = verdict(_with_free(make_items(600, tuned=1.0, retrieved=0.3), 1.0))
    assert "is not worse than tuned" in as_good.reasons[0]
    assert decided(make_evidence(make_items(120, tuned=0.05, retrieved=0.6))).causes_title == "Likely causes:"


def test_adapter_that_is_better_than_the_free_arm_still_ships() -> None:
    items = make_items(600, tuned=0.9, retrieved=0.3)
    without, found = verdict(make_evidence(items)), verdict(_with_free(items, 0.6))
    assert found.decision == without.decision == "ship"
    assert found.reasons[0] == without.reasons[0]
    assert [text for text in found.reasons if text not in without.reasons] == [
        text for text in found.reasons if text.startswith(f"{FREE} 60.0%")
    ]


def test_free_arm_that_may_be_as_good_is_called_unclear() -> None:
    unclear = "They cannot show whether a model is needed."
    few = verdict(_with_free(make_items(50, tuned=0.9, retrieved=0.3), 0.9))
    assert any(text.startswith(FREE) and text.endswith(unclear) for text in few.reasons)
    many = verdict(_with_free(make_items(600, tuned=0.9, retrieved=0.3), 0.6))
    assert not any(unclear in text for text in many.reasons)


def test_free_arm_is_no_reason_where_prompting_is_better_than_both() -> None:
    found = verdict(_with_free(make_items(600, tuned=0.1, retrieved=0.9), 0.3))
    assert not any("No model is needed" in text for text in found.reasons)
    assert found.decision == "don't ship"  # by its own contrast


def test_free_arms_adjust_no_p_value_and_older_evidence_still_opens() -> None:
    items = make_items(120)
    before, after = make_evidence(items), _with_free(items, 0.8)
    assert after.contrasts == before.contrasts
    old = before.model_dump(mode="json")
    del old["free"]
    assert Evidence.model_validate(old) == before
    assert Evidence.model_validate_json(after.model_dump_json()) == after


def test_arms_table_marks_free_arms_and_says_what_they_are() -> None:
    text = repr(arms_section(_with_free(make_items(60), 0.5)))
    assert "no model" in text
    assert "fitted on the training rows only" in text


def _drop(free: np.ndarray[Any, Any], tuned: np.ndarray[Any, Any], margin: float) -> Drop:
    (scorer,) = scorers(["exact_match"])

    def of(values: np.ndarray[Any, Any]) -> Scores:
        return Scores(scorer, values, np.column_stack([values, np.ones_like(values)]), {}, 0)

    return measured_drop(of(free), of(tuned), [f"c{n}" for n in range(len(free))], margin, 0)


@pytest.mark.parametrize(("items", "margin"), [(20, 0.02), (60, 0.05), (200, 0.05), (500, 0.02)])
def test_free_arm_that_is_worse_by_the_margin_passes_at_most_one_time_in_twenty(items: int, margin: float) -> None:
    rng = np.random.default_rng(items)
    passed, trials = 0, 600
    for _ in range(trials):
        tuned = (rng.random(items) < 0.9).astype(float)
        # Of the tuned arm's right answers the free arm misses some and of its wrong ones it has some: -margin in all.
        lost, won = (0.05 + margin) / 0.9, 0.05 / 0.1
        free = np.where(tuned == 1, rng.random(items) >= lost, rng.random(items) < won).astype(float)
        passed += _drop(free, tuned, margin).outcome == "replace"
    assert passed <= 0.05 * trials


def test_few_items_never_show_that_no_model_is_needed() -> None:
    for items in (1, 3, 30, 100):
        same = np.ones(items)
        assert _drop(same, same, 0.02).outcome == "can't tell"
    assert _drop(np.ones(400), np.ones(400), 0.02).outcome == "replace"


def test_few_equal_or_nearly_equal_answers_show_nothing_by_a_corpus_metric() -> None:
    scorer = macro_f1("macro_f1", {"ok", "bad"})
    row = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    for items, outcome in ((5, "can't tell"), (20, "can't tell"), (400, "replace")):
        same = Scores(scorer, np.ones(items), np.array([row] * items), {}, 0)
        # One item is wrong in both arms, as no class or as another one: resampling gives hardly any width.
        wrong = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
        near = [replace(same, statistics=np.array([*same.statistics[1:], each])) for each in wrong]
        for ours, theirs in ((same, same), near):
            assert measured_drop(ours, theirs, [f"c{n}" for n in range(items)], 0.02, 0).outcome == outcome


def test_unshippable_contrast_stays_unshippable_whatever_the_free_arm() -> None:
    items = make_items(600, tuned=0.9, retrieved=0.3)
    worse = with_contrast(_with_free(items, 0.6), difference=-0.1, low=-0.2, high=-0.05, p_value=0.001)
    assert verdict(worse).decision == "don't ship"
