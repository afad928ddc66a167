"""Damage to the serving state: a replaced file, broken pages, and numbers that do not add up."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from states import Clock, raw, reservation, rewrite, with_tenant

from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import StateUnavailableError
from tunewright.serving.tenants.quota import RequestUsage

USED = RequestUsage(10, 20, 0.01, 0.02, 0.03, "stop")
DAY = 86_400


def _backup(file: Path, copy: Path) -> None:
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def test_replaced_file_is_not_used_until_the_open_one_returns(tmp_path: Path) -> None:
    file = tmp_path / "state.sqlite"
    with State(f"sqlite:///{file}") as state:
        state.tenants.add("acme")
        key, _ = state.keys.create("acme")
        _backup(file, tmp_path / "backup.sqlite")
        (tmp_path / "open").hardlink_to(file)
        (tmp_path / "backup.sqlite").replace(file)
        for use in (
            lambda: state.keys.caller(key),
            lambda: state.quota.settle(1, USED),
            lambda: state.tenants.add("globex"),
        ):
            with pytest.raises(StateUnavailableError, match="was replaced while it was in use") as caught:
                use()
            assert "state.sqlite-wal" in str(caught.value)
        (tmp_path / "open").replace(file)
        state.keys.caller(key)
        assert [tenant.name for tenant in state.tenants.list()] == ["acme"]


def test_deleted_file_is_not_used_any_more(tmp_path: Path) -> None:
    file = tmp_path / "state.sqlite"
    with State(f"sqlite:///{file}") as state:
        state.tenants.add("acme")
        file.unlink()
        with pytest.raises(StateUnavailableError, match="was deleted while it was in use"):
            state.tenants.list()
    assert not file.exists()


def _fill(url: str, requests: int) -> None:
    clock = Clock()
    with State(url, "ann", clock=clock) as state:
        caller, release = with_tenant(state)
        with_tenant(state, "globex")
        for _ in range(requests):
            state.quota.settle(state.quota.reserve(reservation(caller, release), "g"), USED)
            clock.now += 1
        state.quota.reserve(reservation(caller, release), "g")  # unfinished


TOKENS = "its tokens do not add up"
RELEASE = "its release has another alias or adapter"
EDITS = {
    "prompt_tokens = 11": TOKENS,
    "completion_tokens = 21": TOKENS,
    "tokens = 31": TOKENS,
    "prompt_tokens = NULL": TOKENS,
    "tenant_id = 2": "its key belongs to another tenant",
    "alias = 'other'": RELEASE,
    "digest = 'b' || substr(digest, 2)": RELEASE,
    "release_id = 2": RELEASE,
}


def test_verify_names_a_request_with_changed_usage(state_url: str) -> None:
    _fill(state_url, 3)
    with State(state_url) as state:
        assert state.verify().faults == ()
        for edit, named in EDITS.items():
            with raw(state_url) as execute:
                before = dict(execute("SELECT * FROM requests WHERE id = 2").mappings().one())
                execute(f"UPDATE requests SET {edit} WHERE id = 2")
            assert state.verify().faults == (f"request 2: {named}",)
            with raw(state_url) as execute:
                rewrite(execute, "requests", before, "id = 2")


DAY_EDITS = (
    "UPDATE usage_days SET prompt_tokens = prompt_tokens + 1",
    "UPDATE usage_days SET completion_tokens = completion_tokens - 1",
    "UPDATE usage_days SET requests = requests + 1",
    "UPDATE usage_days SET tenant_id = 2",
    "DELETE FROM usage_days",
    "INSERT INTO usage_days SELECT day + 1, tenant_id, alias, digest, requests, prompt_tokens, completion_tokens, "
    "first_tokens, first_token_s FROM usage_days",
)


def test_verify_names_a_day_whose_totals_differ_from_the_log(state_url: str) -> None:
    clock = Clock()
    _fill(state_url, 3)
    with State(state_url, "ann", clock=clock) as state:
        clock.now += 2 * DAY
        day = clock.now // DAY * DAY
        assert state.usage_rollup.roll_up(day).requests == 3
        number = state.usage.lines()[0].id
        state.quota.settle(number, USED)
        assert state.usage_rollup.roll_up(day).requests == 1  # the same day again
        with raw(state_url) as execute:
            before = dict(execute("SELECT * FROM usage_days").mappings().one())
        for edit in DAY_EDITS:
            assert state.verify().faults == ()
            with raw(state_url) as execute:
                execute(edit)
            faults = state.verify().faults
            assert faults and all(
                "usage of 2027-01-1" in fault and "differs from the audit log" in fault for fault in faults
            )
            with raw(state_url) as execute:
                execute("DELETE FROM usage_days")
                execute(f"INSERT INTO usage_days VALUES ({', '.join(f':{name}' for name in before)})", **before)


def test_verify_names_broken_pages(tmp_path: Path) -> None:
    file = tmp_path / "state.sqlite"
    _fill(f"sqlite:///{file}", 300)
    with closing(sqlite3.connect(file)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'requests_by_time'").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with file.open("r+b") as stored:
        stored.seek((page - 1) * size + size - 200)
        stored.write(bytes(100))
    with State(f"sqlite:///{file}") as state:
        faults = state.verify().faults
        assert faults and all(fault.startswith("the database file is damaged: ") for fault in faults)


@pytest.mark.parametrize("table", ["requests", "audit", "releases"])
def test_verify_reports_a_table_that_cannot_be_read(tmp_path: Path, table: str) -> None:
    file = tmp_path / "state.sqlite"
    _fill(f"sqlite:///{file}", 300)
    with closing(sqlite3.connect(file)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with file.open("r+b") as stored:
        stored.seek((page - 1) * size)
        stored.write(b"\xff" * size)
    with State(f"sqlite:///{file}") as state:
        assert state.verify().faults[0].startswith("the database file is damaged: ")


def test_damaged_value_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.sqlite"
    with State(url) as state:
        state.tenants.add("acme", ["courts"])
        key, _ = state.keys.create("acme", aliases=["courts"])
        with raw(url) as execute:
            execute("UPDATE api_keys SET aliases = '[courts'")
        for use in (lambda: state.keys.caller(key), state.verify):
            with pytest.raises(StateUnavailableError, match="has a damaged value"):
                use()
