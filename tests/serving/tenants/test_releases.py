"""Releases: their grounds, system prompts and order; test_release_machine.py has the rules for any steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from states import DIGESTS, SHIP, raw

from tunewright.core.errors import UserError
from tunewright.serving.tenants import State
from tunewright.serving.tenants.releases import Candidate, Grounds


def test_grounds_follow_the_adapter(state_url: str) -> None:
    forced = Grounds("can't tell", "e2", "the client asked for it")
    with State(state_url, "ann") as state:
        state.releases.deploy("courts", "a", DIGESTS["a"], SHIP)
        state.releases.start_candidate("courts", Candidate("b", DIGESTS["b"], None), forced)
        assert state.releases.promote("courts").grounds == forced
        back = state.releases.rollback("courts")
        assert (back.adapter, back.grounds, back.restores, back.author) == ("a", SHIP, 1, "ann")


def test_rollback_of_a_candidate_restores_the_live_adapters_grounds(state_url: str) -> None:
    forced = Grounds("can't tell", "e2", "the client asked for it")
    with State(state_url) as state:
        state.releases.deploy("courts", "a", DIGESTS["a"], SHIP)
        for name in "bc":
            state.releases.start_candidate("courts", Candidate(name, DIGESTS[name], 0.1), forced)
        back = state.releases.rollback("courts")
        assert (back.adapter, back.grounds, back.restores) == ("a", SHIP, 1)


def test_rollback_of_a_withdrawal_restores_its_grounds(state: State) -> None:
    state.releases.deploy("courts", "a", DIGESTS["a"], SHIP)
    ended = state.releases.undeploy("courts", "a typing mistake")
    assert (ended.adapter, ended.grounds.because, ended.author) == ("a", "a typing mistake", "ann")
    assert state.releases.live() == {}
    with pytest.raises(UserError, match="already undeployed, since its release 2"):
        state.releases.undeploy("courts")
    with pytest.raises(UserError, match="no live release to try a candidate"):
        state.releases.start_candidate("courts", Candidate("b", DIGESTS["b"], 0.1), SHIP)
    with pytest.raises(UserError, match="Release 2 of courts is a withdrawal"):
        state.releases.rollback("courts", 2)
    back = state.releases.rollback("courts")
    assert (back.adapter, back.grounds, back.restores) == ("a", SHIP, 1)
    assert list(state.releases.live()) == ["courts"]
    assert not state.verify().faults


def test_invalid_releases_are_refused(state: State) -> None:
    with pytest.raises(UserError, match=r"Invalid name .* for an alias"):
        state.releases.deploy("Courts/1", "a", DIGESTS["a"], SHIP)
    state.releases.deploy("courts", "a", DIGESTS["a"], SHIP)
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match=f"{share:g}"):
            state.releases.start_candidate("courts", Candidate("b", DIGESTS["b"], share), SHIP)
    with pytest.raises(UserError, match="from 1 to 1"):
        state.releases.rollback("courts", 2)


def test_concurrent_deploys_are_serialized(state_url: str) -> None:
    with State(state_url) as one, State(state_url) as two:
        one.releases.deploy("courts", "a", DIGESTS["a"], SHIP)

        def deploy(name: str) -> None:
            (one if name in "bd" else two).releases.deploy("courts", name, DIGESTS[name], SHIP)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(deploy, "bcde"))
        history = one.releases.history("courts")
        assert [release.number for release in history] == [1, 2, 3, 4, 5]
        assert two.releases.live()["courts"] == history[-1]
        assert two.releases.newest() == history[-1].id


def test_system_prompt_choice_belongs_to_the_release(state_url: str, state: State) -> None:
    releases = state.releases
    releases.deploy("courts", "a", DIGESTS["a"], SHIP)
    with pytest.raises(UserError, match="already"):
        releases.deploy("courts", "a", DIGESTS["a"], SHIP)
    assert not releases.deploy("courts", "a", DIGESTS["a"], SHIP, system_prompt=False).system_prompt
    with pytest.raises(UserError, match="already"):
        releases.require_deployable("courts", "a", DIGESTS["a"], system_prompt=False)
    beside = releases.start_candidate("courts", Candidate("b", DIGESTS["b"], 0.1), SHIP)
    assert beside.candidate is not None
    assert (beside.system_prompt, beside.candidate.system_prompt) == (False, True)
    assert releases.promote("courts").answer == (DIGESTS["b"], True, None)
    assert releases.rollback("courts").answer == (DIGESTS["a"], False, None)
    releases.start_candidate("courts", Candidate("c", DIGESTS["c"], None, False), SHIP)
    assert releases.promote("courts").answer == (DIGESTS["c"], False, None)
    assert not releases.undeploy("courts").system_prompt
    assert releases.rollback("courts").answer == (DIGESTS["c"], False, None)
    assert releases.rollback("courts").answer == (DIGESTS["a"], False, None)
    assert releases.rollback("courts").answer == (DIGESTS["a"], True, None)
    assert releases.live() == {"courts": releases.history("courts")[-1]}
    assert state.verify().faults == ()
    with raw(state_url) as execute:
        execute("UPDATE releases SET system_prompt = :no WHERE number = 1", no=False)
        execute("UPDATE releases SET candidate_system_prompt = :yes WHERE number = 6", yes=True)
    assert state.verify().faults == (
        "release 1 of courts differs from the audit log",
        "release 6 of courts differs from the audit log",
    )
