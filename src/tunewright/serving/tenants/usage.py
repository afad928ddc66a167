"""Usage: request by request, in totals, and as CSV; the answers of shadows; and old requests rolled up by day."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import (
    Connection,
    Integer,
    RowMapping,
    and_,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)

from tunewright.core.csv import safe_cell
from tunewright.core.errors import UserError
from tunewright.serving.tenants.audit import Audited, Change
from tunewright.serving.tenants.database import Database, iso
from tunewright.serving.tenants.tables import (
    api_keys,
    feedback,
    key_uses,
    releases,
    request_records,
    requests,
    shadow_answers,
    tenants,
    usage_days,
)
from tunewright.serving.tenants.tenants import find_tenant

DAY_SECONDS = 86_400
_MIN_AGE_SECONDS = 3600.0
"""Newer requests are never rolled up, since limits count requests of the last minute."""
_MOST_FAULTS = 100
"""Requests that `Usage.faults` lists; one mistake may affect all."""

_BY = (requests.c.tenant_id, requests.c.alias, requests.c.digest)
_SUMS = {
    "requests": func.count(),
    "prompt_tokens": func.coalesce(func.sum(requests.c.prompt_tokens), 0),
    "completion_tokens": func.coalesce(func.sum(requests.c.completion_tokens), 0),
    "first_tokens": func.count(requests.c.first_token_s),
    "first_token_s": func.coalesce(func.sum(requests.c.first_token_s), 0.0),
}
"""The totals of a group of requests, by the column of ``usage_days`` that keeps them."""


@dataclass(frozen=True)
class UsageLine:
    """The usage of one request."""

    id: int
    time: str
    tenant: str
    key: str
    alias: str
    digest: str
    prompt_tokens: int | None
    completion_tokens: int | None
    queued_s: float | None
    first_token_s: float | None
    total_s: float | None
    outcome: str | None
    """None while the request is in progress."""
    end_user: str | None
    """The request's ``safety_identifier``, or else its ``user``."""


@dataclass(frozen=True)
class UsageSum:
    """The total of a tenant's requests for one alias that one adapter answered."""

    tenant: str
    alias: str
    digest: str
    requests: int
    in_flight: int
    prompt_tokens: int
    completion_tokens: int
    mean_first_token_s: float | None


@dataclass(frozen=True)
class DayTotal:
    """The usage of one tenant, alias and adapter on one day; the audit log has it for a day that was rolled up."""

    day: str
    tenant: str
    alias: str
    digest: str
    requests: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, row: RowMapping) -> DayTotal:
        """Return the total of a row, whose day is a number since 1970; PostgreSQL sums to a decimal."""
        counts = (int(row["requests"]), int(row["prompt_tokens"]), int(row["completion_tokens"]))
        return cls(_date(row["day"]), row["tenant"], row["alias"], row["digest"], *counts)

    @property
    def name(self) -> str:
        """The total's name in messages, which begins with the day."""
        return f"{self.day}, {self.tenant}, {self.alias}, adapter {self.digest}"

    @property
    def counts(self) -> dict[str, int]:
        """The numbers to compare."""
        counted = ("requests", "prompt_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in counted}


@dataclass(frozen=True)
class RollupResult:
    """The records that were rolled up."""

    days: int
    requests: int
    shadow_answers: int
    """Answers of shadows to those requests, which were deleted; they have no total."""
    feedback: int
    """Feedback on those requests, which was deleted; it has no total."""
    request_records: int
    """Records of those requests, which were deleted."""


@dataclass(frozen=True)
class ShadowLine:
    """The live answer to a request, and the answer of its shadow."""

    request: int
    time: str
    tenant: str
    candidate: str
    """The shadow's adapter."""
    answer: str
    shadow_answer: str | None
    why_not: str | None
    """Why the shadow has no answer."""


class Usage:
    """The recorded usage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lines(self, tenant: str | None = None, since: float | None = None) -> list[UsageLine]:
        """Return every request (of one tenant, since a time), the oldest first.

        Raises:
            UserError: the tenant does not exist.
        """
        same = [column for column in requests.c if column.name in UsageLine.__dataclass_fields__]
        named = (requests.c.started.label("time"), tenants.c.name.label("tenant"), api_keys.c.prefix.label("key"))
        query = select(*same, *named).join(tenants, requests.c.tenant_id == tenants.c.id)
        query = query.join(api_keys, requests.c.key_id == api_keys.c.id).order_by(requests.c.id)
        if since is not None:
            query = query.where(requests.c.started >= since)
        with self._database.reading() as connection:
            if tenant is not None:
                query = query.where(requests.c.tenant_id == find_tenant(connection, tenant).id)
            rows = connection.execute(query).mappings().all()
        return [UsageLine(**{**row, "time": str(iso(row["time"]))}) for row in rows]

    def sums(self, tenant: str | None = None, since: float | None = None) -> list[UsageSum]:
        """Return totals by tenant, alias and adapter.

        Raises:
            UserError: the tenant does not exist, or ``since`` is within a day that was rolled up.
        """
        return [
            UsageSum(
                row["tenant"],
                row["alias"],
                row["digest"],
                int(row["requests"]),  # PostgreSQL sums to a decimal
                int(row["in_flight"]),
                int(row["prompt_tokens"]),
                int(row["completion_tokens"]),
                row["first_token_s"] / int(row["first_tokens"]) if row["first_tokens"] else None,
            )
            for row in self._totals(tenant, since)
        ]

    def by_day(self, tenant: str | None = None, since: float | None = None) -> list[DayTotal]:
        """Return totals by day (UTC), tenant, alias and adapter, the oldest first.

        Raises:
            UserError: the tenant does not exist, or ``since`` is within a day that was rolled up.
        """
        return [DayTotal.of(row) for row in self._totals(tenant, since, "day")]

    def _totals(self, tenant: str | None, since: float | None, *more: str) -> list[RowMapping]:
        """Return the totals of requests and of rolled-up days together, by tenant, alias, digest and ``more``."""
        days = requests.c.started / DAY_SECONDS
        # PostgreSQL rounds in a cast; SQLite cuts, and may have no floor.
        day = (cast(days, Integer) if self._database.is_sqlite else func.floor(days)).label("day")
        in_flight = func.count() - func.count(requests.c.finished)
        of_requests = select(
            day, *_BY, in_flight.label("in_flight"), *(sums.label(name) for name, sums in _SUMS.items())
        )
        of_days = select(usage_days.c.day, *(usage_days.c[column.name] for column in _BY), literal(0))
        of_days = of_days.add_columns(*(usage_days.c[name] for name in _SUMS))
        with self._database.reading() as connection:
            if tenant is not None:
                tenant_id = find_tenant(connection, tenant).id
                of_requests = of_requests.where(requests.c.tenant_id == tenant_id)
                of_days = of_days.where(usage_days.c.tenant_id == tenant_id)
            if since is not None:
                _require_whole_day(connection, tenant_id if tenant is not None else None, since)
                of_requests = of_requests.where(requests.c.started >= since)
                of_days = of_days.where(usage_days.c.day >= since / DAY_SECONDS)
            totals = union_all(of_requests.group_by(day, *_BY), of_days).subquery()
            by = [*(totals.c[name] for name in more), tenants.c.name.label("tenant"), totals.c.alias, totals.c.digest]
            sums = (func.sum(totals.c[name]).label(name) for name in ("in_flight", *_SUMS))
            query = select(*by, *sums).join(tenants, totals.c.tenant_id == tenants.c.id).group_by(*by)
            rows = connection.execute(query).mappings().all()
        return sorted(rows, key=lambda row: [row[column.name] for column in by])  # not by a database's collation

    def shadow_lines(self, alias: str) -> list[ShadowLine]:
        """Return the requests of an alias's shadows, the oldest first."""
        answers = [shadow_answers.c[name] for name in ("answer", "shadow_answer", "why_not")]
        named = (requests.c.id.label("request"), requests.c.started.label("time"), tenants.c.name.label("tenant"))
        query = select(*named, releases.c.candidate, *answers).select_from(shadow_answers)
        query = query.join(requests, shadow_answers.c.request_id == requests.c.id)
        query = query.join(tenants, requests.c.tenant_id == tenants.c.id)
        query = query.join(releases, shadow_answers.c.release_id == releases.c.id)
        query = query.where(releases.c.alias == alias).order_by(shadow_answers.c.request_id)
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [ShadowLine(**{**row, "time": str(iso(row["time"]))}) for row in rows]

    def shadow_units(self, alias: str) -> list[tuple[int, int]]:
        """Return the answered requests of each unit of an alias's newest shadow, and how many differing answers it has.

        A unit is a tenant's end user, or else a request. The result is empty if no shadow has answered.
        """
        shadows = shadow_answers.join(requests, shadow_answers.c.request_id == requests.c.id)
        shadows = shadows.join(releases, shadow_answers.c.release_id == releases.c.id)
        answered = and_(releases.c.alias == alias, shadow_answers.c.shadow_answer.is_not(None))
        newest = select(releases.c.candidate_digest).select_from(shadows).where(answered)
        newest = newest.order_by(releases.c.id.desc()).limit(1)
        nameless = case((requests.c.end_user.is_(None), requests.c.id))
        differing = func.sum(case((shadow_answers.c.shadow_answer != shadow_answers.c.answer, 1), else_=0))
        query = select(func.count(), differing).select_from(shadows)
        query = query.where(answered, releases.c.candidate_digest == newest.scalar_subquery())
        query = query.group_by(requests.c.tenant_id, requests.c.end_user, nameless).order_by(func.min(requests.c.id))
        with self._database.reading() as connection:
            return [(int(count), int(other)) for count, other in connection.execute(query)]

    def faults(self) -> list[str]:
        """Return a sentence for each request whose usage contradicts itself, its key or its release.

        One changed number or name contradicts another value. Consistent changes of several values
        are not found, nor changes of times, outcomes or end users, nor deleted requests.
        """
        sums = requests.c.prompt_tokens + requests.c.completion_tokens
        settled = and_(requests.c.finished.is_not(None), requests.c.outcome.is_distinct_from("lost"))
        adapters = releases.c.digest, func.coalesce(releases.c.candidate_digest, releases.c.digest)
        checks = {
            "its tokens do not add up": and_(settled, requests.c.tokens.is_distinct_from(sums)),
            "its key belongs to another tenant": api_keys.c.tenant_id.is_distinct_from(requests.c.tenant_id),
            "its release has another alias or adapter": or_(
                releases.c.alias.is_distinct_from(requests.c.alias),
                and_(*(requests.c.digest.is_distinct_from(digest) for digest in adapters)),
            ),
        }
        query = select(requests.c.id, *checks.values())
        query = query.outerjoin(api_keys, requests.c.key_id == api_keys.c.id)
        query = query.outerjoin(releases, requests.c.release_id == releases.c.id)
        with self._database.reading() as connection:
            rows = connection.execute(query.where(or_(*checks.values())).order_by(requests.c.id)).all()
        found = [
            f"request {row[0]}: {', '.join(text for text, fails in zip(checks, row[1:], strict=True) if fails)}"
            for row in rows
        ]
        more = [f"{len(found) - _MOST_FAULTS} more requests have such faults"] if len(found) > _MOST_FAULTS else []
        return found[:_MOST_FAULTS] + more

    def rolled_up_until(self) -> float | None:
        """Return the time before which there may be daily totals only; None: every request has its line."""
        with self._database.reading() as connection:
            last = connection.execute(select(func.max(usage_days.c.day))).scalar()
        return None if last is None else float((last + 1) * DAY_SECONDS)


class UsageRollup(Audited):
    """Roll-up of old requests into daily totals, which replace the individual records.

    Otherwise the records of all requests would be kept forever. Each day has a separate transaction, so that an
    interrupted call leaves complete days behind, and the next call resumes.
    """

    def roll_up(self, before: float) -> RollupResult:
        """Roll up the requests of all days before a time, which is the beginning of a day in UTC.

        Raises:
            UserError: the time is within a day, or in the future.
        """
        with self._database.reading() as connection:
            now = self._database.now(connection)
            first = connection.execute(select(func.min(requests.c.started))).scalar()
        if before % DAY_SECONDS or before > now:
            raise UserError(
                f"{iso(before)} {'is in the future' if before > now else 'is not the beginning of a day (UTC)'}",
                where="--before",
                fix="Requests are rolled up by whole days: use a date like 2026-11-25.",
            )
        total = Counter[str]()
        if first is not None:
            for day in range(int(first // DAY_SECONDS), int(before // DAY_SECONDS)):
                with self._changing() as change:
                    total.update(_roll_up_day(change, day, now - _MIN_AGE_SECONDS))
        return RollupResult(**{field.name: total[field.name] for field in fields(RollupResult)})

    def days(self) -> list[DayTotal]:
        """Return the totals of all days."""
        query = select(usage_days, tenants.c.name.label("tenant")).join(tenants)
        with self._database.reading() as connection:
            return [DayTotal.of(row) for row in connection.execute(query).mappings()]


def lines_csv(kind: type[Any], lines: Sequence[Any]) -> str:
    """Return a CSV table of lines of one dataclass, whose fields are the columns; unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        # Clients choose some of the texts, and a spreadsheet may take them for formulas.
        cells = asdict(line).items()
        writer.writerow({name: safe_cell(value) if isinstance(value, str) else value for name, value in cells})
    return out.getvalue()


def _date(day: float) -> str:
    return str(iso(int(day) * DAY_SECONDS))[:10]


def _require_whole_day(connection: Connection, tenant_id: int | None, since: float) -> None:
    """Refuse a time within a day that was rolled up: of its requests only the total is known."""
    day, rest = divmod(since, DAY_SECONDS)
    found = select(usage_days.c.day).where(usage_days.c.day == int(day)).limit(1)
    if tenant_id is not None:
        found = found.where(usage_days.c.tenant_id == tenant_id)
    if rest and connection.execute(found).first() is not None:
        raise UserError(
            f"The requests of {_date(day)} were rolled up into one total",
            where="--since",
            fix="Use the beginning of a day.",
        )


def _roll_up_day(change: Change, day: int, until: float) -> dict[str, int]:
    """Roll up a day, and return what was rolled up, by the fields of `RollupResult`."""
    connection = change.connection
    # A request in progress has no usage yet; it is left for the next call.
    old = and_(
        requests.c.started >= day * DAY_SECONDS,
        requests.c.started < min((day + 1) * DAY_SECONDS, until),
        requests.c.finished.is_not(None),
    )
    sums = (total.label(name) for name, total in _SUMS.items())
    query = select(literal(day).label("day"), *_BY, tenants.c.name.label("tenant"), *sums).select_from(requests)
    query = query.join(tenants, requests.c.tenant_id == tenants.c.id).where(old).group_by(*_BY, tenants.c.name)
    rows = connection.execute(query).mappings().all()
    if not rows:
        return {}
    for row in rows:
        by = {name: row[name] for name in ("day", *(column.name for column in _BY))}
        same = and_(*(usage_days.c[name] == value for name, value in by.items()))
        more = {name: usage_days.c[name] + row[name] for name in _SUMS}
        if not connection.execute(update(usage_days).where(same).values(**more)).rowcount:
            connection.execute(insert(usage_days).values(**by, **{name: row[name] for name in _SUMS}))
    # A key's last use is otherwise read from its requests.
    used = select(requests.c.key_id, func.max(requests.c.started)).where(old).group_by(requests.c.key_id)
    for key, last in connection.execute(used).all():
        known = connection.execute(select(key_uses.c.last_used).where(key_uses.c.key_id == key)).scalar()
        if known is None:
            connection.execute(insert(key_uses).values(key_id=key, last_used=last))
        elif known < last:
            connection.execute(update(key_uses).where(key_uses.c.key_id == key).values(last_used=last))
    deleted = {
        table.name: connection.execute(
            delete(table).where(table.c.request_id.in_(select(requests.c.id).where(old)))
        ).rowcount
        for table in (shadow_answers, feedback, request_records)
    }
    deleted["requests"] = connection.execute(delete(requests).where(old)).rowcount
    change.log("usage.rollup", _date(day), **deleted, totals=[asdict(DayTotal.of(row)) for row in rows])
    return {"days": 1, **deleted}
