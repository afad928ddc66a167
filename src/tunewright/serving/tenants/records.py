"""Recorded requests: which tenants are recorded and why, their encrypted records, and the deletion of both.

Nothing is recorded by default. The operator starts it for a tenant, under a contract that the audit log has, and for a
number of days, after which a record deletes itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, RowMapping, Select, delete, func, insert, select, update

from tunewright.core.errors import UserError
from tunewright.core.workers import slices
from tunewright.serving.tenants.audit import Audited
from tunewright.serving.tenants.database import iso
from tunewright.serving.tenants.feedback import FeedbackValues
from tunewright.serving.tenants.record_keys import KeyFile, RecordKeys
from tunewright.serving.tenants.tables import (
    feedback,
    recordings,
    releases,
    request_records,
    requests,
    shadow_answers,
    shadow_judgements,
    shadow_units,
    shadow_verdicts,
    tenants,
)
from tunewright.serving.tenants.tenants import find_tenant

DAY_SECONDS = 86_400
_AT_ONCE = 500
"""Rows of one statement: databases limit its parameters."""

UnitKind = Literal["user", "conversation", "request"]
"""The requests of one end user, of conversations with the same beginning, or one request."""


@dataclass(frozen=True)
class Recording:
    """The recording of a tenant's requests."""

    tenant: str
    contract: str
    """The reference of the contract that permits it."""
    days: int
    """Days until a record deletes itself."""
    share: float
    """The share of the units that are recorded, each with all of its requests."""
    key_id: str
    """The id of the key file."""
    started: str
    stopped: str | None
    records: int
    units: dict[UnitKind, int]
    """Recorded units by kind."""
    dropped: int
    """Requests that could not be recorded, and are missing."""
    oldest: str | None
    """The time of the oldest recorded request."""


@dataclass(frozen=True)
class NewRecord:
    """The record of a request, to be stored."""

    request: int
    unit: str
    unit_kind: UnitKind
    subject: str | None
    probability: float
    body: bytes
    """Encrypted."""


@dataclass(frozen=True)
class RequestRecord:
    """A recorded request."""

    id: str
    """The response's id."""
    time: str
    expires: str
    alias: str
    release: int
    digest: str
    """The adapter's."""
    unit: str
    unit_kind: UnitKind
    subject: str | None
    """The keyed digest of the end user."""
    probability: float
    """The probability with which its unit was sampled."""
    path: str
    request: dict[str, Any]
    """The body that was sent, without labels of the end user."""
    answers: list[dict[str, Any]]
    redacted: dict[str, int]
    """Secrets and personal data that placeholders replace, by kind."""
    outcome: str | None
    """None while the answer is in progress."""
    prompt_tokens: int | None
    completion_tokens: int | None
    queued_s: float | None
    first_token_s: float | None
    total_s: float | None
    feedback: FeedbackValues | None


@dataclass(frozen=True)
class ForgetResult:
    """Counts of deleted data."""

    requests: int
    """Requests of which only the usage is left."""
    records: int
    feedback: int
    shadow_answers: int
    digest: str | None
    """The keyed digest of the end user or the request in the audit log; None without the key file."""
    scrubbed: bool
    """False: SQLite's log still contains deleted text, because others read from it."""


class Records(Audited):
    """Recordings and records in the state."""

    def start(self, tenant: str, contract: str, days: int, share: float, file: KeyFile) -> Recording:
        """Record a tenant's requests from the next one on, or change the terms for further requests.

        Raises:
            UserError: the tenant does not exist, the contract has no reference, or the key file is not right.
        """
        if not contract.strip():
            fix = "Name the contract that permits it, such as DPA-2026-17."
            raise UserError("The reference of the contract is empty", where="--contract", fix=fix)
        with self._changing() as change:
            row = find_tenant(change.connection, tenant)
            own = recordings.c.tenant_id == row.id
            known = change.connection.execute(select(recordings.c.key_id).where(own)).scalar()
            needed = select(recordings.c.key_id).outerjoin(
                request_records, request_records.c.tenant_id == recordings.c.tenant_id
            )
            needed = needed.where(recordings.c.stopped.is_(None) | request_records.c.request_id.is_not(None))
            # A new key in place of a lost one would hide that the records before it cannot be read.
            if change.connection.execute(needed.limit(1)).first() is None:
                file.create()
            has_records = select(request_records.c.request_id).where(request_records.c.tenant_id == row.id).limit(1)
            bound = change.connection.execute(has_records).first() is not None
            keys = file.keys(tenant, known if bound else None)
            terms = {"contract": contract.strip(), "days": days, "share": share, "key_id": keys.id}
            values = {**terms, "started": change.now, "stopped": None}
            if known is None:
                change.connection.execute(insert(recordings).values(tenant_id=row.id, dropped=0, **values))
            else:
                change.connection.execute(update(recordings).where(own).values(**values))
            change.log("record.start", tenant, **terms)
            return _recording(change.connection, row)

    def stop(self, tenant: str) -> Recording:
        """Record no further request of a tenant; what is recorded stays until its retention ends.

        Raises:
            UserError: the tenant does not exist or is not recorded.
        """
        with self._changing() as change:
            row = find_tenant(change.connection, tenant)
            active = recordings.c.tenant_id == row.id, recordings.c.stopped.is_(None)
            if not change.connection.execute(update(recordings).where(*active).values(stopped=change.now)).rowcount:
                raise UserError(f"{tenant} is not recorded")
            change.log("record.stop", tenant)
            return _recording(change.connection, row)

    def list(self, tenant: str | None = None) -> Sequence[Recording]:
        """Return the recording of a tenant (None: of all tenants) that is or was recorded.

        Raises:
            UserError: the tenant does not exist.
        """
        recorded = select(tenants).join(recordings).order_by(tenants.c.name)
        with self._database.reading() as connection:
            if tenant is not None:
                recorded = recorded.where(tenants.c.id == find_tenant(connection, tenant).id)
            return [_recording(connection, row) for row in connection.execute(recorded).all()]

    def require_keys(self, file: KeyFile) -> None:
        """Check that a server with this key file can record all tenants that are recorded.

        Raises:
            UserError: the file is missing or not the right one.
        """
        for each in self.list():
            if each.stopped is None:
                file.keys(each.tenant, each.key_id)

    def write(self, new: Iterable[NewRecord], dropped: Mapping[int, int]) -> int:
        """Store records, add numbers of dropped ones by tenant, and return how many records were stored.

        The others belong to requests that were forgotten meanwhile, or to tenants that are not recorded any more.
        """
        written = 0
        with self._database.writing() as connection:
            # In order, as `forget` locks requests: PostgreSQL would end one of two writers that wait for each other.
            for record in sorted(new, key=lambda each: each.request):
                asked = select(requests.c.tenant_id, requests.c.started, recordings.c.days).select_from(requests)
                asked = asked.join(recordings, recordings.c.tenant_id == requests.c.tenant_id)
                asked = asked.where(requests.c.id == record.request, requests.c.response_id.is_not(None))
                asked = asked.where(recordings.c.stopped.is_(None)).with_for_update(of=requests)
                row = connection.execute(asked).first()
                if row is not None:
                    values = {name: value for name, value in asdict(record).items() if name != "request"}
                    values |= {"tenant_id": row.tenant_id, "expires": row.started + row.days * DAY_SECONDS}
                    connection.execute(insert(request_records).values(request_id=record.request, **values))
                    written += 1
            for tenant_id, count in dropped.items():
                own = recordings.c.tenant_id == tenant_id
                connection.execute(update(recordings).where(own).values(dropped=recordings.c.dropped + count))
        return written

    def read(self, tenant: str, file: KeyFile) -> Sequence[RequestRecord]:
        """Return the decrypted records of a tenant, the oldest first; the audit log says who read how many.

        Records whose days are over are left out, also before a server has deleted them.

        Raises:
            UserError: the tenant does not exist, the key file is not right, or a record was changed.
        """
        found = []
        with self._changing() as change:
            row = find_tenant(change.connection, tenant)
            current = _records(row.id).where(request_records.c.expires > change.now)
            rows = change.connection.execute(current).mappings().all()
            if rows:
                keys = file.keys(tenant, rows[0]["key_id"])
                found = [_record(each, keys) for each in rows]
            change.log("record.read", tenant, records=len(found))
        return found

    def forget(
        self, tenant: str, file: KeyFile, *, user: str | None = None, response_id: str | None = None
    ) -> ForgetResult:
        """Delete what is stored of an end user's requests, of one request, or (neither) of all of a tenant's.

        Deleted are records, feedback, shadows' answers and labels of end users; the usage stays. What is still on its
        way to the state, such as the record of an answer in progress, is dropped when it arrives. The audit log has the
        keyed digest of the end user, if the key file is there.

        Raises:
            UserError: the tenant does not exist.
        """
        counts = dict.fromkeys(("requests", "records", "feedback", "shadow_answers"), 0)
        tables = {"records": request_records, "feedback": feedback, "shadow_answers": shadow_answers}
        with self._changing() as change:
            row = find_tenant(change.connection, tenant)
            of = select(requests.c.id).where(requests.c.tenant_id == row.id).order_by(requests.c.id)
            if user is not None:
                of = of.where(requests.c.end_user == user)
            elif response_id is not None:
                of = of.where(requests.c.response_id == response_id)
            numbers = change.connection.execute(of.with_for_update()).scalars().all()
            forgotten = set[str]()
            for some in slices(numbers, _AT_ONCE):
                nameless = {"end_user": None, "response_id": None}
                same = update(requests).where(requests.c.id.in_(some)).values(**nameless)
                counts["requests"] += change.connection.execute(same).rowcount
                if response_id is None:  # a unit keeps its name while only one of its requests is deleted
                    units = select(request_records.c.unit).where(request_records.c.request_id.in_(some))
                    forgotten.update(change.connection.execute(units).scalars())
                for said in (shadow_verdicts, shadow_judgements):
                    change.connection.execute(delete(said).where(said.c.request_id.in_(some)))
                for name, table in tables.items():
                    deleted = delete(table).where(table.c.request_id.in_(some))
                    counts[name] += change.connection.execute(deleted).rowcount
            scope = "user" if user is not None else "tenant" if response_id is None else "request"
            tombstone = None
            if (asked := user or response_id) is not None:
                with suppress(UserError):  # without the right file, deletion must still be possible
                    tombstone = file.keys(tenant).digest(scope, asked)
                    forgotten.add(tombstone)  # the unit of a user whose records have expired
            nameless_units = update(shadow_units).where(shadow_units.c.tenant_id == row.id).values(unit=None)
            if scope == "tenant":
                change.connection.execute(nameless_units)
            for some_units in slices(sorted(forgotten), _AT_ONCE):
                change.connection.execute(nameless_units.where(shadow_units.c.unit.in_(some_units)))
            change.log("record.forget", tenant, scope=scope, tombstone=tombstone, **counts)
        return ForgetResult(**counts, digest=tombstone, scrubbed=self._database.scrub())


def unit_of(
    keys: RecordKeys, end_user: str | None, beginning: Sequence[Sequence[str]], response_id: str
) -> tuple[str, UnitKind, str | None]:
    """Return a request's unit, the unit's kind, and its subject.

    Args:
        beginning: the role and text of each message up to the first user message.
    """
    if end_user is not None:
        unit = keys.digest("user", end_user)
        return unit, "user", unit
    if beginning and beginning[-1][0] == "user":
        return keys.digest("conversation", *(text for message in beginning for text in message)), "conversation", None
    return keys.digest("request", response_id), "request", None


def is_sampled(unit: str, share: float) -> bool:
    """Return whether all requests of a unit are recorded, or none; a larger share includes all units of a smaller."""
    return int(unit[:16], 16) < share * 2**64


def _recording(connection: Connection, tenant: Row[Any]) -> Recording:
    row = connection.execute(select(recordings).where(recordings.c.tenant_id == tenant.id)).one()
    own = request_records.c.tenant_id == tenant.id
    kinds = select(request_records.c.unit_kind, func.count(request_records.c.unit.distinct()), func.count())
    counted = connection.execute(kinds.where(own).group_by(request_records.c.unit_kind)).all()
    first = select(func.min(requests.c.started)).join(request_records, request_records.c.request_id == requests.c.id)
    return Recording(
        tenant=tenant.name,
        contract=row.contract,
        days=row.days,
        share=row.share,
        key_id=row.key_id,
        started=str(iso(row.started)),
        stopped=iso(row.stopped),
        records=sum(count for _, _, count in counted),
        units={kind: units for kind, units, _ in sorted(counted)},
        dropped=row.dropped,
        oldest=iso(connection.execute(first.where(own)).scalar()),
    )


def _records(tenant_id: int) -> Select[Any]:
    usage = ("outcome", "prompt_tokens", "completion_tokens", "queued_s", "first_token_s", "total_s")
    query = select(
        request_records,
        requests.c.response_id.label("id"),
        requests.c.started.label("time"),
        requests.c.alias,
        requests.c.digest,
        releases.c.number.label("release"),
        recordings.c.key_id,
        feedback.c.request_id.label("has_feedback"),
        *(requests.c[name] for name in usage),
        *(feedback.c[name] for name in FeedbackValues.__dataclass_fields__),
    )
    query = query.select_from(request_records).join(requests, request_records.c.request_id == requests.c.id)
    query = query.join(releases, requests.c.release_id == releases.c.id)
    query = query.join(recordings, recordings.c.tenant_id == request_records.c.tenant_id)
    query = query.outerjoin(feedback, feedback.c.request_id == requests.c.id)
    return query.where(request_records.c.tenant_id == tenant_id).order_by(requests.c.id)


def _record(row: RowMapping, keys: RecordKeys) -> RequestRecord:
    opinion = None
    if row["has_feedback"] is not None:
        opinion = FeedbackValues(**{name: row[name] for name in FeedbackValues.__dataclass_fields__})
    same = {name: row[name] for name in RequestRecord.__dataclass_fields__ if name in row}
    same |= {"time": str(iso(row["time"])), "expires": str(iso(row["expires"])), "feedback": opinion}
    return RequestRecord(**same, **keys.decrypt(row["body"], row["request_id"]))


def recording_terms(each: Recording) -> dict[str, Any]:
    """Return the part of a recording that the audit log has."""
    terms = {name: getattr(each, name) for name in ("contract", "days", "share", "key_id")}
    return {**terms, "stopped": each.stopped is not None}
