"""The serving state: tenants and keys, limits and usage, releases, and the audit log of all changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from tunewright.core.io import canonical_json
from tunewright.serving.tenants.audit import Audit, AuditCheck, AuditLine
from tunewright.serving.tenants.database import Database, StateUnavailableError
from tunewright.serving.tenants.feedback import Feedback
from tunewright.serving.tenants.quota import Quota
from tunewright.serving.tenants.records import Recording, Records, recording_terms
from tunewright.serving.tenants.releases import Releases
from tunewright.serving.tenants.shadow_reviews import ShadowReviews
from tunewright.serving.tenants.tenants import Key, Keys, Tenant, Tenants
from tunewright.serving.tenants.usage import DayTotal, Usage, UsageRollup

Replayed = dict[str, dict[str, Any]]
"""Fields to compare, by their subject: a tenant, a key, a recording, or the usage of a day, tenant, alias, adapter."""


class State:
    """The serving state in a database; close it, or use it as a context manager.

    Args:
        url: ``sqlite:///FILE`` (created if it does not exist) or ``postgresql://…``.
        actor: the author of changes, for the audit log.
        clock: seconds since 1970, in place of the database's clock (tests).
        steady: seconds that no change of the clock affects (tests; default: ``clock``, or else monotonic time).
        serving: True for a server, in which no statement on PostgreSQL may take longer than 5 seconds.

    Raises:
        UserError: the database cannot be reached, or belongs to another version of tunewright.
    """

    def __init__(
        self,
        url: str,
        actor: str | None = None,
        clock: Callable[[], float] | None = None,
        steady: Callable[[], float] | None = None,
        *,
        serving: bool = False,
    ) -> None:
        self.database = Database(url, clock, steady, serving=serving)
        self.tenants = Tenants(self.database, actor)
        self.releases = Releases(self.database, actor)
        self.keys = Keys(self.database, actor)
        self.quota = Quota(self.database)
        self.usage = Usage(self.database)
        self.feedback = Feedback(self.database)
        self.records = Records(self.database, actor)
        self.shadow_reviews = ShadowReviews(self.database, actor)
        self.usage_rollup = UsageRollup(self.database, actor)
        self.audit = Audit(self.database)

    def verify(self, noted: str | None = None) -> AuditCheck:
        """Check SQLite's file, the audit log, the tables against the log, and the usage against itself.

        Args:
            noted: a line's digest (or its beginning) that was noted earlier, and must still be in the chain.

        Raises:
            UserError: ``noted`` is not a digest.
            StateUnavailableError: the database does not answer.
        """
        damage = [f"the database file is damaged: {line}" for line in self.database.damage()]
        try:
            check = self._verified(noted)
            # A change between the two reads would look like a change without a log line, so the check is repeated.
            if self.audit.verify().head != check.head:
                return self.verify(noted)
        except StateUnavailableError:
            if not damage:
                raise
            check = AuditCheck(0, "", ("the rest cannot be checked",))
        return replace(check, faults=(*damage, *check.faults))

    def _verified(self, noted: str | None) -> AuditCheck:
        check = self.audit.verify(noted)
        stored = {(each["alias"], each["number"]): canonical_json(each) for each in self.releases.as_stored()}
        logged = {}
        for line in self.audit.lines():
            if line.action.startswith("release.") and line.true_digest == line.digest:
                details = json.loads(line.details)
                logged[details["alias"], details["number"]] = line.details
        # If lines are missing or changed, a correct release may have no log line.
        releases = logged.keys() if check.faults else logged.keys() | stored.keys()
        differing = sorted(release for release in releases if logged.get(release) != stored.get(release))
        faults = [f"release {number} of {alias} differs from the audit log" for alias, number in differing]
        if not check.faults:  # a log with gaps cannot be replayed
            tables = self.tenants.list(), self.keys.list(), self.usage_rollup.days(), self.records.list()
            faults += _differing(self.audit.lines(), *tables)
        faults += self.usage.faults()
        return replace(check, faults=(*check.faults, *faults))

    def close(self) -> None:
        """Close all connections to the database."""
        self.database.close()

    def __enter__(self) -> State:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _differing(
    lines: Iterable[AuditLine],
    tenants: Iterable[Tenant],
    keys: Iterable[Key],
    usage: Iterable[DayTotal],
    recordings: Iterable[Recording],
) -> list[str]:
    """Return a sentence for each tenant, key, recording and day that differs from what all log lines together say."""
    logged = replay(lines)
    stored: Replayed = {f"tenant {each.name}": _tenant(each.aliases, asdict(each.limits)) for each in tenants}
    for key in keys:
        stored[f"key {key.prefix}"] = _key(key.tenant, key.aliases, key.expires, key.replaced_by, key.revoked)
    stored |= {f"recording of {each.tenant}": recording_terms(each) for each in recordings}
    stored |= {f"usage of {total.name}": total.counts for total in usage}
    differing = [name for name in logged.keys() | stored.keys() if logged.get(name) != stored.get(name)]
    kinds = "tenant ", "key ", "recording of ", "usage of "
    names = [name for kind in kinds for name in sorted(differing) if name.startswith(kind)]
    return [f"{name} differs from the audit log" for name in names]


def replay(lines: Iterable[AuditLine]) -> Replayed:
    """Replay a whole log, the oldest line first."""
    found: Replayed = {}
    for line in lines:
        details = json.loads(line.details)
        tenant, key = f"tenant {line.subject}", f"key {line.subject}"
        match line.action:
            case "tenant.add":
                found[tenant] = _tenant(details["aliases"], details["limits"])
            case "tenant.grant":
                found[tenant]["aliases"] |= set(details["aliases"])
            case "tenant.revoke":
                found[tenant]["aliases"] -= set(details["aliases"])
            case "tenant.limit":
                found[tenant]["limits"] = details["after"]
            case "key.add":
                found[key] = _key(details["tenant"], details["aliases"], details["expires"])
            case "key.rotate":
                found[f"key {details['new']}"] = found[key] | {"expires": details["expires"], "replaced_by": None}
                found[key] |= {"expires": details["old_expires"], "replaced_by": details["new"]}
            case "key.revoke":
                found[key]["revoked"] = True
            case "record.start":
                found[f"recording of {line.subject}"] = {**details, "stopped": False}
            case "record.stop":
                found[f"recording of {line.subject}"]["stopped"] = True
            case "usage.rollup":
                for total in (DayTotal(**total) for total in details["totals"]):
                    so_far = found.setdefault(f"usage of {total.name}", dict.fromkeys(total.counts, 0))
                    so_far |= {name: so_far[name] + count for name, count in total.counts.items()}
    return found


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
    times = {"expires": expires, "replaced_by": replaced_by, "revoked": revoked is not None}
    return {"tenant": tenant, "aliases": scope, **times}
