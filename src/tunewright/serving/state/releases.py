"""Releases: which adapter an alias answers with, from when on, and why it may.

An alias's history is a list of lines, each of which is the whole state from then on; none is changed later. What is
live is the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, insert, select

from tunewright.errors import UserError
from tunewright.serving.state.audit import Change, changing
from tunewright.serving.state.database import Database
from tunewright.serving.state.tables import releases
from tunewright.serving.state.tenants import check_name
from tunewright.serving.state.times import iso

Action = Literal["deploy", "canary", "shadow", "promote", "rollback"]


@dataclass(frozen=True)
class Grounds:
    """Why an adapter may be released."""

    verdict: str | None
    """What its newest evaluation says; None: it has none."""
    evaluation: str | None
    """That evaluation's ID."""
    because: str | None = None
    """Why it is released without a verdict to ship."""


@dataclass(frozen=True)
class Candidate:
    """An adapter that is tried beside the one that the alias answers with."""

    adapter: str
    digest: str
    share: float | None
    """Of the traffic, which it answers (a canary); None: it is asked too, but not heard (a shadow)."""

    @property
    def told(self) -> str:
        """How it is tried, in words."""
        return "in the shadow" if self.share is None else f"on {self.share:.4g} of the traffic"


@dataclass(frozen=True)
class Release:
    """One line of an alias's history."""

    id: int
    """Over all aliases, in the order of time."""
    alias: str
    number: int
    """Within the alias, from 1."""
    action: Action
    adapter: str
    digest: str
    candidate: Candidate | None
    restores: int | None
    """Of a rollback: the number of the release that it brings back."""
    grounds: Grounds
    author: str | None
    created: float

    @property
    def digests(self) -> frozenset[str]:
        """The adapters that it needs."""
        return frozenset({self.digest} | ({self.candidate.digest} if self.candidate else set()))

    def as_dict(self) -> dict[str, Any]:
        """The release as ``--json`` prints it."""
        return {**asdict(self), "created": iso(self.created)}


class Releases:
    """The aliases' histories in the state.

    Args:
        actor: who makes changes, for the history and the audit.
    """

    def __init__(self, database: Database, actor: str | None) -> None:
        self._database = database
        self._actor = actor

    def live(self) -> dict[str, Release]:
        """Each alias's last release, by alias."""
        last = select(func.max(releases.c.id)).group_by(releases.c.alias)
        with self._database.reading() as connection:
            rows = connection.execute(select(releases).where(releases.c.id.in_(last)).order_by(releases.c.alias)).all()
        return {row.alias: _release(row) for row in rows}

    def newest(self) -> int:
        """The id of the newest release of all; 0 before the first."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.coalesce(func.max(releases.c.id), 0))).scalar_one())

    def history(self, alias: str | None = None) -> list[Release]:
        """All releases (of one alias), the first one first.

        Raises:
            UserError: no such alias.
        """
        with self._database.reading() as connection:
            if alias is not None:
                return _history(connection, alias)
            return [_release(row) for row in connection.execute(select(releases).order_by(releases.c.id))]

    def deploy(self, alias: str, adapter: str, digest: str, grounds: Grounds) -> Release:
        """Have an alias answer with this adapter from now on; a candidate beside it is let go.

        Raises:
            UserError: it does so already, or what is no name for an alias.
        """
        check_name(alias, "an alias")
        with changing(self._database, self._actor) as change:
            before = _last(change.connection, alias)
            if before is not None and before.digest == digest and before.candidate is None:
                raise UserError(f"{alias} answers with {adapter} already, since its release {before.number}")
            return _add(change, before, "deploy", alias, adapter, digest, None, grounds)

    def try_beside(self, alias: str, candidate: Candidate, grounds: Grounds) -> Release:
        """Try an adapter beside the one that the alias answers with: on a share of the traffic, or in the shadow.

        Raises:
            UserError: the alias has no release, answers with this adapter already, or a share that is none.
        """
        if candidate.share is not None and not 0 < candidate.share < 1:
            raise UserError(f"{candidate.share:g} is no share: it is above 0 and below 1")
        with changing(self._database, self._actor) as change:
            before = _last(change.connection, alias)
            if before is None:
                raise UserError(
                    f"{alias} has no release that a candidate could be tried beside", fix="Deploy one without it first."
                )
            if before.digest == candidate.digest:
                raise UserError(f"{alias} answers with {candidate.adapter} already, since its release {before.number}")
            if before.candidate == candidate:
                raise UserError(f"{candidate.adapter} is tried {candidate.told} already, since release {before.number}")
            action: Action = "shadow" if candidate.share is None else "canary"
            return _add(change, before, action, alias, before.adapter, before.digest, candidate, grounds)

    def promote(self, alias: str) -> Release:
        """Have an alias answer with its candidate.

        Raises:
            UserError: no such alias, or it has no candidate.
        """
        with changing(self._database, self._actor) as change:
            before = _history(change.connection, alias)[-1]
            chosen = before.candidate
            if chosen is None:
                raise UserError(
                    f"{alias} has no candidate", fix=f"`tunewright deploy {alias} ADAPTER --canary 10%` makes one."
                )
            return _add(change, before, "promote", alias, chosen.adapter, chosen.digest, None, before.grounds)

    def rollback_target(self, alias: str, number: int | None = None) -> Release:
        """The release that :meth:`rollback` would bring back.

        Raises:
            UserError: as of it.
        """
        with self._database.reading() as connection:
            return _target(_history(connection, alias), number)

    def rollback(self, alias: str, number: int | None = None) -> Release:
        """Let the candidate go; where there is none, bring back what the alias answered with before.

        Args:
            number: the release to bring back, in place of the one before.

        Raises:
            UserError: no such alias or release, or there is nothing before.
        """
        with changing(self._database, self._actor) as change:
            history = _history(change.connection, alias)
            back = _target(history, number)
            grounds = back.grounds
            return _add(change, history[-1], "rollback", alias, back.adapter, back.digest, None, grounds, back.number)


def _target(history: Sequence[Release], number: int | None) -> Release:
    now = history[-1]
    if number is not None:
        if not 1 <= number <= len(history):
            raise UserError(f"{now.alias} has no release {number}", fix=f"It has releases 1 to {len(history)}.")
        if history[number - 1].digest == now.digest and now.candidate is None:
            raise UserError(f"{now.alias} answers with {now.adapter}, as in its release {number}, already")
        return history[number - 1]
    if now.candidate is not None:
        return now
    before = _before(history)
    if not before:
        raise UserError(f"{now.alias} has answered with nothing else before {now.adapter}")
    return before[-1]


def _before(history: Sequence[Release]) -> list[Release]:
    """What an alias answered with before what it does now, the last one last: a rollback takes one off this stack."""
    before: list[Release] = []
    current = history[0]
    for release in history[1:]:
        if release.digest == current.digest:
            continue  # a candidate has come or gone beside it
        if before and release.restores == before[-1].number:
            current = before.pop()
        else:
            before.append(current)
            current = release
    return before


def _add(
    change: Change,
    before: Release | None,
    action: Action,
    alias: str,
    adapter: str,
    digest: str,
    candidate: Candidate | None,
    grounds: Grounds,
    restores: int | None = None,
) -> Release:
    row = change.connection.execute(
        insert(releases)
        .values(
            alias=alias,
            number=1 if before is None else before.number + 1,
            action=action,
            adapter=adapter,
            digest=digest,
            candidate=candidate and candidate.adapter,
            candidate_digest=candidate and candidate.digest,
            share=candidate and candidate.share,
            restores=restores,
            author=change.actor,
            created=change.now,
            **asdict(grounds),
        )
        .returning(releases)
    ).one()
    made = _release(row)
    change.log(f"release.{action}", alias, **made.as_dict())
    return made


def _release(row: Row[Any]) -> Release:
    candidate = None if row.candidate is None else Candidate(row.candidate, row.candidate_digest, row.share)
    return Release(
        row.id,
        row.alias,
        row.number,
        row.action,
        row.adapter,
        row.digest,
        candidate,
        row.restores,
        Grounds(row.verdict, row.evaluation, row.because),
        row.author,
        row.created,
    )


def _last(connection: Connection, alias: str) -> Release | None:
    query = select(releases).where(releases.c.alias == alias).order_by(releases.c.number.desc()).limit(1)
    row = connection.execute(query).first()
    return None if row is None else _release(row)


def _history(connection: Connection, alias: str) -> list[Release]:
    rows = connection.execute(select(releases).where(releases.c.alias == alias).order_by(releases.c.number)).all()
    if not rows:
        known = connection.execute(select(releases.c.alias).distinct().order_by(releases.c.alias)).scalars().all()
        there = f"There are: {', '.join(known)}." if known else "`tunewright deploy` makes one."
        raise UserError(f"there is no alias {alias!r}", fix=there)
    return [_release(row) for row in rows]
