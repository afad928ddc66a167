"""Commands on tenants, their keys and the audit log: ``tunewright tenant …``, ``tunewright audit …``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunewright.api.context import ProjectContext

if TYPE_CHECKING:
    from tunewright.serving.tenants import AuditCheck, AuditLine, Key, Limits, RollupResult, Tenant
    from tunewright.serving.tenants.usage import UsageLine, UsageSum
    from tunewright.serving.tenants.usage_rollup import DayTotal


@dataclass(frozen=True)
class NewKey:
    """A key that was just created."""

    secret: str
    """The key itself, which is shown only once and not stored."""
    key: Key

    def as_dict(self) -> dict[str, Any]:
        """Return the key as ``--json`` prints it."""
        return {"key": self.secret, **self.key.as_dict()}


class TenantKeysApi:
    """Methods on tenants' API keys."""

    def __init__(self, opened: ProjectContext) -> None:
        self._context = opened

    def add(self, tenant: str, *, aliases: Sequence[str] | None = None, lifetime: float | None = None) -> NewKey:
        """Create a key for a tenant.

        Args:
            tenant: its name.
            aliases: restricts the key to these aliases (None: all of the tenant's).
            lifetime: seconds until it expires (None: never).

        Raises:
            UserError: no such tenant, or an alias that the tenant may not call.
        """
        with self._context.state() as state:
            return NewKey(*state.keys.create(tenant, aliases=aliases, lifetime=lifetime))

    def rotate(self, key: str, *, overlap: float, lifetime: float | None = None) -> NewKey:
        """Create a replacement for a key, which stays valid for another ``overlap`` seconds.

        Args:
            key: the old key's prefix.
            overlap: seconds during which both keys are valid.
            lifetime: seconds until the new key expires (None: never).

        Raises:
            UserError: no such key, or the key is no longer valid.
        """
        with self._context.state() as state:
            return NewKey(*state.keys.rotate(key, overlap=overlap, lifetime=lifetime))

    def revoke(self, key: str) -> Key:
        """Revoke a key, by its prefix, from the next request on.

        Raises:
            UserError: no such key, or it is already revoked.
        """
        with self._context.state() as state:
            return state.keys.revoke(key)

    def list(self, tenant: str | None = None) -> Sequence[Key]:
        """Return a tenant's keys (None: all tenants'), oldest first.

        Raises:
            UserError: no such tenant.
        """
        with self._context.state() as state:
            return state.keys.list(tenant)


class TenantsApi:
    """Methods on tenants; methods on their keys are under ``key``."""

    def __init__(self, opened: ProjectContext) -> None:
        self._context = opened
        self.key = TenantKeysApi(opened)

    def add(self, name: str, aliases: Sequence[str] = (), limits: Limits | None = None) -> Tenant:
        """Create a tenant that may call these aliases. Once a tenant exists, every request needs an API key.

        Raises:
            UserError: the name is taken or invalid, or a limit is invalid.
        """
        from tunewright.serving.tenants import Limits

        with self._context.state(make=True) as state:
            made = state.tenants.add(name, aliases, limits or Limits())
            self._tell_unreleased(aliases, state.releases.live())
            return made

    def list(self) -> Sequence[Tenant]:
        """Return all tenants, sorted by name."""
        with self._context.state() as state:
            return state.tenants.list()

    def grant(self, name: str, aliases: Sequence[str]) -> Tenant:
        """Allow a tenant to call further aliases.

        Raises:
            UserError: no such tenant, or an invalid alias.
        """
        with self._context.state() as state:
            changed = state.tenants.grant(name, aliases)
            self._tell_unreleased(aliases, state.releases.live())
            return changed

    def revoke(self, name: str, aliases: Sequence[str]) -> Tenant:
        """Revoke a tenant's access to aliases, from the next request on.

        Raises:
            UserError: no such tenant, or an alias that the tenant may not call.
        """
        with self._context.state() as state:
            return state.tenants.revoke(name, aliases)

    def disable(self, name: str) -> Tenant:
        """Revoke all of a tenant's keys and aliases, from the next request on; its usage records remain.

        Raises:
            UserError: no such tenant, or it has no keys or aliases left.
        """
        with self._context.state() as state:
            return state.tenants.disable(name)

    def limit(self, name: str, limits: Limits) -> Tenant:
        """Set all three limits of a tenant, from the next request on.

        Raises:
            UserError: no such tenant, or a limit below 1.
        """
        with self._context.state() as state:
            return state.tenants.limit(name, limits)

    def get(self, name: str) -> Tenant:
        """Return one tenant.

        Raises:
            UserError: no such tenant.
        """
        with self._context.state() as state:
            return state.tenants.get(name)

    def usage(self, name: str | None = None, *, since: float | None = None) -> Sequence[UsageSum]:
        """Return the usage by tenant, alias and adapter.

        Args:
            name: one tenant (None: all).
            since: seconds since 1970 (None: from the beginning).

        Raises:
            UserError: no such tenant.
        """
        with self._context.state() as state:
            return state.usage.sums(name, since)

    def usage_by_day(self, name: str | None = None, *, since: float | None = None) -> Sequence[DayTotal]:
        """Return the usage by day (UTC), tenant, alias and adapter, oldest first; arguments as for :meth:`usage`."""
        with self._context.state() as state:
            return state.usage.by_day(name, since)

    def requests(self, name: str | None = None, *, since: float | None = None) -> Sequence[UsageLine]:
        """Return every request that still has an individual record, oldest first; arguments as for :meth:`usage`."""
        with self._context.state() as state:
            from tunewright.serving.tenants.times import iso

            pruned = state.usage.rolled_up_until()
            if pruned is not None and (since is None or since < pruned):
                day = str(iso(pruned))[:10]
                self._context.reporter.warn(
                    f"Requests before {day} were pruned: `tunewright tenant usage` has their sums."
                )
            return state.usage.lines(name, since)

    def prune_usage(self, *, before: float) -> RollupResult:
        """Roll old requests up into daily totals and delete the individual records; the audit log lists each day.

        Args:
            before: seconds since 1970, the beginning of a day in UTC.

        Raises:
            UserError: not the beginning of a day, or a day in the future.
        """
        with self._context.state() as state:
            return state.usage_rollup.roll_up(before)

    def _tell_unreleased(self, aliases: Sequence[str], live: Iterable[str]) -> None:
        for alias in sorted(set(aliases) - set(live)):
            self._context.reporter.say(f"{alias} has no release yet. `tunewright deploy {alias} ADAPTER` makes one.")


class AuditApi:
    """Methods on the audit log: changes to the serving state, with their authors."""

    def __init__(self, opened: ProjectContext) -> None:
        self._context = opened

    def show(self) -> Sequence[AuditLine]:
        """Return every entry, oldest first."""
        with self._context.state() as state:
            return state.audit.lines()

    def verify(self, noted: str | None = None) -> AuditCheck:
        """Verify SQLite's file, each entry, the tables against the entries, and the usage against itself.

        Args:
            noted: an entry's digest that was noted elsewhere before; it must still be in the log.
        """
        with self._context.state() as state:
            return state.verify(noted)
