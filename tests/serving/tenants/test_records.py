"""Recorded requests in the state: the terms, encryption, the end of the retention, and deletion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from states import Clock, raw, reservation, with_tenant

from tunewright.core.errors import UserError
from tunewright.serving.tenants import State
from tunewright.serving.tenants.feedback import FeedbackValues
from tunewright.serving.tenants.quota import LOST_SECONDS, RequestUsage
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.records import NewRecord, is_sampled, unit_of
from tunewright.serving.tenants.releases import Release
from tunewright.serving.tenants.tenants import Caller

DAY = 86_400.0
USED = RequestUsage(3, 4, 0.0, 0.1, 0.2, "stop")
EVE = "eve.planted-7731"

on_sqlite = pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "serving" / "record.key")


@dataclass
class Times:
    """The clock, which may jump, and steady time."""

    clock: Clock
    steady: Clock

    def pass_by(self, seconds: float) -> None:
        self.clock.now += seconds
        self.steady.now += seconds


@contextmanager
def opened(url: str) -> Iterator[tuple[State, Times]]:
    times = Times(Clock(), Clock())
    with State(url, "ann", times.clock, times.steady) as state:
        yield state, times


@dataclass
class Tenant:
    """A recorded tenant, whose requests are answered and recorded."""

    state: State
    file: KeyFile
    caller: Caller
    release: Release
    asked: int = 0

    def ask(self, end_user: str | None = None, text: str = "Which court?") -> tuple[int, str]:
        """Answer a request that is not recorded yet; return its number and the response's id."""
        self.asked += 1
        response_id = f"chatcmpl-{self.caller.tenant}-{self.asked}"
        asked = replace(reservation(self.caller, self.release), response_id=response_id, end_user=end_user)
        number = self.state.quota.reserve(asked, "g")
        self.state.quota.settle(number, USED)
        return number, response_id

    def record(self, number: int, response_id: str, end_user: str | None = None, text: str = "Which court?") -> int:
        """Record the request; return how many records were stored."""
        keys = self.file.keys(self.caller.tenant)
        unit, kind, subject = unit_of(keys, end_user, [["user", text]], response_id)
        document = {"path": "/v1/chat/completions", "request": {"prompt": text}, "answers": [], "redacted": {}}
        body = keys.encrypt(document, number)
        return self.state.records.write([NewRecord(number, unit, kind, subject, 1.0, body)], {})


def recorded_tenant(state: State, file: KeyFile, name: str = "acme", days: int = 30) -> Tenant:
    caller, release = with_tenant(state, name)
    state.records.start(name, "DPA-17", days, 1.0, file)
    return Tenant(state, file, caller, release)


def test_record_is_encrypted_and_read_with_its_feedback_and_a_line_in_the_audit_log(
    state: State, state_url: str, file: KeyFile
) -> None:
    acme = recorded_tenant(state, file)
    number, response_id = acme.ask(EVE, "Which court sits in Ravenna?")
    assert acme.record(number, response_id, EVE, "Which court sits in Ravenna?") == 1
    values = FeedbackValues("down", None, "Ravenna Muni. Ct.", None)
    state.feedback.record(acme.caller.tenant_id, response_id, values)
    with raw(state_url) as execute:
        assert b"Ravenna" not in bytes(execute("SELECT body FROM request_records").scalar_one())
    (found,) = state.records.read("acme", file)
    assert (found.id, found.request, found.feedback) == (
        response_id,
        {"prompt": "Which court sits in Ravenna?"},
        values,
    )
    assert (found.release, found.digest, found.outcome, found.completion_tokens) == (
        1,
        acme.release.digest,
        "stop",
        4,
    )
    assert (found.unit_kind, found.unit, found.probability) == ("user", found.subject, 1.0)
    start, *_, read = [line for line in state.audit.lines() if line.action.startswith("record.")]
    assert (start.actor, json.loads(start.details)["contract"]) == ("ann", "DPA-17")
    assert (read.action, json.loads(read.details)) == ("record.read", {"records": 1})
    assert state.verify().faults == ()


def test_units_are_users_then_conversations_then_requests_and_differ_between_tenants(file: KeyFile) -> None:
    file.create()
    acme, globex = file.keys("acme"), file.keys("globex")
    opening = [["system", "Cite."], ["user", "Ravenna"]]
    assert unit_of(acme, "eve", opening, "1") == unit_of(acme, "eve", [["user", "other"]], "2")
    assert unit_of(acme, None, opening, "1") == unit_of(acme, None, opening, "2")
    assert unit_of(acme, None, [["prompt", "Ravenna"]], "1") != unit_of(acme, None, [["prompt", "Ravenna"]], "2")
    kinds = [unit_of(acme, *each)[1] for each in (("eve", opening, "1"), (None, opening, "1"), (None, [], "1"))]
    assert kinds == ["user", "conversation", "request"]
    assert unit_of(acme, "eve", opening, "1")[0] != unit_of(globex, "eve", opening, "1")[0]
    units = [acme.digest("user", str(number)) for number in range(2000)]
    tenth = {unit for unit in units if is_sampled(unit, 0.1)}
    assert 140 < len(tenth) < 260
    assert tenth <= {unit for unit in units if is_sampled(unit, 0.5)}
    assert all(is_sampled(unit, 1.0) for unit in units)


def test_records_end_after_their_days_and_a_clock_that_jumps_deletes_none(state_url: str, file: KeyFile) -> None:
    with opened(state_url) as (state, times):
        acme = recorded_tenant(state, file, days=10)

        def beat() -> int:
            for _ in range(4):
                times.pass_by(LOST_SECONDS / 4)
                state.quota.heartbeat("g", "server", 1)
            return state.records.list("acme")[0].records

        acme.record(*acme.ask())
        times.pass_by(9 * DAY)
        acme.record(*acme.ask())
        assert beat() == 2
        times.clock.now += 365 * DAY
        assert beat() == 2, "the clock jumped forward, and stays there"
        times.clock.now -= 700 * DAY
        assert beat() == 2, "it jumped back"
        times.clock.now += 335 * DAY
        times.pass_by(DAY)
        assert len(state.records.read("acme", file)) == 1, "no server runs, but nobody reads the first one any more"
        assert beat() == 1, "ten days have passed for the first record"
        times.pass_by(9 * DAY)
        assert beat() == 0


def test_forgetting_a_user_deletes_everything_of_the_user_and_nothing_else(state: State, file: KeyFile) -> None:
    acme, globex = recorded_tenant(state, file), recorded_tenant(state, file, "globex")
    up = FeedbackValues("up", None, f"{EVE} was here", None)
    for tenant, end_user in ((acme, EVE), (acme, EVE), (acme, "bob"), (acme, None), (globex, EVE)):
        number, response_id = tenant.ask(end_user)
        assert tenant.record(number, response_id, end_user) == 1
        state.feedback.record(tenant.caller.tenant_id, response_id, up)
        state.quota.record_shadow(number, tenant.release.id, f"{EVE} asked", "b", None)
    done = state.records.forget("acme", file, user=EVE)
    assert (done.requests, done.records, done.feedback, done.shadow_answers) == (2, 2, 2, 2)
    assert [line.end_user for line in state.usage.lines("acme")] == [None, None, "bob", None]
    assert [each.records for each in state.records.list()] == [2, 1]
    assert len(state.feedback.lines("acme")) == len(state.usage.shadow_lines("courts-acme")) == 2
    last = json.loads(state.audit.lines()[-1].details)
    assert (last["scope"], last["tombstone"]) == ("user", file.keys("acme").digest("user", EVE))
    assert state.records.forget("acme", file, user=EVE).requests == 0
    assert state.verify().faults == ()


def test_forgetting_a_request_or_all_of_a_tenant(state: State, file: KeyFile) -> None:
    acme = recorded_tenant(state, file)
    ids = []
    for end_user in ("bob", "bob", None):
        number, response_id = acme.ask(end_user)
        acme.record(number, response_id, end_user)
        ids.append(response_id)
    assert state.records.forget("acme", file, response_id=ids[0]).records == 1
    assert [each.id for each in state.records.read("acme", file)] == ids[1:]
    file.path.unlink()  # deletion does not need the key
    done = state.records.forget("acme", file)
    assert (done.records, done.digest) == (2, None)
    assert {line.end_user for line in state.usage.lines()} == {None}
    with pytest.raises(UserError, match="no tenant 'nobody'"):
        state.records.forget("nobody", file, user="bob")


def test_what_arrives_for_a_forgotten_request_is_dropped(state: State, file: KeyFile) -> None:
    acme = recorded_tenant(state, file)
    number, response_id = acme.ask(EVE)
    state.records.forget("acme", file, user=EVE)
    assert acme.record(number, response_id, EVE) == 0
    state.quota.record_shadow(number, acme.release.id, "a", "b", None)
    assert state.feedback.record(acme.caller.tenant_id, response_id, FeedbackValues("up", None, None, None)) is None
    assert state.usage.shadow_lines("courts-acme") == []
    assert acme.record(*acme.ask(EVE), EVE) == 1, "a later request of the same user"
    (recording,) = state.records.list()
    assert (recording.records, recording.dropped) == (1, 0)


@on_sqlite
def test_no_byte_of_a_forgotten_user_is_left_in_the_files_of_the_state(state_url: str, file: KeyFile) -> None:
    folder = file.path.parent
    with State(state_url, "ann") as state:
        acme = recorded_tenant(state, file)
        for place in range(60):  # over several pages, which split
            end_user = EVE if place % 3 else f"other-{place}"
            number, response_id = acme.ask(end_user)
            acme.record(number, response_id, end_user, f"{EVE} asks for number {place}")
            text = f"{end_user} " * 40
            state.feedback.record(acme.caller.tenant_id, response_id, FeedbackValues(None, None, text, None))
            state.quota.record_shadow(number, acme.release.id, text, text, None)
        assert any(EVE.encode() in path.read_bytes() for path in folder.iterdir())
        done = state.records.forget("acme", file, user=EVE)
        assert (done.records, done.scrubbed) == (40, True)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [name for name, found in files.items() if EVE.encode() in found] == []
    assert any(str(done.digest).encode() in found for found in files.values()), "the tombstone"
    assert b"other-0" in files["state.sqlite"]


@pytest.mark.slow
@on_sqlite
def test_forgetting_while_others_read_says_that_the_log_is_not_empty(state_url: str, file: KeyFile) -> None:
    with State(state_url) as state, State(state_url) as other:
        acme = recorded_tenant(state, file)
        acme.record(*acme.ask("bob"), "bob")
        with other.database.reading() as connection:
            connection.exec_driver_sql("SELECT * FROM request_records").all()
            assert state.records.forget("acme", file, user="bob").scrubbed is False


def test_stopping_drops_what_is_on_its_way_and_starting_again_changes_the_terms(state: State, file: KeyFile) -> None:
    acme = recorded_tenant(state, file)
    acme.record(*acme.ask())
    late = acme.ask()
    assert state.records.stop("acme").stopped is not None
    assert acme.record(*late) == 0
    key, _ = state.keys.create("acme")
    assert state.keys.caller(key).record_share is None
    with pytest.raises(UserError, match="acme is not recorded"):
        state.records.stop("acme")
    again = state.records.start("acme", "DPA-18", 5, 0.25, file)
    assert (again.contract, again.days, again.share, again.stopped, again.records) == ("DPA-18", 5, 0.25, None, 1)
    assert state.keys.caller(key).record_share == 0.25
    assert state.verify().faults == ()


def test_recording_without_a_contract_or_a_tenant_is_refused(state: State, file: KeyFile) -> None:
    state.tenants.add("acme")
    for tenant, contract in (("acme", " "), ("nobody", "DPA-17")):
        with pytest.raises(UserError):
            state.records.start(tenant, contract, 30, 1.0, file)
    assert state.records.list() == []
    assert not file.path.exists()


def test_recording_that_no_log_line_permits_is_found(state: State, state_url: str, file: KeyFile) -> None:
    recorded_tenant(state, file)
    with raw(state_url) as execute:
        execute("UPDATE recordings SET share = 0.5")
    assert state.verify().faults == ("recording of acme differs from the audit log",)


def test_lost_wrong_or_public_key_file_is_one_error_and_the_records_stay(state: State, file: KeyFile) -> None:
    acme = recorded_tenant(state, file)
    acme.record(*acme.ask())
    assert file.path.stat().st_mode & 0o777 == 0o600
    right = file.path.read_text()

    def refusal() -> str:
        refused = []
        for use in (
            lambda fresh: state.records.read("acme", fresh),
            lambda fresh: state.records.start("acme", "DPA-18", 30, 1.0, fresh),
            state.records.require_keys,  # a server does not start
        ):
            with pytest.raises(UserError) as caught:
                use(KeyFile(file.path))
            refused.append(f"{caught.value.what} {caught.value.where}")
        assert len(set(refused)) == 1
        return refused[0]

    file.path.unlink()
    assert refusal() == f"The key file of recorded requests is missing {file.path}"
    file.create()
    assert "The key file is not that of acme's records" in refusal()
    file.path.write_text("nonsense")
    assert "This is not a key file" in refusal()
    file.path.write_text(right)
    file.path.chmod(0o644)
    assert "Other users can read the key file" in refusal()
    file.path.chmod(0o600)
    assert len(state.records.read("acme", KeyFile(file.path))) == 1
    state.records.require_keys(KeyFile(file.path))


def test_lost_key_file_is_replaced_once_nothing_needs_it(state: State, file: KeyFile) -> None:
    acme = recorded_tenant(state, file)
    acme.record(*acme.ask())
    file.path.unlink()
    fresh = KeyFile(file.path)
    for step in (lambda: state.records.stop("acme"), lambda: state.records.forget("acme", fresh)):
        with pytest.raises(UserError, match="is missing"):
            state.records.start("acme", "DPA-18", 30, 1.0, fresh)
        step()
    state.records.start("acme", "DPA-18", 30, 1.0, fresh)
    again = Tenant(state, fresh, acme.caller, acme.release, asked=1)
    assert again.record(*again.ask()) == 1
    assert len(state.records.read("acme", fresh)) == 1


def test_swapped_or_changed_record_is_refused(state: State, state_url: str, file: KeyFile) -> None:
    acme = recorded_tenant(state, file)
    (first, _), (second, _) = ((number, acme.record(number, name)) for number, name in (acme.ask(), acme.ask()))
    with raw(state_url) as execute:
        body: Any = execute("SELECT body FROM request_records WHERE request_id = :number", number=first).scalar_one()
        execute("UPDATE request_records SET body = :body WHERE request_id = :number", body=body, number=second)
    with pytest.raises(UserError, match=f"The record of request {second} was changed"):
        state.records.read("acme", file)


def test_roll_up_deletes_and_counts_records(state_url: str, file: KeyFile) -> None:
    with opened(state_url) as (state, times):
        times.pass_by(-(times.clock.now % DAY))
        acme = recorded_tenant(state, file)
        acme.record(*acme.ask())
        times.pass_by(2 * DAY)
        acme.record(*acme.ask())
        pruned = state.usage_rollup.roll_up(times.clock.now - DAY)
        assert (pruned.requests, pruned.request_records) == (1, 1)
        assert state.records.list()[0].records == 1
        assert state.verify().faults == ()
