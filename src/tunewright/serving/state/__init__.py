"""What the server has to remember: tenants and keys, limits and usage, releases, and the audit of all changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from tunewright.core.io import canonical_json
from tunewright.serving.state.audit import Audit, AuditCheck, AuditLine
from tunewright.serving.state.database import Database, StateUnavailableError, is_made
from tunewright.serving.state.isolation import IsolationCheck, IsolationTest
from tunewright.serving.state.limits import Limits
from tunewright.serving.state.meter import LimitExceededError, Meter, Used, Wanted
from tunewright.serving.state.pruning import Pruned, Pruning
from tunewright.serving.state.release import Candidate, Grounds, Release
from tunewright.serving.state.releases import Releases
from tunewright.serving.state.retold import retold
from tunewright.serving.state.tenants import Caller, InvalidKeyError, Key, Tenant, Tenants
from tunewright.serving.state.upgrade import upgrade

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
    "LimitExceededError",
    "Limits",
    "Meter",
    "Pruned",
    "Pruning",
    "Release",
    "Releases",
    "State",
    "StateUnavailableError",
    "Tenant",
    "Tenants",
    "Used",
    "Wanted",
    "is_made",
]


class State:
    """The serving state; close it, or use it as a context.

    Args:
        url: ``sqlite:///FILE`` (made where it is missing) or ``postgresql://…``.
        actor: who makes changes through it, for the audit.
        clock: seconds since 1970, in place of the database's clock (tests).

    Raises:
        UserError: a database that cannot be reached, or of a newer tunewright.
    """

    def __init__(self, url: str, actor: str | None = None, clock: Callable[[], float] | None = None) -> None:
        self._database = Database(url, clock)
        try:
            upgrade(self._database, actor)
        except BaseException:
            self._database.close()
            raise
        self.name = self._database.name
        self.is_sqlite = self._database.is_sqlite
        self.tenants = Tenants(self._database, actor)
        self.releases = Releases(self._database, actor)
        self.meter = Meter(self._database)
        self.pruning = Pruning(self._database, actor)
        self.audit = Audit(self._database)

    def verify(self, noted: str | None = None) -> AuditCheck:
        """Hold the audit to its digests, and releases, tenants and keys to the lines that tell of them.

        Args:
            noted: a line's digest (or its beginning) that was noted before: it has to be in the chain still.

        Raises:
            UserError: what was noted is no digest.
        """
        check = self._verified(noted)
        # What is changed between two looks would be taken for a change that no line tells of.
        return check if self.audit.verify().head == check.head else self.verify(noted)

    def _verified(self, noted: str | None) -> AuditCheck:
        check = self.audit.verify(noted)
        kept = {(release.alias, release.number): _comparable(release.as_dict()) for release in self.releases.history()}
        told = {}
        for line in self.audit.lines():
            if line.action.startswith("release.") and line.true_digest == line.digest:
                details = json.loads(line.details)
                told[details["alias"], details["number"]] = _comparable(details)
        # Where lines are missing or changed, a release may be as it was without a line that tells of it.
        places = told.keys() if check.faults else told.keys() | kept.keys()
        differing = sorted(place for place in places if told.get(place) != kept.get(place))
        faults = [f"release {number} of {alias} is not what the log tells of it" for alias, number in differing]
        if not check.faults:  # of a log with gaps nothing follows
            faults += retold(self.audit.lines()).differing(self.tenants.list(), self.tenants.keys_of())
        return replace(check, faults=(*check.faults, *faults))

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> State:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _comparable(release: Mapping[str, Any]) -> str:
    """Return a release as canonical JSON; what there was no word of yet when it was made is as good as its default."""
    grounds = {name: value for name, value in release["grounds"].items() if value is not None}
    candidate = release["candidate"] and _without_default(release["candidate"])
    return canonical_json({**_without_default(release), "grounds": grounds, "candidate": candidate})


def _without_default(made: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name != "system_prompt" or value is not True}
