"""Replays the audit log: tenants, keys and daily usage that follow from it, for comparison with the tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tunewright.serving.tenants.audit import AuditLine
from tunewright.serving.tenants.keys import Key
from tunewright.serving.tenants.tenants import Tenant
from tunewright.serving.tenants.usage_rollup import DayTotal

Records = dict[str, dict[str, Any]]
"""Fields to compare, by the name of a tenant, the prefix of a key, or a day with tenant, alias and adapter."""


@dataclass(frozen=True)
class AuditReplay:
    """The state that follows from all lines together.

    Args:
        tenants: aliases and limits by name.
        keys: tenant, aliases, expiry and revocation by prefix.
        usage: the rolled-up totals.
        unlogged: days that an earlier version rolled up without logging the totals.
    """

    tenants: Records = field(default_factory=dict)
    keys: Records = field(default_factory=dict)
    usage: Records = field(default_factory=dict)
    unlogged: set[str] = field(default_factory=set)

    def differing(self, tenants: Iterable[Tenant], keys: Iterable[Key], usage: Iterable[DayTotal]) -> list[str]:
        """Return a sentence for each tenant, key and day that differs in the tables."""
        stored_tenants = {tenant.name: _tenant(tenant.aliases, asdict(tenant.limits)) for tenant in tenants}
        stored_keys = {
            key.prefix: _key(key.tenant, key.aliases, key.expires, key.replaced_by, key.revoked) for key in keys
        }
        logged, stored = (
            {name: total for name, total in records.items() if name.partition(",")[0] not in self.unlogged}
            for records in (self.usage, {total.name: total.counts for total in usage})
        )
        return [
            *_differing("tenant", self.tenants, stored_tenants),
            *_differing("key", self.keys, stored_keys),
            *_differing("usage of", logged, stored),
        ]


def replay(lines: Iterable[AuditLine]) -> AuditReplay:
    """Replay a whole log, the oldest line first."""
    replayed = AuditReplay()
    for line in lines:
        _apply(replayed, line.action, line.subject, json.loads(line.details))
    return replayed


def _apply(replayed: AuditReplay, action: str, subject: str, details: Mapping[str, Any]) -> None:
    match action:
        case "tenant.add":
            replayed.tenants[subject] = _tenant(details["aliases"], details["limits"])
        case "tenant.grant":
            replayed.tenants[subject]["aliases"] |= set(details["aliases"])
        case "tenant.revoke":
            replayed.tenants[subject]["aliases"] -= set(details["aliases"])
        case "tenant.limit":
            replayed.tenants[subject]["limits"] = details["after"]
        case "key.add":
            replayed.keys[subject] = _key(details["tenant"], details["aliases"], details["expires"])
        case "key.rotate":
            new = {"expires": details["expires"], "replaced_by": None}
            replayed.keys[details["new"]] = replayed.keys[subject] | new
            replayed.keys[subject] |= {"expires": details["old_expires"], "replaced_by": details["new"]}
        case "key.revoke":
            replayed.keys[subject]["revoked"] = True
        case "usage.rollup" if "totals" not in details:
            replayed.unlogged.add(subject)
        case "usage.rollup":
            for total in (DayTotal(**total) for total in details["totals"]):
                so_far = replayed.usage.get(total.name, {})
                replayed.usage[total.name] = {name: so_far.get(name, 0) + count for name, count in total.counts.items()}


def _tenant(aliases: Sequence[str], limits: Mapping[str, Any]) -> dict[str, Any]:
    return {"aliases": set(aliases), "limits": dict(limits)}


def _key(
    tenant: str,
    aliases: Sequence[str] | None,
    expires: float | None,
    replaced_by: str | None = None,
    revoked: float | None = None,
) -> dict[str, Any]:
    scope = None if aliases is None else set(aliases)
    return {
        "tenant": tenant,
        "aliases": scope,
        "expires": expires,
        "replaced_by": replaced_by,
        "revoked": revoked is not None,
    }


def _differing(what: str, replayed: Records, stored: Records) -> list[str]:
    names = sorted(name for name in replayed.keys() | stored.keys() if replayed.get(name) != stored.get(name))
    return [f"{what} {name} differs from the audit log" for name in names]
