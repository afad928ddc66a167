"""Limits: each request reserves the most tokens that it can use, and settles for the tokens that it used.

One table serves as quota and as usage record. A limit counts a tenant's requests of the last 60
seconds (their number, and their tokens, reserved ones included) and its unfinished requests
(concurrency). Refused requests have a table of their own, and count only towards the number. The count
and the next request's row are one transaction, behind a lock on the tenant. So limits hold across all
servers of a database, and in every interval of 60 seconds, not only in each minute of the clock.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, Table, bindparam, delete, func, insert, or_, select, update

from tunewright.core.errors import UserError
from tunewright.serving.options import LimitOptions
from tunewright.serving.tenants.database import Database
from tunewright.serving.tenants.tables import (
    gateways,
    request_records,
    requests,
    shadow_answers,
    tenants,
    unmetered_requests,
)

WINDOW_SECONDS = 60.0
LOST_SECONDS = 45.0
"""A server without a heartbeat for this long is dead, and its unfinished requests no longer count."""

_SETTLED_SECONDS = LOST_SECONDS / 2
"""A server declares others dead only after the clock was steady for this long, in which living servers beat."""
_JUMP_SECONDS = 5.0
"""A larger difference between the clock and steady time is a jump of the clock."""

log = logging.getLogger("tunewright")

Outcome = Literal["stop", "length", "disconnected", "timed out", "failed", "lost"]

_UNLIMITED = "none"

# Built once, since every request runs them.
_LIMITS = select(tenants).where(tenants.c.id == bindparam("tenant_id")).with_for_update()
_RESERVE = insert(requests).returning(requests.c.id)
# A request that was written off by mistake is billed when its server settles it after all.
_UNSETTLED = or_(requests.c.finished.is_(None), requests.c.outcome == "lost")
_SETTLE = update(requests).where(requests.c.id == bindparam("number"), _UNSETTLED)

_COUNTED = (requests, unmetered_requests)


def _started(table: Table, tenant_id: int, now: float, *columns: Any) -> Select[Any]:
    """Select the starts of a tenant's requests in the last minute, or other columns of them."""
    recent = table.c.started > now - WINDOW_SECONDS, table.c.started <= now + _JUMP_SECONDS
    return select(*(columns or (table.c.started,))).where(table.c.tenant_id == tenant_id, *recent)


@dataclass(frozen=True)
class Limits:
    """A tenant's limits; None means unlimited."""

    requests_per_minute: int | None = None
    """Requests that start within any 60 seconds."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers, counted when their request starts."""
    concurrency: int | None = None
    """Unfinished requests at one time, including requests in the queue."""


UNLIMITED = Limits()


def changed_limits(limits: Limits, options: LimitOptions) -> Limits:
    """Return the limits with the given limits replaced."""
    names = {"requests": "requests_per_minute", "tokens": "tokens_per_minute", "concurrency": "concurrency"}
    given = {option: text for option in names if (text := getattr(options, option)) is not None}
    return replace(limits, **{names[option]: _limit(text, f"--{option}") for option, text in given.items()})


def _limit(text: str, where: str) -> int | None:
    if text == _UNLIMITED:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**53):
        raise UserError(
            f"Invalid limit {text!r}",
            where=where,
            fix=f"Use a number from 1 to 9,007,199,254,740,991, or {_UNLIMITED}.",
        )
    return int(text)


def check_limits(limits: Limits) -> None:
    """Check that each limit is at least 1."""
    for name, value in asdict(limits).items():
        if value is not None and value < 1:
            raise UserError(
                f"{name} must be at least 1 (got {value})", fix="`tunewright tenant disable` disables a tenant."
            )


class LimitExceededError(Exception):
    """A request is over a tenant's limit.

    Args:
        limit: the limit's name.
        message: for the client.
        wait: seconds after which the same request can pass; None means never, since it is over the limit by itself.
    """

    def __init__(self, limit: str, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.limit = limit
        self.wait = wait


@dataclass(frozen=True)
class Reservation:
    """A request that is about to be answered."""

    tenant_id: int
    key_id: int
    alias: str
    release_id: int
    digest: str
    tokens: int
    """Maximum number of tokens of prompts and answers together."""
    end_user: str | None = None
    """The tenant's label for its user."""
    response_id: str | None = None
    """The response's id, as the client receives it."""


@dataclass(frozen=True)
class RequestUsage:
    """The usage of a request."""

    prompt_tokens: int
    completion_tokens: int
    queued_s: float
    """The time from arrival to the engine."""
    first_token_s: float | None
    """The time from arrival to the first token; None if there was no token."""
    total_s: float
    outcome: Outcome


class Quota:
    """Reservations in the state, and the servers that hold them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._beat: tuple[float, float] | None = None  # the last heartbeat: the clock's time and steady time
        self._steady_since = 0.0

    def reserve(self, reservation: Reservation, gateway: str) -> int:
        """Reserve tokens for a request, and return the number to settle it by."""
        with self._database.writing() as connection:
            # Waits for other reservations of this tenant; SQLite has a single writer anyway.
            limits = connection.execute(_LIMITS, {"tenant_id": reservation.tenant_id}).one()
            now = self._database.now(connection)
            try:
                _check_quota(connection, limits, reservation, now)
            except LimitExceededError as error:
                refused = error  # raised after the commit, because the check may have corrected times
            else:
                row = connection.execute(_RESERVE, {"started": now, "gateway": gateway, **asdict(reservation)})
                return int(row.scalar_one())
        raise refused

    def recent_requests(self, tenant_id: int, allowed: int) -> int:
        """Return the number of requests that a tenant has begun in the last 60 seconds, if it may begin another one."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
            numbers = [_started(table, tenant_id, now, func.count()) for table in _COUNTED]
            count = sum(int(connection.execute(number).scalar_one()) for number in numbers)
            if count < allowed:
                return count
            times = [connection.execute(_started(table, tenant_id, now)).scalars() for table in _COUNTED]
            started = sorted(time for table in times for time in table)
        wait = _wait(started, [1] * count, count + 1 - allowed, now)
        raise LimitExceededError("requests_per_minute", f"{_reached(count, 'requests', allowed)}.", wait)

    def record_unmetered(self, tenant_id: int) -> None:
        """Count a request without a reservation towards requests per minute; older records are deleted."""
        own = unmetered_requests.c.tenant_id == tenant_id
        started = unmetered_requests.c.started
        with self._database.writing() as connection:
            now = self._database.now(connection)
            # The clock may have moved back. Another request may have been recorded since `now`, and still counts.
            outdated = or_(started <= now - WINDOW_SECONDS, started > now + _JUMP_SECONDS)
            connection.execute(delete(unmetered_requests).where(own, outdated))
            connection.execute(insert(unmetered_requests).values(tenant_id=tenant_id, started=now))

    def settle(self, number: int, usage: RequestUsage) -> None:
        """Replace a reservation by the request's usage; a second call changes nothing."""
        with self._database.writing() as connection:
            tokens, finished = usage.prompt_tokens + usage.completion_tokens, self._database.now(connection)
            connection.execute(_SETTLE, {"number": number, "tokens": tokens, "finished": finished, **asdict(usage)})

    def record_shadow(
        self, number: int, release_id: int, answer: str, shadow_answer: str | None, why_not: str | None
    ) -> None:
        """Record a request's live answer, and the shadow's or the reason why it has none.

        The answers to a request that was forgotten meanwhile are dropped.
        """
        row = {"answer": answer, "shadow_answer": shadow_answer, "why_not": why_not}
        of = select(shadow_answers.c.request_id).where(shadow_answers.c.request_id == number)
        asked = select(requests.c.id).where(requests.c.id == number, requests.c.response_id.is_not(None))
        with self._database.writing() as connection:
            if connection.execute(asked.with_for_update()).first() is None:
                return
            if connection.execute(of).first() is None:  # otherwise an earlier attempt was committed without a reply
                connection.execute(insert(shadow_answers).values(request_id=number, release_id=release_id, **row))

    def heartbeat(self, gateway: str, name: str, release_id: int) -> None:
        """Record that a server is alive and has taken the releases up to an id.

        The unfinished requests of servers without a heartbeat get the outcome "lost". After a jump of
        the clock, and after the start of this server, the other servers first get time for a heartbeat.
        Then records of requests whose retention has ended are deleted too.
        """
        with self._database.writing() as connection:
            now = self._database.now(connection)
            steady = self._clock_is_steady(now)
            values = {"name": name, "seen": now, "release_id": release_id}
            if not connection.execute(update(gateways).where(gateways.c.id == gateway).values(**values)).rowcount:
                connection.execute(insert(gateways).values(id=gateway, **values))
            # Beats from before the clock moved back; a server that has died since counts from now on.
            connection.execute(update(gateways).where(gateways.c.seen > now).values(seen=now))
            if not steady:
                return
            living = select(gateways.c.id).where(gateways.c.seen > now - LOST_SECONDS)
            connection.execute(delete(gateways).where(gateways.c.seen <= now - LOST_SECONDS))
            connection.execute(
                update(requests)
                .where(requests.c.finished.is_(None), requests.c.gateway.not_in(living))
                .values(outcome="lost", finished=now)
            )
            ended = request_records.c.expires <= self._database.not_after(now)
            expired = connection.execute(delete(request_records).where(ended)).rowcount
        if expired:
            log.info("%d records of requests were deleted at the end of their retention", expired)

    def _clock_is_steady(self, now: float) -> bool:
        """Return whether the clock has not jumped in the last `_SETTLED_SECONDS`, for which this server must run."""
        beat = now, self._database.steady()
        jump = 0.0 if self._beat is None else (beat[0] - self._beat[0]) - (beat[1] - self._beat[1])
        if self._beat is None or abs(jump) > _JUMP_SECONDS:
            self._steady_since = beat[1]
        if jump < -_JUMP_SECONDS:
            log.warning(
                "the clock moved back by %.0f s; until this server restarts, keys that had expired stay expired", -jump
            )
        elif jump > _JUMP_SECONDS:
            log.warning("the clock moved forward by %.0f s, or this machine was suspended", jump)
        self._beat = beat
        return beat[1] - self._steady_since >= _SETTLED_SECONDS

    def remove_gateway(self, gateway: str) -> None:
        """Remove a server that has shut down."""
        with self._database.writing() as connection:
            connection.execute(delete(gateways).where(gateways.c.id == gateway))

    def servers(self) -> list[tuple[str, int]]:
        """Return the live servers: the name of each, and the newest release that it has taken."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
            living = gateways.c.seen.between(now - LOST_SECONDS, now + LOST_SECONDS)
            rows = connection.execute(select(gateways).where(living)).all()
        return sorted((row.name, row.release_id) for row in rows)


def _check_quota(connection: Connection, limits: Row[Any], reservation: Reservation, now: float) -> None:
    if limits.tokens_per_minute is not None and reservation.tokens > limits.tokens_per_minute:
        raise LimitExceededError(
            "tokens_per_minute",
            f"The prompt and max_tokens need {reservation.tokens} tokens, over the limit of "
            f"{limits.tokens_per_minute} tokens per minute. Lower max_tokens.",
            None,
        )
    if limits.concurrency is not None:
        unfinished = connection.execute(
            select(func.count()).where(requests.c.tenant_id == reservation.tenant_id, requests.c.finished.is_(None))
        ).scalar_one()
        if unfinished >= limits.concurrency:
            message = f"Rate limit reached: {unfinished} requests in progress (limit {limits.concurrency})."
            raise LimitExceededError("concurrency", message, 1.0)
    if limits.requests_per_minute is None and limits.tokens_per_minute is None:
        return
    recent = select(requests.c.started, requests.c.tokens).where(
        requests.c.tenant_id == reservation.tenant_id, requests.c.started > now - WINDOW_SECONDS
    )
    rows = [(row.started, row.tokens) for row in connection.execute(recent.order_by(requests.c.started))]
    if rows and rows[-1][0] > now:
        rows = _restarted(connection, reservation.tenant_id, rows, now)
    unmetered = connection.execute(_started(unmetered_requests, reservation.tenant_id, now)).scalars()
    rows = sorted([*rows, *((started, 0) for started in unmetered)])
    for limit, allowed, weights, weight in (
        ("requests_per_minute", limits.requests_per_minute, [1] * len(rows), 1),
        ("tokens_per_minute", limits.tokens_per_minute, [tokens for _, tokens in rows], reservation.tokens),
    ):
        if allowed is not None and sum(weights) + weight > allowed:
            wait = _wait([started for started, _ in rows], weights, sum(weights) + weight - allowed, now)
            what = limit.removesuffix("_per_minute")
            message = _reached(sum(weights), what, allowed)
            if what == "tokens":
                message += f", and this request may need {weight}"
            raise LimitExceededError(limit, f"{message}.", wait)


def _reached(count: int, what: str, allowed: int) -> str:
    return f"Rate limit reached: {count} {what} in the last 60 seconds (limit {allowed})"


def _restarted(
    connection: Connection, tenant_id: int, rows: Sequence[tuple[float, int]], now: float
) -> list[tuple[float, int]]:
    """Return the requests without a start in the future; their true age is unknown after the clock moved back.

    With the old times they would count until the clock reaches them again, which may take hours.
    Counted from now on, they exceed no limit and leave the window after 60 seconds.
    """
    later = requests.c.tenant_id == tenant_id, requests.c.started > now
    moved = connection.execute(update(requests).where(*later).values(started=now)).rowcount
    log.warning("the clock moved back by %.0f s: %d requests now count as started just now", rows[-1][0] - now, moved)
    return [(min(started, now), tokens) for started, tokens in rows]


def _wait(started: Sequence[float], weights: Sequence[int], excess: int, now: float) -> float:
    """Return the seconds until enough of the oldest requests have left the window to free ``excess``."""
    for time, weight in zip(started, weights, strict=True):
        excess -= weight
        if excess <= 0:
            return time + WINDOW_SECONDS - now
    raise AssertionError("the request alone is within the limit")
