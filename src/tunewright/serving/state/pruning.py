"""Old requests become sums by day: what was used stays on the bill, the lines of single requests go.

A line for each request would otherwise be kept for ever. Each day is pruned in a transaction of its own, so that a call
which is cut off leaves whole days behind it and the next one goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, select, update

from tunewright.core.errors import UserError
from tunewright.serving.state.audit import Change, changing
from tunewright.serving.state.database import Database
from tunewright.serving.state.tables import key_uses, requests, shadow_answers, usage_days
from tunewright.serving.state.times import iso

DAY_SECONDS = 86_400
_SPARED_SECONDS = 3600.0
"""Requests so new are left alone, whatever is asked: limits count the last minute's."""

_BY = ("tenant_id", "alias", "digest")
_SUMS = ("requests", "prompt_tokens", "completion_tokens", "first_tokens", "first_token_s")


@dataclass(frozen=True)
class Pruned:
    """What became sums."""

    days: int
    requests: int
    shadow_answers: int
    """What candidates in the shadow said to those requests; no sum is kept of it."""

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as ``--json`` prints them."""
        return asdict(self)


class Pruning:
    """Makes sums of old requests."""

    def __init__(self, database: Database, actor: str | None) -> None:
        self._database = database
        self._actor = actor

    def prune(self, before: float) -> Pruned:
        """Make sums of the requests of all days before a time, which is a day's beginning in UTC.

        Raises:
            UserError: it is in the midst of a day, or to come.
        """
        with self._database.reading() as connection:
            now = self._database.now(connection)
            first = connection.execute(select(func.min(requests.c.started))).scalar()
        if before % DAY_SECONDS or before > now:
            raise UserError(
                f"{iso(before)} {'is still to come' if before > now else 'is not the beginning of a day (UTC)'}",
                where="--before",
                fix="Requests are pruned by whole days: write it like 2026-11-25.",
            )
        days = gone = unheard = 0
        if first is not None:
            for day in range(int(first // DAY_SECONDS), int(before // DAY_SECONDS)):
                with changing(self._database, self._actor) as change:
                    counts = _prune_day(change, day, now - _SPARED_SECONDS)
                days, gone, unheard = days + bool(counts[0]), gone + counts[0], unheard + counts[1]
        return Pruned(days, gone, unheard)


def _prune_day(change: Change, day: int, until: float) -> tuple[int, int]:
    """Return how many requests of a day became sums, and how many answers of shadows went with them."""
    connection = change.connection
    # One under way is on no bill yet; it is left for the next time.
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
    for row in rows:
        _add(connection, day, dict(zip(_BY, row[:3], strict=True)), dict(zip(_SUMS, row[3:], strict=True)))
    _keep_last_use(connection, old)
    heard = connection.execute(
        delete(shadow_answers).where(shadow_answers.c.request_id.in_(select(requests.c.id).where(old)))
    ).rowcount
    gone = connection.execute(delete(requests).where(old)).rowcount
    change.log("usage.prune", str(iso(day * DAY_SECONDS))[:10], requests=gone, shadow_answers=heard)
    return gone, heard


def _add(connection: Connection, day: int, by: dict[str, Any], sums: dict[str, Any]) -> None:
    same = and_(usage_days.c.day == day, *(usage_days.c[name] == value for name, value in by.items()))
    more = {name: usage_days.c[name] + value for name, value in sums.items()}
    if not connection.execute(update(usage_days).where(same).values(**more)).rowcount:
        connection.execute(insert(usage_days).values(day=day, **by, **sums))


def _keep_last_use(connection: Connection, old: Any) -> None:
    """A key was last used when it was, also where that request's line goes."""
    used = select(requests.c.key_id, func.max(requests.c.started)).where(old).group_by(requests.c.key_id)
    for key, last in connection.execute(used).all():
        of = key_uses.c.key_id == key
        known = connection.execute(select(key_uses.c.last_used).where(of)).scalar()
        if known is None:
            connection.execute(insert(key_uses).values(key_id=key, last_used=last))
        elif known < last:
            connection.execute(update(key_uses).where(of).values(last_used=last))


def day_sums(connection: Connection, tenant_id: int | None, since: float | None) -> Iterator[dict[str, Any]]:
    """The sums of pruned days, for a tenant (None: all) from a time on.

    Raises:
        UserError: the time is in the midst of a day of which there are sums only.
    """
    query = select(usage_days)
    if tenant_id is not None:
        query = query.where(usage_days.c.tenant_id == tenant_id)
    for row in connection.execute(query).mappings():
        begins = row["day"] * DAY_SECONDS
        if since is not None and begins < since:
            if since < begins + DAY_SECONDS:
                raise UserError(
                    f"of {str(iso(begins))[:10]} there are sums of the whole day only: its requests were pruned",
                    where="--since",
                    fix="Begin with a day.",
                )
            continue
        yield dict(row)


def pruned_until(connection: Connection) -> float | None:
    """Return the end of the last day of which requests were pruned; None where none were."""
    last = connection.execute(select(func.max(usage_days.c.day))).scalar()
    return None if last is None else float((last + 1) * DAY_SECONDS)
