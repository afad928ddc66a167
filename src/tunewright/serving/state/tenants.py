"""Tenants, their limits, the aliases that they may call, and their keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from tunewright.core.errors import UserError
from tunewright.serving.state.audit import Change, changing
from tunewright.serving.state.database import Database
from tunewright.serving.state.keys import is_key, key_hash, new_key, prefix_of
from tunewright.serving.state.limits import UNLIMITED, Limits, check_limits
from tunewright.serving.state.tables import api_keys, key_uses, requests, tenant_aliases, tenants
from tunewright.serving.state.times import iso

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

# Asked by every request: made once, and a line for each alias of the key's tenant.
_KEY_WITH_ALIASES = (
    select(api_keys, tenants.c.name, tenants.c.tokens_per_minute, tenant_aliases.c.alias)
    .select_from(api_keys)
    .join(tenants)
    .outerjoin(tenant_aliases, tenant_aliases.c.tenant_id == tenants.c.id)
    .where(api_keys.c.prefix == bindparam("prefix"))
)

_UNKNOWN = "This API key is not known here."

KeyState = Literal["valid", "revoked", "expired"]


@dataclass(frozen=True)
class Tenant:
    """Who may call which alias, and how much."""

    name: str
    aliases: tuple[str, ...]
    limits: Limits
    keys: int
    """That are valid now."""

    def as_dict(self) -> dict[str, Any]:
        """Return the tenant as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Key:
    """What is known of a key; the key itself is known to its holder alone."""

    prefix: str
    tenant: str
    aliases: tuple[str, ...] | None
    """The only ones it is good for; None: all of its tenant's."""
    created: float
    expires: float | None
    revoked: float | None
    replaced_by: str | None
    last_used: float | None
    state: KeyState

    def as_dict(self) -> dict[str, Any]:
        """Return the key as ``--json`` prints it."""
        times = {name: iso(getattr(self, name)) for name in ("created", "expires", "revoked", "last_used")}
        return {**asdict(self), **times}


@dataclass(frozen=True)
class Caller:
    """Who a valid key belongs to, and what it opens."""

    tenant_id: int
    tenant: str
    key_id: int
    aliases: frozenset[str]
    tokens_per_minute: int | None
    """The tenant's limit; None is no limit."""


class InvalidKeyError(Exception):
    """A key that opens nothing; the message is for whoever sent it."""


def check_name(name: str, what: str) -> None:
    """Refuse what cannot be the name of a tenant or an alias.

    Raises:
        UserError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for {what}",
            fix="Up to 63 small letters, digits, dots, dashes and underscores, a letter or digit first.",
        )


class Tenants:
    """The tenants in the state.

    Args:
        actor: who makes changes, for the audit.
    """

    def __init__(self, database: Database, actor: str | None) -> None:
        self._database = database
        self._actor = actor

    def add(self, name: str, aliases: Sequence[str] = (), limits: Limits = UNLIMITED) -> Tenant:
        """Make a tenant.

        Raises:
            UserError: the name is taken, or it or an alias is no name, or a limit is none.
        """
        check_name(name, "a tenant")
        for alias in aliases:
            check_name(alias, "an alias")
        check_limits(limits)
        with changing(self._database, self._actor) as change:
            taken = change.connection.execute(select(tenants.c.id).where(tenants.c.name == name)).first()
            if taken:
                raise UserError(f"there is a tenant {name} already", fix="`tunewright tenant list` shows it.")
            made = change.connection.execute(
                insert(tenants).values(name=name, created=change.now, **asdict(limits)).returning(tenants.c.id)
            ).scalar_one()
            chosen = sorted(set(aliases))
            for alias in chosen:
                change.connection.execute(insert(tenant_aliases).values(tenant_id=made, alias=alias))
            change.log("tenant.add", name, aliases=chosen, limits=limits.as_dict())
            return _tenant(change.connection, _find(change.connection, name), change.now)

    def list(self) -> Sequence[Tenant]:
        """Return all tenants by name."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
            rows = connection.execute(select(tenants).order_by(tenants.c.name)).all()
            return [_tenant(connection, row, now) for row in rows]

    def any(self) -> bool:
        """Return whether there is a tenant at all: then nobody is served without a key."""
        with self._database.reading() as connection:
            return connection.execute(select(tenants.c.id).limit(1)).first() is not None

    def allow(self, name: str, aliases: Sequence[str], *, allowed: bool = True) -> Tenant:
        """Let a tenant call further aliases, or (not ``allowed``) no longer.

        Raises:
            UserError: no such tenant, or what is no alias or none of its own.
        """
        for alias in aliases:
            check_name(alias, "an alias")
        with changing(self._database, self._actor) as change:
            row = _find(change.connection, name)
            there = set(_aliases(change.connection, row.id))
            new = sorted(set(aliases) - there) if allowed else sorted(set(aliases) & there)
            lacking = sorted(set(aliases) - there)
            if not allowed and lacking:
                raise UserError(f"{name} may not call {', '.join(lacking)} as it is")
            for alias in new:
                if allowed:
                    change.connection.execute(insert(tenant_aliases).values(tenant_id=row.id, alias=alias))
                else:
                    change.connection.execute(
                        delete(tenant_aliases).where(
                            tenant_aliases.c.tenant_id == row.id, tenant_aliases.c.alias == alias
                        )
                    )
            if new:
                change.log("tenant.grant" if allowed else "tenant.revoke", name, aliases=new)
            return _tenant(change.connection, row, change.now)

    def end(self, name: str) -> Tenant:
        """Revoke all keys of a tenant and take its aliases; itself it stays, as its usage and the audit name it.

        Raises:
            UserError: no such tenant, or it has neither keys nor aliases any more.
        """
        with changing(self._database, self._actor) as change:
            row = _find(change.connection, name)
            own = _aliases(change.connection, row.id)
            unrevoked = api_keys.c.tenant_id == row.id, api_keys.c.revoked.is_(None)
            prefixes = change.connection.execute(select(api_keys.c.prefix).where(*unrevoked)).scalars().all()
            if not own and not prefixes:
                raise UserError(f"{name} has neither keys nor aliases: there is nothing to end")
            change.connection.execute(update(api_keys).where(*unrevoked).values(revoked=change.now))
            for prefix in prefixes:
                change.log("key.revoke", prefix, tenant=name)
            change.connection.execute(delete(tenant_aliases).where(tenant_aliases.c.tenant_id == row.id))
            if own:
                change.log("tenant.revoke", name, aliases=own)
            return _tenant(change.connection, row, change.now)

    def limit(self, name: str, limits: Limits) -> Tenant:
        """Set a tenant's limits, all three of them.

        Raises:
            UserError: no such tenant, or a limit below 1.
        """
        check_limits(limits)
        with changing(self._database, self._actor) as change:
            before = _tenant(change.connection, _find(change.connection, name), change.now)
            if limits != before.limits:
                change.connection.execute(update(tenants).where(tenants.c.name == name).values(**asdict(limits)))
                change.log("tenant.limit", name, before=before.limits.as_dict(), after=limits.as_dict())
            return _tenant(change.connection, _find(change.connection, name), change.now)

    def get(self, name: str) -> Tenant:
        """Return one tenant.

        Raises:
            UserError: there is none of that name.
        """
        with self._database.reading() as connection:
            return _tenant(connection, _find(connection, name), self._database.now(connection))

    def add_key(
        self, name: str, *, aliases: Sequence[str] | None = None, lifetime: float | None = None
    ) -> tuple[str, Key]:
        """Make a key: the key itself, which is not kept, and what is known of it from here on.

        Args:
            name: whose.
            aliases: the only ones it is good for (None: all of its tenant's, those of later on too).
            lifetime: seconds until it expires (None: never).

        Raises:
            UserError: no such tenant, an alias that the tenant may not call, or no time at all.
        """
        _check_lifetime(lifetime)
        with changing(self._database, self._actor) as change:
            row = _find(change.connection, name)
            scope = None if aliases is None else sorted(set(aliases))
            strange = sorted(set(scope or ()) - set(_aliases(change.connection, row.id)))
            if strange:
                raise UserError(
                    f"{name} may not call {', '.join(strange)}",
                    fix=f"`tunewright tenant grant {name} {' '.join(strange)}` lets it.",
                )
            expires = None if lifetime is None else change.now + lifetime
            key, prefix = _make_key(change, row.id, scope, expires)
            change.log("key.add", prefix, tenant=name, aliases=scope, expires=expires)
            return key, self._key(change.connection, prefix, change.now)

    def rotate_key(self, prefix: str, *, overlap: float, lifetime: float | None = None) -> tuple[str, Key]:
        """Make a key that takes another's place, which is good for ``overlap`` seconds more.

        Raises:
            UserError: no such key, one that is not valid any more, or no time at all.
        """
        _check_lifetime(lifetime)
        with changing(self._database, self._actor) as change:
            old = self._key(change.connection, prefix, change.now)
            if old.state != "valid":
                raise UserError(
                    f"{prefix} is {old.state}: there is nothing to overlap with",
                    fix=f"`tunewright tenant key add {old.tenant}` makes a new one.",
                )
            row = _find(change.connection, old.tenant)
            expires = None if lifetime is None else change.now + lifetime
            key, new = _make_key(change, row.id, old.aliases, expires)
            until = min(change.now + overlap, old.expires or change.now + overlap)
            change.connection.execute(
                update(api_keys).where(api_keys.c.prefix == prefix).values(expires=until, replaced_by=new)
            )
            change.log("key.rotate", prefix, tenant=old.tenant, new=new, old_expires=until, expires=expires)
            return key, self._key(change.connection, new, change.now)

    def revoke_key(self, prefix: str) -> Key:
        """End a key at once, for requests that have not yet arrived.

        Raises:
            UserError: no such key, or it is revoked already.
        """
        with changing(self._database, self._actor) as change:
            key = self._key(change.connection, prefix, change.now)
            if key.revoked is not None:
                raise UserError(f"{prefix} is revoked already")
            change.connection.execute(update(api_keys).where(api_keys.c.prefix == prefix).values(revoked=change.now))
            change.log("key.revoke", prefix, tenant=key.tenant)
            return self._key(change.connection, prefix, change.now)

    def keys_of(self, name: str | None = None) -> Sequence[Key]:
        """Return the keys of a tenant (None: of all), the oldest first.

        Raises:
            UserError: no such tenant.
        """
        with self._database.reading() as connection:
            query = select(api_keys.c.prefix).join(tenants).order_by(api_keys.c.id)
            if name is not None:
                query = query.where(tenants.c.id == _find(connection, name).id)
            now = self._database.now(connection)
            return [self._key(connection, prefix, now) for prefix in connection.execute(query).scalars()]

    def caller(self, key: str) -> Caller:
        """Who calls with this key, and which aliases it opens.

        Raises:
            InvalidKeyError: it opens nothing.
        """
        prefix = prefix_of(key)
        if prefix is None:
            raise InvalidKeyError(_UNKNOWN)
        with self._database.reading() as connection:
            rows = connection.execute(_KEY_WITH_ALIASES, {"prefix": prefix}).all()
            row = rows[0] if rows else None
            if not is_key(key, row.sha256 if row else None) or row is None:
                raise InvalidKeyError(_UNKNOWN)
            state = _state(row, self._database.now(connection))
            if state != "valid":  # told to the holder of the right secret only
                raise InvalidKeyError(f"This API key is {state}.")
        own = frozenset(row.alias for row in rows if row.alias is not None)
        aliases = own if row.aliases is None else own & frozenset(row.aliases)
        return Caller(row.tenant_id, row.name, row.id, aliases, row.tokens_per_minute)

    def _key(self, connection: Connection, prefix: str, now: float) -> Key:
        row = connection.execute(
            select(api_keys, tenants.c.name).join(tenants).where(api_keys.c.prefix == prefix)
        ).first()
        if row is None:
            raise UserError(f"no key begins with {prefix!r}", fix="`tunewright tenant key list` shows them.")
        used = connection.execute(select(func.max(requests.c.started)).where(requests.c.key_id == row.id)).scalar()
        if used is None:  # unless its requests were pruned
            used = connection.execute(select(key_uses.c.last_used).where(key_uses.c.key_id == row.id)).scalar()
        aliases = None if row.aliases is None else tuple(row.aliases)
        return Key(
            row.prefix,
            row.name,
            aliases,
            row.created,
            row.expires,
            row.revoked,
            row.replaced_by,
            used,
            _state(row, now),
        )


def _make_key(change: Change, tenant_id: int, scope: Sequence[str] | None, expires: float | None) -> tuple[str, str]:
    key, prefix = new_key()
    change.connection.execute(
        insert(api_keys).values(
            tenant_id=tenant_id,
            prefix=prefix,
            sha256=key_hash(key),
            aliases=None if scope is None else list(scope),
            created=change.now,
            expires=expires,
        )
    )
    return key, prefix


def _state(row: Row[Any], now: float) -> KeyState:
    if row.revoked is not None:
        return "revoked"
    return "expired" if row.expires is not None and row.expires <= now else "valid"


def _find(connection: Connection, name: str) -> Row[Any]:
    row = connection.execute(select(tenants).where(tenants.c.name == name)).first()
    if row is None:
        known = connection.execute(select(tenants.c.name).order_by(tenants.c.name)).scalars().all()
        there = f"There are: {', '.join(known)}." if known else "`tunewright tenant add` makes one."
        raise UserError(f"there is no tenant {name!r}", fix=there)
    return row


def _aliases(connection: Connection, tenant_id: int) -> list[str]:
    query = select(tenant_aliases.c.alias).where(tenant_aliases.c.tenant_id == tenant_id)
    return list(connection.execute(query.order_by(tenant_aliases.c.alias)).scalars())


def _tenant(connection: Connection, row: Row[Any], now: float) -> Tenant:
    theirs = connection.execute(select(api_keys).where(api_keys.c.tenant_id == row.id)).all()
    limits = Limits(row.requests_per_minute, row.tokens_per_minute, row.concurrency)
    valid = sum(_state(key, now) == "valid" for key in theirs)
    return Tenant(row.name, tuple(_aliases(connection, row.id)), limits, valid)


def _check_lifetime(lifetime: float | None) -> None:
    if lifetime is not None and lifetime <= 0:
        raise UserError("a key that expires at once opens nothing", where="--expires", fix="Write it like 90d.")
