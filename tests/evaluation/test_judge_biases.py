"""Judges with known biases, behind a real server: each is vetoed, or its bias shows in the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from making.command_line import tunewright
from making.evidence import make_items
from making.scripted_judge import Asked, Script, honest, scripted, verdict, write_project
from tunewright.core.io import digest
from tunewright.evaluation.judge.questions import CONTROLS_FILE, ROWS_FILE, load_judged
from tunewright.evidence.files import load_evidence
from tunewright.evidence.judge import Judgement
from tunewright.evidence.schema import Evidence, Item
from tunewright.metrics import normalised

CONTROL_QUESTIONS = 14 * 6


def _has_gold(asked: Asked) -> bool:
    return any(normalised(answer) == normalised(asked.reference) for answer in asked.answers)


def always_first(asked: Asked) -> str:
    return verdict("A" if len(asked.answers) == 2 else asked.honest)


def longer_wins(asked: Asked) -> str:
    if len(asked.answers) == 1:
        return honest(asked)
    a, b = map(len, asked.answers)
    return verdict("TIE" if a == b else "A" if a > b else "B")


def at_random(asked: Asked) -> str:
    words = ["CORRECT", "INCORRECT"] if len(asked.answers) == 1 else ["A", "B", "TIE"]
    return verdict(words[int(digest([asked.task, *asked.answers])[:8], 16) % len(words)])


def obeys_an_answer(asked: Asked) -> str:
    return verdict("CORRECT") if "VERDICT: CORRECT" in asked.answers[0] else honest(asked)


def sees_differences_in_equal_answers(asked: Asked) -> str:
    return verdict("B") if len(set(asked.answers)) < len(asked.answers) else honest(asked)


def agrees_with_everything(asked: Asked) -> str:
    return verdict("CORRECT" if len(asked.answers) == 1 else asked.honest)


def condemns_everything(asked: Asked) -> str:
    return verdict("INCORRECT" if len(asked.answers) == 1 else asked.honest)


def writes_garbage(asked: Asked) -> str:
    return "The answer, which is VERDICT: A or perhaps VERDICT: CORRECT, depends."


def judged(folder: Path, script: Script, items: list[Item] | None = None) -> tuple[int, Evidence, int]:
    """Exit code, evidence and number of requests of one run."""
    with scripted(script) as server:
        evaluation = write_project(folder / "project", {"base_url": server.url, "model": "scripted"}, items)
        ran = tunewright("judge", "-p", folder / "project", "--json")
        evidence = load_evidence(evaluation)
        assert evidence.judge is not None
        assert ran.document["judge"] == evidence.judge.model_dump(mode="json")
        return ran.code, evidence, len(server.bodies)


def findings(folder: Path, script: Script, items: list[Item]) -> Judgement:
    """Return the findings of a judge that passes its controls."""
    code, evidence, _ = judged(folder, script, items)
    assert code == 0
    assert evidence.judge is not None
    assert evidence.judge.vetoed == ()
    return evidence.judge


@pytest.mark.parametrize(
    ("script", "failing"),
    [
        (always_first, {"gold against gold", "gold against other"}),
        (longer_wins, {"gold against other"}),
        (
            at_random,
            {
                "gold is correct",
                "swapped reference",
                "injected verdict",
                "gold against gold",
                "gold against other",
            },
        ),
        (obeys_an_answer, {"injected verdict"}),
        (sees_differences_in_equal_answers, {"gold against gold"}),
        (agrees_with_everything, {"swapped reference", "injected verdict"}),
        (condemns_everything, {"gold is correct"}),
    ],
)
def test_judge_is_vetoed_and_stopped_when_a_control_fails(tmp_path: Path, script: Script, failing: set[str]) -> None:
    code, evidence, asked = judged(tmp_path, script)
    section = evidence.judge
    assert section is not None
    assert code == 3
    assert asked == CONTROL_QUESTIONS
    assert {control.name for control in section.controls if not control.held} == failing
    assert len(section.vetoed) == len(failing)
    assert (section.arms, section.contrast, section.preferences) == ((), None, ())
    assert not (tmp_path / "project" / "evaluations" / evidence.id / ROWS_FILE).exists()


def test_unreadable_replies_are_counted_as_such_and_veto_the_judge(tmp_path: Path) -> None:
    code, evidence, _ = judged(tmp_path, writes_garbage)
    assert code == 3
    assert evidence.judge is not None
    assert all(control.unscored == {"no verdict in the reply": 14} for control in evidence.judge.controls)
    assert all("14 without a verdict (no verdict in the reply)" in reason for reason in evidence.judge.vetoed)
    rows = (tmp_path / "project" / "evaluations" / evidence.id / CONTROLS_FILE).read_text().splitlines()
    assert {json.loads(row)["unscored"] for row in rows} == {"no verdict in the reply"}


def test_honest_judge_matches_a_plain_count_and_writes_a_row_for_every_item(tmp_path: Path) -> None:
    items = make_items()
    found = findings(tmp_path, honest, items)
    right = {
        arm: [normalised(item.answers[arm]) == normalised(item.reference) for item in items]
        for arm in ("tuned", "retrieved-4")
    }
    assert {arm.name: (arm.correct, arm.items) for arm in found.arms} == {a: (sum(r), 60) for a, r in right.items()}
    both = list(zip(right["tuned"], right["retrieved-4"], strict=True))
    (pair,) = found.preferences
    wins, losses = both.count((True, False)), both.count((False, True))
    assert (pair.rate.wins, pair.rate.losses, pair.rate.ties) == (wins, losses, 60 - wins - losses)
    assert pair.rate.value == pytest.approx((wins + (60 - wins - losses) / 2) / 60)
    assert pair.rate.interval.low < pair.rate.value < pair.rate.interval.high
    assert (pair.flips, pair.unscored, pair.stripped) == (0, {}, None)
    assert found.contrast is not None
    assert (found.contrast.fixed, found.contrast.broken) == (wins, losses)
    # The same items, the same right and wrong: the same test as that of exact match.
    evidence = load_evidence(tmp_path / "project" / "evaluations" / "0123456789ab")
    assert found.contrast.p_value == pytest.approx(evidence.contrasts[0].p_value)
    assert pair.p_value == pytest.approx(evidence.contrasts[0].p_value)

    rows = load_judged(tmp_path / "project" / "evaluations" / "0123456789ab")
    assert [row.key for row in rows] == [item.key for item in items]
    for row, item in zip(rows, items, strict=True):
        answered = row.correctness["tuned"]
        assert answered.correct == answered.exact == (item.answers["tuned"] == item.reference)
        assert (answered.reply is None) == answered.exact
        compared = row.pairs["retrieved-4"].plain
        assert compared.equal == (item.answers["tuned"] == item.answers["retrieved-4"])
        assert len(compared.replies) == (0 if compared.equal else 2)


def neither_right(count: int, answers: Callable[[int], tuple[str, str]]) -> list[Item]:
    """Items both of whose arms are wrong: what the judge makes of them is its bias. Tuned comes first."""
    changed = []
    for number, item in enumerate(make_items(count)):
        tuned, retrieved = answers(number)
        changed.append(
            item.model_copy(
                update={
                    "cluster": f"c{number}",
                    "answers": {**item.answers, "tuned": tuned, "retrieved-4": retrieved},
                }
            )
        )
    return changed


def test_position_bias_becomes_flips_and_ties(tmp_path: Path) -> None:
    def first_if_unsure(asked: Asked) -> str:
        return honest(asked) if _has_gold(asked) else always_first(asked)

    items = neither_right(40, lambda n: (f"wrong {n}", f"false {n}"))
    (pair,) = findings(tmp_path, first_if_unsure, items).preferences
    assert (pair.flips, pair.flip_rate) == (40, 1.0)
    assert (pair.rate.wins, pair.rate.ties, pair.rate.losses, pair.rate.value) == (0, 40, 0, 0.5)


def test_length_bias_disappears_at_equal_length(tmp_path: Path) -> None:
    def longer_if_unsure(asked: Asked) -> str:
        return honest(asked) if _has_gold(asked) else longer_wins(asked)

    # Tuned is longer in three of four pairs, by 1 to 40 characters.
    def answers(number: int) -> tuple[str, str]:
        longer, shorter = "x" * (20 + number % 40), "y" * 19
        return (longer, shorter) if number % 4 else (shorter, longer)

    (pair,) = findings(tmp_path, longer_if_unsure, neither_right(60, answers)).preferences
    assert pair.rate.value == 0.75
    assert pair.rate.interval.low > 0.6
    controlled = pair.length_controlled
    assert controlled is not None
    assert controlled.slope > 3
    assert controlled.interval.low < 0.5 < controlled.interval.high


def test_length_controlled_rate_is_missing_without_overlapping_lengths(tmp_path: Path) -> None:
    def longer_if_unsure(asked: Asked) -> str:
        return honest(asked) if _has_gold(asked) else longer_wins(asked)

    items = neither_right(40, lambda n: (f"wrong {n} " + "x" * 30, f"wrong {n}"))
    (pair,) = findings(tmp_path, longer_if_unsure, items).preferences
    assert pair.rate.value == 1.0
    assert pair.length_controlled is None
    assert pair.length_note is not None
    assert "longer in all pairs but 0" in pair.length_note


def test_markdown_bias_disappears_without_markdown(tmp_path: Path) -> None:
    def markdown_if_unsure(asked: Asked) -> str:
        if _has_gold(asked) or len(asked.answers) == 1:
            return honest(asked)
        dressed = ["**" in answer for answer in asked.answers]
        return verdict("TIE" if dressed[0] == dressed[1] else "A" if dressed[0] else "B")

    items = neither_right(40, lambda n: (f"**wrong** {n}", f"false {n}"))
    (pair,) = findings(tmp_path, markdown_if_unsure, items).preferences
    assert pair.rate.value == 1.0
    assert pair.stripped is not None
    assert (pair.stripped.ties, pair.stripped.value, pair.stripped_texts) == (40, 0.5, 40)


def test_items_without_a_verdict_are_left_out_and_counted_never_ties(tmp_path: Path) -> None:
    items = make_items()
    wrong = {answer for item in items for answer in item.answers.values() if answer != item.reference}

    def mute_on_some(asked: Asked) -> str:
        return "I cannot say." if wrong.issuperset(asked.answers) and "Georgia" in asked.task else honest(asked)

    found = findings(tmp_path, mute_on_some, items)
    muted = [i for i in items if "Georgia" in i.input]
    tuned, _ = found.arms
    lost = sum(i.answers["tuned"] != i.reference for i in muted)
    assert lost > 0
    assert (tuned.items, tuned.unscored) == (60 - lost, {"no verdict in the reply": lost})
    (pair,) = found.preferences
    unread = sum(
        i.reference not in (i.answers["tuned"], i.answers["retrieved-4"])
        and i.answers["tuned"] != i.answers["retrieved-4"]
        for i in muted
    )
    assert pair.unscored == {"no verdict in the reply": unread}
    assert pair.pairs == pair.rate.wins + pair.rate.ties + pair.rate.losses == 60 - unread


def test_verdict_in_a_truncated_reply_does_not_count(tmp_path: Path) -> None:
    with scripted(honest) as server:
        server.finish = "length"
        evaluation = write_project(tmp_path / "project", {"base_url": server.url, "model": "scripted"})
        assert tunewright("judge", "-p", tmp_path / "project").code == 3
    rows = (evaluation / CONTROLS_FILE).read_text().splitlines()
    assert {json.loads(row)["unscored"] for row in rows} == {"cut at the token limit"}
