"""A serving state that hangs, is locked or was replaced: requests are refused in time, and no usage is lost."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from states import raw
from tenant_server import ASKED, Running, Stored, ask, tenant_server, until

from making.postgres import frozen
from tunewright.serving.tenants import State

pytest_plugins = ["tenant_server"]

MANY = 24  # more than there are threads for the state


def post(server: Running, key: str) -> httpx.Response:
    body = {"model": "courts", "messages": ASKED, "max_tokens": 2}
    headers = {"Authorization": f"Bearer {key}"}
    # The limit only ends a hang.
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=300)


def assert_refused(server: Running, key: str) -> None:
    """Send many requests at once; the state refuses all."""
    with ThreadPoolExecutor(MANY) as threads:
        replies = list(threads.map(lambda _: post(server, key), range(MANY)))
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "state_unavailable")
        assert int(reply.headers["retry-after"]) >= 1


def assert_accounted(server: Running, key: str, state: State) -> None:
    """The server answers again, and no request is left unfinished."""
    until(lambda: "Warning: The serving state answers again." in server.reported.messages)
    ask(server.client(key), "courts")
    until(lambda: all(line.outcome for line in state.usage.lines()))
    assert {line.outcome for line in state.usage.lines()} <= {"stop", "length", "timed out"}


@pytest.mark.slow
@pytest.mark.parametrize("state_url", ["postgresql"], indirect=True)
@pytest.mark.fault("postgresql", "serve")
def test_requests_are_refused_while_postgresql_is_frozen(
    server: Running, state: State, two_tenants: dict[str, str], postgres: Path
) -> None:
    ask(server.client(two_tenants["acme"]), "courts")
    with frozen(postgres):
        assert_refused(server, two_tenants["acme"])
    assert_accounted(server, two_tenants["acme"], state)


@pytest.mark.slow
@pytest.mark.parametrize("state_url", ["postgresql"], indirect=True)
def test_server_ends_while_postgresql_is_frozen(
    state_url: str, two_tenants: dict[str, str], adapters: dict[str, Stored], postgres: Path
) -> None:
    with ExitStack() as freezing, tenant_server(state_url, adapters) as running:
        ask(running.client(two_tenants["acme"]), "courts")
        freezing.enter_context(frozen(postgres))


@pytest.mark.slow
def test_requests_behind_a_lock_are_refused_and_authentication_continues(
    server: Running, state_url: str, state: State, two_tenants: dict[str, str]
) -> None:
    client = server.client(two_tenants["acme"])
    with raw(state_url) as execute:
        execute("UPDATE tenants SET name = name")
        assert_refused(server, two_tenants["acme"])
        assert [model.id for model in client.models.list()] == ["courts"]
    ask(client, "courts")
    outcomes: set[str | None] = {None}

    def complete() -> bool:
        # The refused request's line may come after the lock's release.
        outcomes.clear()
        outcomes.update(line.outcome for line in state.usage.lines())
        return None not in outcomes

    until(complete)
    assert outcomes <= {"stop", "length", "timed out"}


@pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
def test_requests_are_refused_with_one_warning_when_the_state_file_is_replaced(
    server: Running, state_url: str, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    ask(server.client(key), "courts")
    file = Path(state_url.removeprefix("sqlite:///"))
    backup, kept = file.with_name("backup"), file.with_name("kept")
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    kept.hardlink_to(file)
    backup.replace(file)
    assert_refused(server, key)
    assert_refused(server, key)
    (warning,) = [message for message in server.reported.messages if "Requests are refused" in message]
    assert "was replaced while it was in use" in warning
    assert f"remove {file.name}-wal" in warning
    kept.replace(file)
    until(lambda: "Warning: The serving state answers again." in server.reported.messages)
    ask(server.client(key), "courts")
