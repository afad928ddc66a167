"""Replays the audit log: the tenants and keys that follow from it, for comparison with the tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunewright.serving.tenants.audit import AuditLine
from tunewright.serving.tenants.keys import Key
from tunewright.serving.tenants.tenants import Tenant

Records = dict[str, dict[str, Any]]
"""Fields to compare, by the name of a tenant or the prefix of a key."""


@dataclass(frozen=True)
class AuditReplay:
    """The state that follows from all lines together.

    Args:
        tenants: aliases and limits by name.
        keys: tenant, aliases, expiry and revocation by prefix.
    """

    tenants: Records
    keys: Records

    def differing(self, tenants: Iterable[Tenant], keys: Iterable[Key]) -> list[str]:
        """Return a sentence for each tenant and key that differs in the tables."""
        stored_tenants = {tenant.name: _tenant(tenant.aliases, asdict(tenant.limits)) for tenant in tenants}
        stored_keys = {
            key.prefix: _key(key.tenant, key.aliases, key.expires, key.replaced_by, key.revoked) for key in keys
        }
        return [*_differing("tenant", self.tenants, stored_tenants), *_differing("key", self.keys, stored_keys)]


def replay(lines: Iterable[AuditLine]) -> AuditReplay:
    """Replay a whole log, the oldest line first."""
    replayed = AuditReplay({}, {})
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
