"""A judge in a shadow's review: people's verdicts correct it, and nothing that it was sent outlives a deletion."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from shadow_traffic import ALIAS, DAY, EVE, Traffic, fill, recorded_traffic
from starlette.responses import JSONResponse
from states import DIGESTS

from making.command_line import document, trained_project, tunewright
from making.scripted_judge import Asked, Script, Server, scripted, verdict
from tunewright import open as open_project
from tunewright.adapters.registry import list_adapters
from tunewright.core.errors import UserError
from tunewright.evidence.confidence_sequences import confidence_sequence, largest_difference, unit_differences
from tunewright.evidence.shadow import Judging
from tunewright.serving.options import ShadowJudgeOptions
from tunewright.serving.shadow_review import project_seed
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.releases import Candidate, Grounds

PERMITTED = ShadowJudgeOptions(contracts=("DPA-17",), people=0.5)
MODEL = "careful-judge"


@pytest.fixture
def traffic(tmp_path: Path, tiny_base_folder: Path) -> Traffic:
    return recorded_traffic(tmp_path, tiny_base_folder)


def says(better: str) -> Script:
    """Return a judge that prefers the answer with this text in both orders."""
    return lambda asked: verdict("A" if asked.answers[0] == better else "B")


def judged_by(traffic: Traffic, server: Server, **settings: object) -> Traffic:
    """Write the judge into the config."""
    folder = traffic.project.folder.root
    section = {"model": MODEL, "base_url": server.url, "max_retries": 0, "concurrency": 1, **settings}
    config = (folder / "tunewright.yaml").read_text().split("\njudge:")[0].rstrip()
    (folder / "tunewright.yaml").write_text(f"{config}\njudge: {json.dumps(section)}\n")
    traffic.project = open_project(folder)
    return traffic


def test_judge_through_the_command_line_is_corrected_by_people(traffic: Traffic) -> None:
    truth = fill(traffic, 150, worse=0.3, better=0.1)
    root = traffic.project.folder.root

    def misleading(asked: Asked) -> str:
        """Prefer the candidate on three of four cases, and ignore the right answer."""
        side = "A" if (asked.answers[0] == "new") == bool(int(asked.task.split()[-1]) % 4) else "B"
        return verdict(side)

    with scripted(misleading) as server:
        judged_by(traffic, server)
        refused = tunewright("shadow", "judge", ALIAS, "-p", root)
        assert refused.code == 2 and "acme (recorded under DPA-17)" in refused.stderr and server.bodies == []
        assert server.url in refused.stderr and MODEL in refused.stderr
        asked = ("shadow", "judge", ALIAS, "--contract", "DPA-17", "--people", "50%")
        first = document(root, *asked)
        assert first["judge"]["answers"] == len(traffic.right) and first["unjudged"] == 0
        questions = len(server.bodies)
        assert questions <= 2 * len(traffic.right)
        assert all("courts-" not in prompt and "REFERENCE" not in prompt for prompt in server.prompts)
        assert document(root, *asked)["judge"]["answers"] == len(traffic.right)
        assert len(server.bodies) == questions, "no question is asked twice"
        changed = tunewright("shadow", "judge", ALIAS, "--contract", "DPA-17", "--people", "20%", "-p", root)
        assert changed.code == 2 and "50%" in changed.stderr
    assert first["finding"]["outcome"] == "can't tell"

    labelled = traffic.judge("ann")
    assert labelled == first["waiting"] and 0.3 < labelled / len(traffic.right) < 0.7
    found = document(root, "shadow", "status", ALIAS)
    assert (found["waiting"], found["finding"]["units"]) == (0, 150)

    # The estimate, from the requests themselves: request N asks "case N".
    trial = traffic.state.shadow_reviews.trial(ALIAS, 0.0, 0)
    drawn = Judging(0.5, project_seed(trial), takes_part=True)
    pairs, _ = traffic.state.shadow_reviews.pairs(trial)
    units = [pair.unit for pair in pairs]
    right = {"live": -1.0, "new": 1.0}
    human = np.array([right[traffic.right[p.id]] if p.differs else 0.0 for p in pairs])
    human[[p.differs and not drawn.draws(p.id) for p in pairs]] = np.nan
    judge = np.array([(1.0 if int(p.id[-5:]) % 4 else -1.0) if p.differs else 0.0 for p in pairs])
    values = unit_differences(units, human, judge, np.where([p.differs for p in pairs], 0.5, 1.0))
    labels = np.cumsum(
        [
            sum(u == unit and p.differs and drawn.draws(p.id) for u, p in zip(units, pairs, strict=True))
            for unit in dict.fromkeys(units)
        ]
    )
    expected = confidence_sequence(values, largest=largest_difference(0.5, judge=True), labels=labels)
    assert found["finding"]["value"] == pytest.approx(expected.means[-1])
    assert found["finding"]["low"] == pytest.approx(expected.low[-1])
    assert [look["high"] for look in found["looks"]] == pytest.approx(np.minimum(expected.high, 1))
    true = np.mean([np.mean(of) for of in truth.values()])
    assert expected.low[-1] <= true <= expected.high[-1] and found["finding"]["labels"] == labelled

    agreed = [
        p
        for p in pairs
        if p.differs and drawn.draws(p.id) and right[traffic.right[p.id]] == (1.0 if int(p.id[-5:]) % 4 else -1.0)
    ]
    own = found["judge"]
    assert (own["model"], own["share"], own["both"], own["agreed"]) == (MODEL, 0.5, labelled, len(agreed))
    assert own["low"] < len(agreed) / labelled < own["high"] and found["finding"]["judge"] == own
    shown = tunewright("shadow", "status", ALIAS, "-p", root).stdout
    assert re.search(rf"Judge's answers +{len(traffic.right)}\b", shown)
    assert f"on {len(agreed)} of {labelled} pairs" in shown.replace("\n", " ")
    sent = [json.loads(line.details) for line in traffic.state.audit.lines() if line.action == "shadow.send"]
    assert [(each["contracts"], each["model"], each["questions"]) for each in sent] == [
        (["DPA-17"], MODEL, 2 * len(traffic.right))
    ]
    assert traffic.state.verify().faults == ()


def test_promotion_records_the_judge_and_peoples_labels(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = trained_project(tmp_path / "project", tiny_base_folder)
    project, clock, grounds = open_project(folder), [time.time() - 20 * DAY], Grounds(because="a test")
    (adapter,) = list_adapters(folder / "adapters")
    with State(f"sqlite:///{folder}/serving/state.sqlite", "ann", lambda: clock[0]) as state:
        state.tenants.add("acme", [ALIAS])
        key, _ = state.keys.create("acme")
        state.records.start("acme", "DPA-17", 30, 1.0, KeyFile(project.folder.record_key))
        state.releases.deploy(ALIAS, "courts-1", DIGESTS["a"], grounds)
        shadow = state.releases.start_candidate(ALIAS, Candidate(adapter.name, adapter.digest, None), grounds)
        traffic = Traffic(project, state, shadow.id, clock, key=key)
        fill(traffic, 150, worse=0.02, better=0.4)
        with scripted(says("new")) as server:
            judged_by(traffic, server).project.shadow.judge(ALIAS, PERMITTED)
        labelled = traffic.judge("ann")
        document(folder, "promote", ALIAS, "--untested", "a test")
        (*_, promoted) = document(folder, "releases", ALIAS)["releases"]
        assert state.verify().faults == ()
    found = promoted["grounds"]["shadow"]
    assert 0 < labelled < len(traffic.right)
    assert (found["outcome"], found["units"], found["labels"]) == ("better", 150, labelled)
    judge = found["judge"]
    assert (judge["model"], judge["share"], judge["answers"], judge["both"]) == (
        MODEL,
        0.5,
        len(traffic.right),
        labelled,
    )
    assert MODEL in tunewright("releases", ALIAS, "-p", folder).stdout


def test_judge_without_peoples_labels_decides_nothing(traffic: Traffic) -> None:
    for place in range(120):
        traffic.clock[0] += 60
        traffic.ask(f"user-{place}", "live", "new", "live")
    with scripted(says("live")) as server:
        found = judged_by(traffic, server).project.shadow.judge(
            ALIAS, ShadowJudgeOptions(contracts=("DPA-17",), people=0.01)
        )
    assert found.judge is not None and found.judge.both == 0 and found.finding is not None
    assert found.finding.outcome == "can't tell" and found.reached == {}
    assert all(-1 <= look.low <= look.value <= look.high <= 1 for look in found.looks)


def test_judge_that_agrees_no_more_than_chance_is_called_useless(traffic: Traffic) -> None:
    fill(traffic, 60, worse=0.4, better=0.4)
    with scripted(says("new")) as server:
        judged_by(traffic, server).project.shadow.judge(ALIAS, PERMITTED)
    traffic.judge("ann")
    found = traffic.project.shadow.status(ALIAS)
    assert found.judge is not None and found.judge.is_useless
    assert "of no use" in tunewright("shadow", "status", ALIAS, "-p", traffic.project.folder.root).stdout


def test_endpoint_that_dies_halfway_resumes_and_pays_for_nothing_twice(traffic: Traffic) -> None:
    for place in range(10):
        traffic.ask(f"user-{place}", "live", "new", "live")
    traffic.clock[0] += 86_400
    dead = lambda count: JSONResponse({"error": "gone"}, 401) if count >= 7 else None  # noqa: E731
    with scripted(says("live")) as server:
        project = judged_by(traffic, server, price_input=1000.0, price_output=0.0, budget=10.0).project
        server.misbehave = dead
        with pytest.raises(UserError, match="does not answer"):
            project.shadow.judge(ALIAS, PERMITTED)
        assert project.shadow.status(ALIAS).judge is not None
        server.misbehave = lambda _count: None
        found = project.shadow.judge(ALIAS, PERMITTED)
        assert found.judge is not None and found.judge.answers == 10
        assert len(server.prompts) == len(set(server.prompts)) == 20
        # 20 replies of 100 prompt tokens cost 2; the earlier ones count as well.
        traffic.ask("user-11", "live", "new", "live")
        judged_by(traffic, server, price_input=1000.0, price_output=0.0, budget=2.0)
        with pytest.raises(UserError, match="budget of 2 is used up"):
            traffic.project.shadow.judge(ALIAS, PERMITTED)


def test_budget_counts_unreadable_replies_and_replies_about_forgotten_requests(traffic: Traffic) -> None:
    traffic.ask(EVE, "live", "new", "live")
    script: Script = lambda _asked: "I like both."  # noqa: E731
    prices = {"price_input": 1000.0, "price_output": 0.0}
    with scripted(lambda asked: script(asked)) as server:
        project = judged_by(traffic, server, **prices, budget=10.0).project
        with pytest.raises(UserError, match="no verdict in the reply"):
            project.shadow.judge(ALIAS, PERMITTED)
        script = says("live")
        project.shadow.judge(ALIAS, PERMITTED)
        traffic.state.records.forget("acme", KeyFile(project.folder.record_key), user=EVE)
        trial = traffic.state.shadow_reviews.trial(ALIAS, 0.0, 0)
        assert traffic.state.shadow_reviews.judgements(trial) == []
        # Each of the 4 replies had 100 prompt tokens.
        assert trial.spent == pytest.approx(0.4)
        traffic.ask("user-2", "live", "new", "live")
        judged_by(traffic, server, **prices, budget=0.4)
        with pytest.raises(UserError, match=r"budget of 0\.4 is used up: 0\.4000 is spent"):
            traffic.project.shadow.judge(ALIAS, PERMITTED)
    assert len(server.bodies) == 4


def test_estimate_sends_and_declares_nothing_and_matches_the_later_requests(traffic: Traffic) -> None:
    for place in range(3):
        traffic.ask(f"user-{place}", "live", "new", "live")
    traffic.ask("user-4", "same", "same")
    root, asked = traffic.project.folder.root, ("shadow", "judge", ALIAS)
    prices = {"price_input": 1.0, "price_output": 2.0, "parameters": {"max_tokens": 50}}
    lines = len(traffic.state.audit.lines())
    with scripted(says("live")) as server:
        judged_by(traffic, server, **prices, api_key_env="NO_SUCH_KEY")
        estimated = document(root, *asked, "--estimate")
        shown = tunewright(*asked, "--estimate", "-p", root).stdout
        assert server.bodies == []
        assert [line.action for line in traffic.state.audit.lines()[lines:]] == ["shadow.read", "shadow.read"]
        # The first look declares its margin and maximum; an estimate is not a look.
        assert traffic.state.shadow_reviews.trial(ALIAS, 0.07, 123, declare=False).margin == 0.07
        judged_by(traffic, server, **prices)
        server.misbehave = lambda count: JSONResponse({"error": "gone"}, 401) if count >= 4 else None
        assert tunewright(*asked, "--contract", "DPA-17", "-p", root).code == 2
        assert document(root, *asked, "--estimate")["questions"] == 2
        server.misbehave = lambda _count: None
        document(root, *asked, "--contract", "DPA-17")
        assert document(root, *asked, "--estimate")["questions"] == 0
    tokens = sum(-(-len(prompt) // 4) for prompt in server.prompts)
    assert estimated == {
        "controls": 0,
        "questions": len(server.prompts),
        "reference_answers": 0,
        "known": 0,
        "prompt_tokens": tokens,
        "most_completion_tokens": 300,
        "most_cost": pytest.approx((tokens + 2 * 300) / 1e6),
    }
    assert shown.splitlines()[:2] == [
        "6 calls: 6 to judge",
        f"Still to send: about {tokens:,} prompt tokens (4 characters each), at most 300 reply tokens",
    ]


def test_nonsense_is_refused_and_single_replies_without_a_verdict_count_as_ties(traffic: Traffic) -> None:
    for place in range(4):
        traffic.ask(f"user-{place}", "live", "new", "live")
    script: Script = lambda _asked: "I like both."  # noqa: E731
    with scripted(lambda asked: script(asked)) as server:
        project = judged_by(traffic, server).project
        with pytest.raises(UserError, match="no verdict in the reply"):
            project.shadow.judge(ALIAS, PERMITTED)
        assert project.shadow.status(ALIAS).unjudged == 4
        script = lambda asked: "Hm." if asked.task == "case 2" else says("live")(asked)  # noqa: E731
        found = project.shadow.judge(ALIAS, PERMITTED)
    assert found.judge is not None and (found.judge.answers, found.judge.unread, found.unjudged) == (4, 1, 0)


def test_judge_is_refused_when_it_is_missing_compared_or_late(traffic: Traffic) -> None:
    traffic.ask("user-1", "live", "new", "live")
    root = traffic.project.folder.root
    ran = tunewright("shadow", "judge", ALIAS, "--contract", "DPA-17", "-p", root)
    assert ran.code == 2 and "judge.base_url" in ran.stderr
    with scripted(says("live")) as server:
        judged_by(traffic, server, model="courts-2")
        ran = tunewright("shadow", "judge", ALIAS, "--contract", "DPA-17", "-p", root)
        assert ran.code == 2 and "courts-2" in ran.stderr and "judge.model" in ran.stderr
        judged_by(traffic, server, api_key_env="NO_SUCH_KEY")
        ran = tunewright("shadow", "judge", ALIAS, "--contract", "DPA-17", "-p", root)
        assert ran.code == 2 and "NO_SUCH_KEY" in ran.stderr
        judged_by(traffic, server)
        with pytest.raises(UserError, match="cannot judge a share of 0"):
            traffic.project.shadow.judge(ALIAS, ShadowJudgeOptions(contracts=("DPA-17",), people=0.0))
        traffic.judge("ann")
        ran = tunewright("shadow", "judge", ALIAS, "--contract", "DPA-17", "-p", root)
        assert ran.code == 2 and "without a judge" in ran.stderr
        assert server.bodies == []


def test_judge_of_the_bases_family_is_warned_about_before_it_is_declared(traffic: Traffic) -> None:
    traffic.ask("user-1", "live", "new", "live")
    root = traffic.project.folder.root
    with scripted(says("live")) as server:
        for model, warned in (("Llama-3.3-70B-Instruct", True), (MODEL, False)):
            judged_by(traffic, server, model=model)
            config = (root / "tunewright.yaml").read_text()
            named = re.sub(r"(?m)^base_model:.*$", "base_model: meta-llama/Llama-3.1-8B", config)
            (root / "tunewright.yaml").write_text(named)
            ran = tunewright("shadow", "judge", ALIAS, "-p", root)
            assert ran.code == 2 and "--contract" in ran.stderr and server.bodies == []
            assert ("belongs to the base's family (llama)" in " ".join(ran.stderr.split())) is warned


def test_forgotten_request_leaves_nothing_of_the_judge(traffic: Traffic) -> None:
    traffic.ask("user-1", "live", "new", "live")
    planted = traffic.ask(EVE, f"{EVE} lives", "new", "new")
    traffic.clock[0] += 3 * 86_400
    with scripted(lambda asked: f"{asked.task}: {asked.answers}\n{says('new')(asked)}") as server:
        judged_by(traffic, server).project.shadow.judge(ALIAS, PERMITTED)
        assert any(EVE in prompt for prompt in server.prompts)
    trial = traffic.state.shadow_reviews.trial(ALIAS, 0.0, 0)
    assert {each.response_id for each in traffic.state.shadow_reviews.judgements(trial)} > {planted}
    traffic.judge("ann")
    traffic.project.shadow.status(ALIAS)
    traffic.state.records.forget("acme", KeyFile(traffic.project.folder.record_key), user=EVE)
    left = traffic.state.shadow_reviews.judgements(trial)
    assert planted not in {each.response_id for each in left} and len(left) == 2
    traffic.state.shadow_reviews.judge(trial, left)  # a reply that comes twice, or late, changes nothing
    assert traffic.state.verify().faults == ()
    traffic.state.close()
    files = [path for path in traffic.project.folder.root.rglob("*") if path.is_file()]
    assert [path for path in files if EVE.encode() in path.read_bytes() or planted.encode() in path.read_bytes()] == []
