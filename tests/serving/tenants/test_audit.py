"""The audit log: later changes are detected and located."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import DIGESTS, SHIP, raw, rewrite

from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.gate.results import IsolationCheck, IsolationTest
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits

COLUMNS = ("time", "actor", "action", "subject", "details", "previous", "digest")


def fill(state: State) -> None:
    """Six lines."""
    state.tenants.add("acme", ["courts"])
    state.tenants.limit("acme", Limits(requests_per_minute=60))
    _key, message = state.keys.create("acme")
    state.releases.deploy("courts", "courts-1", DIGESTS["a"], SHIP)
    state.releases.deploy("courts", "courts-2", DIGESTS["b"], SHIP)
    state.keys.revoke(message.prefix)


def test_audit_adds_a_line_with_author_and_action_for_every_change(state: State) -> None:
    fill(state)
    lines = state.audit.lines()
    assert [line.action for line in lines] == [
        "tenant.add",
        "tenant.limit",
        "key.add",
        "release.deploy",
        "release.deploy",
        "key.revoke",
    ]
    assert {line.actor for line in lines} == {"ann"}
    assert json.loads(lines[1].details)["after"]["requests_per_minute"] == 60
    check = state.verify()
    assert (check.faults, check.lines, check.head) == ((), 6, lines[-1].digest)


def test_change_without_effect_adds_no_line(state: State) -> None:
    state.tenants.add("acme", ["courts"], Limits(concurrency=2))
    state.tenants.limit("acme", Limits(concurrency=2))
    state.tenants.grant("acme", ["courts"])
    assert len(state.audit.lines()) == 1


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('audit')}/state.sqlite"
    with State(url, "ann") as state:
        fill(state)
    return url


@settings(examples(60), suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    number=st.integers(1, 6), column=st.sampled_from(COLUMNS), value=st.text(st.characters(codec="ascii"), max_size=8)
)
def test_verify_names_a_changed_line(filled: str, number: int, column: str, value: str) -> None:
    with State(filled) as state, raw(filled) as execute:
        before = execute(f"SELECT {column} FROM audit WHERE number = :n", n=number).scalar()
    if value == before:
        return
    with raw(filled) as execute:
        execute(f"UPDATE audit SET {column} = :v WHERE number = :n", v=value, n=number)
    try:
        with State(filled) as state:
            faults = state.verify().faults
        assert any(f"line {number} was changed" in fault for fault in faults), faults
    finally:
        with raw(filled) as execute:
            execute(f"UPDATE audit SET {column} = :v WHERE number = :n", v=before, n=number)
    with State(filled) as state:
        assert not state.verify().faults


@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
def test_verify_names_a_missing_line(state_url: str, state: State, number: int) -> None:
    fill(state)
    with raw(state_url) as execute:
        execute("DELETE FROM audit WHERE number = :n", n=number)
    assert f"line {number} is missing" in state.verify().faults[0]


def _rewrite(state_url: str, first: int, *, head: bool) -> None:
    """Change a line and rewrite the digests from there on, as a careful intruder would."""
    with State(state_url) as state:
        lines = [asdict(line) for line in state.audit.lines()]
    lines[first - 1]["actor"] = "bob"
    with raw(state_url) as execute:
        for place in range(first - 1, len(lines)):
            line = lines[place]
            line["previous"] = lines[place - 1]["digest"] if place else ""
            del line["digest"]
            line["digest"] = digest(line)
            execute("UPDATE audit SET actor=:actor, previous=:previous, digest=:digest WHERE number=:number", **line)
        if head:
            execute("UPDATE audit_head SET digest = :d", d=lines[-1]["digest"])


def test_verify_finds_a_line_changed_together_with_its_digest(state_url: str, state: State) -> None:
    fill(state)
    noted = state.audit.lines()
    changed = asdict(noted[2]) | {"actor": "bob"}
    del changed["digest"]
    with raw(state_url) as execute:
        execute("UPDATE audit SET actor = 'bob', digest = :d WHERE number = 3", d=digest(changed))
    assert state.verify().faults == ("line 3 and its digest were changed: line 4 has another previous digest",)


def test_verify_finds_a_rewritten_chain_by_its_head(state_url: str, state: State) -> None:
    fill(state)
    _rewrite(state_url, 3, head=False)
    assert "line 6 and its digest were changed" in state.verify().faults[0]


def test_verify_finds_a_rewritten_log_by_a_noted_digest(state_url: str, state: State) -> None:
    fill(state)
    noted = state.verify().head
    assert not state.verify(noted).faults
    state.tenants.add("globex")
    assert not state.verify(noted[:16]).faults  # it may have grown since
    _rewrite(state_url, 3, head=True)
    assert not state.verify().faults
    assert "no line has the noted digest" in state.verify(noted).faults[0]


def test_verify_names_a_release_that_differs_from_the_log(state_url: str, state: State) -> None:
    fill(state)
    with raw(state_url) as execute:
        execute("UPDATE releases SET digest = :d WHERE number = 2", d=DIGESTS["c"])
    assert state.verify().faults == ("release 2 of courts differs from the audit log",)
    with raw(state_url) as execute:
        execute("DELETE FROM releases WHERE number = 2")
    assert state.verify().faults == ("release 2 of courts differs from the audit log",)


def _tested(state_url: str) -> dict[str, Any]:
    """The isolation test of release 1 in the table. Its tolerance is a whole number, as older versions wrote some."""
    check = IsolationCheck("one request", 8, 0, 0)
    adapters, versions, alike = (DIGESTS["a"],), {"torch": "2"}, (("a", "b"),)
    with State(state_url, "ann") as state:
        test = IsolationTest(
            "isolated", "s" * 64, "peft", "cpu", "b" * 64, adapters, versions, 1, (check,), alike, (), "t", 2.5
        )
        state.releases.deploy("courts", "courts-1", DIGESTS["a"], replace(SHIP, isolation=test))
        assert state.verify().faults == ()
    stored: dict[str, Any] = json.loads(json.dumps(asdict(test)))
    return stored


def test_verify_names_a_release_whose_isolation_test_was_edited(state_url: str) -> None:
    test = _tested(state_url)
    check = test["checks"][0]
    for edit in (
        {"seen": True},
        {"tolerance": "1"},
        {"seconds": "2.5"},
        {"checks": [check | {"seen": True}]},
        {"checks": [check | {"wrong": "0"}]},
    ):
        with raw(state_url) as execute:
            execute("UPDATE releases SET isolation = :edited", edited=json.dumps(test | edit))
        with State(state_url) as state:
            assert state.verify().faults == ("release 1 of courts differs from the audit log",)


def test_concurrent_changes_make_one_chain(state_url: str) -> None:
    with State(state_url) as one, State(state_url) as two:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda n: (one, two)[n % 2].tenants.add(f"t{n}"), range(20)))
        check = one.verify()
        assert (check.faults, check.lines) == ((), 20)


def test_concurrent_opens_create_one_state(state_url: str) -> None:
    def come(index: int) -> None:
        with State(state_url) as state:
            state.tenants.add(f"t{index}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come, range(4)))
    with State(state_url) as state:
        assert len(state.tenants.list()) == 4


def test_open_waits_while_another_process_creates_the_state(tmp_path: Path) -> None:
    file = tmp_path / "state.sqlite"
    with ThreadPoolExecutor(1) as threads, closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN IMMEDIATE")
        opened = threads.submit(lambda: State(f"sqlite:///{file}"))
        with pytest.raises(TimeoutError):
            opened.result(timeout=0.3)
        other.rollback()
        with opened.result() as state:
            assert state.tenants.list() == []


EDITS = {
    "UPDATE tenants SET tokens_per_minute = 5": "tenant acme",
    "UPDATE tenants SET requests_per_minute = NULL": "tenant acme",
    "DELETE FROM tenant_aliases": "tenant acme",
    "UPDATE api_keys SET revoked = NULL": "key tw_",
    "UPDATE api_keys SET expires = 1": "key tw_",
    "UPDATE api_keys SET prefix = 'tw_0000000000'": "key tw_",
}


def test_verify_names_a_tenant_or_key_that_differs_from_the_log(state_url: str, state: State) -> None:
    fill(state)
    with raw(state_url) as execute:
        kept = {name: execute(f"SELECT * FROM {name}").mappings().all() for name in ("tenants", "api_keys")}
        aliases = execute("SELECT * FROM tenant_aliases").mappings().one()
    for edit, named in EDITS.items():
        with raw(state_url) as execute:
            execute(edit)
        faults = state.verify().faults
        assert faults
        assert all(fault.startswith(named) and "differs from the audit log" in fault for fault in faults)
        with raw(state_url) as execute:
            for table, (row,) in kept.items():
                rewrite(execute, table, row)
            execute("DELETE FROM tenant_aliases")
            execute("INSERT INTO tenant_aliases VALUES (:tenant_id, :alias)", **aliases)
        assert not state.verify().faults


CHANGES = st.lists(
    st.tuples(st.sampled_from(["allow", "deny", "limit", "key", "narrow key", "rotate", "revoke"]), st.integers(0, 3)),
    max_size=12,
)


@examples(25)
@given(changes=CHANGES)
def test_replay_equals_the_tables_after_any_commands(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int]]
) -> None:
    url = f"sqlite:///{tmp_path_factory.mktemp('replay')}/state.sqlite"
    with State(url, "ann") as state:
        state.tenants.add("acme", ["a", "b"])
        for what, number in changes:
            with suppress(UserError):  # nothing to deny, no key to rotate: then nothing changes
                _change(state, what, number)
        assert not state.verify().faults


def _change(state: State, what: str, number: int) -> None:
    alias = "abcd"[number]
    keys = [key.prefix for key in state.keys.list()]
    match what:
        case "allow" | "deny":
            (state.tenants.grant if what == "allow" else state.tenants.revoke)("acme", [alias])
        case "limit":
            state.tenants.limit("acme", Limits(requests_per_minute=number or None))
        case "key":
            state.keys.create("acme", lifetime=number * 1000 or None)
        case "narrow key":
            state.keys.create("acme", aliases=[alias])
        case "rotate" if keys:
            state.keys.rotate(keys[number % len(keys)], overlap=1000)
        case "revoke" if keys:
            state.keys.revoke(keys[number % len(keys)])


@pytest.mark.parametrize("noted", ["", "xyz", "abc", "A" * 64])
def test_verify_refuses_a_noted_text_that_is_not_a_digest(state_url: str, noted: str) -> None:
    with State(state_url) as state, pytest.raises(UserError, match="Invalid digest"):
        state.verify(noted)


def test_verify_finds_no_fault_in_a_concurrent_change(state_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with State(state_url, "ann") as state, State(state_url, "bob") as other:
        fill(state)
        untouched = state.tenants.list

        def list_after_a_change() -> object:
            monkeypatch.undo()
            other.tenants.add("globex")
            return untouched()

        monkeypatch.setattr(state.tenants, "list", list_after_a_change)
        check = state.verify()
        assert (check.faults, check.lines) == ((), 7)
