"""A shadow under review: blind verdicts, the sequence of its units, promotion with it as evidence, and deletion."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from shadow_traffic import ALIAS, DAY, EVE, Traffic, fill, recorded_traffic
from states import DIGESTS, SHIP

from making.command_line import document, trained_project, tunewright
from tunewright import open as open_project
from tunewright.adapters.registry import list_adapters
from tunewright.core.errors import UserError
from tunewright.evidence.confidence_sequences import confidence_sequence
from tunewright.evidence.shadow import COMPLETE_S, Asked, Look, settling
from tunewright.serving.options import ReleaseTestOptions, ShadowReviewOptions
from tunewright.serving.tenants import State
from tunewright.serving.tenants.feedback import FeedbackValues
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.releases import Candidate, Grounds


@pytest.fixture
def traffic(tmp_path: Path, tiny_base_folder: Path) -> Traffic:
    return recorded_traffic(tmp_path, tiny_base_folder)


def test_promotion_takes_the_finding_as_evidence_and_says_if_there_is_none(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = trained_project(tmp_path / "project", tiny_base_folder)
    project, clock = open_project(folder), [time.time() - 20 * DAY]
    (adapter,) = list_adapters(folder / "adapters")
    grounds = Grounds(because="a test")
    untested = ReleaseTestOptions(untested="a test")
    with State(f"sqlite:///{folder}/serving/state.sqlite", "ann", lambda: clock[0]) as state:
        state.tenants.add("acme", [ALIAS])
        key, _ = state.keys.create("acme")
        state.records.start("acme", "DPA-17", 30, 1.0, KeyFile(project.folder.record_key))
        for reviewed in (False, True):
            state.releases.deploy(ALIAS, "courts-1", DIGESTS["a"], grounds)
            shadow = state.releases.start_candidate(ALIAS, Candidate(adapter.name, adapter.digest, None), grounds)
            traffic = Traffic(project, state, shadow.id, clock, key=key, count=1000 * reviewed)
            if reviewed:
                fill(traffic, 150, worse=0.02, better=0.4)
                traffic.judge("ann")
            made = project.promote(ALIAS, untested).release
            assert made is not None and made.grounds.shadow is not None
            found = made.grounds.shadow
            assert (found.outcome, found.units) == (("better", 150) if reviewed else ("can't tell", 0))
        assert state.verify().faults == ()
        stored = state.releases.history(ALIAS)[-1].grounds.shadow
        assert stored == found
    shown = tunewright("releases", ALIAS, "-p", folder).stdout
    assert "people's verdicts: no verdict" in shown and "people's verdicts: better (+" in shown


def test_status_is_the_sequence_of_the_users_means_and_finds_a_worse_candidate(traffic: Traffic) -> None:
    truth = fill(traffic, 150, worse=0.3, better=0.02)
    before = traffic.project.shadow.status(ALIAS)
    assert before.waiting == len(traffic.right) and before.finding is not None and before.finding.units < 20
    assert before.finding.outcome == "can't tell"
    assert traffic.judge("ann") == len(traffic.right)
    found = traffic.project.shadow.status(ALIAS)
    assert found.finding is not None and (found.finding.outcome, found.waiting, found.incomplete) == ("worse", 0, 0)
    expected = confidence_sequence(np.array([np.mean(of) for of in truth.values()]))
    assert found.finding.value == pytest.approx(expected.means[-1])
    assert (found.finding.low, found.finding.high) == pytest.approx((expected.low[-1], expected.high[-1]))
    assert (found.finding.units, found.finding.labels) == (150, len(traffic.right))
    assert [look.low for look in found.looks] == pytest.approx(expected.low)
    # What has entered stays: a later change of mind changes no look.
    review = traffic.project.shadow.review(ALIAS, reviewer="ann")
    assert review.undo() is not None
    assert traffic.project.shadow.status(ALIAS).finding == found.finding


def test_equal_answers_need_no_verdict_and_a_waiting_pair_holds_up_later_units(traffic: Traffic) -> None:
    for place in range(12):
        traffic.clock[0] += 60
        traffic.ask(f"user-{place}", "a", "b" if place == 5 else "a", right="a")
    traffic.ask("user-9", "a", None)
    traffic.ask("user-10", "a", "a", recorded=False)
    found = traffic.project.shadow.status(ALIAS)
    assert found.finding is not None and (found.finding.units, found.waiting) == (5, 1)
    assert (found.unanswered, found.unrecorded, found.pairs) == (1, 1, 12)
    review = traffic.project.shadow.review(ALIAS, reviewer="ann")
    pair = review.next()
    assert pair is not None
    review.judge(pair, "A" if pair.a == "a" else "B")
    assert review.next() is None
    later = traffic.project.shadow.status(ALIAS)
    assert later.finding is not None and later.finding.units == 12
    assert later.finding.value == pytest.approx(-1 / 12)


def test_only_a_users_first_day_counts_and_the_order_depends_on_times_only() -> None:
    units = {
        "slow": [Asked(0.0, None), Asked(DAY + 5, "late"), Asked(100.0, "early")],
        "alone": [Asked(50.0, "one")],
        "new": [Asked(COMPLETE_S, "later")],
    }
    now = COMPLETE_S + 1
    waiting = settling(units, {"alone"}, {}, now)
    assert (waiting.units, waiting.waiting, waiting.incomplete) == ([], ["one", "early", "later"], 1)
    found = settling(units, {"alone"}, {"one": 1.0, "early": -1.0}, now)
    assert [(each.unit, each.value, each.requests) for each in found.units] == [("alone", 1.0, 1), ("slow", -0.5, 2)]
    assert settling(units, {"alone"}, {"early": -1.0}, now).units == []


def test_reviewer_who_is_always_wrong_is_found_by_agreement(traffic: Traffic) -> None:
    fill(traffic, 150, worse=0.3, better=0.02)
    traffic.judge("ann", wrong=0.05)
    traffic.judge("max", wrong=1.0)
    found = traffic.project.shadow.status(ALIAS)
    (agreement,) = found.agreements
    assert agreement.raters == ("ann", "max") and agreement.items >= 10 and agreement.kappa is not None
    assert agreement.kappa < 0
    assert found.finding is not None and found.finding.outcome == "can't tell"
    shown = tunewright("shadow", "status", ALIAS, "-p", traffic.project.folder.root)
    assert "Two reviewers agree no more than chance would" in shown.stdout and "lower bound" not in shown.stderr


def test_shadow_whose_engine_dies_for_days_adds_no_unit_and_is_counted(traffic: Traffic) -> None:
    for day in range(14):
        for place in range(4):
            traffic.clock[0] += DAY / 4
            user = f"user-{day}-{place}"
            traffic.ask(user, "a", None if 5 <= day < 8 else "b", right="a")
            if (day, place) == (4, 3):
                traffic.ask(user, "a", None)
    traffic.judge("ann")
    found = traffic.project.shadow.status(ALIAS)
    assert (found.unanswered, found.pairs, found.waiting, found.incomplete) == (13, 44, 0, 0)
    assert found.kinds == {"user": 44} and found.finding is not None
    assert (found.finding.units, found.finding.requests, found.finding.value) == (44, 44, -1.0)
    shown = tunewright("shadow", "status", ALIAS, "-p", traffic.project.folder.root).stdout
    assert re.search(r"Without an answer in the shadow +13\b", shown)


def test_clock_that_jumps_during_the_review_settles_no_unit_twice_and_changes_no_look(traffic: Traffic) -> None:
    traffic.project.clock = lambda: traffic.clock[0]
    before: list[Look] = []
    for day, jump in enumerate([0.0, DAY, -DAY, -DAY, DAY, 0.0, 2 * DAY]):
        for place in range(6):
            traffic.clock[0] += DAY / 6
            # Each user asks again after the jump.
            for user in (f"user-{day}-{place}", f"user-{day - 1}-{place}"):
                traffic.ask(user, "a", "b" if place % 2 else "a", right="a")
            if place == 3:
                traffic.clock[0] += jump
                traffic.judge("ann")
                looks = traffic.project.shadow.status(ALIAS).looks
                assert looks[: len(before)] == before
                before = looks
    traffic.judge("ann")
    found = traffic.project.shadow.status(ALIAS)
    assert found.looks[: len(before)] == before and found.waiting == 0
    assert found.finding is not None and found.finding.value == pytest.approx(-0.5, abs=0.05)
    assert found.finding.units + found.incomplete == 48 and found.kinds == {"user": 48}
    trial = traffic.state.shadow_reviews.trial(ALIAS, found.margin, found.most_units)
    units = [unit.unit for unit in traffic.state.shadow_reviews.settled(trial)]
    assert len(units) == len(set(units)) == found.finding.units > len(before) // 2
    assert traffic.state.verify().faults == ()


def test_repeated_verdict_counts_once_and_feedback_is_no_verdict(traffic: Traffic) -> None:
    response_id = traffic.ask("user-1", "a", "b", right="a")
    tenant = traffic.state.keys.caller(traffic.key).tenant_id
    down = FeedbackValues("down", None, None, None)
    said = [traffic.state.feedback.record(tenant, response_id, down) for _ in range(3)]
    assert said == ["recorded", "unchanged", "unchanged"]
    assert traffic.project.shadow.status(ALIAS).waiting == 1
    review = traffic.project.shadow.review(ALIAS, reviewer="ann")
    pair = review.item(response_id)
    for _ in range(3):
        review.judge(pair, "A" if pair.a == "a" else "B")
    found = traffic.project.shadow.status(ALIAS)
    assert found.finding is not None and (found.finding.labels, found.finding.value) == (1, -1.0)
    assert found.finding.reviewers == ("ann",) and found.agreements == ()


def test_review_by_a_sheet_is_blind_and_refuses_changed_answers(traffic: Traffic, tmp_path: Path) -> None:
    fill(traffic, 20, worse=0.4, better=0.4)
    root, sheet = traffic.project.folder.root, tmp_path / "pairs.csv"
    wrote = document(root, "shadow", "review", ALIAS, "--reviewer", "ann", "--export", sheet)
    assert wrote["pairs"] == len(traffic.right)
    with sheet.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert {row["A"] for row in rows} == {"live", "new"}, "the sides are drawn"
    assert all("courts-" not in text for row in rows for text in row.values())
    changed = [{**rows[0], "A": "other"}, *rows[1:]]
    for filled, code in ((changed, 2), ([{**row, "verdict": "both"} for row in rows], 0)):
        with sheet.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(filled)
        ran = tunewright("shadow", "review", ALIAS, "--reviewer", "ann", "--import", sheet, "-p", root)
        assert ran.code == code, ran.stderr
    found = document(root, "shadow", "status", ALIAS)
    assert (found["waiting"], found["finding"]["value"]) == (0, 0.0)


def test_terms_are_declared_at_the_first_look_and_the_sequence_ends_at_its_maximum(traffic: Traffic) -> None:
    fill(traffic, 130, worse=0.02, better=0.02)
    first = traffic.project.shadow.status(ALIAS, ShadowReviewOptions(max_units=100))
    traffic.judge("ann")
    later = traffic.project.shadow.status(ALIAS, ShadowReviewOptions(max_units=1000))
    assert (first.most_units, later.most_units, later.ended) == (100, 100, True)
    assert later.finding is not None and (later.finding.units, later.finding.outcome) == (100, "can't tell")
    with pytest.raises(UserError, match="No adapter is or was in the shadow"):
        traffic.state.releases.deploy("other", "courts-1", DIGESTS["a"], SHIP)
        traffic.project.shadow.status("other")


def test_forgotten_user_leaves_a_number_in_the_sequence_and_nothing_else(traffic: Traffic) -> None:
    kept = traffic.ask("user-1", "a", "b", right="a")
    planted = traffic.ask(EVE, f"{EVE} lives", "b", right="b")
    traffic.judge("ann", most=2)
    before = traffic.project.shadow.status(ALIAS)
    review = traffic.project.shadow.review(ALIAS, reviewer="ben")
    file = KeyFile(traffic.project.folder.record_key)
    shown = review.item(planted)
    done = traffic.state.records.forget("acme", file, user=EVE)
    assert (done.requests, done.records, done.shadow_answers) == (1, 1, 1)
    with pytest.raises(UserError, match="was deleted meanwhile"):
        review.judge(shown, "A")
    again = traffic.project.shadow.review(ALIAS, reviewer="ann")
    assert planted not in again.queue() and kept in again.queue()
    after = traffic.project.shadow.status(ALIAS)
    assert after.finding is not None and before.finding is not None
    assert (after.finding.sequence, after.finding.units) == (before.finding.sequence, 2)
    traffic.state.close()
    files = [path for path in traffic.project.folder.root.rglob("*") if path.is_file()]
    assert [path for path in files if EVE.encode() in path.read_bytes() or planted.encode() in path.read_bytes()] == []


def test_prompts_are_read_with_the_key_file_only_and_the_audit_log_says_by_whom(traffic: Traffic) -> None:
    traffic.ask("user-1", "mail eve@planted.com", "b", right="b")
    review = traffic.project.shadow.review(ALIAS, reviewer="ann")
    pair = review.next()
    assert pair is not None and pair.input == "case 1"
    assert "eve@planted.com" not in pair.a + pair.b and "<EMAIL_" in pair.a + pair.b
    read = [line for line in traffic.state.audit.lines() if line.action == "shadow.read"]
    assert [json.loads(line.details)["pairs"] for line in read] == [1]
    assert traffic.state.verify().faults == ()
    with pytest.raises(UserError, match="take no notes"):
        review.note(pair, "eve again")
    traffic.project.folder.record_key.unlink()
    with pytest.raises(UserError, match="key file of recorded requests is missing"):
        traffic.project.shadow.review(ALIAS, reviewer="ann")
