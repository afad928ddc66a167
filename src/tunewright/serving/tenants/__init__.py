"""The serving state: tenants and keys, limits and usage, releases, and the audit log of all changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from tunewright.core.io import canonical_json
from tunewright.gate.results import IsolationCheck, IsolationTest, ServingCheck
from tunewright.serving.tenants.audit import Audit, AuditCheck, AuditLine
from tunewright.serving.tenants.audit_replay import replay
from tunewright.serving.tenants.database import Database, StateUnavailableError, exists
from tunewright.serving.tenants.keys import Caller, InvalidKeyError, Key, Keys, NewKey
from tunewright.serving.tenants.migrations import upgrade
from tunewright.serving.tenants.quota import LimitExceededError, Limits, Quota, RequestUsage, Reservation
from tunewright.serving.tenants.release_record import Candidate, Grounds, Release
from tunewright.serving.tenants.releases import Releases
from tunewright.serving.tenants.tenants import Tenant, Tenants
from tunewright.serving.tenants.usage import Usage
from tunewright.serving.tenants.usage_rollup import RollupResult, UsageRollup

__all__ = [
    "Audit",
    "AuditCheck",
    "AuditLine",
    "Caller",
    "Candidate",
    "Grounds",
    "InvalidKeyError",
    "IsolationCheck",
    "IsolationTest",
    "Key",
    "Keys",
    "LimitExceededError",
    "Limits",
    "NewKey",
    "Quota",
    "Release",
    "Releases",
    "RequestUsage",
    "Reservation",
    "RollupResult",
    "ServingCheck",
    "State",
    "StateUnavailableError",
    "Tenant",
    "Tenants",
    "Usage",
    "UsageRollup",
    "exists",
]


class State:
    """The serving state in a database; close it, or use it as a context manager.

    Args:
        url: ``sqlite:///FILE`` (created if it does not exist) or ``postgresql://…``.
        actor: the author of changes, for the audit log.
        clock: seconds since 1970, in place of the database's clock (tests).
        steady: seconds that no change of the clock affects (tests; default: ``clock``, or else monotonic time).
        serving: True for a server, in which no statement on PostgreSQL may take longer than 5 seconds.

    Raises:
        UserError: the database cannot be reached, or belongs to a newer tunewright.
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
        self._database = Database(url, clock, steady, serving=serving)
        try:
            upgrade(self._database, actor)
        except BaseException:
            self._database.close()
            raise
        self.name = self._database.name
        self.is_sqlite = self._database.is_sqlite
        self.tenants = Tenants(self._database, actor)
        self.releases = Releases(self._database, actor)
        self.keys = Keys(self._database, actor)
        self.quota = Quota(self._database)
        self.usage = Usage(self._database)
        self.usage_rollup = UsageRollup(self._database, actor)
        self.audit = Audit(self._database)

    def verify(self, noted: str | None = None) -> AuditCheck:
        """Check SQLite's file, the audit log, the tables against the log, and the usage against itself.

        Args:
            noted: a line's digest (or its beginning) that was noted earlier, and must still be in the chain.

        Raises:
            UserError: ``noted`` is not a digest.
            StateUnavailableError: the database does not answer.
        """
        damage = [f"the database file is damaged: {line}" for line in self._database.damage()]
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
        stored = {
            (release.alias, release.number): _comparable(release.as_dict()) for release in self.releases.history()
        }
        logged = {}
        for line in self.audit.lines():
            if line.action.startswith("release.") and line.true_digest == line.digest:
                details = json.loads(line.details)
                logged[details["alias"], details["number"]] = _comparable(details)
        # If lines are missing or changed, a correct release may have no log line.
        releases = logged.keys() if check.faults else logged.keys() | stored.keys()
        differing = sorted(release for release in releases if logged.get(release) != stored.get(release))
        faults = [f"release {number} of {alias} differs from the audit log" for alias, number in differing]
        if not check.faults:  # a log with gaps cannot be replayed
            replayed = replay(self.audit.lines())
            faults += replayed.differing(self.tenants.list(), self.keys.list(), self.usage_rollup.days())
        faults += self.usage.faults()
        return replace(check, faults=(*check.faults, *faults))

    def close(self) -> None:
        """Close all connections to the database."""
        self._database.close()

    def __enter__(self) -> State:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _comparable(release: Mapping[str, Any]) -> str:
    """Return a release as canonical JSON; a field that an older version did not write equals its default."""
    grounds = {name: value for name, value in release["grounds"].items() if value is not None}
    candidate = release["candidate"] and _without_default(release["candidate"])
    return canonical_json({**_without_default(release), "grounds": grounds, "candidate": candidate})


def _without_default(record: Mapping[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"system_prompt": True, "grammar": None}
    return {name: value for name, value in record.items() if name not in defaults or value != defaults[name]}
