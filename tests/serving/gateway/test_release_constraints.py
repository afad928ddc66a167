"""A release may carry its constraint, which answers requests that set no form."""

from __future__ import annotations

import pytest
from tenant_server import SHIP, Running, Stored, ask, until

from tunewright.generation.constraints import Grammar
from tunewright.serving.tenants import Candidate, State

pytest_plugins = ["two_tenants"]

COURTS = Grammar.choices(["Ala.", "Fla."]).rule
STATES = Grammar.choices(["Ohio", "Utah"]).rule


def _live(server: Running, number: int) -> None:
    until(lambda: any(f"courts: release {number} is live" in message for message in server.reported.messages))


def _free(server: Running, two_tenants: dict[str, str]) -> str:
    text, _ = ask(server.client(two_tenants["acme"]), "courts")
    assert text not in {"Ala.", "Fla.", "Ohio", "Utah"}
    return text


def test_release_constrains_requests_without_a_form_until_it_is_rolled_back(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    before = _free(server, two_tenants)
    state.releases.deploy("courts", "one", adapters["one"].digest, SHIP, grammar=COURTS)
    _live(server, 2)
    assert ask(client, "courts")[0] in {"Ala.", "Fla."}
    assert ask(client, "courts", response_format={"type": "text"})[0] in {"Ala.", "Fla."}
    completion = client.completions.create(model="courts", prompt="Which court?", max_tokens=12)
    assert completion.choices[0].text in {"Ala.", "Fla."}
    # The request's own form replaces the release's.
    assert ask(client, "courts", extra_body={"guided_choice": ["Ohio", "Utah"]})[0] in {"Ohio", "Utah"}
    assert any("requests that set no form get constrained answers" in each for each in server.reported.messages)
    assert ask(server.client(two_tenants["globex"]), "recipes")[0] not in {"Ala.", "Fla."}, "another alias is free"
    state.releases.rollback("courts")
    _live(server, 3)
    assert ask(client, "courts")[0] == before
    state.releases.rollback("courts", 2)
    _live(server, 4)
    assert ask(client, "courts")[0] in {"Ala.", "Fla."}
    assert state.verify().faults == ()


@pytest.mark.parametrize("share", [None, 0.5])
def test_candidate_has_its_own_constraint_and_keeps_it_when_promoted(
    server: Running,
    state: State,
    two_tenants: dict[str, str],
    adapters: dict[str, Stored],
    share: float | None,
) -> None:
    client, two = server.client(two_tenants["acme"]), adapters["two"].digest
    state.releases.deploy("courts", "one", adapters["one"].digest, SHIP, grammar=COURTS)
    state.releases.start_candidate("courts", Candidate("two", two, share, grammar=STATES), SHIP)
    _live(server, 3)
    answered = {ask(client, "courts", f"case {number}") for number in range(12)}
    for text, digest in answered:
        assert text in ({"Ohio", "Utah"} if digest == two else {"Ala.", "Fla."})
    if share is None:
        until(lambda: len(state.usage.shadow_lines("courts")) >= 1)
        answers = [line.shadow_answer for line in state.usage.shadow_lines("courts")]
        assert {answer for answer in answers if answer is not None} <= {"Ohio", "Utah"}
        assert any(answers)
    else:
        assert {digest for _, digest in answered} == {two, adapters["one"].digest}  # all but 1 in 2,000 draws
    promoted = state.releases.promote("courts")
    assert (promoted.adapter, promoted.grammar) == ("two", STATES)
    _live(server, 4)
    assert ask(client, "courts")[0] in {"Ohio", "Utah"}
    assert state.verify().faults == ()
