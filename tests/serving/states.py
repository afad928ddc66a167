"""Helpers for tests of the serving state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import create_engine, make_url, text

from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits, Reservation
from tunewright.serving.tenants.releases import Grounds, Release
from tunewright.serving.tenants.tenants import Caller

NO_LIMITS = Limits()
SHIP = Grounds("ship", "0123456789ab")
DIGESTS = {name: name * 64 for name in "abcdef"}


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def with_tenant(state: State, name: str = "acme", limits: Limits = NO_LIMITS) -> tuple[Caller, Release]:
    """Add a tenant with a key, and release an alias that it may call."""
    alias = f"courts-{name}"
    state.tenants.add(name, [alias], limits)
    key, _ = state.keys.create(name)
    return state.keys.caller(key), state.releases.deploy(alias, "courts-1", DIGESTS["a"], SHIP)


def reservation(caller: Caller, release: Release, tokens: int = 10) -> Reservation:
    """Return a reservation for a request."""
    return Reservation(caller.tenant_id, caller.key_id, release.alias, release.id, release.digest, tokens)


@contextmanager
def raw(url: str) -> Iterator[Any]:
    """Yield direct access to the database, past tunewright, as an intruder would have."""
    parsed = make_url(url)
    engine = create_engine(parsed.set(drivername=parsed.drivername.replace("postgresql", "postgresql+psycopg")))
    try:
        with engine.begin() as connection:
            yield lambda statement, **values: connection.execute(text(statement), values)
    finally:
        engine.dispose()


def rewrite(execute: Any, table: str, row: Mapping[str, Any], where: str = "1 = 1") -> None:
    """Give a table's row these values again."""
    execute(f"UPDATE {table} SET {', '.join(f'{name} = :{name}' for name in row)} WHERE {where}", **row)
