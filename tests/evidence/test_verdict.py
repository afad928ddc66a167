"""The verdict: its table, that better evidence never makes it worse, and how often chance alone makes it say ship."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.evidence import cross_fitted, make_evidence, make_items, scored_items, with_contrast
from tunewright.evidence.authors_split import AuthorsSplit
from tunewright.evidence.common import AnswerFormat, Interval
from tunewright.evidence.schema import Contrast, Evidence
from tunewright.evidence.scoring import scores_by_template
from tunewright.evidence.statistics import exact_mcnemar, holm
from tunewright.evidence.verdict import SIGNIFICANT, fewest_clusters, plain_measurement, verdict

EVIDENCE = make_evidence(make_items(60))
ORDER = ["don't ship", "can't tell", "ship"]


@pytest.mark.parametrize(
    ("low", "difference", "high", "p_value", "decision", "exit_code", "words"),
    [
        (0.27, 0.35, 0.43, 1e-16, "ship", 0, "above the margin of 2 points"),
        (0.021, 0.05, 0.08, 0.04, "ship", 0, "above the margin"),
        (0.02, 0.05, 0.08, 0.01, "can't tell", 4, "both sides of the margin"),
        (0.01, 0.05, 0.09, 0.01, "can't tell", 4, "would show a true difference of"),
        (-0.02, 0.01, 0.04, 0.5, "can't tell", 4, "test items in all"),
        (0.03, 0.25, 0.5, 0.06, "can't tell", 4, "does not confirm it"),
        (-0.02, 0.0, 0.02, 1.0, "don't ship", 3, "too small a gain to ship"),
        (0.001, 0.01, 0.019, 0.03, "don't ship", 3, "too small a gain to ship"),
        (-0.3, -0.2, -0.1, 1e-4, "don't ship", 3, "significantly worse than retrieved-4"),
        (-0.1, -0.02, 0.03, 0.04, "don't ship", 3, "significantly worse"),
    ],
)
def test_verdict_follows_the_table(
    low: float, difference: float, high: float, p_value: float, decision: str, exit_code: int, words: str
) -> None:
    result = verdict(with_contrast(EVIDENCE, low=low, difference=difference, high=high, p_value=p_value))
    assert (result.decision, result.exit_code) == (decision, exit_code)
    assert words in " ".join(result.reasons)


def test_first_reason_is_the_full_measurement() -> None:
    evidence = with_contrast(
        EVIDENCE, low=0.271, difference=0.35, high=0.426, p_value=1.2e-14, fixed=75, broken=4, test="exact McNemar"
    )
    message = "on 60 test items (30 clusters): +35.0 points, 95% interval +27.1 to +42.6, p = 1e-14 (exact McNemar)"
    assert verdict(evidence).reasons[0].endswith(f"{message}, p = 1e-14 adjusted for 2 contrasts; 75 fixed, 4 broken.")
    alone = evidence.model_copy(update={"contrasts": evidence.contrasts[:1]})
    assert verdict(alone).reasons[0].endswith(f"{message}; 75 fixed, 4 broken.")
    assert verdict(evidence).reasons[0].startswith("tuned 80.0% against retrieved-4 58.3%")


@pytest.mark.parametrize("change", [0.9, 0.0, -0.9])
def test_verdict_is_undecided_with_few_clusters(change: float) -> None:
    evidence = with_contrast(EVIDENCE, low=change, difference=change, high=change, p_value=0.01, clusters=6)
    result = verdict(evidence)
    assert result.decision == "can't tell"
    assert "6 independent clusters; below 7 no difference can be significant" in result.reasons[1]


@pytest.mark.parametrize("contrasts", [1, 2, 3, 4, 5, 8, 9])
def test_unanimous_result_is_significant_only_from_six_clusters(contrasts: int) -> None:
    """All clusters change the same way, in every contrast: Holm multiplies the smallest p by their number."""
    fewest = fewest_clusters(contrasts)
    less, enough = (
        min(holm([exact_mcnemar(np.ones(n), [*map(str, range(n))])] * contrasts)) for n in (fewest - 1, fewest)
    )
    assert less >= SIGNIFICANT > enough


def test_verdict_uses_the_adjusted_p_value() -> None:
    evidence = with_contrast(EVIDENCE, low=0.1, difference=0.2, high=0.3, p_value=0.03, p_adjusted=0.06)
    assert verdict(evidence).decision == "can't tell"
    assert verdict(with_contrast(evidence, p_value=0.03, p_adjusted=0.04)).decision == "ship"


def test_verdict_reports_unscored_items_and_answers_outside_the_choices() -> None:
    evidence = with_contrast(EVIDENCE, left_out={"the reference is not JSON": 3, "f returned None": 1})
    reasons = verdict(evidence).reasons
    assert "Left out, not scored in both arms: 4 items: the reference is not JSON (3); f returned None (1)." in reasons
    tuned = EVIDENCE.arm("tuned")
    outside = tuned.model_copy(
        update={"scores": {"exact_match": tuned.score("exact_match").model_copy(update={"outside": 9})}}
    )
    message = verdict(EVIDENCE.model_copy(update={"arms": [*EVIDENCE.arms[:2], outside]})).reasons
    assert "Caution: 9 of 60 answers of tuned are not a declared choice and count as wrong." in message


@pytest.mark.parametrize("metric", ["exact_match", "token_f1", "bleu"])
def test_verdict_is_undecided_with_a_single_item(metric: Any) -> None:
    for tuned in (0, 1):
        assert verdict(make_evidence(make_items(1, tuned=tuned), metric=metric)).decision == "can't tell"


def test_ten_equal_answers_are_undecided() -> None:
    items = [i.model_copy(update={"cluster": i.key}) for i in make_items(10, tuned=1, retrieved=1)]
    assert verdict(make_evidence(items)).decision == "can't tell"


def test_stated_number_of_items_settles_the_verdict() -> None:
    """With that many, an interval of the same spread clears the margin with room for bad luck."""
    evidence = with_contrast(EVIDENCE, low=-0.06, difference=0.06, high=0.18, p_value=0.3)
    assert "About 1,200 test items in all (1,140 more)" in " ".join(verdict(evidence).reasons)
    half = 0.12 * (60 / 1200) ** 0.5
    assert 0.06 - half > evidence.margin


def test_difference_on_the_margin_promises_no_number_of_items() -> None:
    evidence = with_contrast(EVIDENCE, low=-0.08, difference=0.02, high=0.12, p_value=0.7)
    assert "even 20 times as many" in " ".join(verdict(evidence).reasons)


def test_answers_cut_by_the_token_limit_are_named() -> None:
    arms = [a.model_copy(update={"truncated": 9 if a.name == "retrieved-4" else 1}) for a in EVIDENCE.arms]
    reasons = verdict(EVIDENCE.model_copy(update={"arms": arms})).reasons
    assert [r for r in reasons if "token limit" in r] == [
        "Caution: 9 of 60 answers of retrieved-4 reached the token limit; "
        "raise evaluate.max_new_tokens to see if that is why they score low."
    ]


def test_prompting_that_the_config_restricts_is_a_caution() -> None:
    assert "by default" not in " ".join(verdict(EVIDENCE).reasons)
    left_out = ("no static demonstrations (evaluate.static_seeds)", "16 demonstrations instead of at most 4")
    found = verdict(EVIDENCE.model_copy(update={"untried": left_out}))
    assert found.decision == verdict(EVIDENCE).decision
    assert (
        "Caution: Prompting was not tried as hard as by default. The config has no static demonstrations "
        "(evaluate.static_seeds); 16 demonstrations instead of at most 4. The best prompt may be better than the one "
        "compared here."
    ) in found.reasons


def _formed(what: str, **answers: int) -> list[str]:
    """The cautions where this many of an arm's 60 answers have the form of the references."""
    counts = {"zero-shot": 60, "retrieved-4": 60, "tuned": 60} | {k.replace("_", "-"): v for k, v in answers.items()}
    form = AnswerFormat(what=what, items=60, references=60, answers=counts)
    return [reason for reason in verdict(EVIDENCE.model_copy(update={"form": form})).reasons if form.what in reason]


def test_prompting_arms_that_may_only_lack_the_form_are_named_with_the_setting_that_helps() -> None:
    assert _formed("JSON", zero_shot=57, retrieved_4=55) == []
    assert _formed("JSON", zero_shot=3, retrieved_4=20) == [
        "Caution: 57 of 60 answers of zero-shot and 40 of 60 answers of retrieved-4 are not JSON, which may be the "
        "only reason for a low score: evaluate.structured_outputs measures prompting with the form enforced."
    ]
    (caution,) = _formed("1 line of 3 to 40 characters", zero_shot=3)
    assert caution.endswith("low score: evaluate.instructions can state the form.")


def test_form_is_no_caution_where_it_could_not_change_the_verdict_or_is_enforced() -> None:
    # Zero-shot has no right answer, and tuned is right in over 80%.
    assert _formed("JSON", zero_shot=30) == []
    constrained = EVIDENCE.dev_arms[0].model_copy(update={"constrained": True})
    form = AnswerFormat(what="JSON", items=60, references=60, answers={"zero-shot": 0, "retrieved-4": 0, "tuned": 60})
    enforced = EVIDENCE.model_copy(update={"form": form, "dev_arms": [*EVIDENCE.dev_arms, constrained]})
    assert not [reason for reason in verdict(enforced).reasons if "JSON" in reason]


def test_cross_fitted_verdict_names_the_config_and_the_used_test_split() -> None:
    held_out, result = verdict(EVIDENCE), verdict(cross_fitted(EVIDENCE))
    assert result.decision == held_out.decision
    assert "(30 clusters), cross-fitted in 5 folds: " in result.reasons[0]
    message = " ".join(result.reasons[1:])
    assert "the config on about 144 training pairs: the mean of 5 adapters" in message
    assert "no longer untouched" in message
    assert "no longer untouched" not in " ".join(held_out.reasons)


def test_cross_fitted_verdict_counts_needed_pairs() -> None:
    evidence = cross_fitted(with_contrast(EVIDENCE, low=-0.06, difference=0.06, high=0.18, p_value=0.3))
    message = " ".join(verdict(evidence).reasons)
    assert "About 1,200 pairs in all (1,140 more)" in message
    few = verdict(with_contrast(evidence, clusters=5))
    assert "Add more distinct pairs." in few.reasons[1]


SHARES = st.floats(-1, 1)


@given(
    st.lists(SHARES, min_size=3, max_size=3).map(sorted),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_better_interval_never_worsens_the_decision(
    ends: list[float], gains: tuple[float, float, float], p_value: float, margin: float
) -> None:
    better = sorted(min(end + gain, 1.0) for end, gain in zip(ends, gains, strict=True))
    before, after = (
        verdict(
            with_contrast(EVIDENCE, low=low, difference=difference, high=high, p_value=p_value).model_copy(
                update={"margin": margin}
            )
        )
        for low, difference, high in (ends, better)
    )
    assert ORDER.index(after.decision) >= ORDER.index(before.decision)


def _with_templates(new: list[bool]) -> Evidence:
    items = make_items(60)
    found = scores_by_template(scored_items(items), new, EVIDENCE.contrasts[0], seed=0, resamples=500)
    return EVIDENCE.model_copy(update={"output_templates": found})


def test_known_output_templates_are_a_caution() -> None:
    evidence = _with_templates([n % 10 == 0 for n in range(60)])
    assert evidence.output_templates is not None
    assert evidence.output_templates.new is not None
    scores = evidence.output_templates.new.scores
    message = [r for r in verdict(evidence).reasons if "template" in r]
    assert message == [
        "Caution: 90% of the test items have an output template seen in training; on the 6 items with a new template: "
        f"tuned {100 * scores['tuned'].value:.1f}% and retrieved-4 {100 * scores['retrieved-4'].value:.1f}%."
    ]
    assert verdict(evidence).decision == verdict(EVIDENCE).decision

    for new, cautions in (([False] * 60, 1), ([n % 5 > 0 for n in range(60)], 0)):
        assert sum("template" in r for r in verdict(_with_templates(new)).reasons) == cautions


def _from_authors(near: int, far: Contrast | None, **first: Any) -> Evidence:
    split = AuthorsSplit(source="column part of a.csv", on_overlap="keep", items=60, given=58, near=near, far=far)
    shown = with_contrast(EVIDENCE, **{"low": 0.27, "difference": 0.35, "high": 0.43, "p_value": 1e-9, **first})
    return shown.model_copy(update={"authors_split": split})


def _far(low: float = 0.1, p_value: float = 0.001, clusters: int = 25) -> Contrast:
    interval = Interval(low=low, high=0.5)
    change = {"scored": 50, "clusters": clusters, "difference": 0.3, "interval": interval, "p_value": p_value}
    return EVIDENCE.contrasts[0].model_copy(update=change)


@pytest.mark.parametrize(
    ("near", "far", "decision"),
    [
        (0, None, "ship"),
        (10, _far(), "ship"),
        (10, _far(low=0.02), "can't tell"),  # the margin
        (10, _far(p_value=0.06), "can't tell"),
        (10, _far(clusters=5), "can't tell"),
        (60, None, "can't tell"),
    ],
)
def test_gain_has_to_hold_without_items_near_a_training_row(near: int, far: Contrast | None, decision: str) -> None:
    result = verdict(_from_authors(near, far))
    assert result.decision == decision
    whose = "The split is its authors' (column part of a.csv): they gave 58 of the 60 test items to test."
    assert whose in result.reasons
    assert sum("share a cluster with a training row" in reason for reason in result.reasons) == bool(near)


def test_left_out_rows_of_the_authors_forbid_comparing_with_published_scores() -> None:
    evidence = _from_authors(0, None)
    assert evidence.authors_split is not None
    part = evidence.authors_split.model_copy(update={"missing": 2759})
    (said,) = (
        reason for reason in verdict(evidence.model_copy(update={"authors_split": part})).reasons if "authors" in reason
    )
    assert said.endswith("2,759 rows of theirs left out: the score compares with no published one.")


def test_items_near_a_training_row_never_improve_a_verdict() -> None:
    for change in ({"low": -0.1, "p_value": 0.3}, {"low": -0.3, "difference": -0.2, "high": -0.1}):
        evidence = _from_authors(10, _far(), **change)
        assert verdict(evidence).decision == verdict(evidence.model_copy(update={"authors_split": None})).decision


PLAIN_EVIDENCE = make_evidence(make_items(120, tuned=0.7, retrieved=0.3))


@pytest.mark.parametrize(
    ("difference", "low", "high", "expected"),
    [
        (0.4, 0.3, 0.5, "40.0 points more. With 95% confidence, the true difference is 30.0 to 50.0 points more."),
        (-0.2, -0.3, -0.1, "20.0 points less. With 95% confidence, the true difference is 10.0 to 30.0 points less."),
        (
            0.02,
            -0.031,
            0.082,
            "2.0 points more. With 95% confidence, the true difference is between 3.1 points less and 8.2 points more, "
            "so it may be chance.",
        ),
        (
            0.0,
            0.0,
            0.1,
            "no difference. With 95% confidence, the true difference is between no difference and 10.0 points more.",
        ),
    ],
)
def test_difference_and_its_interval_are_said_with_their_direction(
    difference: float, low: float, high: float, expected: str
) -> None:
    changed = with_contrast(PLAIN_EVIDENCE, difference=difference, low=low, high=high)
    assert plain_measurement(changed, changed.contrasts[0]).endswith(f": {expected}")
