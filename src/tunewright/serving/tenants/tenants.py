"""Tenants, their limits and the aliases that they may call; and their API keys, shown once and stored as a hash.

A key is ``tw_PREFIX_SECRET`` and six characters of checksum. The prefix identifies the key's row
and may be shown; the secret has 256 random bits. The checksum protects nothing: it lets scanners
recognise a key in foreign text, and the server refuses a broken key without asking the database.

The database has the SHA-256 of the whole key. Slow hashes (bcrypt, Argon2) protect passwords, which people choose from
few enough that a thief can try them all. 2**256 keys cannot be tried, however fast the hash, and a slow hash would
delay every request. NIST SP 800-63B, section 5.1.1.2, requires one only below 112 bits.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Row, and_, bindparam, delete, func, insert, or_, select, update

from tunewright.core.errors import UserError
from tunewright.core.text import token_checksum
from tunewright.serving.tenants.audit import Audited, Change
from tunewright.serving.tenants.database import iso
from tunewright.serving.tenants.quota import UNLIMITED, Limits, check_limits
from tunewright.serving.tenants.tables import api_keys, key_uses, recordings, requests, tenant_aliases, tenants

_PREFIX_BYTES = 5
_SECRET_BYTES = 32
_KEY = re.compile(r"tw_(?P<body>(?P<number>[0-9a-f]{10})_[A-Za-z0-9_-]{43})(?P<checksum>[0-9A-Za-z]{6})")
_NO_HASH = hashlib.sha256(secrets.token_bytes(_SECRET_BYTES)).hexdigest()

_UNKNOWN = "Invalid API key."
_BROKEN = "Invalid API key: its checksum is wrong, so part of it is missing or mistyped, or it is for another service."

# Built once, since every request runs it; it returns a row for each alias of the key's tenant.
_KEY_WITH_ALIASES = (
    select(
        api_keys,
        tenants.c.name,
        tenants.c.requests_per_minute,
        tenants.c.tokens_per_minute,
        tenant_aliases.c.alias,
        recordings.c.share,
        recordings.c.key_id,
    )
    .select_from(api_keys)
    .join(tenants)
    .outerjoin(tenant_aliases, tenant_aliases.c.tenant_id == tenants.c.id)
    .outerjoin(recordings, and_(recordings.c.tenant_id == tenants.c.id, recordings.c.stopped.is_(None)))
    .where(api_keys.c.prefix == bindparam("prefix"))
)

KeyState = Literal["valid", "revoked", "expired"]
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
        """Allow a tenant further aliases; aliases that it already has are kept.

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


@dataclass(frozen=True)
class Key:
    """The stored data of a key, without its secret."""

    prefix: str
    tenant: str
    aliases: tuple[str, ...] | None
    """The only aliases that the key may use; None means all of its tenant's."""
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


class NewKey(NamedTuple):
    """A key that was just created."""

    secret: str
    """The key itself, which is shown only once and not stored."""
    key: Key

    def as_dict(self) -> dict[str, Any]:
        """Return the key as ``--json`` prints it."""
        return {"key": self.secret, **self.key.as_dict()}


@dataclass(frozen=True)
class Caller:
    """The tenant of a valid key, and the aliases that the key may use."""

    tenant_id: int
    tenant: str
    key_id: int
    aliases: frozenset[str]
    requests_per_minute: int | None
    """The tenant's limit; None means no limit."""
    tokens_per_minute: int | None
    """The same."""
    record_share: float | None = None
    """The share of its requests that are recorded; None means that the tenant is not recorded."""
    record_key: str | None = None
    """The id of the key file of its records."""


class InvalidKeyError(Exception):
    """A key that is unknown, revoked or expired; the message is for its sender."""


class Keys(Audited):
    """The API keys in the state."""

    def create(self, tenant: str, *, aliases: Sequence[str] | None = None, lifetime: float | None = None) -> NewKey:
        """Create a key, and return it together with its stored data. The key itself is not stored.

        Args:
            aliases: the only aliases that the key may use; None means all of its tenant's, including later ones.
            lifetime: seconds until the key expires; None means never.

        Raises:
            UserError: the tenant does not exist or may not use an alias, or the lifetime is not positive.
        """
        _check_lifetime(lifetime)
        with self._changing() as change:
            row = find_tenant(change.connection, tenant)
            scope = None if aliases is None else sorted(set(aliases))
            forbidden = sorted(set(scope or ()) - set(aliases_of(change.connection, row.id)))
            if forbidden:
                raise UserError(
                    f"{tenant} may not call {', '.join(forbidden)}",
                    fix=f"Allow it with `tunewright tenant grant {tenant} {' '.join(forbidden)}`.",
                )
            expires = None if lifetime is None else change.now + lifetime
            key, prefix = _insert_key(change, row.id, scope, expires)
            change.log("key.add", prefix, tenant=tenant, aliases=scope, expires=expires)
            return NewKey(key, _find_key(change.connection, prefix, change.now))

    def rotate(self, prefix: str, *, overlap: float, lifetime: float | None = None) -> NewKey:
        """Create a key that replaces another one; the old key stays valid for ``overlap`` seconds.

        Raises:
            UserError: the key does not exist or is not valid, or the lifetime is not positive.
        """
        _check_lifetime(lifetime)
        with self._changing() as change:
            old = _find_key(change.connection, prefix, change.now)
            if old.state != "valid":
                raise UserError(
                    f"Cannot rotate {prefix}: the key is {old.state}",
                    fix=f"Create a key with `tunewright tenant key add {old.tenant}`.",
                )
            row = find_tenant(change.connection, old.tenant)
            expires = None if lifetime is None else change.now + lifetime
            key, new = _insert_key(change, row.id, old.aliases, expires)
            until = min(change.now + overlap, old.expires or change.now + overlap)
            change.connection.execute(
                update(api_keys).where(api_keys.c.prefix == prefix).values(expires=until, replaced_by=new)
            )
            change.log("key.rotate", prefix, tenant=old.tenant, new=new, old_expires=until, expires=expires)
            return NewKey(key, _find_key(change.connection, new, change.now))

    def revoke(self, prefix: str) -> Key:
        """Revoke a key; requests that arrive later are refused.

        Raises:
            UserError: the key does not exist, or is revoked already.
        """
        with self._changing() as change:
            key = _find_key(change.connection, prefix, change.now)
            if key.revoked is not None:
                raise UserError(f"{prefix} is already revoked")
            change.connection.execute(update(api_keys).where(api_keys.c.prefix == prefix).values(revoked=change.now))
            change.log("key.revoke", prefix, tenant=key.tenant)
            return _find_key(change.connection, prefix, change.now)

    def list(self, tenant: str | None = None) -> Sequence[Key]:
        """Return the keys of a tenant (None: of all tenants), the oldest first.

        Raises:
            UserError: the tenant does not exist.
        """
        with self._database.reading() as connection:
            query = select(api_keys.c.prefix).join(tenants).order_by(api_keys.c.id)
            if tenant is not None:
                query = query.where(tenants.c.id == find_tenant(connection, tenant).id)
            now = self._database.now(connection)
            return [_find_key(connection, prefix, now) for prefix in connection.execute(query).scalars()]

    def caller(self, key: str) -> Caller:
        """Return the tenant of a key, with the aliases that the key may use.

        Raises:
            InvalidKeyError: the key is not valid.
        """
        match = _KEY.fullmatch(key)
        if match is None or token_checksum(match["body"]) != match["checksum"]:
            raise InvalidKeyError(_BROKEN)
        with self._database.reading() as connection:
            rows = connection.execute(_KEY_WITH_ALIASES, {"prefix": f"tw_{match['number']}"}).all()
            row = rows[0] if rows else None
            # An unknown key takes as long to refuse as a known one.
            if not hmac.compare_digest(key_hash(key), row.sha256 if row else _NO_HASH) or row is None:
                raise InvalidKeyError(_UNKNOWN)
            state = key_state(row, self._database.not_before(self._database.now(connection)))
            if state != "valid":  # only the holder of the right secret learns this
                raise InvalidKeyError(f"This API key is {state}.")
        own = frozenset(row.alias for row in rows if row.alias is not None)
        aliases = own if row.aliases is None else own & frozenset(row.aliases)
        limits = row.requests_per_minute, row.tokens_per_minute
        return Caller(row.tenant_id, row.name, row.id, aliases, *limits, row.share, row.key_id)


def key_hash(key: str) -> str:
    """Return the stored hash of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_state(row: Row[Any], now: float) -> KeyState:
    """Return the state of a row of ``api_keys``."""
    if row.revoked is not None:
        return "revoked"
    return "expired" if row.expires is not None and row.expires <= now else "valid"


def _insert_key(change: Change, tenant_id: int, scope: Sequence[str] | None, expires: float | None) -> tuple[str, str]:
    """Return a new key and its prefix."""
    number = secrets.token_hex(_PREFIX_BYTES)
    body = f"{number}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    prefix, key = f"tw_{number}", f"tw_{body}{token_checksum(body)}"
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


def _find_key(connection: Connection, prefix: str, now: float) -> Key:
    row = connection.execute(select(api_keys, tenants.c.name).join(tenants).where(api_keys.c.prefix == prefix)).first()
    if row is None:
        raise UserError(f"No key has the prefix {prefix!r}", fix="List the keys with `tunewright tenant key list`.")
    used = connection.execute(select(func.max(requests.c.started)).where(requests.c.key_id == row.id)).scalar()
    if used is None:  # its requests may have been rolled up
        used = connection.execute(select(key_uses.c.last_used).where(key_uses.c.key_id == row.id)).scalar()
    aliases, state = None if row.aliases is None else tuple(row.aliases), key_state(row, now)
    return Key(row.prefix, row.name, aliases, row.created, row.expires, row.revoked, row.replaced_by, used, state)


def _check_lifetime(lifetime: float | None) -> None:
    if lifetime is not None and lifetime <= 0:
        raise UserError("A key's lifetime must be greater than 0", where="--expires", fix="Use a duration like 90d.")
