"""Results of reviewers' verdicts against a plain count, whichever side the answers were on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from making.evidence import make_evidence, make_items
from making.human_evaluations import begin, evaluation, save, side_of_treatment
from tunewright.core.errors import UserError
from tunewright.evaluation.human_eval.results import JudgePreferences, review_results
from tunewright.evaluation.human_eval.sample import stratify
from tunewright.evaluation.human_eval.session import Side
from tunewright.evidence.files import load_items

Taste = Callable[[str], int]


def _judge_all(folder: Path, taste: Taste, reviewer: str = "ada", items: int = 50) -> dict[str, int]:
    """A reviewer who prefers by pair key; what they said."""
    review = begin(folder, reviewer, items)
    said = {}
    while (pair := review.next()) is not None:
        said[pair.key] = taste(pair.key)
        treatment = side_of_treatment(review, pair)
        other: Side = "B" if treatment == "A" else "A"
        sides: dict[int, Side] = {1: "A" if treatment == "A" else "B", -1: other, 0: "both"}
        review.answer(pair, sides[said[pair.key]])
    return said


def _taste(of: int) -> Taste:
    return lambda key: (1, 1, 0, -1)[int(key[of : of + 8], 16) % 4]


def _alone(folder: Path, count: int = 120) -> Path:
    """Each item its own cluster."""
    items = [i.model_copy(update={"cluster": i.key}) for i in make_items(count, tuned=0.7, retrieved=0.3)]
    return save(folder / "evaluation", items)


def test_preferences_are_counted_by_stratum_and_tested_by_signs(tmp_path: Path) -> None:
    folder = _alone(tmp_path)
    said = _judge_all(folder, _taste(0))
    found = review_results(folder)
    wins, losses = list(said.values()).count(1), list(said.values()).count(-1)
    assert found.preferred == (wins, losses)
    assert found.p_value == pytest.approx(binomtest(wins, wins + losses).pvalue)
    assert found.test == "exact sign test"
    strata = stratify(load_items(folder), "tuned", "retrieved-4", "exact_match")
    for stratum in found.strata:
        theirs = [said[key] for key in said if strata[key] == stratum.name]
        assert (stratum.answered, stratum.asked, stratum.items) == (
            len(theirs),
            len(theirs),
            sum(name == stratum.name for name in strata.values()),
        )
        assert (stratum.treatment, stratum.control, stratum.ties) == tuple(theirs.count(s) for s in (1, -1, 0))
    assert sum(s.items for s in found.strata) + found.same == found.items == 120


def test_win_rate_weights_strata_and_counts_equal_answers_as_ties(tmp_path: Path) -> None:
    folder = _alone(tmp_path)
    said = _judge_all(folder, _taste(0))
    strata = stratify(load_items(folder), "tuned", "retrieved-4", "exact_match")
    total = 0.0
    names = list(strata.values())
    for name in set(names):
        theirs = [said[key] for key in said if strata[key] == name]
        total += names.count(name) * sum(theirs) / len(theirs)
    found = review_results(folder)
    assert found.win_rate is not None
    assert found.win_rate.value == pytest.approx((1 + total / 120) / 2)
    assert found.win_rate.interval.low < found.win_rate.value < found.win_rate.interval.high


@pytest.mark.parametrize(("says", "decision"), [(1, "treatment"), (-1, "control"), (0, "can't tell")])
def test_unanimous_reviewers_decide(tmp_path: Path, says: int, decision: str) -> None:
    folder = evaluation(tmp_path / "evaluation")
    _judge_all(folder, lambda key: says)
    assert review_results(folder).decision == decision


def test_agreement_equals_scikit_learn_and_reviewers_are_averaged(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    first, second = _judge_all(folder, _taste(0)), _judge_all(folder, _taste(8), "ben")
    (found,) = review_results(folder).agreements
    keys = sorted(first)
    assert found.raters == ("ada", "ben")
    assert found.kappa == pytest.approx(cohen_kappa_score([first[k] for k in keys], [second[k] for k in keys]))
    preferred = review_results(folder).preferred
    assert preferred == tuple(sum(s * (first[k] + second[k]) > 0 for k in keys) for s in (1, -1))


def test_agreeing_judge_narrows_the_interval_and_is_reported(tmp_path: Path) -> None:
    folder = _alone(tmp_path, 400)
    said = _judge_all(folder, _taste(0))
    strata = stratify(load_items(folder), "tuned", "retrieved-4", "exact_match")
    judge = JudgePreferences("judge m", {key: _taste(0)(key) for key in strata})
    found = review_results(folder, judge)
    assert found.powered is not None
    assert found.win_rate is not None
    assert found.powered.judged == len(strata)
    assert found.powered.tuning > 0.8
    widths = [i.high - i.low for i in (found.powered.win_rate.interval, found.win_rate.interval)]
    assert widths[0] < 0.7 * widths[1]
    truth = (1 + sum(judge.preferences.values()) / 400) / 2
    assert abs(found.powered.win_rate.value - truth) < abs(found.win_rate.value - truth)
    assert found.agreements[0].raters == ("ada", "judge m")
    assert found.agreements[0].agreed == len(said)


def test_judge_without_some_verdicts_still_counts(tmp_path: Path) -> None:
    folder = _alone(tmp_path)
    _judge_all(folder, _taste(0))
    keys = sorted(stratify(load_items(folder), "tuned", "retrieved-4", "exact_match"))
    found = review_results(folder, JudgePreferences("judge m", dict.fromkeys(keys[::2], 1)))
    assert found.powered is not None
    assert found.powered.judged == len(keys[::2])


def test_win_rate_is_missing_with_a_reason_until_each_stratum_has_two_verdicts(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    review = begin(folder)
    pair = review.next()
    assert pair is not None
    review.answer(pair, "neither")
    found = review_results(folder)
    assert (found.answered, found.win_rate, found.decision) == (1, None, "can't tell")
    assert found.lacking is not None
    assert found.lacking.startswith("fewer than two verdicts on items of the kind")
    assert found.reviewers[0].neither == 1


def test_skipped_pairs_do_not_count_but_are_reported(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    review = begin(folder, items=20)
    for number in range(20):
        pair = review.next()
        assert pair is not None
        review.answer(review.show_reference(pair), "skip" if number < 3 else "both")
    found = review_results(folder)
    assert (found.answered, found.preferred, found.p_value) == (17, (0, 0), 1)
    who = found.reviewers[0]
    assert (who.answered, who.skipped, who.both, who.reference_shown) == (17, 3, 17, 17)


def test_results_without_a_review_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The evaluation has no reviews"):
        review_results(save(tmp_path / "evaluation", make_items(40), make_evidence(make_items(40))))
