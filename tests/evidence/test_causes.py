"""Causes of a *don't ship*: each from golden evidence, and none where it could not change the outcome."""

from __future__ import annotations

from typing import Any

import pytest

from making.evidence import make_evidence, make_items
from making.full_evidence import CURVE, GENERAL
from tunewright.evidence.causes import Labels, ProjectFacts, decided, undertrained
from tunewright.evidence.common import AnswerFormat, Interval
from tunewright.evidence.schema import Evidence

WORSE = make_evidence(make_items(120, tuned=0.05, retrieved=0.6))
assert decided(WORSE).decision == "don't ship"


def trained(evidence: Evidence, *dev_losses: float, epochs: int | None = None) -> Evidence:
    """The same evidence on an adapter whose run had these dev losses, an epoch each."""
    recorded = [
        {"step": 40 * n, "epoch": float(n), "train_loss": loss, "dev_loss": loss, "dev_metric": None}
        for n, loss in enumerate(dev_losses, start=1)
    ]
    config = {"train": {"epochs": epochs or len(dev_losses)}}
    adapter = {"name": "legal-1", "digest": "0" * 64, "lineage": {"training": {"epochs": recorded}, "config": config}}
    return evidence.model_copy(update={"lineage": {**evidence.lineage, "adapter": adapter}})


def formed(evidence: Evidence, tuned: int, *, longer: int = 0, what: str = "JSON with the fields name") -> Evidence:
    """The same evidence where this many tuned answers have the form that all references have."""
    form = AnswerFormat(
        what=what, items=120, references=120, answers={"tuned": tuned, "retrieved-4": 120}, longer=longer
    )
    return evidence.model_copy(update={"form": form})


def cut(evidence: Evidence, answers: int, limit: int = 32) -> Evidence:
    """The same evidence where this many tuned answers reached a token limit."""
    arms = [arm.model_copy(update={"truncated": answers}) if arm.name == "tuned" else arm for arm in evidence.arms]
    return evidence.model_copy(
        update={"arms": arms, "lineage": {**evidence.lineage, "decoding": {"max_new_tokens": limit}}}
    )


def found(evidence: Evidence, **known: Any) -> list[str]:
    """The causes, by their first words."""
    return [cause.what for cause in decided(evidence, ProjectFacts(**known)).causes]


def steps(first: float, last: float, count: int = 40) -> list[dict[str, float]]:
    """A training run whose loss goes evenly from one value to another."""
    return [{"step": n, "loss": first + (last - first) * n / (count - 1)} for n in range(count)]


def test_falling_loss_is_undertrained() -> None:
    (cause,) = decided(trained(WORSE, 1.5, 1.1, 0.9)).causes
    assert cause.what == "Undertrained: the loss was still falling when training ended"
    assert "1.500 → 1.100 → 0.900" in cause.evidence
    assert "train.epochs: 6 (now 3)" in cause.next_command
    assert "`tunewright train`" in cause.next_command


@pytest.mark.parametrize("losses", [(1.5, 0.9, 0.895), (1.5, 0.9, 1.1), (0.9, 1.1), (0.08, 0.006, 0.004)])
def test_flat_rising_or_tiny_loss_is_not_undertrained(losses: tuple[float, ...]) -> None:
    assert not any("Undertrained" in what for what in found(trained(WORSE, *losses)))


def test_single_evaluation_uses_the_step_losses() -> None:
    once = trained(WORSE, 2.0)
    assert found(once, history=steps(3.0, 1.0)) == ["Undertrained: the loss was still falling when training ended"]
    assert not any("Undertrained" in what for what in found(once, history=steps(1.02, 1.0)))
    assert not any("Undertrained" in what for what in found(once, history=steps(3.0, 1.0, count=4)))


def test_undertrained_is_given_when_the_last_third_still_adds_to_what_the_run_gained() -> None:
    """A single epoch with a cosine rate: little falls at the end, but all of it with 6% of the rate."""
    once = trained(WORSE, 3.0)
    slow = [7.7, *[4.0] * 42, *[3.12] * 43, *[2.93] * 43]
    done = [7.7, *[4.0] * 42, *[2.0] * 43, *[1.94] * 43]
    noisy = [loss + (1.5 if n % 2 else -1.5) for n, loss in enumerate(slow)]

    def undertrained(losses: list[float]) -> bool:
        history = [{"step": n, "loss": loss} for n, loss in enumerate(losses)]
        return any("Undertrained" in what for what in found(once, history=history))

    assert [undertrained(losses) for losses in (slow, done, noisy)] == [True, False, False]


def ran(steps: int, *dev_losses: float, **lineage: Any) -> dict[str, Any]:
    """The lineage of a run of some steps with evenly spaced evaluations."""
    epochs = [
        {"step": steps * n // len(dev_losses), "epoch": float(n), "dev_loss": loss}
        for n, loss in enumerate(dev_losses, start=1)
    ]
    return {"training": {"epochs": epochs}, "config": {"train": {"epochs": len(dev_losses)}}, **lineage}


def test_few_steps_are_hardly_trained_with_epochs_for_enough_of_them() -> None:
    reason = undertrained(ran(8, 2.798), [])
    assert reason is not None
    assert reason.what == "Hardly trained: 8 optimizer steps"
    assert "2.798" in reason.evidence
    assert reason.next_command.startswith("Set train.epochs: 3 (now 1) or raise train.learning_rate")
    fewer = undertrained(ran(4, 2.4), [])
    assert fewer is not None and "train.epochs: 5 (now 1)" in fewer.next_command
    falling = undertrained(ran(16, 2.4, 1.8), [])
    assert falling is not None and falling.what == "Hardly trained: 16 optimizer steps"


def test_useless_adapter_of_the_bundled_base_gets_its_settings_and_every_short_run_the_sweep() -> None:
    lineage = ran(48, 5.893, 4.320, 4.049, base={"spec": "bundled:smollm2-135m-instruct"})
    lineage["config"]["train"] |= {"preset": "classic", "learning_rate": 2e-4, "method": "sft"}
    lineage["training"]["epochs"][-1]["dev_metric"] = 0.0
    reason = undertrained(lineage, [])
    wanted = "Set train.preset: all-linear, train.learning_rate: 0.001, and train.epochs: 6 (now 3), then `tunewright"
    assert reason is not None and reason.next_command.startswith(wanted)
    assert reason.next_command.endswith("`tunewright train --sweep` searches for a rate")
    other = [
        lineage | {"base": {"spec": "acme/other"}},
        lineage | {"training": {"epochs": [{**each, "dev_metric": 0.7} for each in lineage["training"]["epochs"]]}},
        lineage | {"config": {"train": lineage["config"]["train"] | {"preset": "all-linear", "learning_rate": 1e-3}}},
    ]
    for each in other:
        plain = undertrained(each, [])
        assert plain is not None and plain.next_command.startswith("Set train.epochs: 6 (now 3), then")
        assert "`tunewright train --sweep`" in plain.next_command


def test_few_steps_suffice_where_the_dev_loss_is_flat_or_another_adapter_was_trained_before() -> None:
    assert undertrained(ran(16, 0.5, 0.499), []) is None
    assert undertrained(ran(16, 0.5, 0.7), []) is None
    assert undertrained(ran(8, 0.5, parent={"name": "legal-1"}), []) is None
    assert undertrained(ran(60, 0.5), []) is None


def test_adapter_that_answers_as_its_base_is_hardly_trained_whatever_its_steps() -> None:
    reason = undertrained(ran(200, 2.0, 1.999), [], divergence=0.0032)
    assert reason is not None
    assert reason.what.startswith("Hardly trained: 200 optimizer steps")
    assert "0.0032 nats" in reason.evidence
    assert undertrained(ran(200, 2.0, 1.999), [], divergence=0.1) is None


def test_verdict_takes_the_divergence_from_the_benchmarks() -> None:
    suites = tuple(suite.model_copy(update={"divergence": 0.001}) for suite in GENERAL.suites)
    drifted = trained(WORSE, 2.0, 1.999).model_copy(
        update={"regressions": GENERAL.model_copy(update={"suites": suites})}
    )
    assert found(drifted)[0].startswith("Hardly trained: 80 optimizer steps")


def test_next_step_is_the_first_remedy_or_what_settles_the_verdict() -> None:
    falling = decided(trained(WORSE, 1.5, 1.1, 0.9))
    assert falling.next_step == falling.causes[0].next_command
    even = make_evidence(make_items(120, tuned=0.04, retrieved=0.02))
    assert "`tunewright crossval`" in decided(even).next_step
    assert decided(even.model_copy(update={"split": "dev"})).next_step == "tunewright evaluate"
    assert decided(make_evidence(make_items(600, tuned=0.9, retrieved=0.3))).next_step == ""


def test_undecided_verdict_has_only_causes_that_training_can_fix() -> None:
    even = make_evidence(make_items(120, tuned=0.04, retrieved=0.02))
    assert decided(even).decision == "can't tell"
    assert found(even) == []
    assert found(trained(even, 3.5, 3.0)) == ["Undertrained: the loss was still falling when training ended"]
    assert found(formed(even, 31)) == ["The adapter has not learned the form of the answers"]
    assert found(even, labels=Labels(rows=900, conflicts=0, checked=80, wrong=9)) == []


def test_retrieval_is_not_enough_when_neither_arm_works() -> None:
    hopeless = make_evidence(make_items(400, tuned=0.0, retrieved=0.05))
    assert decided(hopeless).decision == "don't ship"
    (cause,) = decided(hopeless).causes
    assert cause.what == "Neither prompting nor training works"
    assert cause.evidence == "retrieved-4 has 6.5%, tuned 0.0%"


def test_unlearned_form_is_reported_with_its_share() -> None:
    (cause,) = decided(formed(WORSE, 31)).causes
    assert cause.what == "The adapter has not learned the form of the answers"
    assert "31 of 120 tuned answers are JSON with the fields name (26%); of the references 120" in cause.evidence
    assert "evaluate.structured_outputs" in cause.next_command
    assert "The adapter has not learned the form of the answers" not in found(formed(WORSE, 115))


def test_form_is_not_a_cause_when_it_could_not_change_the_outcome() -> None:
    hopeless = make_evidence(make_items(120, tuned=0.0, retrieved=0.95))
    assert found(formed(hopeless, 120 - 20)) == ["Retrieval is enough"]


def test_endless_answers_are_a_form_cause_and_not_a_limit_cause() -> None:
    (cause,) = decided(cut(formed(WORSE, 31, longer=0), 80)).causes
    assert cause.what == "The adapter has not learned the form of the answers"
    assert "80 reached the token limit although their references do not" in cause.evidence


def test_token_limit_is_a_cause_only_when_references_are_longer() -> None:
    (cause,) = decided(cut(formed(WORSE, 120, longer=90), 90)).causes
    assert cause.what == "The token limit cuts answers"
    assert "90 of 120 tuned answers were cut at the limit of 32 tokens; 90 references are longer" in cause.evidence
    assert "evaluate.max_new_tokens: 64" in cause.next_command
    assert "The token limit cuts answers" not in found(cut(formed(WORSE, 120, longer=0), 90))


def test_token_limit_is_not_a_cause_when_cut_answers_could_not_change_the_verdict() -> None:
    assert "The token limit cuts answers" not in found(cut(formed(WORSE, 120, longer=10), 10))


def test_noisy_labels_are_reported_from_the_review() -> None:
    causes = decided(WORSE, ProjectFacts(labels=Labels(rows=900, conflicts=0, checked=80, wrong=9))).causes
    assert causes[0].what == "Labels are noisy"
    assert causes[0].evidence == "9 of 80 reviewed rows are wrong (11%)"
    assert "`tunewright data suspects`" in causes[0].next_command
    assert "Labels are noisy" not in found(WORSE, labels=Labels(rows=900, conflicts=0, checked=80, wrong=1))
    assert "Labels are noisy" not in found(WORSE, labels=Labels(rows=900, conflicts=0, checked=5, wrong=2))


def test_several_outputs_are_noise_by_right_or_wrong_and_not_by_a_graded_metric() -> None:
    many = Labels(rows=900, conflicts=200)
    assert "Labels are noisy" in found(WORSE, labels=many)
    graded = make_evidence(make_items(120, tuned=0.05, retrieved=0.6), metric="bleu", also=["exact_match"])
    assert decided(graded).decision == "don't ship"
    assert "Labels are noisy" not in found(graded, labels=many)


def test_few_rows_are_reported_from_the_learning_curve() -> None:
    rising = CURVE.model_copy(update={"slope": 0.2, "interval": Interval(low=0.1, high=0.3)})
    cause = next(c for c in decided(WORSE, ProjectFacts(curve=rising)).causes if c.what == "Too few rows")
    assert "+20.0 points on dev" in cause.evidence
    assert "`tunewright data add FILE`" in cause.next_command


def test_more_rows_are_not_suggested_when_the_curve_is_flat_or_too_many_are_needed() -> None:
    few = WORSE.model_copy(update={"train_items": 120})
    flat = CURVE.model_copy(update={"slope": 0.001, "interval": Interval(low=-0.01, high=0.01)})
    slow = CURVE.model_copy(update={"slope": 0.03, "interval": Interval(low=0.01, high=0.05)})
    assert found(few, curve=flat) == found(few, curve=slow) == ["Retrieval is enough"]


def test_few_rows_without_a_curve_suggest_one_unless_another_cause_exists() -> None:
    few = WORSE.model_copy(update={"train_items": 120})
    cause = decided(few).causes[0]
    assert (cause.what, cause.next_command) == ("Perhaps too few rows", "`tunewright train --curve`")
    assert found(trained(few, 1.5, 1.0)) == ["Undertrained: the loss was still falling when training ended"]


def test_retrieval_is_enough_when_no_cause_can_be_fixed() -> None:
    (cause,) = decided(WORSE).causes
    assert cause.what == "Retrieval is enough"
    assert "412 prompt tokens" in cause.evidence
    assert "against 71" in cause.evidence
    assert "`tunewright advise`" in cause.next_command
    priced = decided(WORSE, ProjectFacts(cost="a call costs 1.25 s with retrieved-4, 0.31 s tuned")).causes[0]
    assert "a call costs 1.25 s" in priced.evidence


def test_other_verdicts_have_no_causes() -> None:
    better = make_evidence(make_items(120))
    assert decided(better).decision == "ship"
    assert found(trained(better, 1.5, 1.0)) == []
    message = " ".join(f"{c.what} {c.next_command}" for c in decided(trained(cut(formed(WORSE, 31), 80), 2, 1)).causes)
    assert "test items" not in message
