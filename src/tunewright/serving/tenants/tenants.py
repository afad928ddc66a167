"""Tenants, their limits, and the aliases that they may call."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update

from tunewright.core.errors import UserError
from tunewright.serving.tenants.audit import Audited
from tunewright.serving.tenants.quota import UNLIMITED, Limits, check_limits
from tunewright.serving.tenants.tables import api_keys, tenant_aliases, tenants

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Tenant:
    """A tenant with its aliases and limits."""

    name: str
    aliases: tuple[str, ...]
    limits: Limits
    keys: int
    """The number of valid keys."""


def check_name(name: str, what: str) -> None:
    """Check the name of a tenant or an alias."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"Invalid name {name!r} for {what}",
            fix="Use up to 63 lowercase letters, digits, dots, dashes and underscores; begin with a letter or digit.",
        )


class Tenants(Audited):
    """The tenants in the state."""

    def add(self, name: str, aliases: Sequence[str] = (), limits: Limits = UNLIMITED) -> Tenant:
        """Create a tenant.

        Raises:
            UserError: the name is taken, or a name or a limit is not valid.
        """
        check_name(name, "a tenant")
        for alias in aliases:
            check_name(alias, "an alias")
        check_limits(limits)
        with self._changing() as change:
            taken = change.connection.execute(select(tenants.c.id).where(tenants.c.name == name)).first()
            if taken:
                raise UserError(
                    f"The tenant {name} already exists", fix="List the tenants with `tunewright tenant list`."
                )
            tenant_id = change.connection.execute(
                insert(tenants).values(name=name, created=change.now, **asdict(limits)).returning(tenants.c.id)
            ).scalar_one()
            distinct = sorted(set(aliases))
            for alias in distinct:
                change.connection.execute(insert(tenant_aliases).values(tenant_id=tenant_id, alias=alias))
            change.log("tenant.add", name, aliases=distinct, limits=asdict(limits))
            return _tenant(change.connection, find_tenant(change.connection, name), change.now)

    def list(self) -> Sequence[Tenant]:
        """Return all tenants by name."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
            rows = connection.execute(select(tenants).order_by(tenants.c.name)).all()
            return [_tenant(connection, row, now) for row in rows]

    def any(self) -> bool:
        """Return whether there is a tenant. Once there is one, every request needs a key."""
        with self._database.reading() as connection:
            return connection.execute(select(tenants.c.id).limit(1)).first() is not None

    def callers(self) -> dict[str, frozenset[str]]:
        """Return the tenants that have a valid key, with their aliases."""
        with self._database.reading() as connection:
            valid = _is_valid(self._database.now(connection))
            pairs = select(tenants.c.name, tenant_aliases.c.alias).distinct()
            rows = connection.execute(pairs.join_from(tenants, api_keys).outerjoin(tenant_aliases).where(*valid)).all()
        found: defaultdict[str, set[str]] = defaultdict(set)
        for name, alias in rows:
            found[name].update(() if alias is None else (alias,))
        return {name: frozenset(aliases) for name, aliases in found.items()}

    def grant(self, name: str, aliases: Sequence[str]) -> Tenant:
        """Allow a tenant further aliases; those that it has already are left alone.

        Raises:
            UserError: the tenant does not exist, or an alias is not valid.
        """
        for alias in aliases:
            check_name(alias, "an alias")
        with self._changing() as change:
            row = find_tenant(change.connection, name)
            added = sorted(set(aliases) - set(aliases_of(change.connection, row.id)))
            for alias in added:
                change.connection.execute(insert(tenant_aliases).values(tenant_id=row.id, alias=alias))
            if added:
                change.log("tenant.grant", name, aliases=added)
            return _tenant(change.connection, row, change.now)

    def revoke(self, name: str, aliases: Sequence[str]) -> Tenant:
        """Take aliases from a tenant.

        Raises:
            UserError: the tenant does not exist, or does not have one of the aliases.
        """
        with self._changing() as change:
            row = find_tenant(change.connection, name)
            own = aliases_of(change.connection, row.id)
            if missing := sorted(set(aliases) - set(own)):
                raise UserError(f"{name} may not call {', '.join(missing)} anyway")
            removed = sorted(set(aliases))
            _remove_aliases(change.connection, row.id, removed)
            if removed:
                change.log("tenant.revoke", name, aliases=removed)
            return _tenant(change.connection, row, change.now)

    def disable(self, name: str) -> Tenant:
        """Revoke all keys of a tenant and take its aliases. The tenant itself stays: usage and audit log refer to it.

        Raises:
            UserError: the tenant does not exist, or has no keys and no aliases.
        """
        with self._changing() as change:
            row = find_tenant(change.connection, name)
            own = aliases_of(change.connection, row.id)
            unrevoked = api_keys.c.tenant_id == row.id, api_keys.c.revoked.is_(None)
            prefixes = change.connection.execute(select(api_keys.c.prefix).where(*unrevoked)).scalars().all()
            if not own and not prefixes:
                raise UserError(f"{name} has no keys and no aliases")
            change.connection.execute(update(api_keys).where(*unrevoked).values(revoked=change.now))
            for prefix in prefixes:
                change.log("key.revoke", prefix, tenant=name)
            _remove_aliases(change.connection, row.id, own)
            if own:
                change.log("tenant.revoke", name, aliases=own)
            return _tenant(change.connection, row, change.now)

    def limit(self, name: str, limits: Limits) -> Tenant:
        """Set all three limits of a tenant.

        Raises:
            UserError: the tenant does not exist, or a limit is below 1.
        """
        check_limits(limits)
        with self._changing() as change:
            before = _tenant(change.connection, find_tenant(change.connection, name), change.now)
            if limits != before.limits:
                change.connection.execute(update(tenants).where(tenants.c.name == name).values(**asdict(limits)))
                change.log("tenant.limit", name, before=asdict(before.limits), after=asdict(limits))
            return _tenant(change.connection, find_tenant(change.connection, name), change.now)

    def get(self, name: str) -> Tenant:
        """Return a tenant.

        Raises:
            UserError: the tenant does not exist.
        """
        with self._database.reading() as connection:
            return _tenant(connection, find_tenant(connection, name), self._database.now(connection))


def find_tenant(connection: Connection, name: str) -> Row[Any]:
    """Return the row of a tenant."""
    row = connection.execute(select(tenants).where(tenants.c.name == name)).first()
    if row is None:
        known = connection.execute(select(tenants.c.name).order_by(tenants.c.name)).scalars().all()
        fix = f"Tenants: {', '.join(known)}." if known else "Create one with `tunewright tenant add`."
        raise UserError(f"There is no tenant {name!r}", fix=fix)
    return row


def aliases_of(connection: Connection, tenant_id: int) -> list[str]:
    """Return the aliases of a tenant, sorted."""
    query = select(tenant_aliases.c.alias).where(tenant_aliases.c.tenant_id == tenant_id)
    return list(connection.execute(query.order_by(tenant_aliases.c.alias)).scalars())


def _remove_aliases(connection: Connection, tenant_id: int, aliases: Sequence[str]) -> None:
    own = tenant_aliases.c.tenant_id == tenant_id
    connection.execute(delete(tenant_aliases).where(own, tenant_aliases.c.alias.in_(aliases)))


def _is_valid(now: float) -> tuple[Any, Any]:
    """Return the conditions for a valid key."""
    return api_keys.c.revoked.is_(None), or_(api_keys.c.expires.is_(None), api_keys.c.expires > now)


def _tenant(connection: Connection, row: Row[Any], now: float) -> Tenant:
    keys = select(func.count()).where(api_keys.c.tenant_id == row.id, *_is_valid(now))
    valid = connection.execute(keys).scalar_one()
    limits = Limits(row.requests_per_minute, row.tokens_per_minute, row.concurrency)
    return Tenant(row.name, tuple(aliases_of(connection, row.id)), limits, valid)
