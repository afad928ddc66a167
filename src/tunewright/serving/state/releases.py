"""The histories of aliases: what is released, and what may follow on which.

An alias's history is a list of lines, each of which is the whole state from then on; none is changed later. What is
live is the last one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from tunewright.core.errors import UserError
from tunewright.serving.state.audit import Change, changing
from tunewright.serving.state.database import Database
from tunewright.serving.state.isolation import IsolationTest
from tunewright.serving.state.release import Action, Candidate, Grounds, Release
from tunewright.serving.state.tables import audit, releases
from tunewright.serving.state.tenants import check_name

_REFUSED = "isolation.refused"


class Releases:
    """The aliases' histories in the state.

    Args:
        actor: who makes changes, for the history and the audit.
    """

    def __init__(self, database: Database, actor: str | None) -> None:
        self._database = database
        self._actor = actor

    def live(self) -> dict[str, Release]:
        """Return each alias's last release, by alias, without those that are undeployed."""
        with self._database.reading() as connection:
            return {release.alias: release for release in _live(connection)}

    def newest(self) -> int:
        """Return the id of the newest release of all; 0 before the first."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.coalesce(func.max(releases.c.id), 0))).scalar_one())

    def history(self, alias: str | None = None) -> list[Release]:
        """Return all releases (of one alias), the first one first.

        Raises:
            UserError: no such alias.
        """
        with self._database.reading() as connection:
            if alias is not None:
                return _history(connection, alias)
            return [_release(row) for row in connection.execute(select(releases).order_by(releases.c.id))]

    def passed(self, subject: str) -> IsolationTest | None:
        """Return the newest isolation test of exactly this that a release went live by."""
        tests = [release.grounds.isolation for release in self.history()]
        return next((test for test in reversed(tests) if test is not None and test.subject == subject), None)

    def refused(self, subject: str) -> IsolationTest | None:
        """Return the newest isolation test of exactly this by which a release did not go live."""
        query = select(audit.c.details).where(audit.c.action == _REFUSED).order_by(audit.c.number.desc())
        with self._database.reading() as connection:
            told = [json.loads(details)["isolation"] for details in connection.execute(query).scalars()]
        return next((IsolationTest.of(test) for test in told if test["subject"] == subject), None)

    def require_deployable(self, alias: str, adapter: str, digest: str, *, system_prompt: bool = True) -> None:
        """Refuse what :meth:`deploy` would refuse as things are.

        Raises:
            UserError: as of it.
        """
        with self._database.reading() as connection:
            _require_new(connection, alias, adapter, (digest, system_prompt))

    def require_triable(self, alias: str, candidate: Candidate) -> None:
        """Refuse what :meth:`try_beside` would refuse as things are.

        Raises:
            UserError: as of it.
        """
        with self._database.reading() as connection:
            _require_candidate(connection, alias, candidate)

    def promotable(self, alias: str) -> tuple[Release, Candidate]:
        """Return what :meth:`promote` would go on from, and have the alias answer with.

        Raises:
            UserError: as of it.
        """
        with self._database.reading() as connection:
            return _promotable(connection, alias)

    def refuse(self, alias: str, adapter: str, digest: str, test: IsolationTest) -> None:
        """Note in the audit that an adapter did not go live, and why; nothing else changes."""
        with changing(self._database, self._actor) as change:
            change.log(_REFUSED, alias, adapter=adapter, digest=digest, isolation=asdict(test))

    def deploy(self, alias: str, adapter: str, digest: str, grounds: Grounds, *, system_prompt: bool = True) -> Release:
        """Have an alias answer with this adapter from now on; a candidate beside it is let go.

        Args:
            system_prompt: requests without a system message get the one that the adapter was trained with.

        Raises:
            UserError: it does so already, what is no name for an alias, or what is live now has not been tested with
                it.
        """
        with changing(self._database, self._actor) as change:
            answer = (digest, system_prompt)
            before = _require_new(change.connection, alias, adapter, answer)
            return _add(change, before, "deploy", alias, adapter, answer, None, grounds)

    def try_beside(self, alias: str, candidate: Candidate, grounds: Grounds) -> Release:
        """Try an adapter beside the one that the alias answers with: on a share of the traffic, or in the shadow.

        Raises:
            UserError: the alias has no release, answers with this adapter already, a share that is none, or what is
                live now has not been tested with it.
        """
        with changing(self._database, self._actor) as change:
            before = _require_candidate(change.connection, alias, candidate)
            action: Action = "shadow" if candidate.share is None else "canary"
            return _add(change, before, action, alias, before.adapter, before.answer, candidate, grounds)

    def promote(self, alias: str, grounds: Grounds | None = None) -> Release:
        """Have an alias answer with its candidate.

        Args:
            grounds: in place of those that the candidate came by.

        Raises:
            UserError: no such alias, it has no candidate, or what is live now has not been tested with it.
        """
        with changing(self._database, self._actor) as change:
            before, chosen = _promotable(change.connection, alias)
            by = before.grounds if grounds is None else grounds
            answer = (chosen.digest, chosen.system_prompt)
            return _add(change, before, "promote", alias, chosen.adapter, answer, None, by)

    def rollback_target(self, alias: str, number: int | None = None) -> Release:
        """Return the release that :meth:`rollback` would bring back.

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
            return _add(change, history[-1], "rollback", alias, back.adapter, back.answer, None, grounds, back.number)

    def undeploy(self, alias: str, because: str | None = None) -> Release:
        """Have an alias answer nothing from now on, until something is released under it again.

        Raises:
            UserError: no such alias, or it is undeployed already.
        """
        with changing(self._database, self._actor) as change:
            now = _history(change.connection, alias)[-1]
            if now.undeployed:
                raise UserError(f"{alias} is undeployed already, since its release {now.number}")
            grounds = Grounds(because=because)
            return _add(change, now, "undeploy", alias, now.adapter, now.answer, None, grounds)


def _require_new(connection: Connection, alias: str, adapter: str, answer: tuple[str, bool]) -> Release | None:
    check_name(alias, "an alias")
    before = _last(connection, alias)
    if before is not None and before.answer == answer and before.candidate is None and not before.undeployed:
        raise UserError(f"{alias} answers with {adapter} already, since its release {before.number}")
    return before


def _require_candidate(connection: Connection, alias: str, candidate: Candidate) -> Release:
    if candidate.share is not None and not 0 < candidate.share < 1:
        raise UserError(f"{candidate.share:g} is no share: it is above 0 and below 1")
    before = _last(connection, alias)
    if before is None or before.undeployed:
        raise UserError(
            f"{alias} has no release that a candidate could be tried beside", fix="Deploy one without it first."
        )
    if before.digest == candidate.digest:
        raise UserError(f"{alias} answers with {candidate.adapter} already, since its release {before.number}")
    if before.candidate == candidate:
        raise UserError(f"{candidate.adapter} is tried {candidate.told} already, since release {before.number}")
    return before


def _promotable(connection: Connection, alias: str) -> tuple[Release, Candidate]:
    before = _history(connection, alias)[-1]
    if before.candidate is None:
        raise UserError(f"{alias} has no candidate", fix=f"`tunewright deploy {alias} ADAPTER --canary 10%` makes one.")
    return before, before.candidate


def _target(history: Sequence[Release], number: int | None) -> Release:
    now = history[-1]
    ends_something = now.candidate is not None or now.undeployed  # what a rollback would end, whatever it brings back
    if number is not None:
        if not 1 <= number <= len(history):
            raise UserError(f"{now.alias} has no release {number}", fix=f"It has releases 1 to {len(history)}.")
        back = history[number - 1]
        if back.undeployed:
            raise UserError(f"{now.alias} answered nothing from its release {number} on", fix="Name another one.")
        if back.answer == now.answer and not ends_something:
            raise UserError(f"{now.alias} answers with {now.adapter}, as in its release {number}, already")
        return back
    if ends_something:
        # Not the candidate's own line: its grounds are the candidate's.
        return next(line for line in reversed(history) if line.candidate is None and not line.undeployed)
    before = _before(history)
    if not before:
        raise UserError(f"{now.alias} has answered with nothing else before {now.adapter}")
    return before[-1]


def _before(history: Sequence[Release]) -> list[Release]:
    """What an alias answered with before what it does now, the last one last: a rollback takes one off this stack."""
    before: list[Release] = []
    current = history[0]
    for release in history[1:]:
        if release.answer == current.answer:
            continue  # a candidate has come or gone beside it, or it was undeployed and is back
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
    answer: tuple[str, bool],
    candidate: Candidate | None,
    grounds: Grounds,
    restores: int | None = None,
) -> Release:
    digest, system_prompt = answer
    if action not in ("rollback", "undeploy"):
        _require_tested(change.connection, alias, digest, candidate, grounds)
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
            system_prompt=system_prompt,
            candidate_system_prompt=candidate and candidate.system_prompt,
            restores=restores,
            author=change.actor,
            created=change.now,
            **asdict(grounds),  # the isolation test as JSON
        )
        .returning(releases)
    ).one()
    made = _release(row)
    change.log(f"release.{action}", alias, **made.as_dict())
    return made


def _require_tested(
    connection: Connection, alias: str, digest: str, candidate: Candidate | None, grounds: Grounds
) -> None:
    """Refuse a release beside which something is live that was not there in its isolation test."""
    if grounds.isolation is None:
        return
    beside = [release for release in _live(connection) if release.alias != alias]
    needed = {digest, *({candidate.digest} if candidate else ())}.union(*(release.digests for release in beside))
    if not needed <= set(grounds.isolation.adapters):
        raise UserError(
            f"another release has gone live while {alias}'s was tested", fix="Do it again: it is tested with that one."
        )


def _live(connection: Connection) -> list[Release]:
    last = select(func.max(releases.c.id)).group_by(releases.c.alias)
    query = select(releases).where(releases.c.id.in_(last)).order_by(releases.c.alias)
    found = [_release(row) for row in connection.execute(query)]
    return [release for release in found if not release.undeployed]


def _release(row: Row[Any]) -> Release:
    candidate = None
    if row.candidate is not None:
        adds = row.candidate_system_prompt is not False
        candidate = Candidate(row.candidate, row.candidate_digest, row.share, adds)
    return Release(
        row.id,
        row.alias,
        row.number,
        row.action,
        row.adapter,
        row.digest,
        candidate,
        row.restores,
        Grounds(
            row.verdict,
            row.evaluation,
            row.because,
            None if row.isolation is None else IsolationTest.of(row.isolation),
            row.untested,
        ),
        row.author,
        row.created,
        row.system_prompt is not False,
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
