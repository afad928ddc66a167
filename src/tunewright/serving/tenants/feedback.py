"""Feedback of tenants on answers: recorded by the response's id, listed, and counted by alias and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from sqlalchemy import insert, select, update

from tunewright.data.examples import Example, Message
from tunewright.data.pii import redact
from tunewright.serving.tenants.database import Database, iso
from tunewright.serving.tenants.tables import feedback, requests, tenants
from tunewright.serving.tenants.tenants import find_tenant

Thumb = Literal["up", "down"]
FeedbackStatus = Literal["recorded", "replaced", "unchanged"]


@dataclass(frozen=True)
class FeedbackValues:
    """A tenant's opinion of one answer, to be stored; make it with :meth:`redacted`."""

    thumb: Thumb | None
    score: float | None
    """Between 0 and 1."""
    correction: str | None
    """The answer that was expected."""
    reason: str | None

    @classmethod
    def redacted(
        cls, thumb: Thumb | None, score: float | None, correction: str | None, reason: str | None
    ) -> tuple[FeedbackValues, dict[str, int]]:
        """Return the values with placeholders for secrets and personal data, and counts of these by kind."""
        # As one conversation, so that a value has the same placeholder in both texts.
        texts = Example((Message("user", correction or ""), Message("user", reason or "")))
        replaced, counts = redact(texts)
        return cls(thumb, score, *(message.content or None for message in replaced.messages)), counts


@dataclass(frozen=True)
class FeedbackLine:
    """The feedback on one answer, and the request."""

    request: int
    response_id: str
    time: str
    """The time of the newest feedback on the answer."""
    tenant: str
    alias: str
    digest: str
    thumb: Thumb | None
    score: float | None
    correction: str | None
    reason: str | None


@dataclass(frozen=True)
class FeedbackSum:
    """The feedback on the answers of one adapter to requests for one alias."""

    alias: str
    digest: str
    answers: int
    up: int
    down: int
    mean_score: float | None
    """The mean over the answers with a score; None if no answer has one."""
    corrections: int


class Feedback:
    """The stored feedback: at most one record for each request, the newest."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, tenant_id: int, response_id: str, values: FeedbackValues) -> FeedbackStatus | None:
        """Store the feedback on a tenant's request in place of earlier feedback; None: the tenant has no such request.

        The same values again change nothing.
        """
        request = select(requests.c.id).where(requests.c.tenant_id == tenant_id, requests.c.response_id == response_id)
        with self._database.writing() as connection:
            # Locked: on PostgreSQL, the same feedback may be sent twice at one moment.
            number = connection.execute(request.with_for_update()).scalar()
            if number is None:
                return None
            columns = (feedback.c[field.name] for field in fields(FeedbackValues))
            same = feedback.c.request_id == number
            stored = connection.execute(select(*columns).where(same)).mappings().first()
            row = {"time": self._database.now(connection), **asdict(values)}
            if stored is None:
                connection.execute(insert(feedback).values(request_id=number, **row))
                return "recorded"
            if dict(stored) == asdict(values):
                return "unchanged"
            connection.execute(update(feedback).where(same).values(**row))
            return "replaced"

    def lines(self, tenant: str | None = None, alias: str | None = None) -> list[FeedbackLine]:
        """Return the feedback on every request (of one tenant, for one alias), the oldest request first.

        Raises:
            UserError: the tenant does not exist.
        """
        known = [column for column in (*requests.c, *feedback.c) if column.name in FeedbackLine.__dataclass_fields__]
        query = select(requests.c.id.label("request"), tenants.c.name.label("tenant"), *known).select_from(feedback)
        query = query.join(requests, feedback.c.request_id == requests.c.id)
        query = query.join(tenants, requests.c.tenant_id == tenants.c.id).order_by(requests.c.id)
        if alias is not None:
            query = query.where(requests.c.alias == alias)
        with self._database.reading() as connection:
            if tenant is not None:
                query = query.where(requests.c.tenant_id == find_tenant(connection, tenant).id)
            rows = connection.execute(query).mappings().all()
        return [FeedbackLine(**{**row, "time": str(iso(row["time"]))}) for row in rows]


def feedback_sums(lines: Sequence[FeedbackLine]) -> list[FeedbackSum]:
    """Return counts and means by alias and adapter."""
    sums = []
    for alias, digest in sorted({(line.alias, line.digest) for line in lines}):
        same = [line for line in lines if (line.alias, line.digest) == (alias, digest)]
        thumbs = [line.thumb for line in same]
        scores = [line.score for line in same if line.score is not None]
        mean = sum(scores) / len(scores) if scores else None
        corrections = sum(line.correction is not None for line in same)
        sums.append(FeedbackSum(alias, digest, len(same), thumbs.count("up"), thumbs.count("down"), mean, corrections))
    return sums
