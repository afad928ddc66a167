"""Reading the usage: request by request, in totals, and as CSV; and the answers of shadows."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import Connection, Integer, and_, cast, func, or_, select

from tunewright.core.csv import safe_cell
from tunewright.serving.tenants.database import Database
from tunewright.serving.tenants.tables import api_keys, releases, requests, shadow_answers, tenants
from tunewright.serving.tenants.tenants import find_tenant
from tunewright.serving.tenants.times import iso
from tunewright.serving.tenants.usage_rollup import DAY_SECONDS, DayTotal, daily_totals, rolled_up_until

_MOST_FAULTS = 100
"""Requests that `Usage.faults` lists; one mistake may affect all."""


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
        query = select(requests, tenants.c.name.label("tenant"), api_keys.c.prefix.label("key"))
        query = query.join(tenants, requests.c.tenant_id == tenants.c.id)
        query = query.join(api_keys, requests.c.key_id == api_keys.c.id).order_by(requests.c.id)
        if since is not None:
            query = query.where(requests.c.started >= since)
        with self._database.reading() as connection:
            if tenant is not None:
                query = query.where(requests.c.tenant_id == find_tenant(connection, tenant).id)
            rows = connection.execute(query).all()
        return [
            UsageLine(
                row.id,
                str(iso(row.started)),
                row.tenant,
                row.key,
                row.alias,
                row.digest,
                row.prompt_tokens,
                row.completion_tokens,
                row.queued_s,
                row.first_token_s,
                row.total_s,
                row.outcome,
                row.end_user,
            )
            for row in rows
        ]

    def sums(self, tenant: str | None = None, since: float | None = None) -> list[UsageSum]:
        """Return totals by tenant, alias and adapter.

        Raises:
            UserError: the tenant does not exist, or of a day in part before ``since`` only the total is known.
        """
        with self._database.reading() as connection:
            tenant_id = None if tenant is None else int(find_tenant(connection, tenant).id)
            rows = _request_totals(connection, tenant_id, since)
            rows += daily_totals(connection, tenant_id, since)
            names = dict(connection.execute(select(tenants.c.id, tenants.c.name)).all())
        return _summed(rows, names)

    def by_day(self, tenant: str | None = None, since: float | None = None) -> list[DayTotal]:
        """Return totals by day (UTC), tenant, alias and adapter, the oldest first.

        Raises:
            UserError: the tenant does not exist, or ``since`` is within a day that was rolled up.
        """
        with self._database.reading() as connection:
            tenant_id = None if tenant is None else int(find_tenant(connection, tenant).id)
            rows = _request_totals(connection, tenant_id, since, (self._day,))
            rows += daily_totals(connection, tenant_id, since)
            names = dict(connection.execute(select(tenants.c.id, tenants.c.name)).all())
        sums: dict[tuple[str, str, str, str], Counter[str]] = defaultdict(Counter)
        for row in rows:
            day = str(iso(int(row["day"]) * DAY_SECONDS))[:10]
            by = (day, names[row["tenant_id"]], row["alias"], row["digest"])
            sums[by].update({name: int(row[name]) for name in _COUNTED})
        return [
            DayTotal(*by, total["requests"], total["prompt_tokens"], total["completion_tokens"])
            for by, total in sorted(sums.items())
        ]

    @property
    def _day(self) -> Any:
        """The day of a request since 1970, as SQL."""
        days = requests.c.started / DAY_SECONDS
        # PostgreSQL rounds in a cast; SQLite cuts, and may have no floor.
        return (cast(days, Integer) if self._database.is_sqlite else func.floor(days)).label("day")

    def shadow_lines(self, alias: str) -> list[ShadowLine]:
        """Return the requests of an alias's shadows, the oldest first."""
        query = select(shadow_answers, requests.c.started, tenants.c.name, releases.c.candidate)
        query = query.join(requests, shadow_answers.c.request_id == requests.c.id)
        query = query.join(tenants, requests.c.tenant_id == tenants.c.id)
        query = query.join(releases, shadow_answers.c.release_id == releases.c.id)
        query = query.where(releases.c.alias == alias).order_by(shadow_answers.c.request_id)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [
            ShadowLine(
                row.request_id,
                str(iso(row.started)),
                row.name,
                row.candidate,
                row.answer,
                row.shadow_answer,
                row.why_not,
            )
            for row in rows
        ]

    def faults(self) -> list[str]:
        """Return a sentence for each request whose usage contradicts itself, its key or its release.

        One changed number or name contradicts another one. A change of several that agree is not found, nor one of
        times, outcomes or end users, nor a request that was deleted.
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
            return rolled_up_until(connection)


def usage_csv(lines: Sequence[UsageLine]) -> str:
    """Return a CSV table with the fields of `UsageLine` as columns; unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(UsageLine)], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        # Clients choose this text, and a spreadsheet may take it for a formula.
        writer.writerow({**asdict(line), "end_user": safe_cell(line.end_user or "")})
    return out.getvalue()


_COUNTED = ("requests", "prompt_tokens", "completion_tokens")
_SUMMED = ("requests", "in_flight", "prompt_tokens", "completion_tokens", "first_tokens", "first_token_s")


def _request_totals(
    connection: Connection, tenant_id: int | None, since: float | None, more: tuple[Any, ...] = ()
) -> list[dict[str, Any]]:
    by = (requests.c.tenant_id, requests.c.alias, requests.c.digest, *more)
    query = select(
        *by,
        func.count().label("requests"),
        (func.count() - func.count(requests.c.finished)).label("in_flight"),
        func.coalesce(func.sum(requests.c.prompt_tokens), 0).label("prompt_tokens"),
        func.coalesce(func.sum(requests.c.completion_tokens), 0).label("completion_tokens"),
        func.count(requests.c.first_token_s).label("first_tokens"),
        func.coalesce(func.sum(requests.c.first_token_s), 0.0).label("first_token_s"),
    )
    query = query.group_by(*by)
    if since is not None:
        query = query.where(requests.c.started >= since)
    if tenant_id is not None:
        query = query.where(requests.c.tenant_id == tenant_id)
    return [dict(row) for row in connection.execute(query).mappings()]


def _summed(rows: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[UsageSum]:
    """Add up totals of requests and of days."""
    sums: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        counted = {name: row.get(name, 0) for name in _SUMMED}
        sums[names[row["tenant_id"]], row["alias"], row["digest"]].update(counted)
    return [
        UsageSum(
            *by,
            requests=total["requests"],
            in_flight=total["in_flight"],
            prompt_tokens=int(total["prompt_tokens"]),
            completion_tokens=int(total["completion_tokens"]),
            mean_first_token_s=total["first_token_s"] / total["first_tokens"] if total["first_tokens"] else None,
        )
        for by, total in sorted(sums.items())
    ]
