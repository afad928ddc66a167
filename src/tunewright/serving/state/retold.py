"""Tenants and keys as the audit tells of them, to be held to what the tables say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.serving.state.audit import AuditLine
from tunewright.serving.state.tenants import Key, Tenant

Told = dict[str, dict[str, Any]]
"""What there is to say of each, by name."""


@dataclass(frozen=True)
class Retold:
    """What follows from all lines together.

    Args:
        tenants: aliases and limits by name.
        keys: whose, for what, until when, and whether revoked, by prefix.
    """

    tenants: Told
    keys: Told

    def differing(self, tenants: Iterable[Tenant], keys: Iterable[Key]) -> list[str]:
        """Return what is otherwise in the tables, a sentence each."""
        there = {tenant.name: _tenant(tenant.aliases, tenant.limits.as_dict()) for tenant in tenants}
        good = {key.prefix: _key(key.tenant, key.aliases, key.expires, key.replaced_by, key.revoked) for key in keys}
        return [*_differing("tenant", self.tenants, there), *_differing("key", self.keys, good)]


def retold(lines: Iterable[AuditLine]) -> Retold:
    """Go through a whole log, the first line first."""
    told = Retold({}, {})
    for line in lines:
        _follow(told, line.action, line.subject, json.loads(line.details))
    return told


def _follow(told: Retold, action: str, subject: str, details: Mapping[str, Any]) -> None:
    match action:
        case "tenant.add":
            told.tenants[subject] = _tenant(details["aliases"], details["limits"])
        case "tenant.grant":
            told.tenants[subject]["aliases"] |= set(details["aliases"])
        case "tenant.revoke":
            told.tenants[subject]["aliases"] -= set(details["aliases"])
        case "tenant.limit":
            told.tenants[subject]["limits"] = details["after"]
        case "key.add":
            told.keys[subject] = _key(details["tenant"], details["aliases"], details["expires"])
        case "key.rotate":
            new = {"expires": details["expires"], "replaced_by": None}
            told.keys[details["new"]] = told.keys[subject] | new
            told.keys[subject] |= {"expires": details["old_expires"], "replaced_by": details["new"]}
        case "key.revoke":
            told.keys[subject]["revoked"] = True


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


def _differing(what: str, told: Told, there: Told) -> list[str]:
    names = sorted(name for name in told.keys() | there.keys() if told.get(name) != there.get(name))
    return [f"{what} {name} is not what the log tells of it" for name in names]
