"""Timeouts towards PostgreSQL: nothing waits for it without end."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from sqlalchemy import text

from making.postgres import frozen
from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import Database, StateUnavailableError

pytestmark = pytest.mark.parametrize("state_url", ["postgresql"], indirect=True)


def _setting(database: Database, name: str) -> str:
    with database.reading() as connection:
        return str(connection.execute(text(f"SHOW {name}")).scalar_one())


@pytest.mark.parametrize(("serving", "statement"), [(True, "4s"), (False, "0")])
def test_server_limits_statements_and_every_process_limits_locks(state_url: str, serving: bool, statement: str) -> None:
    database = Database(state_url, serving=serving)
    assert (_setting(database, "statement_timeout"), _setting(database, "lock_timeout")) == (statement, "10s")
    assert _setting(database, "search_path").startswith("state"), "the URL's own options stay"
    database.close()
    database = Database(f"{state_url}%20-cstatement_timeout%3D3s%20-clock_timeout%3D2s", serving=serving)
    assert (_setting(database, "statement_timeout"), _setting(database, "lock_timeout")) == ("3s", "2s")
    database.close()


@pytest.mark.slow
def test_server_ends_a_statement_that_takes_too_long(state_url: str) -> None:
    database = Database(f"{state_url}%20-cstatement_timeout%3D0", serving=True)  # only our own limit is left
    with pytest.raises(StateUnavailableError), database.reading() as connection:
        connection.execute(text("SELECT pg_sleep(300)"))
    assert _setting(database, "lock_timeout") == "10s", "the next one has a new connection"
    database.close()


@pytest.mark.slow
def test_frozen_postgresql_is_unavailable_and_answers_again_later(state_url: str, postgres: Path) -> None:
    with State(state_url, serving=True) as state:
        state.tenants.add("acme")
        with frozen(postgres):
            for _ in range(2):  # on the open connection, and on a new one
                with pytest.raises(StateUnavailableError):
                    state.tenants.list()
        assert [tenant.name for tenant in state.tenants.list()] == ["acme"]


@pytest.mark.slow
def test_open_fails_when_the_address_never_answers(state_url: str) -> None:
    del state_url
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StateUnavailableError, match="timeout"):
            State(f"postgresql://me:secret@{address}/x")
