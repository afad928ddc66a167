"""The audit log: every change to tenants, keys, limits and releases, in lines chained by their digests.

A line is written in the same transaction as its change, so neither exists without the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, digest
from tunewright.serving.tenants.database import Database
from tunewright.serving.tenants.tables import audit, audit_head

_NOTED = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class AuditLine:
    """One change."""

    number: int
    """Counts from 1."""
    time: str
    """UTC, ISO 8601."""
    actor: str | None
    """The author's git user.name, or else the login name."""
    action: str
    subject: str
    details: str
    """Further facts about the change, as canonical JSON."""
    previous: str
    """The digest of the line before; empty in the first line."""
    digest: str
    """The SHA-256 of this line's other fields as canonical JSON."""

    @property
    def true_digest(self) -> str:
        """The value that ``digest`` must have."""
        fields = asdict(self)
        del fields["digest"]
        return digest(fields)


@dataclass(frozen=True)
class AuditCheck:
    """The result of checking the whole chain."""

    lines: int
    head: str
    """The last line's digest. Note it elsewhere: nothing else reveals that the whole chain was rewritten."""
    faults: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the check as ``--json`` prints it."""
        return {"ok": not self.faults, **asdict(self)}


class Change:
    """A change in progress; changes never interleave."""

    def __init__(self, connection: Connection, now: float, actor: str | None, number: int, head: str) -> None:
        self.connection = connection
        self.now = now
        self.actor = actor
        self._number = number
        self._head = head

    def log(self, action: str, subject: str, /, **details: Any) -> None:
        """Append a line to the audit log."""
        line = AuditLine(
            number=self._number + 1,
            time=datetime.fromtimestamp(self.now, UTC).isoformat(timespec="milliseconds"),
            actor=self.actor,
            action=action,
            subject=subject,
            details=canonical_json(details),
            previous=self._head,
            digest="",
        )
        line = replace(line, digest=line.true_digest)
        self.connection.execute(insert(audit).values(**asdict(line)))
        self.connection.execute(update(audit_head).values(number=line.number, digest=line.digest))
        self._number, self._head = line.number, line.digest


@contextmanager
def changing(database: Database, actor: str | None) -> Iterator[Change]:
    """Open a transaction that changes the state; it waits for others at the head of the audit log."""
    with database.writing() as connection:
        head = connection.execute(select(audit_head).with_for_update()).one()
        yield Change(connection, database.now(connection), actor, head.number, head.digest)


class Audited:
    """A part of the state whose changes are in the audit log, with ``actor`` as their author."""

    def __init__(self, database: Database, actor: str | None) -> None:
        self._database = database
        self._actor = actor

    def _changing(self) -> AbstractContextManager[Change]:
        return changing(self._database, self._actor)


class Audit:
    """Read access to the audit log."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lines(self) -> list[AuditLine]:
        """Return all lines, the oldest first."""
        return self._read()[0]

    def verify(self, noted: str | None = None) -> AuditCheck:
        """Check each line against its digest and the line before it, and the last line against the head.

        Args:
            noted: a line's digest (or its beginning) that was noted earlier, and must still be in the chain.

        Raises:
            UserError: ``noted`` is not a digest.
        """
        if noted is not None and not _NOTED.fullmatch(noted):
            fix = "Use the 64 hexadecimal digits that `tunewright audit verify` printed, or at least the first 8."
            raise UserError(f"Invalid digest {noted!r}", where="--noted", fix=fix)
        lines, (head_number, head_digest) = self._read()
        faults = list(_faults(lines))
        last = lines[-1].number if lines else 0
        if head_number > last:
            faults.append(f"line {last + 1} is missing: {head_number} lines were written")
        elif not lines and head_digest:
            faults.append("all lines are missing, and the head of the log has a digest")
        elif lines and head_digest != lines[-1].digest:
            faults.append(f"line {last} and its digest were changed: the head of the log has another digest")
        if noted is not None and not any(line.digest.startswith(noted) for line in lines):
            faults.append(f"no line has the noted digest {noted}: the log was rewritten")
        return AuditCheck(len(lines), head_digest, tuple(faults))

    def _read(self) -> tuple[list[AuditLine], tuple[int, str]]:
        with self._database.reading() as connection:
            head = connection.execute(select(audit_head)).one()
            rows = connection.execute(select(audit).order_by(audit.c.number)).mappings().all()
        return [AuditLine(**row) for row in rows], (head.number, head.digest)


def _faults(lines: Sequence[AuditLine]) -> Iterator[str]:
    """Yield the faults line by line; a changed line is reported once, and not again by its neighbours."""
    expected, previous = 1, ""
    for line in lines:
        if line.number != expected:
            yield f"line {expected} is missing: line {line.number} follows line {expected - 1}"
        elif line.true_digest != line.digest:
            yield f"line {line.number} was changed after it was written: {_shown(line)}"
        elif line.previous != previous:
            yield f"line {expected - 1} and its digest were changed: line {line.number} has another previous digest"
        expected, previous = line.number + 1, line.digest


def _shown(line: AuditLine) -> str:
    try:
        details = json.dumps(json.loads(line.details), ensure_ascii=False)
    except ValueError:
        details = line.details
    return f"{line.time} {line.actor} {line.action} {line.subject} {details}"
