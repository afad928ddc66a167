"""The state of a shadow's review: recorded pairs of answers, people's verdicts on them, and the units that count.

Everything that names a request goes with the request. What stays of a forgotten user is the number that their unit
added to the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select, update

from tunewright.core.errors import UserError
from tunewright.data.pii import redact_value
from tunewright.serving.tenants.audit import Audited
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.records import UnitKind
from tunewright.serving.tenants.tables import (
    recordings,
    releases,
    request_records,
    requests,
    shadow_answers,
    shadow_judgements,
    shadow_reviews,
    shadow_units,
    shadow_verdicts,
    tenants,
)


@dataclass(frozen=True)
class DeclaredJudge:
    """The judge that takes part in a shadow's review."""

    model: str
    url: str
    instructions: str
    """The digest of what it is asked."""
    share: float
    """The probability with which a differing pair goes to people."""


@dataclass(frozen=True)
class ShadowTrial:
    """An adapter in the shadow of an alias, and the terms that were declared before the first look at its verdicts."""

    release_id: int
    alias: str
    release: int
    """The number of the release that started it."""
    candidate: str
    digest: str
    live: str
    """The adapter whose answers were returned."""
    margin: float
    """The loss, as a share, up to which the candidate is not worse."""
    most_units: int
    """The maximum: a sequence of this length without another outcome ends with *can't tell*."""
    judge: DeclaredJudge | None
    """None: people judge all pairs that differ."""
    spent: float = 0.0
    """The cost of all replies of the judge, also of replies about requests that were deleted since."""


@dataclass(frozen=True)
class ShadowPair:
    """A recorded request with the live answer and the shadow's."""

    number: int
    """Of the request; it grows with time."""
    id: str
    """The response's id."""
    tenant_id: int
    unit: str
    unit_kind: UnitKind
    started: float
    differs: bool


@dataclass(frozen=True)
class PairTexts:
    """The texts of a pair, with placeholders for secrets and personal data."""

    request: dict[str, Any]
    live: str
    shadow: str
    tenant: str
    contract: str
    """The reference of the contract under which the tenant's requests are recorded."""


@dataclass(frozen=True)
class SettledUnit:
    """A unit of the sequence: the mean difference of its answers, candidate minus live, from -1 to 1."""

    value: float
    requests: int
    differing: int
    tenant_id: int
    unit: str | None
    """None: it was forgotten."""
    labels: int
    confirmed: float
    squares: float
    """Of `tunewright.evidence.shadow.CompleteUnit`, as ``labels`` and ``confirmed``."""


@dataclass(frozen=True)
class ShadowEvent:
    """A reviewer's verdict on a pair, or (None) its withdrawal; ``live`` or ``shadow`` is the better answer."""

    response_id: str
    reviewer: str
    verdict: str | None
    time: float


@dataclass(frozen=True)
class Judgement:
    """A judge's reply about a pair; ``swapped``: the candidate's answer was shown second."""

    response_id: str
    swapped: bool
    verdict: str | None
    """``live`` or ``shadow``, the better answer, or ``both``; None: the reply had no verdict."""


@dataclass(frozen=True)
class ShadowCounts:
    """Requests of a shadow that are no pairs."""

    unanswered: int
    """The shadow has no answer, for instance because its engine died."""
    unrecorded: int
    """Answered twice, and not recorded: their tenant is not, or their unit was not sampled."""
    time: float
    """The time of the count, in seconds since 1970."""


class ShadowReviews(Audited):
    """Reviews of shadows in the state."""

    def trial(self, alias: str, margin: float, most_units: int, *, declare: bool = True) -> ShadowTrial:
        """Return the newest shadow of an alias; ``declare`` its terms now if they have not been.

        Raises:
            UserError: no such alias, or it never had a shadow.
        """
        of = and_(releases.c.alias == alias, releases.c.action == "shadow")
        with self._database.reading() as connection:
            row = connection.execute(select(releases).where(of).order_by(releases.c.id.desc()).limit(1)).first()
            if row is None:
                fix = f"Run `tunewright deploy {alias} ADAPTER --shadow`."
                raise UserError(f"No adapter is or was in the shadow of {alias}", fix=fix)
            own = select(shadow_reviews).where(shadow_reviews.c.release_id == row.id)
            declared = connection.execute(own).first()
        head = row.id, alias, row.number, row.candidate, row.candidate_digest, row.adapter
        if declared is None and not declare:
            return ShadowTrial(*head, margin, most_units, None)
        if declared is None:
            with self._changing() as change:
                declared = change.connection.execute(own).first()  # another look may have declared them meanwhile
                if declared is None:
                    terms = {"margin": margin, "most_units": most_units}
                    change.connection.execute(insert(shadow_reviews).values(release_id=row.id, **terms))
                    change.log("shadow.declare", alias, release=row.number, **terms)
                    declared = change.connection.execute(own).one()
        judge = None if declared.judge is None else DeclaredJudge(**declared.judge)
        return ShadowTrial(*head, declared.margin, declared.most_units, judge, declared.spent)

    def pairs(self, trial: ShadowTrial) -> tuple[list[ShadowPair], ShadowCounts]:
        """Return a shadow's recorded pairs, the oldest first, and counts of its other requests."""
        both = shadow_answers.outerjoin(request_records, request_records.c.request_id == shadow_answers.c.request_id)
        both = both.join(requests, requests.c.id == shadow_answers.c.request_id)
        query = select(
            requests.c.id.label("number"),
            requests.c.response_id.label("id"),
            requests.c.tenant_id,
            request_records.c.unit,
            request_records.c.unit_kind,
            requests.c.started,
            (shadow_answers.c.answer != shadow_answers.c.shadow_answer).label("differs"),
        ).select_from(both)
        query = query.where(shadow_answers.c.release_id == trial.release_id).order_by(requests.c.id)
        with self._database.reading() as connection:
            rows, time = connection.execute(query).mappings().all(), self._database.now(connection)
        answered = [row for row in rows if row["differs"] is not None]
        pairs = [ShadowPair(**{**row, "differs": bool(row["differs"])}) for row in answered if row["unit"] is not None]
        return pairs, ShadowCounts(len(rows) - len(answered), len(answered) - len(pairs), time)

    def texts(self, trial: ShadowTrial, file: KeyFile) -> dict[str, PairTexts]:
        """Return the texts of a shadow's differing pairs by the response's id; the audit log says who read how many.

        Raises:
            UserError: the key file is not right, or a record was changed.
        """
        query = select(
            request_records,
            requests.c.response_id,
            tenants.c.name,
            recordings.c.key_id,
            recordings.c.contract,
            shadow_answers,
        ).select_from(request_records)
        query = query.join(requests, requests.c.id == request_records.c.request_id)
        query = query.join(shadow_answers, shadow_answers.c.request_id == requests.c.id)
        query = query.join(tenants, tenants.c.id == request_records.c.tenant_id)
        query = query.join(recordings, recordings.c.tenant_id == tenants.c.id)
        query = query.where(shadow_answers.c.release_id == trial.release_id)
        query = query.where(shadow_answers.c.answer != shadow_answers.c.shadow_answer)
        found = {}
        with self._changing() as change:
            for row in change.connection.execute(query).mappings():
                keys, unit = file.keys(row["name"], row["key_id"]), row["unit"]
                record = keys.decrypt(row["body"], row["request_id"])
                (live, shadow), _ = redact_value([row["answer"], row["shadow_answer"]], partial(keys.placeholder, unit))
                found[row["response_id"]] = PairTexts(record["request"], live, shadow, row["name"], row["contract"])
            change.log("shadow.read", trial.alias, release=trial.release, pairs=len(found))
        return found

    def events(self, trial: ShadowTrial) -> list[ShadowEvent]:
        """Return all verdicts and withdrawals, the oldest first."""
        named = (shadow_verdicts.c[name] for name in ("reviewer", "verdict", "time"))
        query = select(requests.c.response_id, *named).select_from(shadow_verdicts)
        query = query.join(requests, requests.c.id == shadow_verdicts.c.request_id)
        query = query.where(shadow_verdicts.c.release_id == trial.release_id).order_by(shadow_verdicts.c.id)
        with self._database.reading() as connection:
            return [ShadowEvent(**row) for row in connection.execute(query).mappings()]

    def say(self, trial: ShadowTrial, reviewer: str, said: Sequence[tuple[str, str | None]]) -> None:
        """Store a reviewer's verdicts by response id; None withdraws one.

        Raises:
            UserError: a request was forgotten or expired meanwhile. No verdict is stored.
        """
        with self._database.writing() as connection:
            time = self._database.now(connection)
            for response_id, verdict in said:
                number = _number(connection, response_id)
                if number is None:
                    what = f"{response_id} was deleted meanwhile: its verdict was not stored"
                    raise UserError(what, fix="Judge the next pair.")
                own = {"release_id": trial.release_id, "request_id": number, "reviewer": reviewer}
                connection.execute(insert(shadow_verdicts).values(**own, verdict=verdict, time=time))

    def send(self, trial: ShadowTrial, judge: DeclaredJudge, contracts: Sequence[str], questions: int) -> None:
        """Log that recorded requests are sent to a judge, which is declared with the first ones.

        Raises:
            UserError: people have judged pairs without a judge, or another call has declared one.
        """
        with self._changing() as change:
            if trial.judge is None:
                own = shadow_reviews.c.release_id == trial.release_id
                said = select(shadow_verdicts.c.id).where(shadow_verdicts.c.release_id == trial.release_id)
                counted = select(shadow_units.c.place).where(shadow_units.c.release_id == trial.release_id)
                for begun in (said, counted.where(shadow_units.c.differing > 0)):
                    if change.connection.execute(begun.limit(1)).first() is not None:
                        what = f"People have begun to judge all pairs of {trial.alias} {trial.release} without a judge"
                        raise UserError(
                            what, fix="A judge must take part from the first verdict on. Continue without it."
                        )
                new = update(shadow_reviews).where(own, shadow_reviews.c.judge.is_(None)).values(judge=asdict(judge))
                if not change.connection.execute(new).rowcount:
                    raise UserError("Another call has declared a judge meanwhile", fix="Repeat the command.")
                change.log("shadow.declare", trial.alias, release=trial.release, judge=asdict(judge))
            to = {"model": judge.model, "url": judge.url}
            sent = {"contracts": list(contracts), "questions": questions}
            change.log("shadow.send", trial.alias, release=trial.release, **to, **sent)

    def judgements(self, trial: ShadowTrial) -> list[Judgement]:
        """Return a judge's replies about the pairs that are still stored."""
        named = (shadow_judgements.c[name] for name in ("swapped", "verdict"))
        query = select(requests.c.response_id, *named).select_from(shadow_judgements)
        query = query.join(requests, requests.c.id == shadow_judgements.c.request_id)
        query = query.where(shadow_judgements.c.release_id == trial.release_id, requests.c.response_id.is_not(None))
        with self._database.reading() as connection:
            return [Judgement(**row) for row in connection.execute(query).mappings()]

    def judge(self, trial: ShadowTrial, said: Sequence[Judgement], cost: float = 0.0) -> None:
        """Store a judge's verdicts and what they cost. The first one counts; those on deleted requests are dropped."""
        paid = update(shadow_reviews).where(shadow_reviews.c.release_id == trial.release_id)
        with self._database.writing() as connection:
            connection.execute(paid.values(spent=shadow_reviews.c.spent + cost))
            for each in said:
                key = {"request_id": _number(connection, each.response_id), "swapped": each.swapped}
                own = and_(*(shadow_judgements.c[name] == value for name, value in key.items()))
                known = select(shadow_judgements.c.request_id).where(own)
                if key["request_id"] is not None and connection.execute(known).first() is None:
                    values = {"release_id": trial.release_id, "verdict": each.verdict}
                    connection.execute(insert(shadow_judgements).values(**key, **values))

    def settled(self, trial: ShadowTrial) -> list[SettledUnit]:
        """Return the units of the sequence in its order."""
        named = (shadow_units.c[name] for name in SettledUnit.__dataclass_fields__)
        query = select(*named).where(shadow_units.c.release_id == trial.release_id).order_by(shadow_units.c.place)
        with self._database.reading() as connection:
            return [SettledUnit(**row) for row in connection.execute(query).mappings()]

    def settle(self, trial: ShadowTrial, after: int, units: Sequence[SettledUnit]) -> None:
        """Append units to a sequence that has ``after`` units; another look may have done it meanwhile."""
        if not units:
            return
        with self._changing() as change:
            own = shadow_units.c.release_id == trial.release_id
            count = change.connection.execute(select(func.count()).select_from(shadow_units).where(own)).scalar_one()
            if count == after:
                of = [{"release_id": trial.release_id, "place": after + at} for at in range(len(units))]
                rows = [{**where, **asdict(unit)} for where, unit in zip(of, units, strict=True)]
                change.connection.execute(insert(shadow_units), rows)
                change.log("shadow.settle", trial.alias, release=trial.release, units=after + len(units))


def _number(connection: Connection, response_id: str) -> int | None:
    """Return the number of a recorded request, locked against its deletion; None: it was deleted."""
    query = select(requests.c.id).join(request_records, request_records.c.request_id == requests.c.id)
    query = query.where(requests.c.response_id == response_id).with_for_update(of=requests)
    number: int | None = connection.execute(query).scalar()
    return number
