"""Limits and usage: each request reserves the most that it can come to, and settles for what it came to.

One table serves both. A limit counts a tenant's lines of the last 60 seconds (requests; and tokens, reserved ones of
requests under way) and its unfinished lines (concurrency), in the transaction that adds the next line, behind a lock
on the tenant. So limits hold over any number of servers on one database, in each 60 seconds that one can lay
anywhere, and not in each minute of the clock only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from tunewright.core.errors import UserError
from tunewright.serving.state.database import Database
from tunewright.serving.state.pruning import day_sums, pruned_until
from tunewright.serving.state.tables import api_keys, gateways, releases, requests, shadow_answers, tenants
from tunewright.serving.state.times import iso

WINDOW_SECONDS = 60.0
LOST_SECONDS = 45.0
"""A server that has not been seen for so long is dead, and what it had under way no longer counts."""

Outcome = Literal["stop", "length", "hung up", "timed out", "failed", "refused", "lost"]


# Asked by every request: made once.
_LIMITS = select(tenants).where(tenants.c.id == bindparam("tenant_id")).with_for_update()
_RESERVE = insert(requests).returning(requests.c.id)
_SETTLE = update(requests).where(requests.c.id == bindparam("number"), requests.c.finished.is_(None))


class LimitExceededError(Exception):
    """A tenant's limit is reached.

    Args:
        limit: which.
        message: for the client.
        wait: seconds after which the same request can pass; None: never, it is too large by itself.
    """

    def __init__(self, limit: str, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.limit = limit
        self.wait = wait


@dataclass(frozen=True)
class Wanted:
    """A request that is about to be answered."""

    tenant_id: int
    key_id: int
    alias: str
    release_id: int
    digest: str
    tokens: int
    """Prompt, and the most that the answer may have."""
    end_user: str | None = None
    """The tenant's own label of whom it asks for."""


@dataclass(frozen=True)
class Used:
    """What a request came to."""

    prompt_tokens: int
    completion_tokens: int
    queued_s: float
    """Before the engine took it."""
    first_token_s: float | None
    """From its arrival to the first token; None where none came."""
    total_s: float
    outcome: Outcome


@dataclass(frozen=True)
class UsageLine:
    """One request, as it is metered."""

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
    """None while it is under way."""
    end_user: str | None
    """The request's ``safety_identifier``, or else its ``user``."""


@dataclass(frozen=True)
class UsageSum:
    """The requests of one tenant for one alias that one adapter answered."""

    tenant: str
    alias: str
    digest: str
    requests: int
    under_way: int
    prompt_tokens: int
    completion_tokens: int
    mean_first_token_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the sum as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class ShadowLine:
    """What an alias answered and what its candidate in the shadow would have."""

    request: int
    time: str
    tenant: str
    candidate: str
    """The adapter."""
    answer: str
    shadow_answer: str | None
    why_not: str | None
    """There is no answer of the shadow."""

    def as_dict(self) -> dict[str, Any]:
        """Return the line as ``--json`` prints it."""
        return asdict(self)


class Meter:
    """Reservations and usage in the state."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def reserve(self, wanted: Wanted, gateway: str) -> int:
        """Take a request into account before it is answered: the number to settle it by.

        Raises:
            LimitExceededError: it would go over a limit; nothing is reserved.
        """
        with self._database.writing() as connection:
            # Waits for whoever reserves for this tenant at this moment; SQLite has one writer anyway.
            limits = connection.execute(_LIMITS, {"tenant_id": wanted.tenant_id}).one()
            now = self._database.now(connection)
            _require_within(connection, limits, wanted, now)
            made = connection.execute(_RESERVE, {"started": now, "gateway": gateway, **asdict(wanted)})
            return int(made.scalar_one())

    def settle(self, number: int, used: Used) -> None:
        """Replace what a request reserved by what it used. Once is enough: a second time changes nothing."""
        with self._database.writing() as connection:
            tokens, finished = used.prompt_tokens + used.completion_tokens, self._database.now(connection)
            connection.execute(_SETTLE, {"number": number, "tokens": tokens, "finished": finished, **asdict(used)})

    def alive(self, gateway: str, name: str, release_id: int) -> None:
        """Say that a server lives and by which release it answers; what dead ones had under way is written off."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            values = {"name": name, "seen": now, "release_id": release_id}
            if not connection.execute(update(gateways).where(gateways.c.id == gateway).values(**values)).rowcount:
                connection.execute(insert(gateways).values(id=gateway, **values))
            living = select(gateways.c.id).where(gateways.c.seen > now - LOST_SECONDS)
            connection.execute(delete(gateways).where(gateways.c.seen <= now - LOST_SECONDS))
            connection.execute(
                update(requests)
                .where(requests.c.finished.is_(None), requests.c.gateway.not_in(living))
                .values(outcome="lost", finished=now)
            )

    def gone(self, gateway: str) -> None:
        """Say that a server has ended in good order."""
        with self._database.writing() as connection:
            connection.execute(delete(gateways).where(gateways.c.id == gateway))

    def servers(self) -> list[tuple[str, int]]:
        """Return the servers that live: what each is called, and the newest release that it answers by."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
            rows = connection.execute(select(gateways).where(gateways.c.seen > now - LOST_SECONDS)).all()
        return sorted((row.name, row.release_id) for row in rows)

    def record_shadow(
        self, number: int, release_id: int, answer: str, shadow_answer: str | None, why_not: str | None
    ) -> None:
        """Keep what a candidate in the shadow would have answered, beside what was."""
        told = {"answer": answer, "shadow_answer": shadow_answer, "why_not": why_not}
        with self._database.writing() as connection:
            connection.execute(insert(shadow_answers).values(request_id=number, release_id=release_id, **told))

    def shadow_lines(self, alias: str) -> list[ShadowLine]:
        """Return what candidates in an alias's shadow were asked, the first one first."""
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

    def lines(self, tenant: str | None = None, since: float | None = None) -> list[UsageLine]:
        """Return every request (of one tenant, from a time on), the first one first.

        Raises:
            UserError: no such tenant.
        """
        query = select(requests, tenants.c.name.label("tenant"), api_keys.c.prefix.label("key"))
        query = query.join(tenants, requests.c.tenant_id == tenants.c.id)
        query = query.join(api_keys, requests.c.key_id == api_keys.c.id).order_by(requests.c.id)
        if since is not None:
            query = query.where(requests.c.started >= since)
        with self._database.reading() as connection:
            if tenant is not None:
                query = query.where(requests.c.tenant_id == _tenant_id(connection, tenant))
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
        """Usage by tenant, alias and adapter.

        Raises:
            UserError: no such tenant.
        """
        by = (requests.c.tenant_id, requests.c.alias, requests.c.digest)
        query = select(
            *by,
            func.count().label("requests"),
            (func.count() - func.count(requests.c.finished)).label("under_way"),
            func.coalesce(func.sum(requests.c.prompt_tokens), 0).label("prompt_tokens"),
            func.coalesce(func.sum(requests.c.completion_tokens), 0).label("completion_tokens"),
            func.count(requests.c.first_token_s).label("first_tokens"),
            func.coalesce(func.sum(requests.c.first_token_s), 0.0).label("first_token_s"),
        )
        query = query.group_by(*by)
        if since is not None:
            query = query.where(requests.c.started >= since)
        with self._database.reading() as connection:
            only = None if tenant is None else _tenant_id(connection, tenant)
            if only is not None:
                query = query.where(requests.c.tenant_id == only)
            rows = [dict(row) for row in connection.execute(query).mappings()]
            rows += day_sums(connection, only, since)
            names = dict(connection.execute(select(tenants.c.id, tenants.c.name)).all())
        return _summed(rows, names)

    def pruned_until(self) -> float | None:
        """Before which time there may be sums by day only; None: every request has its line."""
        with self._database.reading() as connection:
            return pruned_until(connection)


def _summed(rows: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[UsageSum]:
    """Rows of single requests and of pruned days together."""
    sums: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        counted = {name: row.get(name, 0) for name in _SUMMED}
        sums[names[row["tenant_id"]], row["alias"], row["digest"]].update(counted)
    return [
        UsageSum(
            *by,
            requests=of["requests"],
            under_way=of["under_way"],
            prompt_tokens=int(of["prompt_tokens"]),
            completion_tokens=int(of["completion_tokens"]),
            mean_first_token_s=of["first_token_s"] / of["first_tokens"] if of["first_tokens"] else None,
        )
        for by, of in sorted(sums.items())
    ]


_SUMMED = ("requests", "under_way", "prompt_tokens", "completion_tokens", "first_tokens", "first_token_s")


def _tenant_id(connection: Connection, name: str) -> int:
    found = connection.execute(select(tenants.c.id).where(tenants.c.name == name)).scalar()
    if found is None:
        raise UserError(f"there is no tenant {name!r}", fix="`tunewright tenant list` shows them.")
    return int(found)


def _require_within(connection: Connection, limits: Row[Any], wanted: Wanted, now: float) -> None:
    if limits.tokens_per_minute is not None and wanted.tokens > limits.tokens_per_minute:
        raise LimitExceededError(
            "tokens_per_minute",
            f"The prompt and the most that the answer may have are {wanted.tokens} tokens together, over the limit of"
            f" tokens a minute ({limits.tokens_per_minute}). Ask for fewer (max_tokens).",
            None,
        )
    if limits.concurrency is not None:
        under_way = connection.execute(
            select(func.count()).where(requests.c.tenant_id == wanted.tenant_id, requests.c.finished.is_(None))
        ).scalar_one()
        if under_way >= limits.concurrency:
            message = f"The limit of requests at once ({limits.concurrency}) is reached."
            raise LimitExceededError("concurrency", message, 1.0)
    if limits.requests_per_minute is None and limits.tokens_per_minute is None:
        return
    recent = select(requests.c.started, requests.c.tokens).where(
        requests.c.tenant_id == wanted.tenant_id, requests.c.started > now - WINDOW_SECONDS
    )
    rows = [(row.started, row.tokens) for row in connection.execute(recent.order_by(requests.c.started))]
    for limit, allowed, weights, weight in (
        ("requests_per_minute", limits.requests_per_minute, [1] * len(rows), 1),
        ("tokens_per_minute", limits.tokens_per_minute, [tokens for _, tokens in rows], wanted.tokens),
    ):
        if allowed is not None and sum(weights) + weight > allowed:
            wait = _wait([started for started, _ in rows], weights, sum(weights) + weight - allowed, now)
            what = limit.removesuffix("_per_minute")
            message = f"The limit of {what} a minute ({allowed}) is reached: the last 60 seconds had {sum(weights)}"
            if what == "tokens":
                message += f", used or reserved, and this request may need {weight}"
            message += "."
            raise LimitExceededError(limit, message, wait)


def _wait(started: Sequence[float], weights: Sequence[int], excess: int, now: float) -> float:
    """Seconds until lines that weigh ``excess`` or more have left the window; the oldest come first."""
    for time, weight in zip(started, weights, strict=True):
        excess -= weight
        if excess <= 0:
            return time + WINDOW_SECONDS - now
    raise AssertionError("the request alone is within the limit")
