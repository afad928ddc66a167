"""Releases: the adapter of an alias, its candidate and the grounds for it; the history, and the rules for the next one.

A history is a list of releases, each with the alias's whole state from then on. No release is
changed later, and the last release is live.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import TypeAdapter
from sqlalchemy import Connection, Row, func, insert, select

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.evidence.shadow import ShadowFinding
from tunewright.gate.results import IsolationTest, ServingCheck
from tunewright.serving.tenants.audit import Audited, Change
from tunewright.serving.tenants.database import iso
from tunewright.serving.tenants.tables import audit, releases
from tunewright.serving.tenants.tenants import check_name

Answer = tuple[str, bool, str | None]
"""The adapter's digest, True if its system prompt is added, and the rule that constrains answers."""

Action = Literal["deploy", "canary", "shadow", "promote", "rollback", "undeploy"]


@dataclass(frozen=True)
class Grounds:
    """The reasons for a release, or for a withdrawal."""

    verdict: str | None = None
    """The verdict of the adapter's newest evaluation; None if there was no evaluation."""
    evaluation: str | None = None
    """The ID of that evaluation."""
    because: str | None = None
    """The reason for a release without a verdict to ship, or for a withdrawal."""
    isolation: IsolationTest | None = None
    """The isolation test that it passed, together with all live adapters."""
    untested: str | None = None
    """The reason for a release without that test, and without the serving check."""
    serving: ServingCheck | None = None
    """The serving check of its adapter."""
    shadow: ShadowFinding | None = None
    """What the review of its answers in the shadow had shown when it was promoted; None: no such review decided."""


@dataclass(frozen=True)
class Candidate:
    """An adapter on trial next to the live one."""

    adapter: str
    digest: str
    share: float | None
    """The share of the traffic that it answers, as a canary; None: its answers are only recorded, as a shadow."""
    system_prompt: bool = True
    """True if its trained system prompt is added to requests without one."""
    grammar: str | None = None
    """The rule that constrains its answers, text or calls; None means any."""

    @property
    def answer(self) -> Answer:
        """As :attr:`Release.answer`."""
        return self.digest, self.system_prompt, self.grammar

    @property
    def summary(self) -> str:
        """The kind of trial, in words."""
        how = "in the shadow" if self.share is None else f"on {100 * self.share:.4g}% of the traffic"
        how = how if self.grammar is None else f"{how}, constrained"
        return how if self.system_prompt else f"{how} without its system prompt"


@dataclass(frozen=True)
class Release:
    """One entry of an alias's history."""

    id: int
    """The number over all aliases, in the order of time."""
    alias: str
    number: int
    """The number within the alias, from 1."""
    action: Action
    adapter: str
    """The alias's adapter from this release on; for an undeployment, the adapter until then."""
    digest: str
    candidate: Candidate | None
    restores: int | None
    """For a rollback, the number of the restored release."""
    grounds: Grounds
    author: str | None
    created: float
    system_prompt: bool = True
    """True if the adapter's trained system prompt is added to requests without one."""
    grammar: str | None = None
    """The rule that constrains answers, text or calls; None means any."""

    @property
    def undeployed(self) -> bool:
        """True if the alias has no adapter from this release on."""
        return self.action == "undeploy"

    @property
    def answer(self) -> Answer:
        """The part of a release that decides the alias's answers: equal for two releases that answer alike."""
        return self.digest, self.system_prompt, self.grammar

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """The adapters it needs, by name and digest."""
        candidate = [(self.candidate.adapter, self.candidate.digest)] if self.candidate else []
        return [(self.adapter, self.digest), *candidate]

    @property
    def digests(self) -> frozenset[str]:
        """The digests of the adapters it needs."""
        return frozenset(digest for _, digest in self.adapters)

    def as_dict(self) -> dict[str, Any]:
        """Return the release as ``--json`` prints it."""
        document = {**asdict(self), "created": iso(self.created)}
        if self.grounds.shadow is None:  # as the audit log has releases from before schema 8
            del document["grounds"]["shadow"]
        return document


_REFUSED = "isolation.refused"
_NOT_AS_TRAINED = "serving.refused"
_ISOLATION, _SERVING = TypeAdapter(IsolationTest), TypeAdapter(ServingCheck)
_SHADOW = TypeAdapter(ShadowFinding)


class Releases(Audited):
    """The releases in the state."""

    def live(self) -> dict[str, Release]:
        """Return the live release of each alias; undeployed aliases have none."""
        with self._database.reading() as connection:
            return {release.alias: release for release in _live(connection)}

    def report_unreleased(self, aliases: Iterable[str], reporter: Reporter) -> None:
        """Report which of the aliases have no live release, so that nothing answers on them yet."""
        for alias in sorted(set(aliases) - set(self.live())):
            reporter.say(f"{alias} has no release yet. `tunewright deploy {alias} ADAPTER` makes one.")

    def newest(self) -> int:
        """Return the id of the newest release of any alias; 0 before the first release."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.coalesce(func.max(releases.c.id), 0))).scalar_one())

    def history(self, alias: str | None = None) -> list[Release]:
        """Return all releases (of one alias), the oldest first.

        Raises:
            UserError: the alias does not exist.
        """
        with self._database.reading() as connection:
            if alias is not None:
                return _history(connection, alias)
            return [_release(row) for row in connection.execute(select(releases).order_by(releases.c.id))]

    def as_stored(self) -> list[dict[str, Any]]:
        """Return all releases as the audit log has them, with both tests unparsed, for the comparison with the log.

        Parsing drops unknown keys and converts texts to numbers, which would hide an edit of the table.
        """
        with self._database.reading() as connection:
            rows = connection.execute(select(releases)).all()
        found = [_release(row).as_dict() for row in rows]
        for release, row in zip(found, rows, strict=True):
            release["grounds"] |= {"isolation": row.isolation, "serving": row.serving}
            if row.shadow is not None:
                release["grounds"]["shadow"] = row.shadow
        return found

    def passed(self, subject: str) -> IsolationTest | None:
        """Return the newest passed isolation test of this subject, if there is one."""
        tests = (release.grounds.isolation for release in reversed(self.history()))
        return next((test for test in tests if test is not None and test.subject == subject), None)

    def refused(self, subject: str) -> IsolationTest | None:
        """Return the newest failed isolation test of this subject, if there is one."""
        query = select(audit.c.details).where(audit.c.action == _REFUSED).order_by(audit.c.number.desc())
        with self._database.reading() as connection:
            tests = [json.loads(details)["isolation"] for details in connection.execute(query).scalars()]
        return next((_ISOLATION.validate_python(test) for test in tests if test["subject"] == subject), None)

    def checked(self, subject: str) -> ServingCheck | None:
        """Return the newest serving check of this subject that a release has, if there is one."""
        checks = (release.grounds.serving for release in reversed(self.history()))
        return next((check for check in checks if check is not None and check.subject == subject), None)

    def require_deployable(
        self, alias: str, adapter: str, digest: str, *, system_prompt: bool = True, grammar: str | None = None
    ) -> None:
        """Check that :meth:`deploy` would accept this adapter now."""
        with self._database.reading() as connection:
            _require_new(connection, alias, adapter, (digest, system_prompt, grammar))

    def require_triable(self, alias: str, candidate: Candidate) -> None:
        """Check that :meth:`start_candidate` would accept this candidate now."""
        with self._database.reading() as connection:
            _require_candidate(connection, alias, candidate)

    def promotable(self, alias: str) -> tuple[Release, Candidate]:
        """Return the release and the candidate that :meth:`promote` would use."""
        with self._database.reading() as connection:
            return _promotable(connection, alias)

    def refuse_served(self, alias: str, adapter: str, check: ServingCheck) -> None:
        """Record in the audit log that an adapter failed its serving check; nothing else changes."""
        with self._changing() as change:
            change.log(_NOT_AS_TRAINED, alias, adapter=adapter, digest=check.adapter, serving=asdict(check))

    def refuse(self, alias: str, adapter: str, digest: str, test: IsolationTest) -> None:
        """Record in the audit log that an adapter failed its isolation test; nothing else changes."""
        with self._changing() as change:
            change.log(_REFUSED, alias, adapter=adapter, digest=digest, isolation=asdict(test))

    def deploy(
        self,
        alias: str,
        adapter: str,
        digest: str,
        grounds: Grounds,
        *,
        system_prompt: bool = True,
        grammar: str | None = None,
    ) -> Release:
        """Make an adapter an alias's live adapter, and drop the alias's candidate.

        Args:
            system_prompt: whether the adapter's trained system prompt is added to requests without one.
            grammar: the rule that answers match if their request sets no form.

        Raises:
            UserError: the adapter is live already, the alias's name is not valid, or another adapter has gone live
                since the isolation test.
        """
        with self._changing() as change:
            answer = (digest, system_prompt, grammar)
            before = _require_new(change.connection, alias, adapter, answer)
            return _add(change, before, "deploy", alias, adapter, answer, None, grounds)

    def start_candidate(self, alias: str, candidate: Candidate, grounds: Grounds) -> Release:
        """Try a candidate next to the live adapter: on a share of the traffic, or in the shadow.

        Raises:
            UserError: the alias has no release, the candidate is live already, the share is not valid, or another
                adapter has gone live since the isolation test.
        """
        with self._changing() as change:
            before = _require_candidate(change.connection, alias, candidate)
            action: Action = "shadow" if candidate.share is None else "canary"
            return _add(change, before, action, alias, before.adapter, before.answer, candidate, grounds)

    def promote(self, alias: str, grounds: Grounds | None = None) -> Release:
        """Make an alias's candidate its live adapter.

        Args:
            grounds: replace the candidate's grounds.

        Raises:
            UserError: the alias does not exist or has no candidate, or another adapter has gone live since the
                isolation test.
        """
        with self._changing() as change:
            before, chosen = _promotable(change.connection, alias)
            by = before.grounds if grounds is None else grounds
            return _add(change, before, "promote", alias, chosen.adapter, chosen.answer, None, by)

    def rollback_target(self, alias: str, number: int | None = None) -> Release:
        """Return the release that :meth:`rollback` would restore."""
        with self._database.reading() as connection:
            return _target(_history(connection, alias), number)

    def rollback(self, alias: str, number: int | None = None) -> Release:
        """Drop the candidate; without a candidate, restore the adapter before the live one.

        Args:
            number: restore this release instead.

        Raises:
            UserError: the alias or release does not exist, or there is no earlier adapter.
        """
        with self._changing() as change:
            history = _history(change.connection, alias)
            back = _target(history, number)
            grounds = back.grounds
            return _add(change, history[-1], "rollback", alias, back.adapter, back.answer, None, grounds, back.number)

    def undeploy(self, alias: str, because: str | None = None) -> Release:
        """Take an alias out of service until its next release.

        Raises:
            UserError: the alias does not exist, or is undeployed already.
        """
        with self._changing() as change:
            now = _history(change.connection, alias)[-1]
            if now.undeployed:
                raise UserError(f"{alias} is already undeployed, since its release {now.number}")
            grounds = Grounds(because=because)
            return _add(change, now, "undeploy", alias, now.adapter, now.answer, None, grounds)


def _require_new(connection: Connection, alias: str, adapter: str, answer: Answer) -> Release | None:
    check_name(alias, "an alias")
    before = _last(connection, alias)
    if before is not None and before.answer == answer and before.candidate is None and not before.undeployed:
        raise UserError(f"{adapter} is already live under {alias}, since its release {before.number}")
    return before


def _require_candidate(connection: Connection, alias: str, candidate: Candidate) -> Release:
    if candidate.share is not None and not 0 < candidate.share < 1:
        raise UserError(f"A canary's share must be above 0 and below 1 (got {candidate.share:g})")
    before = _last(connection, alias)
    if before is None or before.undeployed:
        raise UserError(
            f"{alias} has no live release to try a candidate against", fix="Deploy an adapter without --canary first."
        )
    if before.digest == candidate.digest:
        raise UserError(f"{candidate.adapter} is already live under {alias}, since its release {before.number}")
    if before.candidate == candidate:
        raise UserError(f"{candidate.adapter} is already on trial {candidate.summary}, since release {before.number}")
    return before


def _promotable(connection: Connection, alias: str) -> tuple[Release, Candidate]:
    before = _history(connection, alias)[-1]
    if before.candidate is None:
        raise UserError(
            f"{alias} has no candidate", fix=f"Add one with `tunewright deploy {alias} ADAPTER --canary 10%`."
        )
    return before, before.candidate


def _target(history: Sequence[Release], number: int | None) -> Release:
    now = history[-1]
    ends_something = now.candidate is not None or now.undeployed  # a rollback ends a trial or a withdrawal first
    if number is not None:
        if not 1 <= number <= len(history):
            raise UserError(f"{now.alias} has no release {number}", fix=f"Use a release from 1 to {len(history)}.")
        back = history[number - 1]
        if back.undeployed:
            raise UserError(f"Release {number} of {now.alias} is a withdrawal", fix="Use another release.")
        if back.answer == now.answer and not ends_something:
            raise UserError(f"{now.adapter}, of release {number}, is already live under {now.alias}")
        return back
    if ends_something:
        # Not the release that added the candidate: its grounds are the candidate's grounds.
        return next(line for line in reversed(history) if line.candidate is None and not line.undeployed)
    before = _before(history)
    if not before:
        raise UserError(f"{now.alias} has no adapter before {now.adapter}")
    return before[-1]


def _before(history: Sequence[Release]) -> list[Release]:
    """Return the earlier adapters of an alias as a stack, the newest last; a rollback pops one."""
    before: list[Release] = []
    current = history[0]
    for release in history[1:]:
        if release.answer == current.answer:
            continue  # only its candidate changed, or it was undeployed and restored
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
    answer: Answer,
    candidate: Candidate | None,
    grounds: Grounds,
    restores: int | None = None,
) -> Release:
    digest, system_prompt, grammar = answer
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
            grammar=grammar,
            candidate_grammar=candidate and candidate.grammar,
            restores=restores,
            author=change.actor,
            created=change.now,
            **asdict(grounds),  # includes the isolation test and the serving check as JSON
        )
        .returning(releases)
    ).one()
    made = replace(_release(row), grounds=grounds)  # the log has the numbers of the table: parsing turns 0 into 0.0
    change.log(f"release.{action}", alias, **made.as_dict())
    return made


def _require_tested(
    connection: Connection, alias: str, digest: str, candidate: Candidate | None, grounds: Grounds
) -> None:
    """Refuse a release if an adapter is live that was not part of its isolation test."""
    if grounds.isolation is None:
        return
    others = [release for release in _live(connection) if release.alias != alias]
    needed = {digest, *({candidate.digest} if candidate else ())}.union(*(release.digests for release in others))
    if not needed <= set(grounds.isolation.adapters):
        raise UserError(f"Another release went live during the isolation test of {alias}", fix="Run the command again.")


def _live(connection: Connection) -> list[Release]:
    last = select(func.max(releases.c.id)).group_by(releases.c.alias)
    query = select(releases).where(releases.c.id.in_(last)).order_by(releases.c.alias)
    found = [_release(row) for row in connection.execute(query)]
    return [release for release in found if not release.undeployed]


def _release(row: Row[Any]) -> Release:
    candidate = None
    if row.candidate is not None:
        adds = row.candidate_system_prompt
        candidate = Candidate(row.candidate, row.candidate_digest, row.share, adds, row.candidate_grammar)
    isolation = None if row.isolation is None else _ISOLATION.validate_python(row.isolation)
    serving = None if row.serving is None else _SERVING.validate_python(row.serving)
    shadow = None if row.shadow is None else _SHADOW.validate_python(row.shadow)
    grounds = Grounds(row.verdict, row.evaluation, row.because, isolation, row.untested, serving, shadow)
    head = row.id, row.alias, row.number, row.action, row.adapter, row.digest
    return Release(*head, candidate, row.restores, grounds, row.author, row.created, row.system_prompt, row.grammar)


def _last(connection: Connection, alias: str) -> Release | None:
    query = select(releases).where(releases.c.alias == alias).order_by(releases.c.number.desc()).limit(1)
    row = connection.execute(query).first()
    return None if row is None else _release(row)


def _history(connection: Connection, alias: str) -> list[Release]:
    rows = connection.execute(select(releases).where(releases.c.alias == alias).order_by(releases.c.number)).all()
    if not rows:
        known = connection.execute(select(releases.c.alias).distinct().order_by(releases.c.alias)).scalars().all()
        there = f"Aliases: {', '.join(known)}." if known else "Create one with `tunewright deploy`."
        raise UserError(f"There is no alias {alias!r}", fix=there)
    return [_release(row) for row in rows]
