"""Releases: the adapter of an alias after any steps, checked against a stack."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import DIGESTS, SHIP, raw

from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.serving.tenants import Candidate, Grounds, Release, State


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


def test_rollback_restores_any_release_by_number(state: State) -> None:
    for name in "abc":
        state.releases.deploy("courts", name, DIGESTS[name], SHIP)
    assert state.releases.rollback("courts", 1).adapter == "a"
    with pytest.raises(UserError, match="already"):
        state.releases.rollback("courts", 1)
    assert state.releases.rollback("courts").adapter == "c"
    with pytest.raises(UserError, match="a release from 1 to 5"):
        state.releases.rollback("courts", 6)


STEPS = st.sampled_from([*(("deploy", n) for n in "abc"), *(("canary", n) for n in "abc")])
COMMANDS = st.sampled_from([("promote", ""), ("rollback", ""), ("undeploy", "")])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with State(f"sqlite:///{tmp_path_factory.mktemp('releases')}/state.sqlite") as state:
        yield state


@settings(examples(100), suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(st.one_of(STEPS, COMMANDS), max_size=12))
def test_alias_follows_a_stack_after_any_steps(shared: State, steps: list[tuple[str, str]]) -> None:
    releases, alias = shared.releases, f"alias-{shared.releases.newest()}"
    history: list[Release] = []
    stack: list[str] = []  # the live adapter on top
    candidate, undeployed = "", True
    for step, name in steps:
        live = "" if undeployed else stack[-1]
        trial = bool(candidate) or (undeployed and bool(stack))
        adapter = candidate if step == "promote" else name
        try:
            match step:
                case "deploy":
                    allowed = live != name or bool(candidate)
                    made = releases.deploy(alias, name, DIGESTS[name], SHIP)
                case "canary":
                    allowed = bool(live) and name not in (live, candidate)
                    made = releases.start_candidate(alias, Candidate(name, DIGESTS[name], 0.1), SHIP)
                case "promote":
                    allowed = bool(candidate)
                    made = releases.promote(alias)
                case "undeploy":
                    allowed = bool(live)
                    made = releases.undeploy(alias)
                case _:
                    allowed = trial or len(stack) > 1
                    made = releases.rollback(alias)
        except UserError:
            assert not allowed
            continue
        assert allowed
        if step in ("deploy", "promote") and stack[-1:] != [adapter]:
            stack.append(adapter)
        elif step == "rollback" and not trial:
            stack.pop()
        candidate, undeployed = name if step == "canary" else "", step == "undeploy"
        # The earlier releases stay as they were, and one is added.
        history.append(made)
        assert releases.history(alias) == history
        assert (made.adapter, made.undeployed) == (stack[-1], undeployed)
        assert (made.candidate.adapter if made.candidate else "") == candidate


def test_invalid_releases_are_refused(state: State) -> None:
    with pytest.raises(UserError, match="no live release to try a candidate"):
        state.releases.start_candidate("courts", Candidate("a", DIGESTS["a"], 0.1), SHIP)
    with pytest.raises(UserError, match="There is no alias 'courts'"):
        state.releases.rollback("courts")
    with pytest.raises(UserError, match=r"Invalid name .* for an alias"):
        state.releases.deploy("Courts/1", "a", DIGESTS["a"], SHIP)
    state.releases.deploy("courts", "a", DIGESTS["a"], SHIP)
    with pytest.raises(UserError, match="no adapter before"):
        state.releases.rollback("courts")
    with pytest.raises(UserError, match="has no candidate"):
        state.releases.promote("courts")
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="share must be above 0"):
            state.releases.start_candidate("courts", Candidate("b", DIGESTS["b"], share), SHIP)


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
