"""The audit log: every change to tenants, keys, limits and releases, in lines that are chained by their digests.

A line is written in the transaction of the change that it tells of, so there is never one without the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, digest
from tunewright.serving.state.database import Database
from tunewright.serving.state.tables import audit, audit_head

_NOTED = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class AuditLine:
    """One change."""

    number: int
    """From 1."""
    time: str
    """UTC, ISO 8601."""
    actor: str | None
    """git's user.name of who made it, else the login name."""
    action: str
    subject: str
    details: str
    """The rest, as canonical JSON."""
    previous: str
    """The digest of the line before; empty in the first."""
    digest: str
    """SHA-256 of this line without this field, as canonical JSON."""

    @property
    def true_digest(self) -> str:
        """What ``digest`` has to be."""
        told = asdict(self)
        del told["digest"]
        return digest(told)

    def as_dict(self) -> dict[str, Any]:
        """Return the line as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class AuditCheck:
    """What a look at the whole chain came to."""

    lines: int
    head: str
    """The last line's digest, to be noted elsewhere: who rewrites the whole chain is found by it alone."""
    faults: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the check as ``--json`` prints it."""
        return {"ok": not self.faults, **asdict(self)}


class Change:
    """A change under way, which no other one interleaves with."""

    def __init__(self, connection: Connection, now: float, actor: str | None, number: int, head: str) -> None:
        self.connection = connection
        self.now = now
        self.actor = actor
        self._number = number
        self._head = head

    def log(self, action: str, subject: str, /, **details: Any) -> None:
        """Write the audit's next line."""
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
    """A transaction that changes the state; changes wait for each other at the audit's head."""
    with database.writing() as connection:
        head = connection.execute(select(audit_head).with_for_update()).one()
        yield Change(connection, database.now(connection), actor, head.number, head.digest)


class Audit:
    """The log, to be read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lines(self) -> list[AuditLine]:
        """Return every line, the first one first."""
        return self._read()[0]

    def verify(self, noted: str | None = None) -> AuditCheck:
        """Hold each line to its digest and to the one before it, and the last one to the head.

        Args:
            noted: a line's digest (or its beginning) that was noted before: it has to be in the chain still.

        Raises:
            UserError: what was noted is no digest.
        """
        if noted is not None and not _NOTED.fullmatch(noted):
            fix = "Give the 64 hexadecimal digits that `tunewright audit verify` printed, or the first 8 or more."
            raise UserError(f"{noted!r} is no digest", where="--noted", fix=fix)
        lines, (head_number, head_digest) = self._read()
        faults = list(_faults(lines))
        last = lines[-1].number if lines else 0
        if head_number > last:
            faults.append(f"line {last + 1} is missing: lines up to {head_number} were written")
        elif not lines and head_digest:
            faults.append("there is no line any more, and the head of the log has a digest")
        elif lines and head_digest != lines[-1].digest:
            faults.append(f"line {last} was changed, with its digest: the head of the log has another one")
        if noted is not None and not any(line.digest.startswith(noted) for line in lines):
            faults.append(f"no line has the digest {noted}, which was noted before: the log is another one")
        return AuditCheck(len(lines), head_digest, tuple(faults))

    def _read(self) -> tuple[list[AuditLine], tuple[int, str]]:
        with self._database.reading() as connection:
            head = connection.execute(select(audit_head)).one()
            rows = connection.execute(select(audit).order_by(audit.c.number)).mappings().all()
        return [AuditLine(**row) for row in rows], (head.number, head.digest)


def _faults(lines: Sequence[AuditLine]) -> Iterator[str]:
    """What is wrong, line by line; a line that was changed is told as that, and not its neighbours too."""
    expected, previous = 1, ""
    for line in lines:
        if line.number != expected:
            yield f"line {expected} is missing: line {line.number} follows line {expected - 1}"
        elif line.true_digest != line.digest:
            yield f"line {line.number} was changed after it was written: {_told(line)}"
        elif line.previous != previous:
            yield f"line {expected - 1} was changed, with its digest: line {line.number} was written after another one"
        expected, previous = line.number + 1, line.digest


def _told(line: AuditLine) -> str:
    try:
        details = json.dumps(json.loads(line.details), ensure_ascii=False)
    except ValueError:
        details = line.details
    return f"{line.time} {line.actor} {line.action} {line.subject} {details}"
