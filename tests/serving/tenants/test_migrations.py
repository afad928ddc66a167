"""Migration of a state of an earlier tunewright, without any loss."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import inspect
from states import DIGESTS, SHIP, raw, with_tenant

from tunewright.serving.tenants import State
from tunewright.serving.tenants.tables import SCHEMA_VERSION, metadata


def _make_old(url: str) -> None:
    """A state with a tenant and two releases, as the first schema had it."""
    with State(url, "ann") as state:
        with_tenant(state)
        state.releases.deploy("recipes", "b", DIGESTS["b"], SHIP)
    with raw(url) as execute:
        for column in (
            "isolation",
            "untested",
            "system_prompt",
            "candidate_system_prompt",
            "serving",
            "grammar",
            "candidate_grammar",
        ):
            execute(f"ALTER TABLE releases DROP COLUMN {column}")
        execute("ALTER TABLE requests DROP COLUMN end_user")
        for table in ("usage_days", "key_uses", "unmetered_requests"):
            execute(f"DROP TABLE {table}")
        execute("UPDATE tunewright_schema SET version = 1")
        # The audit's lines of that time had no word of isolation.
        lines = execute("SELECT number, details FROM audit WHERE action LIKE 'release.%'").all()
        assert all('"isolation":null,"serving":null,"untested":null,' in details for _, details in lines)


def test_migration_keeps_releases_and_audit_and_is_logged(state_url: str) -> None:
    _make_old(state_url)
    with State(state_url, "bob") as state:
        assert {alias: release.adapter for alias, release in state.releases.live().items()} == {
            "courts-acme": "courts-1",
            "recipes": "b",
        }
        assert all(release.grounds == SHIP for release in state.releases.history())
        last = state.audit.lines()[-1]
        assert (last.action, last.actor, last.details) == (
            "schema.upgrade",
            "bob",
            f'{{"after":{SCHEMA_VERSION},"before":1}}',
        )
        assert state.verify().faults == ()
        state.releases.deploy("recipes", "c", DIGESTS["c"], SHIP)
        assert state.verify().faults == ()
    with State(state_url) as state:
        assert [line.action for line in state.audit.lines()].count("schema.upgrade") == 1


def test_migrated_tables_equal_those_of_a_new_state(state_url: str) -> None:
    """By what the database itself says of them; columns that came later stand last."""

    def described() -> Any:
        with raw(state_url) as execute:
            about = inspect(execute("SELECT 1").connection)
            found = {}
            for table in metadata.tables:
                # SQLite keeps the words DOUBLE and DOUBLE PRECISION, which are one type to it.
                columns = {
                    c["name"]: (str(c["type"]).removesuffix(" PRECISION").replace("DOUBLE", "REAL"), c["nullable"])
                    for c in about.get_columns(table)
                }
                found[table] = columns, about.get_pk_constraint(table)["constrained_columns"]
        return found

    with State(state_url):
        new = described()
    with raw(state_url) as execute:
        for table in reversed(metadata.sorted_tables):
            execute(f"DROP TABLE {table.name}")
    _make_old(state_url)
    with State(state_url):
        assert described() == new


def test_concurrent_opens_migrate_once(state_url: str) -> None:
    _make_old(state_url)

    def look(_: int) -> int:
        with State(state_url) as state:
            return len(state.releases.history())

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(look, range(4))) == [2] * 4
    with State(state_url) as state:
        assert [line.action for line in state.audit.lines()].count("schema.upgrade") == 1


def test_verify_accepts_audit_lines_without_later_fields(state: State) -> None:
    made = state.releases.deploy("recipes", "b", DIGESTS["b"], SHIP)
    from tunewright.serving.tenants import _comparable

    now = made.as_dict()
    old = {
        **now,
        "grounds": {k: v for k, v in now["grounds"].items() if k not in ("isolation", "untested", "serving")},
    }
    del old["system_prompt"], old["grammar"]
    assert _comparable(old) == _comparable(now)
    assert _comparable({**old, "digest": DIGESTS["c"]}) != _comparable(now)
