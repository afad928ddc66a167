"""Roll-up of old requests into daily totals, which replace the individual records.

Otherwise the records of all requests would be kept forever. Each day has a separate transaction, so that an
interrupted call leaves complete days behind, and the next call resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, select, update

from tunewright.core.errors import UserError
from tunewright.serving.tenants.audit import Change, changing
from tunewright.serving.tenants.database import Database
from tunewright.serving.tenants.tables import key_uses, requests, shadow_answers, tenants, usage_days
from tunewright.serving.tenants.times import iso

DAY_SECONDS = 86_400
_MIN_AGE_SECONDS = 3600.0
"""Newer requests are never rolled up, since limits count those of the last minute."""

_BY = ("tenant_id", "alias", "digest")
_SUMS = ("requests", "prompt_tokens", "completion_tokens", "first_tokens", "first_token_s")


@dataclass(frozen=True)
class RollupResult:
    """The records that were rolled up."""

    days: int
    requests: int
    shadow_answers: int
    """Answers of shadows to those requests, which were deleted; there is no total of them."""


@dataclass(frozen=True)
class DayTotal:
    """The rolled-up usage of one tenant, alias and adapter on one day, as the audit log has it."""

    day: str
    tenant: str
    alias: str
    digest: str
    requests: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def name(self) -> str:
        """The total's name in messages, which begins with the day."""
        return f"{self.day}, {self.tenant}, {self.alias}, adapter {self.digest}"

    @property
    def counts(self) -> dict[str, int]:
        """The numbers to compare."""
        counted = ("requests", "prompt_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in counted}


class UsageRollup:
    """Rolls up requests in the state."""

    def __init__(self, database: Database, actor: str | None) -> None:
        self._database = database
        self._actor = actor

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
        days = rolled_up = shadows = 0
        if first is not None:
            for day in range(int(first // DAY_SECONDS), int(before // DAY_SECONDS)):
                with changing(self._database, self._actor) as change:
                    counts = _roll_up_day(change, day, now - _MIN_AGE_SECONDS)
                days, rolled_up, shadows = days + bool(counts[0]), rolled_up + counts[0], shadows + counts[1]
        return RollupResult(days, rolled_up, shadows)

    def days(self) -> list[DayTotal]:
        """Return the totals of all days."""
        with self._database.reading() as connection:
            names = _tenant_names(connection)
            rows = connection.execute(select(usage_days)).mappings().all()
            return [_day_total(row["day"], names, dict(row), dict(row)) for row in rows]


def _tenant_names(connection: Connection) -> dict[int, str]:
    return dict(connection.execute(select(tenants.c.id, tenants.c.name)).all())


def _day_total(day: int, names: Mapping[int, str], by: Mapping[str, Any], sums: Mapping[str, Any]) -> DayTotal:
    return DayTotal(
        _date(day),
        names[by["tenant_id"]],
        by["alias"],
        by["digest"],
        sums["requests"],
        int(sums["prompt_tokens"]),  # PostgreSQL sums to a decimal
        int(sums["completion_tokens"]),
    )


def _date(day: int) -> str:
    return str(iso(day * DAY_SECONDS))[:10]


def _roll_up_day(change: Change, day: int, until: float) -> tuple[int, int]:
    """Roll up a day, and return the numbers of deleted requests and shadow answers."""
    connection = change.connection
    # A request in progress has no usage yet; it is left for the next call.
    old = and_(
        requests.c.started >= day * DAY_SECONDS,
        requests.c.started < min((day + 1) * DAY_SECONDS, until),
        requests.c.finished.is_not(None),
    )
    columns = [requests.c[name] for name in _BY]
    sums = (
        func.count(),
        func.coalesce(func.sum(requests.c.prompt_tokens), 0),
        func.coalesce(func.sum(requests.c.completion_tokens), 0),
        func.count(requests.c.first_token_s),
        func.coalesce(func.sum(requests.c.first_token_s), 0.0),
    )
    rows = connection.execute(select(*columns, *sums).where(old).group_by(*columns)).all()
    if not rows:
        return 0, 0
    names, totals = _tenant_names(connection), []
    for row in rows:
        by, summed = dict(zip(_BY, row[:3], strict=True)), dict(zip(_SUMS, row[3:], strict=True))
        _add(connection, day, by, summed)
        totals.append(asdict(_day_total(day, names, by, summed)))
    _keep_last_use(connection, old)
    shadows = connection.execute(
        delete(shadow_answers).where(shadow_answers.c.request_id.in_(select(requests.c.id).where(old)))
    ).rowcount
    rolled_up = connection.execute(delete(requests).where(old)).rowcount
    change.log("usage.rollup", _date(day), requests=rolled_up, shadow_answers=shadows, totals=totals)
    return rolled_up, shadows


def _add(connection: Connection, day: int, by: dict[str, Any], sums: dict[str, Any]) -> None:
    same = and_(usage_days.c.day == day, *(usage_days.c[name] == value for name, value in by.items()))
    more = {name: usage_days.c[name] + value for name, value in sums.items()}
    if not connection.execute(update(usage_days).where(same).values(**more)).rowcount:
        connection.execute(insert(usage_days).values(day=day, **by, **sums))


def _keep_last_use(connection: Connection, old: Any) -> None:
    """Keep the time of each key's last use, which is otherwise read from its requests."""
    used = select(requests.c.key_id, func.max(requests.c.started)).where(old).group_by(requests.c.key_id)
    for key, last in connection.execute(used).all():
        of = key_uses.c.key_id == key
        known = connection.execute(select(key_uses.c.last_used).where(of)).scalar()
        if known is None:
            connection.execute(insert(key_uses).values(key_id=key, last_used=last))
        elif known < last:
            connection.execute(update(key_uses).where(of).values(last_used=last))


def daily_totals(connection: Connection, tenant_id: int | None, since: float | None) -> Iterator[dict[str, Any]]:
    """Yield the totals of rolled-up days, for a tenant (None: all) since a time.

    Raises:
        UserError: the time is within a day that was rolled up.
    """
    query = select(usage_days)
    if tenant_id is not None:
        query = query.where(usage_days.c.tenant_id == tenant_id)
    for row in connection.execute(query).mappings():
        begins = row["day"] * DAY_SECONDS
        if since is not None and begins < since:
            if since < begins + DAY_SECONDS:
                raise UserError(
                    f"The requests of {str(iso(begins))[:10]} were rolled up into one total",
                    where="--since",
                    fix="Use the beginning of a day.",
                )
            continue
        yield dict(row)


def rolled_up_until(connection: Connection) -> float | None:
    """Return the end of the last day with rolled-up requests, if there is one."""
    last = connection.execute(select(func.max(usage_days.c.day))).scalar()
    return None if last is None else float((last + 1) * DAY_SECONDS)
